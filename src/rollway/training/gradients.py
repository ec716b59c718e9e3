"""Gradients of one optimiser batch, computed a micro-batch at a time and equal to those of the whole."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rollway.config.objectives import Objective, OneTokenGate
from rollway.errors import RollwayError
from rollway.objectives import LossResult, TokenBatch, loss, requirements, separable, totals
from rollway.policies.critic import Critic
from rollway.policies.layout import Layout
from rollway.policies.logprobs import Observe, Others, TokenLogprobs, forward_logprobs, micro_batches
from rollway.training import candidates
from rollway.training.batch import TrainingRow
from rollway.training.signal import order_of, rows_with_signal
from rollway.training.teacher import Live
from rollway.training.teacher_gap import OVERLAP, kl_over_top_k, overlap_observer


@dataclass
class Gathered:
    """What the micro-batches of an optimiser batch left behind, besides the gradients in the parameters."""

    logp: Tensor
    """[n, T] of the policy before the step."""
    entropy: Tensor | None = None
    """[n, T], where it was computed."""
    metrics: dict[str, float] = field(default_factory=dict)
    partials: dict[str, Tensor] = field(default_factory=dict)
    per_token: dict[str, Tensor] = field(default_factory=dict)
    """[n, T] each."""

    def add(self, result: LossResult) -> None:
        for name, value in result.metrics.items():
            old, new = self.metrics.get(name), float(value)
            if old is None:
                self.metrics[name] = new
            else:
                self.metrics[name] = max(old, new) if name.startswith("max/") else old + new
        for name, part in result.partials.items():
            self.partials[name] = self.partials[name] + part if name in self.partials else part


@dataclass(frozen=True)
class Models:
    """What is trained; `freeze_policy` during the critic's warm-up, `unmoved` while the policy is still the old one."""

    policy: PreTrainedModel
    critic: Critic | None
    temperature: float
    micro_tokens: int
    distill_temperature: float = 1.0
    """Of the log-probs at a teacher's top k."""
    freeze_policy: bool = False
    unmoved: bool = False
    teacher: Live | None = None
    """Beside the policy in memory; None: what it says is stored, or nothing asks one."""
    seed: int = 0
    """Of the run, for what an objective draws inside a step."""
    step: int = 0
    """Optimiser steps before this one, likewise."""


Watch = Callable[[Tensor, Tensor], None]
"""Called after each micro-batch's backward pass with its rows' numbers [m] and the losses of their tokens [m, T]."""


def accumulate(
    models: Models,
    rows: Sequence[TrainingRow],
    tokens: TokenBatch,
    objective: Objective,
    state: dict[str, Tensor],
    watch: Watch | None = None,
) -> Gathered:
    """Adds the gradient of the objective over `rows` to the parameters' `.grad`.

    `tokens` [n, T] holds what is constant during the round; its denominators are those of all these rows, whatever the
    micro-batches are. Objectives whose rows interact are differentiated as a whole with respect to log-probs,
    entropies, divergences and values, and those gradients are then backpropagated a micro-batch at a time (exact; one
    more forward pass).
    Raises NotFinite, which names the rollouts, when a loss is not finite, unless somebody watches.
    """
    if separable(objective):
        return _direct(models, rows, tokens, objective, state, watch)
    return _through_leaves(models, rows, tokens, objective, state, watch)


