"""The loss of each token, [N, T], from the parts an objective names; and what is worth logging about them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rollway.config.objectives import (
    ROUTES,
    AscentDual,
    CispoGate,
    ClipGate,
    Correction,
    DftGate,
    DualClipGate,
    FibreDomainRatio,
    FibreRatio,
    KlPenalty,
    NoGate,
    NoRatio,
    Objective,
    OneTokenGate,
    SequenceRatio,
    SequenceTokenRatio,
    SftGate,
    ShapedAnchors,
    SoftGate,
    TokenRatio,
    TotalVariationRatio,
    UnitAnchors,
    VarianceGate,
)
from rollway.objectives import gates
from rollway.objectives.anchors import shaped_anchor, unit_anchor
from rollway.objectives.batch import TokenBatch
from rollway.objectives.corrections import correction_weights
from rollway.objectives.fibre import Level, fibre_domain_ratio, fibre_ratio, total_variation_ratio
from rollway.objectives.kl import ESTIMATORS, k3
from rollway.objectives.ratios import log_ratio, sequence_ratio, sequence_token_ratio, token_ratio
from rollway.objectives.states import State, penalty_weights

USUAL_CLIP = 0.2
"""PPO's width: the clip that R2VPO's penalty is measured against; its budget of 0.04 is the square."""


@dataclass(frozen=True)
class TokenTerms:
    """Per-token parts of a policy loss, [N, T]; meaningful where the mask is true."""

    policy: Tensor
    """Loss of the gate, times the correction's weight."""
    kl: Tensor | None
    """beta times the estimator."""
    ratio: Tensor | None
    """None without one."""
    correction: Tensor
    """The correction's weight, 1 without one; constant."""
    logged: dict[str, Tensor]
    """[N, T] quantities whose mean over valid tokens is a metric."""


def token_terms(batch: TokenBatch, objective: Objective, state: State) -> TokenTerms:
    """Evaluates ratio, gate, anchors, correction and KL on a batch that is `ready` and prepared."""
    lp, mask = batch.logp, batch.mask
    expert = expert_rows(batch, objective)
    ratio = ratio_of(batch, objective, expert)
    advantage = spread_advantage(batch)
    lam = _lam(batch, objective, state)
    policy = _gated(ratio, lp, advantage, objective, mask, lam)
    if isinstance(objective.gate, OneTokenGate):
        assert batch.hit is not None
        assert batch.missed is not None
        policy = gates.one_token_gate(lp, batch.hit, batch.missed, objective.gate.beta)
    match objective.anchors:
        case UnitAnchors():
            policy = torch.where(expert, unit_anchor(lp, advantage), policy)
        case ShapedAnchors(gamma=gamma):
            policy = torch.where(expert, shaped_anchor(lp, advantage, gamma), policy)
    logged = _logged(ratio, advantage, objective, lam)
    correction = torch.ones_like(lp)
    if isinstance(objective.correction, Correction):
        correction = correction_of(batch, objective.correction, mask & ~expert)
        policy = correction * policy
    penalty = None
    if isinstance(objective.kl, KlPenalty) and batch.logp_ref is not None:
        penalty = objective.kl.beta * ESTIMATORS[objective.kl.kind](lp, batch.logp_ref.detach())
        logged["kl/reference"] = k3(lp, batch.logp_ref).detach()
    if batch.entropy is not None:
        logged["entropy"] = batch.entropy.detach()
    if isinstance(objective.gate, OneTokenGate) and batch.hit is not None:
        logged["one_token/hit_rate"] = batch.hit.detach()
        if objective.gate.candidates is not None:
            logged["one_token/no_hit_share"] = (batch.hit == 0).to(lp)
    if "mixing/rho" in batch.extra:
        logged["mixing/rho"] = batch.extra["mixing/rho"]
        logged["mixing/alpha"] = batch.extra["mixing/alpha"].expand_as(lp)
        logged["mixing/correct_share"] = batch.extra["mixing/correct_share"].expand_as(lp)
    return TokenTerms(policy, penalty, ratio, correction, logged)


