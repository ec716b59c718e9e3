"""What a pass keeps in memory, and what is said when that is too much."""

from pathlib import Path

import pytest
import torch

from rollway.config import load_recipe
from rollway.config.policies import HuggingFacePolicy, ScratchPolicy
from rollway.errors import RollwayError
from rollway.policies import causal_lm, manifest
from rollway.policies.logprobs import forward_logprobs
from rollway.training.memory import names_micro_tokens
from rollway.training.state import TrainState
from rollway.training.update import update
from training.tiny import gradients, largest_difference, random_batch


def saved_bytes(model: torch.nn.Module, batch: list) -> int:
    """Bytes that a forward pass keeps for its backward pass; takes the gradient of the summed log-probs."""
    held: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    model.zero_grad(set_to_none=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        total = forward_logprobs(model, batch, temperature=1.0).logp.sum()
    total.backward()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(size for place, size in held.items() if place not in weights)


def test_gradient_checkpointing_keeps_less_and_changes_no_gradient(tmp_path: Path) -> None:
    """As a run does it: `policy.gradient_checkpointing` goes through policy.json to the train stage's model."""
    made = causal_lm.build(ScratchPolicy(layers=6, hidden=32, heads=2, kv_heads=1, intermediate=64), [], 0, "cpu")
    causal_lm.save_model(tmp_path / "base", made.model)
    causal_lm.save_tokenizer(tmp_path / "base", made.tokenizer)
    rows = random_batch(8, length=40).rows
    found = []
    for number, checkpointing in enumerate((False, True)):
        config = HuggingFacePolicy(name=str(tmp_path / "base"), gradient_checkpointing=checkpointing)
        folder = tmp_path / f"r{number}"
        named = causal_lm.save(folder, causal_lm.build(config, [], 0, "cpu"))
        manifest.write_manifest(folder / "policy.json", manifest.PolicyManifest("causal-lm", {"main": named}))
        model = causal_lm.load(folder / "policy.json", train=True, device="cpu").model
        found.append((saved_bytes(model, rows), gradients(model)))
    assert found[1][0] < 0.35 * found[0][0]
    assert largest_difference(found[0][1], found[1][1]) < 1e-5 * max(float(g.abs().max()) for g in found[0][1])


def small() -> torch.nn.Module:
    config = ScratchPolicy(layers=1, hidden=16, heads=2, kv_heads=1, intermediate=16)
    return causal_lm.build(config, [], 0, "cpu").model.requires_grad_(True)


def test_an_allocation_that_fails_names_micro_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own error for 2^50 bytes, out of the middle of an update."""
    model, train = small(), load_recipe("grpo").train
    monkeypatch.setattr(model.get_decoder().norm, "forward", lambda x: torch.empty(2**48))
    with (
        pytest.raises(RollwayError, match=r"Lower train\.micro_tokens \(now 16384.*tried to allocate") as caught,
        names_micro_tokens(train.micro_tokens, checkpointing=False),
    ):
        update(model, None, None, random_batch(4), train, TrainState(seed=0))
    # Policies from scratch have no such key.
    assert "gradient_checkpointing: true in a warm-up policy of kind huggingface" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_gpus_error_is_named_alike_and_others_are_left_alone() -> None:
    with (
        pytest.raises(RollwayError, match=r"Lower train\.micro_tokens \(now 99.*CUDA out of memory") as caught,
        names_micro_tokens(99, checkpointing=True),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation")
    assert "gradient_checkpointing" not in str(caught.value)
    with pytest.raises(RuntimeError, match="shapes"), names_micro_tokens(99, checkpointing=True):
        raise RuntimeError("shapes do not fit")
