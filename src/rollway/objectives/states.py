"""What an objective remembers from one update to the next: tensors that go into the checkpoint."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from rollway.config.objectives import AdamDirection, AscentDual, CurvatureTrust, Objective, TargetEntropy, VarianceGate
from rollway.errors import RollwayError
from rollway.objectives.curvature import Moments, next_moments
from rollway.objectives.mixing import target_temperature

State = dict[str, Tensor]


def initial_state(objective: Objective) -> State:
    """State before the first update; empty for most objectives.

    variance/lam [versions]: dual variables that ascend; mixing/entropy []: last entropy; curvature/{ids [J], first,
    second [J, H], steps []}: moments, J and H 0 until a step was taken.
    """
    state: State = {}
    if isinstance(objective.gate, VarianceGate) and isinstance(objective.gate.dual, AscentDual):
        state["variance/lam"] = torch.full((objective.gate.dual.versions,), objective.gate.lam, dtype=torch.float64)
    if isinstance(objective.mixing, TargetEntropy):
        state["mixing/entropy"] = torch.zeros((), dtype=torch.float64)
    if isinstance(objective.select, CurvatureTrust) and isinstance(objective.select.direction, AdamDirection):
        state["curvature/ids"] = torch.zeros(0, dtype=torch.int64)
        state["curvature/first"] = torch.zeros(0, 0)
        state["curvature/second"] = torch.zeros(0, 0)
        state["curvature/steps"] = torch.zeros((), dtype=torch.int64)
    return state


def remembered(objective: Objective, stored: Mapping[str, Tensor]) -> State:
    """The state of a checkpoint, and the initial one where it holds none.

    What parts left behind that the objective no longer has is dropped, so that they start anew if they come back.
    Raises RollwayError when the number of dual variables was changed on the way.
    """
    start = initial_state(objective)
    state = {name: stored.get(name, first) for name, first in start.items()}
    if "variance/lam" in start and state["variance/lam"].shape != start["variance/lam"].shape:
        raise RollwayError(
            f"train.objective.gate.dual.versions asks for {len(start['variance/lam'])} dual variables, and the "
            f"checkpoint holds {len(state['variance/lam'])}: keep the number of the rounds before"
        )
    return state


def state_metrics(objective: Objective, state: State) -> dict[str, float]:
    """What the coming step goes by, for the metrics: dual variables, last entropy (nats), target temperature."""
    out: dict[str, float] = {}
    if isinstance(objective.gate, VarianceGate):
        lam = penalty_weights(objective.gate, state).tolist()
        names = ["variance/lam"] if len(lam) == 1 else [f"variance/lam_{age}" for age in range(len(lam))]
        out |= dict(zip(names, lam, strict=True))
    temperature = dcpo_temperature(objective, state)
    if temperature is not None:
        out |= {"mixing/last_entropy": float(state["mixing/entropy"]), "mixing/temperature": temperature}
    return out


def state_cadence(objective: Objective) -> Literal["none", "update", "round"]:
    """How often `next_state` is due: never, after each step, or once a round with the partials of all its steps."""
    if isinstance(objective.mixing, TargetEntropy):
        return "round"
    if isinstance(objective.gate, VarianceGate):
        return objective.gate.dual.every if isinstance(objective.gate.dual, AscentDual) else "none"
    return "update" if "curvature/ids" in initial_state(objective) else "none"


def next_state(objective: Objective, state: State, partials: dict[str, Tensor]) -> State:
    """State after a step whose micro-batches' `partials` add up to these. Without tokens only step counts change."""
    new = dict(state)
    if isinstance(objective.gate, VarianceGate) and isinstance(objective.gate.dual, AscentDual):
        dual, lam = objective.gate.dual, state["variance/lam"]
        count = partials["variance/tokens"].to(lam)
        variance = partials["variance/sum"].to(lam) / count.clamp(min=torch.finfo(lam.dtype).tiny)
        moved = (lam + dual.eta * (variance - dual.delta)).clamp(0.0, dual.lam_max)
        new["variance/lam"] = torch.where(count > 0, moved, lam)
    if isinstance(objective.mixing, TargetEntropy):
        last = state["mixing/entropy"]
        count = partials["mixing/tokens"].to(last)
        new["mixing/entropy"] = torch.where(count > 0, -partials["mixing/logp"].to(last) / count.clamp(min=1), last)
    moments = curvature_moments(objective, state)
    if moments is not None:
        after = next_moments(moments, partials["curvature/sum"], partials["curvature/count"])
        new["curvature/ids"], new["curvature/first"], new["curvature/second"] = after.ids, after.first, after.second
        new["curvature/steps"] = torch.tensor(after.steps, dtype=torch.int64)
    return new


def penalty_weights(gate: VarianceGate, state: State) -> Tensor:
    """lam, float64 [versions]: the dual variables, or the fixed weight, which the objective alone decides."""
    if isinstance(gate.dual, AscentDual):
        return state["variance/lam"]
    return torch.full((1,), gate.lam, dtype=torch.float64)


def curvature_moments(objective: Objective, state: State) -> Moments | None:
    """The moments of CAPO's Adam direction; None for objectives without."""
    if not isinstance(objective.select, CurvatureTrust) or not isinstance(objective.select.direction, AdamDirection):
        return None
    adam = objective.select.direction
    return Moments(
        state["curvature/ids"],
        state["curvature/first"],
        state["curvature/second"],
        int(state["curvature/steps"]),
        adam.beta1,
        adam.beta2,
        adam.eps,
    )


def dcpo_temperature(objective: Objective, state: State) -> float | None:
    """Temperature of the second pass that fills `logp_old_temp` (DCPO, eq. 1); None for objectives without one."""
    mixing = objective.mixing
    if not isinstance(mixing, TargetEntropy):
        return None
    return target_temperature(float(state["mixing/entropy"]), mixing.entropy, mixing.hot, mixing.cold)
