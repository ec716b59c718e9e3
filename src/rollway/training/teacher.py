"""What a teacher says of a round's tokens: from stored columns once a round, from a live model before every step.

A teacher may read another prompt than the policy did. Both say something of the same completion tokens, one by one, so
positions are those of the tokens, whatever stands before them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from rollway.config.distillation import Distill, Exact, Sampled, TopK
from rollway.config.objectives import Objective
from rollway.config.training import TrainConfig
from rollway.errors import RollwayError
from rollway.objectives import TokenBatch
from rollway.objectives.distillation import gets_distilled
from rollway.objectives.divergences import clipped_terms, terms
from rollway.policies.head import Head
from rollway.policies.layout import Layout
from rollway.policies.logprobs import Observe, Row, completion_states, micro_batches
from rollway.policies.top_k import top_k
from rollway.policies.two_heads import compared_and_measured
from rollway.training.batch import TrainingRow

_MEND = "score the rollouts with a teacher, and let curation carry its columns into the batch"


def with_stored(
    rows: list[TrainingRow], tokens: TokenBatch, train: TrainConfig, policy: PreTrainedModel, temperature: float
) -> TokenBatch:
    """The batch with the teacher's columns that training reads: `teacher_logp`, `teacher_entropy`, top k.

    temperature: of sampling.

    Rows that are not distilled may be without and hold NaN. Raises RollwayError that names a row which lacks one, or
    whose top k is not of the policy's vocabulary or smaller than asked for.
    """
    read = train.reads_teacher()
    objective = train.objective
    distilled = gets_distilled(tokens, objective)[:, 0].tolist()
    needed = [asked or train.advantage_of_teacher() for asked in distilled]
    made: dict[str, Tensor] = {}
    if "teacher_logprob" in read:
        made["teacher_logp"] = _per_token(rows, [row.said.logprob for row in rows], "logprob", needed, tokens)
    if "teacher_entropy" in read:
        made["teacher_entropy"] = _per_token(rows, [row.said.entropy for row in rows], "entropy", distilled, tokens)
    if "teacher_topk_ids" in read:
        assert objective.distill is not None
        vocabulary = policy.config.get_text_config().vocab_size
        stored_at = train.top_k_temperature(temperature)
        made |= _top_k(rows, objective.distill, distilled, tokens, vocabulary, stored_at)
    return replace(tokens, **made)  # type: ignore[arg-type]


def _per_token(
    rows: list[TrainingRow],
    said: Sequence[NDArray[np.float32] | None],
    name: str,
    needed: list[bool],
    tokens: TokenBatch,
) -> Tensor:
    """[N, T], NaN where nothing was said."""
    out = np.full(tokens.logp.shape, np.nan, dtype=np.float32)
    for n, (row, values) in enumerate(zip(rows, said, strict=True)):
        if values is not None:
            out[n, : len(values)] = values
        elif needed[n]:
            raise RollwayError(_lacks(row, name))
    return torch.from_numpy(out).to(tokens.logp)


def _top_k(
    rows: list[TrainingRow], part: Distill, needed: list[bool], tokens: TokenBatch, vocabulary: int, stored_at: float
) -> dict[str, Tensor]:
    """Ids and log-probs [N, T, K] of the teacher's likeliest tokens; ids 0 and NaN where nothing was said."""
    for row, asked in zip(rows, needed, strict=True):
        if asked and (row.said.topk_ids is None or row.said.topk_logprobs is None):
            raise RollwayError(_lacks(row, "topk_ids" if row.said.topk_ids is None else "topk_logprobs"))
    widths = {width for row in rows if (width := _width(row)) is not None}
    wanted = part.estimate.k if isinstance(part.estimate, TopK) else None
    if len(widths) > 1 and wanted is None:
        raise RollwayError(
            f"batch: teachers gave top {' and '.join(map(str, sorted(widths)))}; set "
            "train.objective.distill.estimate.k to one that all of them hold"
        )
    k = wanted or next(iter(widths), 1)
    ids = np.zeros((*tokens.logp.shape, k), dtype=np.int64)
    logp = np.full((*tokens.logp.shape, k), np.nan, dtype=np.float32)
    for n, row in enumerate(rows):
        width = _width(row)
        if width is None:
            continue
        own, values = row.said.topk_ids, row.said.topk_logprobs
        assert own is not None
        assert values is not None
        if width < k:
            raise RollwayError(
                f"batch: row ({row.rollout_id}, slot {row.slot}) holds the teacher's top {width}, and "
                f"train.objective.distill.estimate.k is {k}: lower it, or score with a larger top_k"
            )
        if own.min() < 0 or own.max() >= vocabulary:
            raise RollwayError(
                f"batch: row ({row.rollout_id}, slot {row.slot}) has a teacher's token {int(own.max())}, and the "
                f"policy knows {vocabulary}: the teacher has another vocabulary"
            )
        best = np.argsort(-values, axis=1, kind="stable")[:, :k]
        ids[n, : len(own)] = np.take_along_axis(own, best, axis=1)
        logp[n, : len(own)] = np.take_along_axis(values, best, axis=1)
    device = tokens.logp.device
    # At another temperature than stored log-probs differ by a constant per position, which renormalising removes.
    scaled = torch.from_numpy(logp).to(tokens.logp) * (stored_at / part.temperature)
    return {"topk_ids": torch.from_numpy(ids).to(device), "teacher_topk_logp": scaled}


