"""Steps that must not be taken: which ones, and what their rows look like."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rollway.config.objectives import Objective
from rollway.config.training import Guard
from rollway.errors import RollwayError
from rollway.objectives import TokenBatch
from rollway.objectives.kl import k3
from rollway.training.batch import TrainingRow
from rollway.training.gradients import Gathered, Models, accumulate
from rollway.training.state import TrainState

KNOWN = 8
"""Losses that must be known before one can be called a spike."""
LEAST_SPREAD = 1e-3
"""Losses of policy gradients lie near 0 and may hardly differ at first: rounding is no spike."""


MOST_IN_A_ROW = 64
"""Steps left out one after the other, over rounds, after which training stops: it would go on for ever and learn
nothing."""


class UpdateRefused(RollwayError):
    """A step that must not be taken. `figures`: what was wrong with it; `rows`: what `inspect` says of its rows."""

    def __init__(self, message: str, figures: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        super().__init__(message)
        self.figures, self.rows = figures, rows


@dataclass(frozen=True)
class Objection:
    """What a guard has against a step."""

    what: str
    value: float
    limit: str
    bound: float | None = None
    """Of a loss: the nearest one that would not have been a spike."""
    lasts: bool = True
    """Whether the next steps, and rounds, may meet the same: not so of the KL from a round's own old policy."""

    def __str__(self) -> str:
        return f"the {self.what} is {self.value:.4g}, {self.limit}"


def objection(guard: Guard, losses: Sequence[float], tokens: TokenBatch, got: Gathered) -> Objection | None:
    """What speaks against the step whose gradients were gathered, if anything. losses: of the steps before it.

    KL in nats per token over the valid tokens, by k3, of the policy as it is before the step.
    """
    loss = got.metrics["loss"]
    if guard.loss_spike is not None and len(losses) >= KNOWN:
        known = np.asarray(losses[-guard.window :])
        mean, spread = float(known.mean()), max(LEAST_SPREAD, float(known.std(ddof=1)))
        if abs(loss - mean) > guard.loss_spike * spread:
            return Objection(
                "loss",
                loss,
                f"further than guard.loss_spike {guard.loss_spike:g} x {spread:.3g} from the mean {mean:.4g} of the "
                f"{len(known)} steps before",
                mean + math.copysign(guard.loss_spike * spread, loss - mean),
            )
    new = got.logp[tokens.mask]
    if guard.kl is not None and tokens.logp_old is not None:
        value = float(k3(tokens.logp_old[tokens.mask], new).double().mean())
        if value > guard.kl:
            return Objection("KL from the old policy", value, f"above guard.kl {guard.kl:g}", lasts=False)
    if guard.kl_reference is not None and tokens.logp_ref is not None:
        value = float(k3(new, tokens.logp_ref[tokens.mask]).double().mean())
        if value > guard.kl_reference:
            return Objection("KL to the reference", value, f"above guard.kl_reference {guard.kl_reference:g}")
    return None


def left_out(guard: Guard, state: TrainState, refused: Objection) -> TrainState:
    """The state after a step that was left out: its loss is one of those that later ones are compared with, cut to the
    bound, to twice as far from the mean where the step before it was left out too, four times after two, and so on.

    So one spike widens the bound little, and a loss that stays where it leapt to is none once it is the loss of about
    window / (1 + loss_spike^2) steps: more of n numbers lie no further from their mean than that.
    """
    losses = state.losses
    if guard.loss_spike is not None and refused.bound is not None:
        mean = float(np.mean(losses[-guard.window :]))
        further = mean + (refused.bound - mean) * 2.0 ** min(state.skipped, MOST_IN_A_ROW)
        nearest = min if refused.value > mean else max
        losses = (*losses, nearest(refused.value, further if state.skipped else refused.bound))[-guard.window :]
    return replace(state, losses=losses, skipped=state.skipped + refused.lasts)


def inspect(
    models: Models, rows: Sequence[TrainingRow], tokens: TokenBatch, objective: Objective, state: dict[str, Tensor]
) -> list[dict[str, Any]]:
    """Of each row of a step: where it comes from, `loss` (the sum of its tokens' losses, before denominators),
    `gradient_norm` (of its own part of the gradient, over policy and critic), and `logp_least` of its tokens.

    What is not finite comes first, then the largest gradients. Every row has a pass of its own; gradients are cleared.
    """
    trained: list[nn.Module] = [models.policy] if models.critic is None else [models.policy, models.critic]
    parameters = [p for model in trained for p in model.parameters() if p.requires_grad]
    found: dict[int, tuple[float, float]] = {}

    def clear() -> float:
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = float(nn.utils.get_total_norm(gradients)) if gradients else 0.0
        for parameter in parameters:
            parameter.grad = None
        return norm

    def watch(at: Tensor, token_loss: Tensor) -> None:
        norm = clear()
        for place, losses in zip(at.tolist(), token_loss, strict=True):
            found[place] = float(losses.double().sum()), norm

    clear()
    with torch.enable_grad():
        got = accumulate(replace(models, micro_tokens=1), rows, tokens, objective, state, watch)
    said = [
        {
            "rollout_id": row.rollout_id,
            "slot": row.slot,
            "source": row.source,
            "age": row.age,
            "tokens": len(row.tokens),
            "advantage": row.advantage,
            "weight": row.weight,
            "loss": found[n][0],
            "gradient_norm": found[n][1],
            "logp_least": float(got.logp[n, : len(row.tokens)].min()) if len(row.tokens) else 0.0,
        }
        for n, row in enumerate(rows)
    ]
    return sorted(said, key=worst_first)


def worst_first(row: dict[str, Any]) -> tuple[bool, float]:
    """What rows are sorted by: those with a figure that is not finite first, then by the norm of their gradients."""
    whole = all(math.isfinite(value) for value in row.values() if isinstance(value, float))
    return whole, -row["gradient_norm"] if whole else 0.0
