"""The public functions: one loss of one batch, and what is needed to compute it in parts."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from rollway.config.objectives import (
    CopgPreference,
    Correction,
    CurvatureTrust,
    DpoPreference,
    EntropyTop,
    IpoPreference,
    Objective,
    SignalTop,
    SpinPreference,
)
from rollway.errors import RollwayError
from rollway.objectives.aggregation import denominator, numerator, ratio_or_zero
from rollway.objectives.batch import TokenBatch, full_precision
from rollway.objectives.distillation import (
    Distilled,
    distill_totals,
    distilled,
    distilled_tokens,
    gets_distilled,
    gets_policy_loss,
)
from rollway.objectives.imitation import imitated, imitated_rows, imitation_totals, without_imitated
from rollway.objectives.needs import unit
from rollway.objectives.policy import token_terms, variance_partials
from rollway.objectives.preference import copg_group_loss, copg_pair_loss, dpo_loss, implied_reward, ipo_loss
from rollway.objectives.preparation import correct_share_of, kept, prepare_ready, ready
from rollway.objectives.states import State, initial_state, next_state
from rollway.objectives.value import value_error


@dataclass(frozen=True)
class LossResult:
    """What one batch, or one part of it, gives."""

    loss: Tensor
    """Scalar to minimise; parts of a batch with its totals add up."""
    token_loss: Tensor
    """[N, T] gate, correction and KL at every valid token, selected or not; 0 where masked. A constant."""
    kept: Tensor
    """[N, T] bool: tokens that enter the loss."""
    metrics: dict[str, Tensor]
    """Scalars that add up over the parts of a batch, except `max/...`, of which the largest counts."""
    state: State
    """State after a step on this batch alone."""
    partials: dict[str, Tensor] = field(default_factory=dict)
    """Sums over the batch that `next_state` needs; they add up over its parts."""
    per_token: dict[str, Tensor] = field(default_factory=dict)
    """[N, T] of single tokens, whose distribution over the whole step is to be logged; 0 where masked."""


def loss(
    batch: TokenBatch, objective: Objective, *, state: State | None = None, totals: dict[str, Tensor] | None = None
) -> LossResult:
    """The objective's loss on a batch.

    state: from the last step, by default `initial_state`. totals: `totals(...)` of the whole optimiser batch when this
    is a part of it; without, the batch is taken as whole. Raises RollwayError when the batch lacks what is needed.
    """
    state = initial_state(objective) if state is None else state
    batch = ready(batch, objective)
    _check_part(batch, objective, totals)
    batch = prepare_ready(
        batch, objective, state, _progress(batch), None if totals is None else totals.get("correct_share")
    )
    if objective.preference.kind != "none":
        whole = _preference_totals(batch, objective) if totals is None else totals
        return _preference_result(batch, objective, state, whole)
    return _policy_result(batch, objective, state, totals)


@torch.no_grad()
def totals(batch: TokenBatch, objective: Objective, state: State | None = None) -> dict[str, Tensor]:
    """Denominators and whole-batch quantities of an optimiser batch: give them to `loss` with each of its parts.

    They read the current models only where the objective's `unit` is the batch; elsewhere `value` and `hidden` may be
    absent. Scalars: `denominator` of the policy loss, `tokens` (weighted valid tokens), `valid` (their count),
    `correct_share`; `distill/tokens`, `distill/emphasis`, `distill/denominator`; `imitate/groups`, `imitate/tokens`;
    `pairs` or `groups` for preferences.
    """
    state = initial_state(objective) if state is None else state
    whole = unit(objective) == "batch"
    batch = ready(batch, objective, forward=whole)
    if objective.preference.kind != "none":
        return _preference_totals(batch, objective)
    batch = prepare_ready(batch, objective, state, _progress(batch))
    needs_keep = objective.select.kind != "curvature" or whole
    own = without_imitated(batch, objective)
    keep = kept(own, objective, state)[0] if needs_keep else own.mask
    return _policy_totals(own, objective, keep) | imitation_totals(batch, objective)


def value_loss(batch: TokenBatch, clip: float | None, totals: dict[str, Tensor] | None = None) -> Tensor:
    """The critic's loss alone, a scalar: half the token mean of (clipped) squared errors (PPO)."""
    if batch.value is None or batch.returns is None or (clip is not None and batch.value_old is None):
        raise RollwayError("the critic's loss needs `value`, `returns` and, when clipped, `value_old` in the batch")
    batch = batch.cleaned()
    assert batch.value is not None
    assert batch.returns is not None
    old = None if batch.value_old is None else batch.value_old.detach()
    error = value_error(batch.value, old, batch.returns.detach(), clip)
    weight = _weight(batch)
    tokens = (weight * batch.mask.sum(1)).sum() if totals is None else totals["tokens"]
    return ratio_or_zero((weight * torch.where(batch.mask, error, 0.0).sum(1)).sum(), tokens)


