"""What stays fixed during a round's updates: old, reference and behaviour log-probs, old values, token advantages."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from rollway.config.objectives import Objective
from rollway.config.training import (
    GaeAdvantage,
    LeaveOneOutAdvantage,
    ReturnsAdvantage,
    TeacherAdvantage,
    TrainConfig,
    WhitenAdvantage,
)
from rollway.errors import RollwayError
from rollway.objectives import TokenBatch, dcpo_temperature, requirements, route_codes
from rollway.objectives.needs import advantage_needed
from rollway.policies.critic import Critic, values
from rollway.policies.logprobs import TokenLogprobs, token_logprobs
from rollway.training import advantages
from rollway.training.batch import TrainingBatch, TrainingRow
from rollway.training.teacher import with_stored


@dataclass(frozen=True)
class Round:
    """A round's rows with all that its updates keep constant; `tokens.logp` and `.entropy` are the old policy's."""

    rows: list[TrainingRow]
    tokens: TokenBatch
    behaviour: Tensor
    """[N, T] log-probs of whoever sampled, NaN where nobody did."""


def precompute(
    policy: PreTrainedModel,
    critic: Critic | None,
    reference: PreTrainedModel | None,
    batch: TrainingBatch,
    train: TrainConfig,
    objective_state: dict[str, Tensor],
    temperature: float,
    *,
    old: bool = True,
) -> Round:
    """Recomputes log-probs with the trainer's own model at the sampling temperature, before any update of the round.

    `old=False` leaves old log-probs and entropies at 0, for a caller that fills them in (see `update.one_step`).
    Only what the objective requires is computed. Raises RollwayError when a row lacks what it requires.
    """
    objective, rows = train.objective, batch.rows
    _check_experts(rows, objective)
    _check_reworded(rows, objective)
    needs = requirements(objective)
    if old:
        before = token_logprobs(
            policy,
            rows,
            temperature=temperature,
            micro_tokens=train.micro_tokens,
            entropy=True,
            extra_temperature=dcpo_temperature(objective, objective_state) if "logp_old_temp" in needs else None,
        )
    else:
        before = _zeros(policy, rows)
    like, width = before.logp, before.logp.shape[1]
    mask = _pad([r.train_mask for r in rows], width, False).to(like.device)
    behaviour = _pad([r.logprobs for r in rows], width, np.nan).to(like)
    if "logp_behavior" in needs:
        _check_behaviour(rows, behaviour, mask, objective)
    logp_ref = None
    if train.refers() and train.reference == "round":
        logp_ref = before.logp
    elif "logp_ref" in needs or train.kl_in_reward() > 0.0 or train.extrapolates():
        if reference is None:
            raise RollwayError("train: the objective compares with a reference policy, but none was given")
        logp_ref = token_logprobs(reference, rows, temperature=temperature, micro_tokens=train.micro_tokens).logp
    value = None if critic is None else values(critic, rows, micro_tokens=train.micro_tokens).to(like)
    tokens = TokenBatch(
        logp=like,
        mask=mask,
        logp_old=like,
        logp_ref=logp_ref,
        logp_behavior=behaviour,
        logp_old_temp=before.extra,
        entropy=before.entropy,
        value=value,
        value_old=value,
        weight=_column(rows, [r.weight for r in rows], "weight", True).to(like),
        group=torch.tensor([r.group for r in rows], device=like.device),
        reward=_optional(rows, [r.reward for r in rows], "reward", "reward" in needs, like),
        correct=_optional(rows, [r.correct for r in rows], "correct", "correct" in needs, like),
        route=route_codes([r.route for r in rows]).to(like.device) if "route" in needs else None,
        domain=torch.tensor(_dense([r.route or "" for r in rows]), device=like.device),
        age=torch.tensor([r.age for r in rows], device=like.device),
        pair_chosen=torch.from_numpy(batch.chosen).to(like.device) if "pair_chosen" in needs else None,
        pair_rejected=torch.from_numpy(batch.rejected).to(like.device) if "pair_chosen" in needs else None,
        token_ids=_pad([np.asarray(r.tokens) for r in rows], width, 0).long().to(like.device),
    )
    tokens = with_stored(rows, tokens, train, policy, temperature)
    made = _with_advantage(rows, tokens, train, _sampler(tokens, objective), advantage_needed(objective))
    return Round(rows, made, behaviour)


def _zeros(policy: PreTrainedModel, rows: list[TrainingRow]) -> TokenLogprobs:
    dtype = torch.float64 if policy.dtype == torch.float64 else torch.float32
    zeros = torch.zeros(len(rows), max(len(row.tokens) for row in rows), dtype=dtype, device=policy.device)
    return TokenLogprobs(zeros, zeros)


def _sampler(tokens: TokenBatch, objective: Objective) -> Tensor:
    """[N, T] log-probs of the policy that the ratio divides by: ln mu of arXiv 2604.00626, eq. 6. Anchored experts have
    none, and keep the old policy's."""
    assert tokens.logp_behavior is not None
    if not objective.divides_by_behaviour():
        return tokens.logp
    return torch.where(tokens.logp_behavior.isfinite(), tokens.logp_behavior, tokens.logp)


