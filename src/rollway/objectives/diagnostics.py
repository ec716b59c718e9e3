"""What is logged of a whole optimiser batch and does not add up over its parts: quantiles, means over subsets."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from rollway.config.objectives import Correction, FibreDomainRatio, FibreRatio, Objective, SoftGate
from rollway.objectives.batch import TokenBatch
from rollway.objectives.corrections import effective_sample_size
from rollway.objectives.fibre import channel_aggregates, clipped_residuals, domain_levels, gate_state, token_counts
from rollway.objectives.gates import clipped_tokens, soft_weight
from rollway.objectives.imitation import without_imitated
from rollway.objectives.policy import correction_of, expert_rows, ratio_of, spread_advantage
from rollway.objectives.ratios import log_ratio

GRPO_CLIP = 0.2
"""The clip that SAPO's gate is compared with (arXiv 2402.03300)."""


@torch.no_grad()
def whole_batch_metrics(batch: TokenBatch, objective: Objective) -> dict[str, float]:
    """Numbers of the soft gate, the fibre ratios and the correction over all valid tokens; {} for objectives without.

    batch: the whole optimiser batch with the current log-probs. What is a mean over nothing is left out. Rows of
    weight 0 are left out where the aggregation leaves them out.
    """
    mask = batch.mask.bool()
    if batch.weight is not None and objective.aggregate is not None and objective.aggregate.weights == "denominator":
        mask = mask & (batch.weight != 0)[:, None]
    batch = without_imitated(replace(batch, mask=mask).cleaned(), objective)
    mask = batch.mask
    found: dict[str, float] = {}
    if not bool(mask.any()):
        return found
    if isinstance(objective.gate, SoftGate):
        found |= _soft(batch, objective, objective.gate)
    if isinstance(objective.ratio, FibreRatio | FibreDomainRatio):
        found |= _fibre(batch, objective.ratio)
    if isinstance(objective.correction, Correction):
        found |= _correction(batch, objective, objective.correction)
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _soft(batch: TokenBatch, objective: Objective, gate: SoftGate) -> dict[str, float]:
    """SAPO (arXiv 2511.20347): its gradient weight w, and what GRPO would have clipped."""
    ratio = ratio_of(batch, objective, expert_rows(batch, objective))
    assert ratio is not None
    r = ratio[batch.mask]
    a = spread_advantage(batch)[batch.mask]
    w = soft_weight(r, a, gate.tau_pos, gate.tau_neg)
    return {
        "soft/weight_positive": _mean(w[a > 0]),
        "soft/weight_negative": _mean(w[a < 0]),
        "soft/weight_p01": float(w.kthvalue(math.ceil(0.01 * w.numel())).values),
        "soft/grpo_clip_share": _mean(clipped_tokens(r, a, GRPO_CLIP, GRPO_CLIP).to(w)),
    }


def _fibre(batch: TokenBatch, part: FibreRatio | FibreDomainRatio) -> dict[str, float]:
    """FiberPO (arXiv 2603.08239): s+ and s-, the ratio before its gates, and how many rows are in which regime."""
    assert batch.logp_old is not None
    mask, live = batch.mask, batch.mask.any(1)
    x = log_ratio(batch.logp, batch.logp_old)
    up, down = channel_aggregates(x, mask)
    clipped, tokens = clipped_residuals(x, mask, part.residual).sum(1)[live], mask.sum(1)[live]
    found = {
        "fibre/up": _mean(up[live]),
        "fibre/down": _mean(down[live]),
        "fibre/ratio_before": _mean(x.exp()[mask]),
        "fibre/clipped_share": float(clipped.sum()) / float(tokens.sum()),
        "fibre/rows_none_clipped": float((clipped == 0).sum()),
        "fibre/rows_some_clipped": float(((clipped > 0) & (clipped < tokens)).sum()),
        "fibre/rows_all_clipped": float((clipped == tokens).sum()),
    }
    if isinstance(part, FibreRatio):
        size = token_counts(mask, x)
        states = torch.stack([gate_state(up, part.up, size), gate_state(down, part.down, size)])[:, live]
        return found | _regimes(states)
    assert batch.domain is not None
    assert batch.group is not None
    levels = {"domain": part.domain, "group": part.group, "trajectory": part.trajectory}
    channels = {"up": domain_levels(up, mask, batch.domain, batch.group)}
    channels |= {"down": domain_levels(down, mask, batch.domain, batch.group)}
    for at, (level, budget) in enumerate(levels.items()):
        budgets = {"up": budget.up, "down": budget.down}
        states = torch.cat([gate_state(c[at].value, budgets[name], c[at].size) for name, c in channels.items()])
        for name, state in _STATES.items():
            found[f"fibre/{level}_gates_{name}"] = float((states == state).sum())
    return found


_STATES = {"passed": 0, "rolled_back": 1, "zeroed": 2}


def _regimes(states: Tensor) -> dict[str, float]:
    """Rows by the states [2, N] of their two gates (eq. 7): G-I passed, G-II one, G-III both; one of each kind."""
    rolled, zeroed = (states == 1).sum(0), (states == 2).sum(0)
    return {
        "fibre/rows_passed": float(((rolled + zeroed) == 0).sum()),
        "fibre/rows_one_rolled_back": float(((rolled == 1) & (zeroed == 0)).sum()),
        "fibre/rows_one_zeroed": float(((zeroed == 1) & (rolled == 0)).sum()),
        "fibre/rows_both_rolled_back": float((rolled == 2).sum()),
        "fibre/rows_both_zeroed": float((zeroed == 2).sum()),
        "fibre/rows_rolled_back_and_zeroed": float(((rolled == 1) & (zeroed == 1)).sum()),
    }


def _correction(batch: TokenBatch, objective: Objective, part: Correction) -> dict[str, float]:
    """Mean and effective sample size of the weights: one per token, or one per row at sequence level."""
    own = batch.mask & ~expert_rows(batch, objective)
    weights = correction_of(batch, part, own)
    if part.level == "sequence":
        live = own.any(1)
        kept = weights[live, own.int().argmax(1)[live]]
    else:
        kept = weights[own]
    return {"correction/mean": _mean(kept), "correction/ess": float(effective_sample_size(kept))} if len(kept) else {}


def _mean(x: Tensor) -> float:
    return float(x.double().mean()) if x.numel() else math.nan