def _policy_result(
    batch: TokenBatch, objective: Objective, state: State, given: dict[str, Tensor] | None
) -> LossResult:
    aggregate = objective.aggregate
    assert aggregate is not None
    everything, batch = batch, without_imitated(batch, objective)
    mask, weight = batch.mask, _weight(batch)
    keep, curvature, partials = kept(batch, objective, state)
    if given is None:
        whole = _policy_totals(batch, objective, keep) | imitation_totals(everything, objective)
    else:
        whole = given
    terms = token_terms(batch, objective, state)
    per_token = terms.policy if terms.kl is None else terms.policy + terms.kl
    taught = distilled(batch, objective, whole)
    own = keep & gets_policy_loss(batch, objective)

    def mean(x: Tensor, over: Tensor = own) -> Tensor:
        return ratio_or_zero(numerator(x, over, weight, aggregate), whole["denominator"])

    def token_mean(x: Tensor) -> Tensor:
        return ratio_or_zero((weight * torch.where(mask, x, 0.0).sum(1)).sum(), whole["tokens"])

    value = mean(per_token)
    metrics = {"loss/policy": mean(terms.policy.detach())}
    if terms.kl is not None:
        metrics["loss/kl"] = mean(terms.kl.detach())
    if taught is not None:
        assert objective.distill is not None
        spared = isinstance(objective.correction, Correction) and objective.correction.weighs == "policy"
        pull = taught.loss if spared else terms.correction * taught.loss
        of = objective.distill.aggregate
        both = keep & taught.keep
        if of is None:
            term = mean(pull, both)
        else:
            term = ratio_or_zero(numerator(pull, both, weight, of), whole["distill/denominator"])
        value = value + term
        metrics["loss/distill"] = term.detach()
        per_token = torch.where(own, per_token, 0.0) + torch.where(both, pull, 0.0)
        seen = torch.where(taught.keep, taught.divergence, 0.0).sum()
        metrics["distill/divergence"] = ratio_or_zero(seen, whole["distill/tokens"])
        metrics["distill/share"] = ratio_or_zero(taught.keep.sum().to(seen), whole["valid"])
        for name, x in taught.logged.items():
            metrics[f"distill/{name}"] = ratio_or_zero(torch.where(taught.keep, x, 0.0).sum(), whole["distill/tokens"])
    copied = imitated(everything, objective, weight, whole)
    if copied is not None:
        value = value + copied.loss
        metrics |= copied.metrics
    if objective.entropy_bonus > 0.0:
        assert batch.entropy is not None
        bonus = -objective.entropy_bonus * token_mean(batch.entropy)
        value = value + bonus
        metrics["loss/entropy"] = bonus.detach()
    if objective.value is not None:
        critic = objective.value.coefficient * value_loss(batch, objective.value.clip, whole)
        value = value + critic
        metrics["loss/value"] = critic.detach()
    logged = terms.logged | curvature
    if objective.select.kind != "all":
        logged["kept_share"] = keep.to(batch.logp.dtype)
        metrics["kept_tokens"] = keep.sum().to(batch.logp.dtype)
    for name, x in logged.items():
        metrics[name] = ratio_or_zero(torch.where(mask, x, 0.0).sum(), whole["valid"])
    for name, largest in (("max/ratio", terms.ratio), ("max/mixing_rho", batch.extra.get("mixing/rho"))):
        if largest is not None:
            metrics[name] = (
                torch.where(mask, largest.detach(), 0.0).max() if mask.numel() else value.detach().new_zeros(())
            )
    if terms.ratio is not None:
        partials |= variance_partials(batch, objective, terms.ratio, weight)
    if objective.mixing.kind != "none":
        partials["mixing/logp"] = torch.where(mask, batch.logp.detach(), 0.0).sum()
        partials["mixing/tokens"] = mask.sum()
    token_loss, trained = torch.where(mask, per_token.detach(), 0.0), keep
    if copied is not None:
        token_loss, trained = torch.where(copied.mask, copied.token_loss, token_loss), keep | copied.mask
    return LossResult(
        loss=value,
        token_loss=token_loss,
        kept=trained,
        metrics={"loss": value.detach()} | metrics,
        state=next_state(objective, state, partials),
        partials=partials,
        per_token=_by_token(curvature, keep, taught),
    )


def _by_token(curvature: dict[str, Tensor], keep: Tensor, taught: Distilled | None) -> dict[str, Tensor]:
    found = {**curvature, "curvature/kept": keep} if curvature else {}
    if taught is None:
        return found
    return found | {"distill/divergence": torch.where(taught.keep, taught.divergence, 0.0), "distill/kept": taught.keep}