def _with_advantage(
    rows: list[TrainingRow], tokens: TokenBatch, train: TrainConfig, sampler: Tensor, needed: bool
) -> TokenBatch:
    """Advantages of the whole round, made once: token-level ones here, sample-level ones as curated.

    sampler [N, T]: log-probs that a teacher's are compared with.
    """
    like, mask = tokens.logp, tokens.mask
    match train.advantage:
        case None:
            return replace(tokens, advantage=_sample_advantage(rows, tokens, needed))
        case WhitenAdvantage():
            given = _sample_advantage(rows, tokens, True)
            spread = advantages.broadcast(given, mask) if given.dim() == 1 else given
            return replace(tokens, advantage=advantages.whiten(spread, mask, tokens.weight))
        case TeacherAdvantage() as part:
            assert tokens.teacher_logp is not None
            made = advantages.of_teacher(
                tokens.teacher_logp,
                sampler,
                tokens.logp_ref,
                mask,
                kappa=part.kappa,
                extrapolate=part.extrapolate,
                gamma=part.gamma,
                mean=part.mean,
                from_next=part.from_next,
            )
            if part.with_curated:
                given = _sample_advantage(rows, tokens, True)
                made = made + (advantages.broadcast(given, mask) if given.dim() == 1 else given * mask)
            return replace(tokens, advantage=made)
        case ReturnsAdvantage(gamma=gamma, kl=kl, whiten=white):
            reward = _column(rows, [r.reward for r in rows], "reward", True).to(like)
            made = advantages.returns(reward, like, tokens.logp_ref, mask, gamma=gamma, kl=kl)
            return replace(tokens, advantage=advantages.whiten(made, mask, tokens.weight) if white else made)
        case LeaveOneOutAdvantage(kl=kl):
            assert tokens.group is not None
            reward = _column(rows, [r.reward for r in rows], "reward", True).to(like)
            made = advantages.leave_one_out(reward, like, tokens.logp_ref, mask, tokens.group, kl)
            return replace(tokens, advantage=made)
        case GaeAdvantage(gamma=gamma, lam=lam, kl=kl, whiten=white):
            if tokens.value_old is None:
                raise RollwayError("train.advantage gae: needs a critic; set train.critic and train.objective.value")
            reward = _column(rows, [r.reward for r in rows], "reward", True).to(like)
            made, target = advantages.gae(
                reward,
                tokens.value_old.to(like),
                mask,
                gamma=gamma,
                lam=lam,
                kl=kl,
                logp_old=like,
                logp_ref=tokens.logp_ref,
            )
            return replace(
                tokens, advantage=advantages.whiten(made, mask, tokens.weight) if white else made, returns=target
            )


def _sample_advantage(rows: list[TrainingRow], tokens: TokenBatch, needed: bool) -> Tensor:
    """[N] as curated, or [N, T] where curation gave token-level ones; rows without any count 0 unless `needed`."""
    like = tokens.logp
    for row in rows:
        if needed and row.advantage is None and row.token_advantage is None:
            raise RollwayError(_lacks(row, "advantage", "set curate.advantage or train.advantage"))
    sample = torch.tensor([row.advantage or 0.0 for row in rows], dtype=torch.float64).to(like)
    if all(row.token_advantage is None for row in rows):
        return sample
    spread = sample[:, None].expand_as(like).clone()
    for n, row in enumerate(rows):
        if row.token_advantage is not None:
            spread[n, : len(row.tokens)] = torch.from_numpy(row.token_advantage.copy()).to(like)
    return spread


