"""Loads a Qwen3 folder as this project writes it, without what `from_pretrained` does for all other models and formats.

That is most of the time to load a small policy, twice in every round.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from rollway.policies.manifest import NamedPolicy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS = "model.safetensors"


def load_qwen3(source: Path | str, spec: NamedPolicy) -> PreTrainedModel | None:
    """The model that `from_pretrained` gives, on the CPU.

    None where the folder is anything but untied whole weights of the wanted type in one file, with just the names and
    shapes of its config.json: then `from_pretrained` is asked, and says what is wrong if something is.
    """
    folder = Path(source)
    if not (folder / WEIGHTS).is_file() or not _plain(folder / "config.json"):
        return None
    import torch
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(folder)
    dtype = getattr(torch, spec.dtype)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=spec.attention, dtype=dtype)
    wanted = {name: (tensor.shape, dtype) for name, tensor in model.state_dict().items()}
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        # Slices own their memory, as those of `from_pretrained` do.
        tensors = {name: file.get_slice(name)[...] for name in file.keys()}  # noqa: SIM118
    if {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()} != wanted:
        return None
    model.load_state_dict(tensors, assign=True)
    # The one part that no file holds.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def _plain(file: Path) -> bool:
    """Whether a config.json is that of a Qwen3 with untied weights and no quantisation."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(config, dict) or config.get("architectures") != ["Qwen3ForCausalLM"]:
        return False
    return (
        config.get("model_type") == "qwen3"
        and not {"quantization_config", "auto_map"} & config.keys()
        and (config.get("tie_word_embeddings") is False)
    )
