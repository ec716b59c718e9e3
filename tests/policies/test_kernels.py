"""liger-kernel: refused in a sentence where it cannot run, equal to torch's layers where it can."""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

import numpy as np
import pytest
import torch

from policies.architectures import VOCABULARY, tiny_model
from rollway.errors import RollwayError
from rollway.policies.kernels import apply_liger, use_liger
from rollway.policies.logprobs import Row, forward_logprobs

NAMES = ["qwen3", "llama", "mistral", "gemma2", "gemma3"]


def test_without_a_gpu_it_is_refused() -> None:
    with pytest.raises(
        RollwayError, match=r"needs a CUDA GPU, and this job runs on the CPU; set train\.kernels: torch"
    ):
        use_liger(tiny_model("qwen3"))


def test_without_the_package_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollway.policies.kernels.find_spec", lambda name: None)
    with pytest.raises(
        RollwayError, match=r"liger-kernel is not installed; install it \(`pip install 'rollway\[gpu\]'"
    ):
        apply_liger(tiny_model("qwen3"))


def test_an_architecture_without_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("liger_kernel.transformers.monkey_patch")
    module.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None, "qwen3": None}
    for name in ("liger_kernel", "liger_kernel.transformers", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("rollway.policies.kernels.find_spec", lambda name: ModuleSpec(name, None))
    with pytest.raises(
        RollwayError, match=r"none for gpt2 models; set train\.kernels: torch\. It has them for llama, qwen3"
    ):
        apply_liger(tiny_model("gpt2"))


@pytest.mark.gpu
@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="liger-kernel is not installed (extra `gpu`)")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_of_liger_equal_those_of_torch(name: str, dtype: torch.dtype) -> None:
    compare(name, dtype, "cuda", 1e-4 if dtype == torch.float32 else 0.1)


def compare(name: str, dtype: torch.dtype, device: str, bar: float) -> None:
    """Log-probs, entropies and gradients, by their relative distance."""
    rng = np.random.default_rng(0)
    rows = [Row(rng.integers(0, VOCABULARY, 3).tolist(), rng.integers(0, VOCABULARY, n).tolist()) for n in (4, 7, 9)]
    found = []
    for liger in (False, True):
        model = tiny_model(name, "eager", dtype).to(device)
        if liger:
            apply_liger(model)
        seen = forward_logprobs(model, rows, temperature=0.8, entropy=True)
        (seen.logp + 0.1 * seen.entropy).sum().backward()
        slopes = [p.grad.float() for p in model.parameters() if p.grad is not None]
        found.append([seen.logp.detach(), seen.entropy.detach(), *slopes])
    for mine, theirs in zip(*found, strict=True):
        assert (mine - theirs).norm() <= bar * theirs.norm()
