"""Rollouts in process: batched decoding in which no row waits for another.

Every distinct prompt is encoded once and its keys and values copied to all its samples; a row that ends makes room for
the next request, and when none is left the batch shrinks. Noise is counter-based: tokens do not depend on any of this.
docs/engines.md describes the loop and counts its cost.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rollway.config.rollouts import Sampling
from rollway.engines import kv_cache
from rollway.engines.base import Completion, Request, TeacherShare
from rollway.engines.decoding_trial import takes_slots
from rollway.engines.fused_qwen3 import FusedQwen3, fused
from rollway.engines.stopping import Stopper
from rollway.errors import RollwayError, is_out_of_memory
from rollway.policies.causal_lm import context_length, stop_ids
from rollway.policies.logprobs import Head
from rollway.runtime.notice import notice, tick
from rollway.sampling import draw, noise

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rollway.policies.causal_lm import CausalPolicy

PREFILL_TOKENS = 16384
"""Most prompt tokens encoded in one forward."""
REFILL = 8
"""Free slots are refilled when they are 1/REFILL of the batch: encoding prompts costs about one step."""
ROWS_PER_THREAD = 64
"""Fewest rows that one thread decodes by itself: matrix products of fewer are slow."""


def generate(
    policy: CausalPolicy,
    requests: Sequence[Request],
    sampling: Sampling,
    *,
    batch: int,
    seed: int,
    entropy: bool = False,
    teacher: TeacherShare | None = None,
) -> list[Completion]:
    """One completion per request, in their order; `batch` is the most rows decoded at once. teacher: a model with a
    share in every token; the entropies are the policy's own.

    Out of memory, the rows that had not ended are drawn again in batches of half the size. Raises RollwayError when a
    prompt is empty or fills the model's context, two requests share a rollout id, one row alone needs too much memory,
    a log-prob is not finite, or no cache decodes this architecture right.
    """
    models = [policy.model] if teacher is None else [policy.model, teacher.policy.model]
    whose = ("the policy", "the teacher of rollout.mix")
    windows = [
        _budgets(requests, sampling, context_length(model), who) for model, who in zip(models, whose, strict=False)
    ]
    budgets = np.minimum.reduce(windows)
    if not requests:
        return []
    drawn = _Drawn.empty(len(requests), int(budgets.max()), entropy)
    streams = noise.keys(seed, [request.rollout_id for request in requests])
    were_training = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        with torch.inference_mode():
            work = _Work(policy, requests, sampling, budgets, streams, teacher)
            while not drawn.ended.all():
                batch = min(batch, int((~drawn.ended).sum()))
                if not _decode(work, drawn, batch):
                    batch = _smaller(work, drawn, batch)
    finally:
        for model, was_training in zip(models, were_training, strict=True):
            model.train(was_training)
    return [drawn.completion(i) for i in range(len(requests))]


@dataclass(frozen=True)
class _Drawn:
    """What was drawn so far, by request. Threads write to rows of their own."""

    tokens: np.ndarray
    logprobs: np.ndarray
    entropies: np.ndarray | None
    counts: np.ndarray
    stopped: np.ndarray
    ended: np.ndarray

    @staticmethod
    def empty(n: int, longest: int, entropy: bool) -> _Drawn:
        # Memory that is never written to is never taken.
        return _Drawn(
            np.zeros((n, longest), dtype=np.int32),
            np.zeros((n, longest), dtype=np.float32),
            np.zeros((n, longest), dtype=np.float32) if entropy else None,
            np.zeros(n, dtype=np.int64),
            np.zeros(n, dtype=bool),
            np.zeros(n, dtype=bool),
        )

    def completion(self, i: int) -> Completion:
        n = int(self.counts[i])
        return Completion(
            self.tokens[i, :n].tolist(),
            self.logprobs[i, :n].tolist(),
            "stop" if self.stopped[i] else "length",
            None if self.entropies is None else self.entropies[i, :n].tolist(),
        )


class _Work:
    """What all threads read: the policy in the form that decoding needs, and what is asked of it."""

    def __init__(
        self,
        policy: CausalPolicy,
        requests: Sequence[Request],
        sampling: Sampling,
        budgets: np.ndarray,
        streams: np.ndarray,
        teacher: TeacherShare | None,
    ) -> None:
        self.sampling, self.budgets, self.streams = sampling, budgets, streams
        self.device = policy.model.device
        self.models = [_Model.of(policy.model)]
        self.share = 0.0
        if teacher is not None:
            self.models.append(_Model.of(teacher.policy.model))
            self.share = teacher.share
        self.stopper = Stopper(policy.tokenizer, stop_ids(policy), sampling.stop, self.models[0].head.weight.shape[0])
        self.requests = requests
        self.prompts = [tuple(request.prompt_tokens) for request in requests]
        # Longest prompts first, samples of a prompt side by side.
        self.order = sorted(range(len(requests)), key=lambda i: (-len(self.prompts[i]), self.prompts[i], i))
        self.stop = threading.Event()


@dataclass(frozen=True)
class _Model:
    """A model in the form that decoding needs."""

    model: PreTrainedModel
    head: Head
    fused: FusedQwen3 | None
    slots: bool
    """Rows of different lengths may share a batch."""

    @staticmethod
    def of(model: PreTrainedModel) -> _Model:
        head = Head.of(model)
        if head.weight.dtype != torch.float32:
            # Once per call instead of at every step.
            bias = None if head.bias is None else head.bias.float()
            head = Head(head.weight.float(), bias, head.scale, head.softcap)
        own = fused(model)
        return _Model(model, head, own, own is not None or takes_slots(model))


def _decode(work: _Work, drawn: _Drawn, batch: int) -> bool:
    """Decodes what has not ended, at most `batch` rows at once. False: memory ran out, and not all have ended."""
    order = [i for i in work.order if not drawn.ended[i]]
    threads = torch.get_num_threads()
    small = all(part.fused is not None for part in work.models)
    workers = max(1, min(threads, batch // ROWS_PER_THREAD)) if small else 1
    if workers == 1:
        return _attempt(work, drawn, order, batch)
    # The operations of a small model are too short to be cut among threads: each decodes rows of its own instead.
    torch.set_num_threads(threads // workers)
    try:
        with ThreadPoolExecutor(workers) as pool:
            try:
                shares = _shares([work.prompts[i] for i in order], workers)
                parts = [[order[k] for k in share] for share in shares]
                attempts = [pool.submit(_attempt, work, drawn, part, batch // workers) for part in parts]
                enough = [attempt.result() for attempt in attempts]
                return all(enough)
            except BaseException:
                work.stop.set()
                raise
    finally:
        torch.set_num_threads(threads)


def _shares(prompts: list[tuple[int, ...]], workers: int) -> list[list[int]]:
    """Places 0 .. N - 1 dealt to workers: prompts in turn with all their samples, or samples where prompts are few."""
    index: dict[tuple[int, ...], int] = {}
    ranks = [index.setdefault(prompt, len(index)) for prompt in prompts]
    if len(index) < 2 * workers:
        ranks = list(range(len(prompts)))
    return [[k for k, rank in enumerate(ranks) if rank % workers == worker] for worker in range(workers)]


def _attempt(work: _Work, drawn: _Drawn, order: list[int], batch: int) -> bool:
    try:
        with torch.inference_mode():
            _Decoding(work, drawn, order, batch).run()
    except Exception as error:
        if _out_of_memory(error):
            return False
        work.stop.set()
        raise
    return True


def _out_of_memory(error: BaseException) -> bool:
    if is_out_of_memory(error):
        return True
    # Where a CUDA graph was being recorded, ending that fails in turn.
    return error.__context__ is not None and _out_of_memory(error.__context__)


def _smaller(work: _Work, drawn: _Drawn, batch: int) -> int:
    """Half the batch, with a notice. Raises RollwayError where there is no smaller one."""
    left = np.flatnonzero(~drawn.ended)
    if batch == 1:
        prompt = max(len(work.prompts[i]) for i in left)
        raise RollwayError(
            f"rollout.engine: out of memory decoding one rollout at a time (prompts of up to {prompt} tokens, "
            f"completions of up to {int(work.budgets[left].max())}); lower rollout.sampling.max_tokens, leave long "
            "prompts out, or use a device with more memory"
        )
    if work.device.type == "cuda":
        torch.cuda.empty_cache()
    notice(
        f"out of memory decoding {batch} rollouts at once: {len(left)} that had not ended are drawn again, "
        f"{batch // 2} at once; lower rollout.engine.batch to save the attempt"
    )
    return batch // 2


class _Decoding:
    """What each row of one batch is doing: arrays over its slots."""

    owner: np.ndarray
    """Index of the request."""
    lengths: np.ndarray
    """Tokens in the cache."""
    alive: np.ndarray
    """False once the row has ended."""
    next: Tensor
    """The token drawn last, not yet in the cache."""
    mixed: bool
    """Rows of different lengths may share the batch."""
    drop: int
    """Ended rows are dropped when they are 1/drop of the batch."""

    def __init__(self, work: _Work, drawn: _Drawn, order: list[int], batch: int) -> None:
        self.work, self.drawn, self.pending, self.batch = work, drawn, order, batch
        self.device = work.device
        drawn.counts[order] = 0
        self.longest = max(len(work.prompts[i]) for i in order), int(work.budgets[order].max())
        self._open(0)

    def run(self) -> None:
        while self._admit() and not self.work.stop.is_set():
            # Rows that have ended go along until they are dropped, no further than the others.
            self.lengths = np.minimum(self.lengths, self.lengths[self.alive].max())
            states = [cache.step(self.next, self.lengths) for cache in self.caches]
            self.lengths += 1
            self._emit(states, np.arange(len(self.owner)))

    def _admit(self) -> bool:
        """Fills free slots with pending requests, or drops them; False when nothing is left to do."""
        while self.pending or self.alive.any():
            idle = len(self.alive) - int(self.alive.sum())
            if self.pending:
                free = self.batch if not self.alive.any() else idle
                if free < max(1, self.batch // REFILL) or (self.alive.any() and not self.mixed):
                    break
                self._start(min(free, len(self.pending)))
                # A first token may already end its row.
                continue
            if idle >= max(1, len(self.alive) // self.drop):
                self._drop()
            break
        return bool(self.alive.any())

    def _open(self, count: int) -> None:
        """A new batch of `count` free slots."""
        self.caches = [
            kv_cache.make(part.model, *self.longest, part.fused, slots=part.slots) for part in self.work.models
        ]
        self.mixed = all(cache.mixed for cache in self.caches)
        self.drop = min(cache.drop for cache in self.caches)
        self.owner, self.lengths = np.full(count, -1), np.zeros(count, dtype=np.int64)
        self.alive = np.zeros(count, dtype=bool)
        self.next = torch.zeros(count, dtype=torch.long, device=self.device)

    def _start(self, count: int) -> None:
        if not self.mixed:
            sizes = [len(self.work.prompts[i]) for i in self.pending[:count]]
            count = sizes.count(sizes[0])
        taken, self.pending = self.pending[:count], self.pending[count:]
        if not self.alive.any():
            self._open(count)
        slots = np.flatnonzero(~self.alive)[:count]
        self.owner[slots] = taken
        self.lengths[slots] = [len(self.work.prompts[i]) for i in taken]
        self.alive[slots] = True
        for part in self._prefill_parts(slots):
            self._prefill(part)

    def _prefill_parts(self, slots: np.ndarray) -> list[np.ndarray]:
        """Cuts slots where the prompt length changes, or (mixed caches only) the distinct prompts are too many."""
        parts: list[list[int]] = []
        prompts: set[tuple[int, ...]] = set()
        for slot in slots:
            prompt = self.work.prompts[self.owner[slot]]
            tokens = len(prompt) * (len(prompts | {prompt}))
            same = bool(parts) and self.lengths[parts[-1][-1]] == len(prompt)
            if not same or (self.mixed and tokens > PREFILL_TOKENS):
                parts.append([])
                prompts = set()
            parts[-1].append(int(slot))
            prompts.add(prompt)
        return [np.array(part) for part in parts]

    def _prefill(self, slots: np.ndarray) -> None:
        distinct: dict[tuple[int, ...], int] = {}
        source = [distinct.setdefault(self.work.prompts[i], len(distinct)) for i in self.owner[slots]]
        index = torch.tensor(source, device=self.device)
        prompts = torch.tensor(list(distinct), device=self.device)
        into, batch = torch.from_numpy(slots).to(self.device), len(self.owner)
        self._emit([cache.prefill(prompts, index, into, batch)[index] for cache in self.caches], slots)

    def _emit(self, states: list[Tensor], slots: np.ndarray) -> None:
        """Draws the next token of the rows in `slots` from their states [K, H] in each model; records it where the row
        is alive."""
        work, drawn = self.work, self.drawn
        owner = self.owner[slots]
        counts = drawn.counts[owner]
        logits, *others = [part.head.logits(x) for part, x in zip(work.models, states, strict=True)]
        uniforms = torch.from_numpy(noise.uniform(work.streams[owner], counts)).to(logits.device)
        tokens, logp = draw.draw(logits, uniforms, work.sampling, (others[0], work.share) if others else None)
        if len(slots) == len(self.owner):
            self.next = tokens
        else:
            self.next[torch.from_numpy(slots).to(tokens.device)] = tokens
        new = tokens.cpu().numpy()
        live = self.alive[slots]
        if not live.all():
            slots, owner, counts, new = slots[live], owner[live], counts[live], new[live]
        drawn.tokens[owner, counts] = new
        drawn.logprobs[owner, counts] = found = logp.float().cpu().numpy()[live]
        if not np.isfinite(found).all():
            row = int(np.flatnonzero(~np.isfinite(found))[0])
            finite = bool(logits[torch.from_numpy(live).to(logits.device)][row].isfinite().all())
            raise self._not_finite(int(owner[row]), "teacher" if others and finite else "policy")
        if drawn.entropies is not None:
            drawn.entropies[owner, counts] = draw.entropy(logits).cpu().numpy()[live]
        counts = counts + 1
        drawn.counts[owner] = counts
        stops = work.stopper.stops(new, drawn.tokens, owner, counts)
        drawn.stopped[owner] = stops
        ended = stops | (counts >= work.budgets[owner])
        if ended.any():
            self.alive[slots[ended]] = False
            drawn.ended[owner[ended]] = True
            tick(int(ended.sum()), tokens=int(counts[ended].sum()))

    def _not_finite(self, request: int, whose: str) -> RollwayError:
        cause = "training diverged in the round before, or the model is damaged"
        if whose == "teacher":
            cause = "rollout.mix.model is damaged, or its dtype is too small for it"
        return RollwayError(
            f"rollout {self.work.requests[request].rollout_id}: the log-prob of its token "
            f"{int(self.drawn.counts[request]) + 1} is not finite; the {whose}'s weights hold NaN or overflow: {cause}"
        )

    def _drop(self) -> None:
        """Gives up the slots of ended rows; the last rows that are alive move into their places."""
        count = int(self.alive.sum())
        rows = np.arange(count)
        rows[~self.alive[:count]] = count + np.flatnonzero(self.alive[count:])
        for cache in self.caches:
            cache.keep(rows)
        self.owner, self.lengths, self.alive = self.owner[rows], self.lengths[rows], self.alive[rows]
        self.next = self.next[torch.from_numpy(rows).to(self.device)]


def _budgets(requests: Sequence[Request], sampling: Sampling, context: int | None, whose: str) -> np.ndarray:
    """Most tokens [N] of each completion. context: the window in tokens, and `whose` it is, for messages."""
    if len({request.rollout_id for request in requests}) != len(requests):
        raise RollwayError("two rollout requests share a rollout_id; they would draw the same noise")
    budgets = np.full(len(requests), sampling.max_tokens, dtype=np.int64)
    for i, request in enumerate(requests):
        size = len(request.prompt_tokens)
        if size == 0:
            raise RollwayError(f"rollout {request.rollout_id}: its prompt has no token")
        if context is not None:
            if size >= context:
                raise RollwayError(
                    f"rollout {request.rollout_id}: its prompt has {size} tokens, {whose}'s context holds "
                    f"{context}, prompt and completion together; leave long prompts out, or use a longer context"
                )
            budgets[i] = min(budgets[i], context - size)
    return budgets
