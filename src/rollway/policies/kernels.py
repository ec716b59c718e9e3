"""Fused kernels for the layers of a model: norms, gated feed-forward blocks, rotary positions, from `liger-kernel`.

The output layer stays ours: liger's fused cross-entropy takes the gradient of a plain sum in its forward pass, and an
objective weighs every token in its own way.
"""

from __future__ import annotations

import inspect
from importlib.util import find_spec
from typing import TYPE_CHECKING

from rollway.errors import RollwayError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_OUTPUT_LAYER = ("cross_entropy", "fused_linear_cross_entropy")


def use_liger(model: PreTrainedModel) -> None:
    """Replaces the layers of `model` in place; weights and results stay (up to rounding).

    Raises RollwayError where there is no GPU, no liger-kernel, or none for the architecture.
    """
    if model.device.type != "cuda":
        raise RollwayError(
            "train.kernels liger: needs a CUDA GPU, and this job runs on the CPU; set train.kernels: torch"
        )
    apply_liger(model)


def apply_liger(model: PreTrainedModel) -> None:
    """`use_liger`, wherever Triton runs."""
    if find_spec("liger_kernel") is None:
        raise RollwayError(
            "train.kernels liger: the package liger-kernel is not installed; "
            "install it (`pip install 'rollway[gpu]'`), or set train.kernels: torch"
        )
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    kind = model.config.get_text_config().model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise RollwayError(
            f"train.kernels liger: liger-kernel has none for {kind} models; set train.kernels: torch. "
            f"It has them for {', '.join(sorted(MODEL_TYPE_TO_APPLY_LIGER_FN))}"
        )
    apply = MODEL_TYPE_TO_APPLY_LIGER_FN[kind]
    known = inspect.signature(apply).parameters
    apply(model=model, **{name: False for name in _OUTPUT_LAYER if name in known})