def variance_partials(batch: TokenBatch, objective: Objective, ratio: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """Sums [versions] of w (r - centre)^2 and of w over valid tokens, for the dual step of R2VPO (eq. 2)."""
    gate = objective.gate
    if not isinstance(gate, VarianceGate) or not isinstance(gate.dual, AscentDual):
        return {}
    square = (ratio - _centre(ratio, batch.mask, gate)).square().detach()
    per_row = weight * torch.where(batch.mask, square, 0.0).sum(1)
    tokens = weight * batch.mask.sum(1)
    version = _versions(batch, gate.dual)
    zeros = per_row.new_zeros(gate.dual.versions)
    return {
        "variance/sum": zeros.index_add(0, version, per_row),
        "variance/tokens": zeros.index_add(0, version, tokens),
    }


def ratio_of(batch: TokenBatch, objective: Objective, expert: Tensor) -> Tensor | None:
    """The objective's ratio [N, T], 1 on `expert` rows [N, 1]; None for objectives without."""
    ratio, mask = objective.ratio, batch.mask
    if ratio is None or isinstance(ratio, NoRatio):
        return None
    behavior = isinstance(ratio, TokenRatio | SequenceRatio | SequenceTokenRatio) and ratio.denominator == "behavior"
    old = batch.logp_behavior if behavior else batch.logp_old
    assert old is not None
    x = log_ratio(batch.logp, torch.where(expert, batch.logp, old).detach())
    match ratio:
        case TokenRatio():
            return token_ratio(x)
        case SequenceRatio():
            return sequence_ratio(x, mask)
        case SequenceTokenRatio():
            return sequence_token_ratio(x, mask)
        case FibreRatio():
            return fibre_ratio(x, mask, Level(ratio.up, ratio.down), ratio.residual)
        case FibreDomainRatio():
            assert batch.domain is not None
            assert batch.group is not None
            levels = [Level(b.up, b.down) for b in (ratio.domain, ratio.group, ratio.trajectory)]
            return fibre_domain_ratio(
                x, mask, batch.domain, batch.group, (levels[0], levels[1], levels[2]), ratio.residual
            )
        case TotalVariationRatio():
            return total_variation_ratio(x, mask, ratio.delta)


def _gated(
    ratio: Tensor | None, lp: Tensor, advantage: Tensor, objective: Objective, mask: Tensor, lam: Tensor | None
) -> Tensor:
    if objective.gate is None:
        return torch.zeros_like(lp)
    if ratio is None:
        match objective.gate:
            case SftGate():
                return -lp
            case DftGate():
                return gates.dft_gate(lp)
        return gates.reinforce_gate(lp, advantage)
    match objective.gate:
        case ClipGate(low=low, high=high):
            return gates.clip_gate(ratio, advantage, low, high)
        case DualClipGate(low=low, high=high, c=c):
            return gates.dual_clip_gate(ratio, advantage, low, high, c)
        case SoftGate(tau_pos=tau_pos, tau_neg=tau_neg):
            return gates.soft_gate(ratio, advantage, tau_pos, tau_neg)
        case CispoGate(low=low, high=high):
            return gates.cispo_gate(ratio, lp, advantage, low, high)
        case VarianceGate() as gate:
            assert lam is not None
            return gates.variance_gate(ratio, advantage, lam, _centre(ratio, mask, gate))
        case NoGate():
            return gates.plain_gate(ratio, advantage)
    raise ValueError(f"gate {objective.gate} has no loss on a ratio")


def _logged(ratio: Tensor | None, advantage: Tensor, objective: Objective, lam: Tensor | None) -> dict[str, Tensor]:
    if ratio is None:
        return {}
    r = ratio.detach()
    out = {"ratio/mean": r, "ratio/variance": (r - 1).square()}
    match objective.gate:
        case ClipGate(low=low, high=high) | CispoGate(low=low, high=high):
            out["clip_share"] = gates.clipped_tokens(r, advantage, low, high).to(r)
        case DualClipGate(low=low, high=high, c=c):
            out["clip_share"] = gates.clipped_tokens(r, advantage, low, high, c).to(r)
        case SoftGate(tau_pos=tau_pos, tau_neg=tau_neg):
            out["soft/weight"] = gates.soft_weight(r, advantage, tau_pos, tau_neg)
        case VarianceGate():
            assert lam is not None
            out["variance/reversed_share"] = ((advantage - 2 * lam * (r - 1)) * advantage < 0).to(r)
            out["variance/would_clip_share"] = gates.clipped_tokens(r, advantage, USUAL_CLIP, USUAL_CLIP).to(r)
    return out


def spread_advantage(batch: TokenBatch) -> Tensor:
    """[N, T], a constant; 0 where there is none."""
    if batch.advantage is None:
        return torch.zeros_like(batch.logp)
    spread = batch.advantage[:, None] if batch.advantage.dim() == 1 else batch.advantage
    return spread.detach().to(batch.logp.dtype).expand_as(batch.logp)


def expert_rows(batch: TokenBatch, objective: Objective) -> Tensor:
    """bool [N, 1]"""
    if objective.anchors.kind == "none" or batch.route is None:
        return torch.zeros(batch.n_rows, 1, dtype=torch.bool, device=batch.logp.device)
    return (batch.route == ROUTES.index("expert"))[:, None]


def correction_of(batch: TokenBatch, part: Correction, own: Tensor) -> Tensor:
    """Weights [N, T] of the policy's own tokens, `own` [N, T]; 1 elsewhere."""
    assert batch.logp_old is not None
    assert batch.logp_behavior is not None
    return correction_weights(batch.logp_old, batch.logp_behavior, own, kind=part.kind, level=part.level, cap=part.cap)


def _centre(ratio: Tensor, mask: Tensor, gate: VarianceGate) -> Tensor | float:
    if gate.centre == "one":
        return 1.0
    return torch.where(mask, ratio, 0.0).sum() / mask.sum().clamp(min=1)


def _lam(batch: TokenBatch, objective: Objective, state: State) -> Tensor | None:
    """[N, 1] or [1, 1]"""
    if not isinstance(objective.gate, VarianceGate):
        return None
    lam = penalty_weights(objective.gate, state).to(batch.logp)
    dual = objective.gate.dual
    return lam[_versions(batch, dual)][:, None] if isinstance(dual, AscentDual) else lam[:, None]


def _versions(batch: TokenBatch, dual: AscentDual) -> Tensor:
    """int64 [N]: which dual variable each row has."""
    if batch.age is None or dual.versions == 1:
        return torch.zeros(batch.n_rows, dtype=torch.int64, device=batch.logp.device)
    return batch.age.clamp(max=dual.versions - 1)