def _check_experts(rows: list[TrainingRow], objective: Objective) -> None:
    """An expert's solution must not pass for something that the policy sampled."""
    for row in rows:
        if row.source != "expert":
            continue
        if not objective.places_experts():
            raise RollwayError(
                f"batch: rollout {row.rollout_id} is an expert's, and the objective forms a ratio of what nobody "
                "sampled: set train.objective.anchors, or drop experts with the SQL of curate.filter"
            )
        if objective.anchors.kind != "none" and row.route != "expert":
            raise RollwayError(
                f"batch: rollout {row.rollout_id} is an expert's and has the route {row.route}, so "
                "train.objective.anchors leaves it out: set curate.route: {sql: source}"
            )
        if objective.anchors.kind == "none" and objective.imitate is not None and row.route != "imitate":
            raise RollwayError(
                f"batch: rollout {row.rollout_id} is an expert's and has the route {row.route}, so it would pass for "
                "the policy's own: set curate.route: {sql: imitate, source: expert}, or drop experts with curate.filter"
            )


def _check_reworded(rows: list[TrainingRow], objective: Objective) -> None:
    """A row whose prompt the engine did not read must not pass for a sample under that prompt."""
    reworded = [row for row in rows if row.reworded]
    if not reworded:
        return
    if objective.divides_by_behaviour() or objective.corrects_behaviour():
        raise RollwayError(
            f"batch: rollout {reworded[0].rollout_id} ({len(reworded)} in all) is trained under another prompt than "
            "the engine read (rollout.derive, `trained: plain`), so its log-probs are of another context, and the "
            "objective weighs by them: set `denominator: old` and no correction, or drop these rows with the SQL of "
            "curate.filter"
        )
    if not objective.distils_samples():
        return
    taken = [r for r in reworded if not objective.is_distill_routed() or r.route in ("distill", "both")]
    if taken:
        raise RollwayError(
            f"batch: rollout {taken[0].rollout_id} ({len(taken)} in all) is trained under another prompt than the "
            "engine read, and train.objective.distill takes it for a sample of the policy: route it elsewhere, or "
            "estimate topk or exact"
        )


def _check_behaviour(rows: list[TrainingRow], behaviour: Tensor, mask: Tensor, objective: Objective) -> None:
    anchors = torch.tensor([objective.anchors.kind != "none" and r.route == "expert" for r in rows])
    own = mask & ~anchors.to(mask.device)[:, None]
    lost = (own & ~behaviour.isfinite()).any(1).nonzero()[:, 0].tolist()
    if lost:
        raise RollwayError(
            f"batch: rollout {rows[lost[0]].rollout_id} ({len(lost)} in all) has tokens without a behaviour "
            "log-prob, which the objective needs; import them with log-probs, or use an objective without correction"
        )


def _optional(rows: list[TrainingRow], column: list[Any], name: str, needed: bool, like: Tensor) -> Tensor | None:
    if not needed and any(v is None for v in column):
        return None
    return _column(rows, column, name, needed).to(like)


def _column(rows: list[TrainingRow], column: list[Any], name: str, needed: bool) -> Tensor:
    for row, value in zip(rows, column, strict=True):
        if needed and value is None:
            raise RollwayError(_lacks(row, name, "the objective needs it; let curation pass it on"))
    return torch.tensor([float(v) for v in column], dtype=torch.float64)


def _lacks(row: TrainingRow, name: str, mend: str) -> str:
    return f"batch: row ({row.rollout_id}, slot {row.slot}) has no {name}; {mend}"


def _pad(arrays: list[NDArray[Any]], width: int, fill: float) -> Tensor:
    out = np.full((len(arrays), width), fill, dtype=arrays[0].dtype)
    for n, values_ in enumerate(arrays):
        out[n, : len(values_)] = values_
    return torch.from_numpy(out)


def _dense(names: list[str]) -> list[int]:
    order = sorted(set(names))
    return [order.index(name) for name in names]
