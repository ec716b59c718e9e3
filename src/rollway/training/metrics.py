"""What is measured at each optimiser step, as the metrics files hold it."""

import math
from typing import Any, NamedTuple

from torch import Tensor

from rollway.objectives import TokenBatch
from rollway.objectives.corrections import effective_sample_size
from rollway.objectives.kl import k3
from rollway.training.gradients import Gathered
from rollway.training.precompute import Round


class Metric(NamedTuple):
    """One number. `step`: optimiser steps done since the warm-up, the one it is measured at included."""

    step: int
    name: str
    value: float

    def row(self) -> dict[str, Any]:
        """The JSON form; what is not finite (a ratio of nothing) is null."""
        return {"step": self.step, "name": self.name, "value": self.value if math.isfinite(self.value) else None}


def step_metrics(step: int, tokens: TokenBatch, got: Gathered, norms: dict[str, float], lr: float) -> list[Metric]:
    """Of one step, over its valid tokens, with the policy as it was before the step. KL in nats per token, by k3.

    `kl_old` is KL(old || current), `kl_reference` KL(current || reference): the first is what samples of the old policy
    estimate without bias.
    """
    assert tokens.logp_old is not None
    mask = tokens.mask
    new, old = got.logp[mask], tokens.logp_old[mask]
    found = {f"{name}": value for name, value in got.metrics.items()}
    found |= {f"grad_norm{'' if name == 'policy' else '_' + name}": norm for name, norm in norms.items()}
    found |= {
        "lr": lr,
        "tokens": float(mask.sum()),
        "kl_old": _mean(k3(old, new)),
        "logp": _mean(new),
    }
    if tokens.logp_ref is not None:
        found["kl_reference"] = _mean(k3(new, tokens.logp_ref[mask]))
    return [Metric(step, name, value) for name, value in found.items()]


def engine_gap(step: int, fixed: Round) -> list[Metric]:
    """Once a round, before its first step: entropy, and how far the engine's log-probs are from the trainer's.

    `gap_*`: |behaviour - old| in nats; `ess`: (sum w)^2 / (n sum w^2) of w = exp(old - behaviour), over the
    tokens whose behaviour log-prob is known.
    """
    tokens = fixed.tokens
    out = []
    if tokens.entropy is not None:
        out.append(Metric(step, "entropy_old", _mean(tokens.entropy[tokens.mask])))
    known = tokens.mask & fixed.behaviour.isfinite()
    assert tokens.logp_old is not None
    difference = (tokens.logp_old - fixed.behaviour)[known].double()
    if difference.numel():
        weight = difference.clamp(-20, 20).exp()
        out += [
            Metric(step, "gap_mean", float(difference.abs().mean())),
            Metric(step, "gap_max", float(difference.abs().max())),
            Metric(step, "ess", float(effective_sample_size(weight))),
        ]
    return out


def _mean(x: Tensor) -> float:
    return float(x.double().mean()) if x.numel() else math.nan