def _policy_totals(batch: TokenBatch, objective: Objective, keep: Tensor) -> dict[str, Tensor]:
    assert objective.aggregate is not None
    weight = _weight(batch).double()
    # A distillation with a denominator of its own leaves the policy's loss the rows that get that loss, and no others.
    apart = objective.distill is not None and objective.distill.aggregate is not None
    own = gets_policy_loss(batch, objective) if apart else ~imitated_rows(batch, objective)
    share = weight if objective.aggregate.weights == "denominator" else torch.ones_like(weight)
    out = {
        "denominator": denominator(keep & own, weight, objective.aggregate, own[:, 0], batch.group),
        "tokens": (share * batch.mask.sum(1)).sum(),
        "valid": batch.mask.sum(),
    }
    if objective.mixing.kind != "none":
        out["correct_share"] = correct_share_of(batch)
    out |= distill_totals(batch, objective)
    if objective.distill is not None and objective.distill.aggregate is not None:
        counted, rows = keep & distilled_tokens(batch, objective), gets_distilled(batch, objective)[:, 0]
        if objective.distill.over == "batch":
            counted, rows = keep, ~imitated_rows(batch, objective)[:, 0]
        out["distill/denominator"] = denominator(counted, weight, objective.distill.aggregate, rows, batch.group)
    return out


def _preference_totals(batch: TokenBatch, objective: Objective) -> dict[str, Tensor]:
    weight, live = _weight(batch).double(), batch.mask.any(1)
    part = objective.preference
    if isinstance(part, CopgPreference) and part.form == "group":
        assert batch.group is not None
        sizes = torch.unique(batch.group[live], return_counts=True)[1]
        return {"groups": (sizes >= 2).sum(), "valid": batch.mask.sum()}
    assert batch.pair_chosen is not None
    assert batch.pair_rejected is not None
    return {"pairs": (weight[batch.pair_chosen] * weight[batch.pair_rejected]).sum(), "valid": batch.mask.sum()}


def _preference_result(batch: TokenBatch, objective: Objective, state: State, whole: dict[str, Tensor]) -> LossResult:
    part = objective.preference
    from_what = batch.logp_old if isinstance(part, SpinPreference) else batch.logp_ref
    assert from_what is not None
    d = implied_reward(batch.logp, from_what.detach(), batch.mask, isinstance(part, IpoPreference) and part.average)
    metrics: dict[str, Tensor] = {}
    if isinstance(part, CopgPreference) and part.form == "group":
        assert batch.group is not None
        assert batch.reward is not None
        live = batch.mask.any(1)
        each, counts = copg_group_loss(batch.reward[live].to(d).detach(), d[live], batch.group[live], part.beta)
        value = ratio_or_zero(torch.where(counts, each, 0.0).sum(), whole["groups"])
    else:
        assert batch.pair_chosen is not None
        assert batch.pair_rejected is not None
        chosen, rejected = batch.pair_chosen, batch.pair_rejected
        weight = _weight(batch)[chosen] * _weight(batch)[rejected]
        h = d[chosen] - d[rejected]
        match part:
            case DpoPreference(beta=strength) | SpinPreference(lam=strength):
                each = dpo_loss(h, strength)
            case IpoPreference(beta=beta):
                each = ipo_loss(h, beta)
            case CopgPreference(beta=beta):
                assert batch.reward is not None
                reward = batch.reward.to(d).detach()
                each = copg_pair_loss(reward[chosen], reward[rejected], d[chosen], d[rejected], beta)
            case _:
                raise ValueError(f"preference {part} has no loss")
        value = ratio_or_zero((weight * each).sum(), whole["pairs"])
        metrics["preference/margin"] = ratio_or_zero((weight * h.detach()).sum(), whole["pairs"])
        metrics["preference/accuracy"] = ratio_or_zero((weight * (h.detach() > 0)).sum(), whole["pairs"])
    metrics = {"loss": value.detach()} | metrics
    zero = torch.zeros_like(batch.logp)
    return LossResult(value, zero, batch.mask, metrics, next_state(objective, state, {}), {})


def _weight(batch: TokenBatch) -> Tensor:
    if batch.weight is None:
        return torch.ones(batch.n_rows, dtype=batch.logp.dtype, device=batch.logp.device)
    return batch.weight.detach().to(full_precision(batch.logp).dtype)


def _progress(batch: TokenBatch) -> float:
    return float(batch.extra["progress"]) if "progress" in batch.extra else 0.0


def _check_part(batch: TokenBatch, objective: Objective, given: dict[str, Tensor] | None) -> None:
    if given is None:
        return
    if isinstance(objective.select, EntropyTop | SignalTop) and "keep" not in batch.extra:
        raise RollwayError(
            f"select {objective.select.kind} picks among all tokens of a batch: call prepare() on the whole batch first"
        )
    # Single tokens and sentences are judged by themselves; only how many are kept is the whole batch's business.
    apart = isinstance(objective.select, CurvatureTrust) and objective.select.level != "batch"
    together = unit(objective) == "batch" and not apart
    if together and int(without_imitated(batch, objective).mask.sum()) != int(given["valid"]):
        raise RollwayError("rows of this objective interact, so its loss needs the whole batch: see separable()")
