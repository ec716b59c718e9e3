"""What a teacher says of a round's tokens: from stored columns once a round, from a live model before every step.

A teacher may read another prompt than the policy did. Both say something of the same completion tokens, one by one, so
positions are those of the tokens, whatever stands before them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from rollway.objectives.divergences import terms
from rollway.policies.head import Head
from rollway.policies.layout import Layout
from rollway.policies.logprobs import Observe, Row, completion_states, micro_batches
from rollway.policies.top_k import top_k
from rollway.policies.two_heads import compared_and_measured
from rollway.training.batch import TrainingRow

_MEND = "score the rollouts with a teacher, and let curation carry its columns into the batch"


def with_stored(rows: list[TrainingRow], tokens: TokenBatch, train: TrainConfig, policy: PreTrainedModel) -> TokenBatch:
    """The batch with the teacher's columns that training reads: `teacher_logp`, `teacher_entropy`, top k.

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
        made |= _top_k(rows, objective.distill, distilled, tokens, vocabulary)
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
    rows: list[TrainingRow], part: Distill, needed: list[bool], tokens: TokenBatch, vocabulary: int
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
    # Stored at temperature 1. At another one log-probs differ by a constant per position, which renormalising removes.
    scaled = torch.from_numpy(logp).to(tokens.logp) / part.temperature
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

    @property
    def part(self) -> Distill:
        assert self.objective.distill is not None
        return self.objective.distill

    def reads(self, rows: Sequence[TrainingRow], tokens: TokenBatch) -> list[Row]:
        """The same completions after what the teacher reads; rows that are not distilled after their own prompt."""
        distilled = gets_distilled(tokens, self.objective)[:, 0].tolist()
        out = []
        for row, asked in zip(rows, distilled, strict=True):
            own = row.said.prompt_tokens
            if self.privileged and asked and (own is None or len(own) == 0):
                raise RollwayError(_lacks(row, "prompt_tokens"))
            prompt = own.tolist() if self.privileged and own is not None and len(own) else row.prompt_tokens
            out.append(Row(prompt, row.tokens))
        return out

    @torch.no_grad()
    def say(self, rows: Sequence[TrainingRow], tokens: TokenBatch) -> TokenBatch:
        """The batch with what a stored teacher would have said of its distilled rows, as the teacher is now.

        What follows from both models at once (`exact`, the student's top k) comes from `observer`.
        """
        like = tokens.logp
        at = gets_distilled(tokens, self.objective)[:, 0].nonzero()[:, 0]
        read = self.reads([rows[n] for n in at.tolist()], tokens.rows(at, split_pairs=True))
        made = self._nothing_said(like)
        layout = Layout.of(self.model, self.micro_tokens)
        for some in micro_batches(read, layout):
            head, states, targets, place = self._pass([read[n] for n in some], layout.packed, like.shape[1])
            row, column = at[torch.tensor(some, device=at.device)][place // like.shape[1]], place % like.shape[1]
            for name, x in self._said(head, states, targets).items():
                made[name][row, column] = x.to(made[name].dtype)
        return replace(tokens, **made)  # type: ignore[arg-type]

    def _nothing_said(self, like: Tensor) -> dict[str, Tensor]:
        """[N, T] and [N, T, k], with NaN and ids 0: of rows that are not distilled."""
        part, found = self.part, {}
        if isinstance(part.estimate, Sampled):
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
        if isinstance(part.estimate, Sampled):
            found["teacher_logp"] = top_k(head, states, targets, 0, self.temperature).logp
        if part.emphasis.kind != "none":
            found["teacher_entropy"] = top_k(head, states, targets, 0).entropy
        if isinstance(part.estimate, TopK) and part.estimate.of == "teacher":
            assert part.estimate.k is not None
            best = top_k(head, states, targets, part.estimate.k, part.temperature)
            found |= {"topk_ids": best.ids, "teacher_topk_logp": best.logprobs}
        return found

    @torch.no_grad()
    def _pass(self, rows: Sequence[Row], packed: bool, width: int) -> tuple[Head, Tensor, Tensor, Tensor]:
        """The teacher's output layer, its hidden states [K, H], the K tokens and their flat places in [N, width]."""
        states, targets, place = completion_states(self.model, rows, packed, width)
        head = Head.of(self.model)
        if self.near is None:
            return head, states, targets, place
        others, _, _ = completion_states(self.near, rows, packed, width)
        return Head.between(head, Head.of(self.near), self.mix), torch.cat([states, others], dim=1), targets, place

    def observer(self, rows: Sequence[TrainingRow], tokens: TokenBatch, packed: bool) -> Observe | None:
        """What a forward pass of the policy over `rows` computes beside its log-probs; None where `say` has it all."""
        part = self.part
        if not part.needs_live():
            return None
        width = max(len(row.tokens) for row in rows)
        fixed, read, expected, _ = self._pass(self.reads(rows, tokens), packed, width)

        def observe(head: Head, states: Tensor, targets: Tensor) -> dict[str, Tensor]:
            if not torch.equal(targets, expected):
                raise RollwayError("train: the teacher was given other tokens than the policy wrote")
            if len(head.weight) != len(fixed.weight):
                raise RollwayError(
                    f"train.teacher: it knows {len(fixed.weight)} tokens and the policy {len(head.weight)}; the two "
                    "need one vocabulary"
                )
            if isinstance(part.estimate, Exact):
                measures = [] if part.clip is None else [partial(_raw, part), partial(_over, part)]
                value, seen = compared_and_measured(
                    head, states, fixed, read, partial(_term, part), measures, part.temperature
                )
                found = {"divergence": value}
                if measures:
                    found |= {"raw_divergence": seen[:, 0], "clipped_entries": seen[:, 1] / len(head.weight)}
                return found
            assert isinstance(part.estimate, TopK)
            assert part.estimate.k is not None
            ids = top_k(head, states.detach(), targets, part.estimate.k, part.temperature).ids
            own = head.values_at(states, targets, (part.temperature,), False, ids, part.temperature)[2]
            with torch.no_grad():
                said = fixed.values_at(read, targets, (part.temperature,), False, ids, part.temperature)[2]
            return {"topk_logp": own, "teacher_topk_logp": said}

        return observe


@torch.no_grad()
def follow(average: PreTrainedModel, policy: PreTrainedModel, rate: float) -> None:
    """average <- (1 - rate) average + rate policy, in place, of all that is trained (SDPO, arXiv 2601.20802)."""
    for mean, now in zip(average.parameters(), policy.parameters(), strict=True):
        if now.requires_grad:
            mean.lerp_(now.to(mean.dtype), rate)


def _term(part: Distill, lp: Tensor, lq: Tensor) -> Tensor:
    each = terms(lp, lq, part.divergence)
    return each if part.clip is None else each.clamp(max=part.clip)


def _raw(part: Distill, lp: Tensor, lq: Tensor) -> Tensor:
    return terms(lp, lq, part.divergence)


def _over(part: Distill, lp: Tensor, lq: Tensor) -> Tensor:
    """1 where the clip acts on an entry."""
    assert part.clip is not None
    return (terms(lp, lq, part.divergence) > part.clip).to(lp.dtype)