def _direct(
    models: Models,
    rows: Sequence[TrainingRow],
    tokens: TokenBatch,
    objective: Objective,
    state: dict[str, Tensor],
    watch: Watch | None,
) -> Gathered:
    needs = requirements(objective)
    whole = totals(_with_head(models, tokens, needs, None), objective, state)
    out = Gathered(torch.zeros_like(tokens.logp), torch.zeros_like(tokens.logp))
    layout = _layout(models)
    # A row without signal is run for the metrics' sake alone.
    for chosen, moves in order_of(rows_with_signal(objective, tokens)):
        for at, part in _cut(rows, chosen, layout, tokens.logp.device):
            with torch.set_grad_enabled(moves and torch.is_grad_enabled()):
                own = tokens.rows(at)
                seen = _policy_forward(models, part, own, objective, layout.packed)
                batch = _current(own, seen, _values(models, part, tokens))
                batch = _with_head(models, batch, needs, seen.hidden)
                if models.unmoved:
                    batch = replace(batch, logp_old=seen.logp.detach())
                result = loss(batch, objective, state=state, totals=whole)
            if watch is None:
                _check(result, part)
            if result.loss.requires_grad:
                result.loss.backward()
            if watch is not None:
                watch(at, result.token_loss)
            out.logp[at] = seen.logp.detach()
            if seen.entropy is not None and out.entropy is not None:
                out.entropy[at] = seen.entropy.detach()
            out.add(result)
            beside = kl_over_top_k(objective.distill, batch, models.teacher is not None)
            beside |= {name: x for name, x in seen.observed.items() if name == OVERLAP}
            for name, x in (result.per_token | beside).items():
                out.per_token.setdefault(name, x.new_zeros(tokens.logp.shape))[at] = x
    return out


def _through_leaves(
    models: Models,
    rows: Sequence[TrainingRow],
    tokens: TokenBatch,
    objective: Objective,
    state: dict[str, Tensor],
    watch: Watch | None,
) -> Gathered:
    needs, layout = requirements(objective), _layout(models)

    def current(at: Tensor, part: list[TrainingRow]) -> TokenBatch:
        own = tokens.rows(at, split_pairs=True)
        seen = _policy_forward(models, part, own, objective, layout.packed)
        return replace(_current(own, seen, _values(models, part, tokens)), hidden=seen.hidden)

    cut = _cut(rows, range(len(rows)), layout, tokens.logp.device)
    with torch.no_grad():
        parts = [current(at, part) for at, part in cut]
    back = torch.cat([at for at, _ in cut]).argsort()
    fresh = {name: _joined([getattr(part, name) for part in parts], back) for name in (*_LEAVES, *_FORWARD)}
    leaves = {name: x.requires_grad_() for name, x in fresh.items() if x is not None and name in _LEAVES}
    batch = _with_head(models, replace(tokens, **fresh), needs, fresh["hidden"])  # type: ignore[arg-type]
    result = loss(batch, objective, state=state)
    if watch is None:
        _check(result, rows)
    else:
        watch(torch.arange(len(rows), device=tokens.logp.device), result.token_loss)
    beside = kl_over_top_k(objective.distill, batch, models.teacher is not None)
    out = Gathered(leaves["logp"].detach(), per_token=result.per_token | beside)
    out.add(result)
    if not result.loss.requires_grad:
        return out
    found = torch.autograd.grad(result.loss, list(leaves.values()), allow_unused=True)
    slopes = {name: g for name, g in zip(leaves, found, strict=True) if g is not None}
    moves = torch.stack([(g != 0).flatten(1).any(1) for g in slopes.values()]).any(0)
    for at, part in _cut(rows, order_of(moves)[0][0], layout, tokens.logp.device):
        again = current(at, part)
        total = torch.stack([(g[at] * getattr(again, name)).sum() for name, g in slopes.items()]).sum()
        if total.requires_grad:
            total.backward()
        if watch is not None:
            watch(at, result.token_loss[at])
    return out


_LEAVES = ("logp", "entropy", "value", "topk_logp", "divergence")
"""What the current models give and the loss is differentiated by."""
_FORWARD = ("hidden", "teacher_topk_logp", "raw_divergence", "clipped_entries")
"""What they give beside, as constants."""


def _cut(
    rows: Sequence[TrainingRow], chosen: Sequence[int], layout: Layout, device: torch.device
) -> list[tuple[Tensor, list[TrainingRow]]]:
    """Micro-batches of the chosen rows: their numbers, and themselves."""
    micro = [[chosen[n] for n in part] for part in micro_batches([rows[n] for n in chosen], layout)]
    return [(torch.tensor(part, device=device), [rows[n] for n in part]) for part in micro]


