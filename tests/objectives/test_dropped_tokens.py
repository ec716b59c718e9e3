"""A token that a part of the objective drops moves nothing, or the combination is refused (D3S under GSPO apart)."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from rollway.config.objectives import Objective
from rollway.objectives import TokenBatch, loss

N, T = 6, 5
RATIOS = ("none", "token", "sequence", "sequence_token", "fibre", "fibre_domain", "total_variation")
GATES = ("none", "clip", "dual_clip", "soft", "cispo", "variance")
DROPPING: dict[str, dict[str, Any]] = {
    "entropy_top": {"select": {"kind": "entropy_top", "share": 0.4}},
    "mis": {"correction": {"kind": "mis", "level": "token", "cap": 1.0}},
}


def batch() -> TokenBatch:
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    logp = 0.05 * normal(N, T) - 1
    return TokenBatch(
        logp=logp.clone().requires_grad_(),
        mask=torch.ones(N, T, dtype=torch.bool),
        advantage=normal(N),
        logp_old=logp + 0.02 * normal(N, T),
        logp_behavior=logp + 0.3 * normal(N, T),
        entropy=torch.rand(N, T, generator=rng, dtype=torch.float64),
        domain=torch.tensor([0, 0, 1, 1, 1, 1]),
        group=torch.tensor([0, 0, 1, 1, 2, 2]),
        age=torch.zeros(N, dtype=torch.long),
    )


def largest_on_dropped(objective: Objective, how: str) -> float:
    b = batch()
    result = loss(b, objective)
    (slope,) = torch.autograd.grad(result.loss, b.logp)
    assert b.logp_old is not None
    assert b.logp_behavior is not None
    dropped = ~result.kept if how == "entropy_top" else (b.logp_old - b.logp_behavior).exp() > 1.0
    assert bool(dropped.any())
    assert bool(slope.any())
    return float(slope[dropped].abs().max())


def combinations() -> Iterator[tuple[str, str, str]]:
    for ratio in RATIOS:
        for gate in GATES:
            try:
                Objective.model_validate({"ratio": ratio, "gate": gate, "aggregate": "token_mean"})
            except ValidationError:
                continue
            for how in DROPPING:
                yield ratio, gate, how


@pytest.mark.parametrize(("ratio", "gate", "how"), sorted(combinations()))
def test_what_is_dropped_moves_nothing_or_is_refused(ratio: str, gate: str, how: str) -> None:
    parts = {"ratio": ratio, "gate": gate, "aggregate": "token_mean"}
    if ratio == "sequence" and gate != "cispo":
        with pytest.raises(ValidationError, match="acts on single tokens, and ratio sequence is one number"):
            Objective.model_validate(parts | DROPPING[how])
        refused = Objective.model_validate(parts).model_copy(update=_parsed(how))
        assert largest_on_dropped(refused, how) > 1e-3
    else:
        assert largest_on_dropped(Objective.model_validate(parts | DROPPING[how]), how) == 0.0


def _parsed(how: str) -> dict[str, Any]:
    whole = Objective.model_validate({"ratio": "token", "gate": "clip", "aggregate": "token_mean"} | DROPPING[how])
    return {name: getattr(whole, name) for name in DROPPING[how]}