def _width(row: TrainingRow) -> int | None:
    """K of a row whose teacher gave a top k of at least one token."""
    ids, values = row.said.topk_ids, row.said.topk_logprobs
    if ids is None or values is None or len(ids) == 0:
        return None
    if ids.shape != values.shape:
        raise RollwayError(
            f"batch: row ({row.rollout_id}, slot {row.slot}) has {ids.shape[1]} teacher_topk_ids and {values.shape[1]} "
            "teacher_topk_logprobs per token; score it again with the teacher"
        )
    return int(ids.shape[1])


def _lacks(row: TrainingRow, name: str) -> str:
    return f"batch: row ({row.rollout_id}, slot {row.slot}) has no teacher_{name}; {_MEND}"


@dataclass(frozen=True)
class Live:
    """A teacher in the trainer. Never trained; its hidden states, not its logits, are what is held per token."""

    model: PreTrainedModel
    objective: Objective
    """Has `distill`."""
    temperature: float
    """Of sampling, at which the policy's log-probs are: that of `sampled` estimates."""
    micro_tokens: int
    privileged: bool = False
    """Whether it reads `teacher_prompt_tokens` in place of the prompt."""
    near: PreTrainedModel | None = None
    """The policy, towards whose logits the teacher's are moved; None: they are as they are."""
    mix: float = 0.0
    """How far: (1 - mix) of the teacher's logits and mix of the policy's, both in the teacher's context."""
    entropy_temperature: float = 1.0
    """At which its entropy is taken."""
    vocabulary: int | None = None
    """Its distributions are over the ids below it, those of its padding beyond have no mass; None: over all."""
    held: Mapping[tuple[str, int], Tensor] = field(default_factory=dict)
    """Hidden states [tokens, H] of rows that it has read at this step, by rollout and slot."""

    @property
    def part(self) -> Distill:
        assert self.objective.distill is not None
        return self.objective.distill

    def reads(self, rows: Sequence[TrainingRow]) -> list[Row]:
        """The completions of distilled rows after what the teacher reads."""
        out = []
        for row in rows:
            own = row.said.prompt_tokens
            if self.privileged and (own is None or len(own) == 0):
                raise RollwayError(_lacks(row, "prompt_tokens"))
            read = Row(own.tolist() if self.privileged and own is not None else row.prompt_tokens, row.tokens)
            largest = max(int(np.max(ids, initial=0)) for ids in (read.prompt_tokens, read.tokens))
            if self.vocabulary is not None and largest >= self.vocabulary:
                raise RollwayError(
                    f"batch: row ({row.rollout_id}, slot {row.slot}) has the id {largest}, and train.teacher knows "
                    f"{self.vocabulary}: no token belongs to it; leave the row out with curate.filter"
                )
            out.append(read)
        return out

    @torch.no_grad()
    def say(self, rows: Sequence[TrainingRow], tokens: TokenBatch) -> "tuple[TokenBatch, Live]":
        """The batch with what a stored teacher would have said of its distilled rows, as the teacher is now; and the
        teacher for this one step, which need not read again what fits in a micro-batch.

        What follows from both models at once (`exact`, the student's top k) comes from `observer`.
        """
        like, made = tokens.logp, self._nothing_said(tokens)
        if not made:
            return tokens, self
        at = gets_distilled(tokens, self.objective)[:, 0].nonzero()[:, 0]
        chosen = [rows[n] for n in at.tolist()]
        read = self.reads(chosen)
        held: dict[tuple[str, int], Tensor] = {}
        layout = Layout.of(self.model, self.micro_tokens)
        cut = micro_batches(read, layout)
        for some in cut:
            head, states, targets, place = self._pass([read[n] for n in some], layout.packed, like.shape[1])
            row, column = at[torch.tensor(some, device=at.device)][place // like.shape[1]], place % like.shape[1]
            for name, x in self._said(head, states, targets).items():
                made[name][row, column] = x.to(made[name].dtype)
            if len(cut) == 1 and self.part.needs_live():
                each = states.split([len(read[n].tokens) for n in some])
                held = {_key(chosen[n]): x for n, x in zip(some, each, strict=True)}
        return replace(tokens, **made), replace(self, held=held)  # type: ignore[arg-type]

    def _nothing_said(self, tokens: TokenBatch) -> dict[str, Tensor]:
        """[N, T] and [N, T, k], with NaN and ids 0 (`sampled`: the sampled ones): of rows that are not distilled."""
        part, like, found = self.part, tokens.logp, {}
        if part.samples_at_own_temperature():
            assert tokens.token_ids is not None
            found["teacher_topk_logp"] = torch.full_like(like, torch.nan)[..., None]
            found["topk_ids"] = tokens.token_ids[..., None]
        elif isinstance(part.estimate, Sampled):
            found["teacher_logp"] = torch.full_like(like, torch.nan)
        if part.emphasis.kind != "none":
            found["teacher_entropy"] = torch.full_like(like, torch.nan)
        if isinstance(part.estimate, TopK) and part.estimate.of == "teacher":
            assert part.estimate.k is not None
            found["teacher_topk_logp"] = like.new_full((*like.shape, part.estimate.k), torch.nan)
            found["topk_ids"] = torch.zeros_like(found["teacher_topk_logp"], dtype=torch.int64)
        return found

    def _said(self, head: Head, states: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """What the part reads of the teacher alone, for K tokens: [K] and [K, k] each."""
        part, found = self.part, {}
        if part.samples_at_own_temperature():
            found["teacher_topk_logp"] = top_k(head, states, targets, 0, part.temperature).logp[:, None]
        elif isinstance(part.estimate, Sampled):
            found["teacher_logp"] = top_k(head, states, targets, 0, self.temperature).logp
        if part.emphasis.kind != "none":
            found["teacher_entropy"] = top_k(head, states, targets, 0, self.entropy_temperature).entropy
        if isinstance(part.estimate, TopK) and part.estimate.of == "teacher":
            assert part.estimate.k is not None
            best = top_k(head, states, targets, part.estimate.k, part.temperature)
            found |= {"topk_ids": best.ids, "teacher_topk_logp": best.logprobs}
        return found

    @torch.no_grad()
    def _pass(self, rows: Sequence[Row], packed: bool, width: int) -> tuple[Head, Tensor, Tensor, Tensor]:
        """The teacher's output layer, its hidden states [K, H], the K tokens and their flat places in [N, width]."""
        states, targets, place = completion_states(self.model, rows, packed, width)
        if self.near is not None:
            others, _, _ = completion_states(self.near, rows, packed, width)
            states = torch.cat([states, others], dim=1)
        return self._head(), states, targets, place

    def _head(self) -> Head:
        """For the states of `_pass`."""
        head = Head.of(self.model) if self.vocabulary is None else Head.of(self.model).first(self.vocabulary)
        return head if self.near is None else Head.between(head, Head.of(self.near), self.mix)

    def observer(self, rows: Sequence[TrainingRow], tokens: TokenBatch, packed: bool) -> Observe | None:
        """What a forward pass of the policy over `rows` computes beside its log-probs; None where `say` has it all.

        Rows that are not distilled are not read, and have zeros.
        """
        if not self.part.needs_live():
            return None
        distilled = gets_distilled(tokens, self.objective)[:, 0].tolist()
        chosen = [row for row, asked in zip(rows, distilled, strict=True) if asked]
        if not chosen:
            return self._of_nobody
        fixed, read, expected = self._seen(chosen, packed)
        counts = [len(row.tokens) for row in rows]

        def observe(head: Head, states: Tensor, targets: Tensor) -> dict[str, Tensor]:
            at = torch.repeat_interleave(torch.tensor(distilled), torch.tensor(counts)).nonzero()[:, 0]
            at = at.to(states.device)
            if not torch.equal(targets[at], expected):
                raise RollwayError("train: the teacher was given other tokens than the policy wrote")
            if len(chosen) == len(rows):
                return self._both(head, states, targets, fixed, read)
            found = self._both(head, states[at], targets[at], fixed, read)
            return {k: x.new_zeros(len(targets), *x.shape[1:]).index_copy(0, at, x) for k, x in found.items()}

        return observe

    @torch.no_grad()
    def _seen(self, rows: Sequence[TrainingRow], packed: bool) -> tuple[Head, Tensor, Tensor]:
        """The teacher's output layer, its hidden states [K, H] and the tokens [K] of distilled rows, as far as they are
        held without another pass."""
        if all(_key(row) in self.held for row in rows):
            states = torch.cat([self.held[_key(row)] for row in rows])
            tokens = torch.cat([torch.as_tensor(np.asarray(row.tokens), dtype=torch.int64) for row in rows])
            return self._head(), states, tokens.to(states.device)
        head, states, tokens, _ = self._pass(self.reads(rows), packed, max(len(row.tokens) for row in rows))
        return head, states, tokens

    def _of_nobody(self, head: Head, states: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Zeros for rows of which none is distilled."""
        zero = states.new_zeros(len(targets), dtype=torch.promote_types(states.dtype, torch.float32))
        if isinstance(self.part.estimate, TopK):
            assert self.part.estimate.k is not None
            each = zero[:, None].repeat(1, self.part.estimate.k)
            return {"topk_logp": each, "teacher_topk_logp": each}
        seen = [] if self.part.clip is None else ["raw_divergence", "clipped_entries"]
        return dict.fromkeys(("divergence", *seen), zero)

    def _both(self, head: Head, states: Tensor, targets: Tensor, fixed: Head, read: Tensor) -> dict[str, Tensor]:
        """What the part reads of policy and teacher at once, for K tokens: [K] and [K, k] each.

        Over the ids that both have: `exact` compares the two softmaxes over them, and what padding of the policy holds
        beyond them is the tail's of its top k, as beside stored columns.
        """
        part = self.part
        both = head if len(head.weight) == len(fixed.weight) else head.first(len(fixed.weight))
        if isinstance(part.estimate, Exact):
            measures = [] if part.clip is None else [partial(_raw, part), partial(_over, part)]
            value, seen = compared_and_measured(
                both, states, fixed, read, partial(_term, part), measures, part.temperature
            )
            found = {"divergence": value}
            if measures:
                found |= {"raw_divergence": seen[:, 0], "clipped_entries": seen[:, 1] / len(both.weight)}
            return found
        assert isinstance(part.estimate, TopK)
        assert part.estimate.k is not None
        ids = top_k(both, states.detach(), targets, part.estimate.k, part.temperature).ids
        own = head.values_at(states, targets, (part.temperature,), False, ids, part.temperature)[2]
        with torch.no_grad():
            said = fixed.values_at(read, targets, (part.temperature,), False, ids, part.temperature)[2]
        return {"topk_logp": own, "teacher_topk_logp": said}


def _key(row: TrainingRow) -> tuple[str, int]:
    return row.rollout_id, row.slot


@torch.no_grad()
def follow(average: PreTrainedModel, policy: PreTrainedModel, rate: float) -> None:
    """average <- (1 - rate) average + rate policy, in place, of all that is trained (SDPO, arXiv 2601.20802)."""
    for mean, now in zip(average.parameters(), policy.parameters(), strict=True):
        if now.requires_grad:
            mean.lerp_(now.to(mean.dtype), rate)


def _term(part: Distill, lp: Tensor, lq: Tensor) -> Tensor:
    return clipped_terms(lp, lq, part.divergence, part.clip)


def _raw(part: Distill, lp: Tensor, lq: Tensor) -> Tensor:
    return terms(lp, lq, part.divergence)


def _over(part: Distill, lp: Tensor, lq: Tensor) -> Tensor:
    """1 where the clip acts on an entry."""
    assert part.clip is not None
    return (terms(lp, lq, part.divergence) > part.clip).to(lp.dtype)