def _layout(models: Models) -> Layout:
    """Of the policy's passes. A critic reads the same micro-batches in padded form, so these are then made for that."""
    layout = Layout.of(models.policy, models.micro_tokens)
    return layout if models.critic is None else replace(layout, packed=False)


def _policy_forward(
    models: Models, rows: Sequence[TrainingRow], own: TokenBatch, objective: Objective, packed: bool
) -> TokenLogprobs:
    """The policy's pass over `rows`, whose constants `own` holds."""
    needs, others = requirements(objective), None
    if own.topk_ids is not None and "topk_logp" in needs:
        others = Others(own.topk_ids, models.distill_temperature)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not models.freeze_policy):
        return forward_logprobs(
            models.policy,
            rows,
            temperature=models.temperature,
            entropy="entropy" in needs or models.unmoved,
            hidden="hidden" in needs,
            packed=packed,
            width=own.logp.shape[1],
            others=others,
            observe=_observer(models, rows, own, objective, packed),
        )


def _observer(
    models: Models, rows: Sequence[TrainingRow], own: TokenBatch, objective: Objective, packed: bool
) -> Observe | None:
    """All that is computed of the hidden states beside log-probs: what a live teacher says, what candidates count."""
    asked = [] if models.teacher is None else [models.teacher.observer(rows, own, packed)]
    if separable(objective):
        asked.append(overlap_observer(objective.distill, rows, own))
    if isinstance(objective.gate, OneTokenGate):
        asked.append(candidates.observer(rows, objective.gate, models.temperature, models.seed, models.step))
    observers = [each for each in asked if each is not None]
    if not observers:
        return None
    return lambda head, states, targets: {k: x for each in observers for k, x in each(head, states, targets).items()}


def _values(models: Models, rows: Sequence[TrainingRow], tokens: TokenBatch) -> Tensor | None:
    return None if models.critic is None else models.critic(rows, tokens.logp.shape[1]).to(tokens.logp.dtype)


def _current(tokens: TokenBatch, seen: TokenLogprobs, value: Tensor | None) -> TokenBatch:
    given = {} if seen.at is None else {"topk_logp": seen.at}
    given |= {name: x for name, x in seen.observed.items() if name != OVERLAP}
    return replace(tokens, logp=seen.logp, entropy=seen.entropy, value=value, **given)  # type: ignore[arg-type]


def _with_head(models: Models, tokens: TokenBatch, needs: frozenset[str], hidden: Tensor | None) -> TokenBatch:
    if "hidden" not in needs:
        return tokens
    # Totals of a separable objective do not read hidden states, but want the field to be there.
    blank = tokens.logp.new_zeros(*tokens.logp.shape, 0)
    head = models.policy.get_output_embeddings().weight.detach()
    return replace(tokens, hidden=blank if hidden is None else hidden.detach(), lm_head=head)


def _joined(parts: list[Tensor | None], back: Tensor) -> Tensor | None:
    known = [part for part in parts if part is not None]
    return torch.cat(known)[back] if known else None


def _check(result: LossResult, rows: Sequence[TrainingRow]) -> None:
    if bool(result.loss.isfinite()):
        return
    bad = (~result.token_loss.isfinite()).any(1).nonzero()[:, 0].tolist() or range(len(rows))
    raise NotFinite("loss", float(result.loss.detach()), [rows[n].rollout_id for n in bad])


class NotFinite(RollwayError):
    """A loss, or the norm of a gradient, that is no number."""

    def __init__(self, what: str, value: float, rollout_ids: list[str]) -> None:
        super().__init__(_not_finite(what, value, rollout_ids))
        self.what, self.value = what, value


def _not_finite(what: str, value: float, rollout_ids: list[str]) -> str:
    named = ", ".join(rollout_ids[:5]) + (f" and {len(rollout_ids) - 5} more" if len(rollout_ids) > 5 else "")
    return (
        f"train: the {what} is {value}; nothing was saved. Look at rollouts {named}, lower train.optimizer.lr, "
        "or clip harder (train.optimizer.max_grad_norm, train.objective.gate)"
    )
