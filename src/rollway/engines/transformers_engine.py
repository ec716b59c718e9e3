"""Rollouts in process: batched decoding in which no row waits for another.

Every distinct prompt is encoded once and its keys and values copied to all its samples; a row that ends makes room for
the next request, and when none is left the batch shrinks. Noise is counter-based: tokens do not depend on any of this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rollway.config.rollouts import Sampling
from rollway.engines import kv_cache
from rollway.engines.base import Completion, Request
from rollway.engines.stopping import Stopper
from rollway.errors import RollwayError
from rollway.policies.causal_lm import context_length, stop_ids
from rollway.policies.logprobs import Head
from rollway.sampling import draw, noise

if TYPE_CHECKING:
    from rollway.policies.causal_lm import CausalPolicy

PREFILL_TOKENS = 16384
"""Most prompt tokens encoded in one forward."""
SLACK = 8
"""Finished rows are replaced or dropped when they are 1/SLACK of the batch: doing it costs about one step."""


def generate(
    policy: CausalPolicy,
    requests: Sequence[Request],
    sampling: Sampling,
    *,
    batch: int,
    seed: int,
    entropy: bool = False,
) -> list[Completion]:
    """One completion per request, in their order; `batch` is the most rows decoded at once.

    Raises RollwayError when a prompt is empty or fills the model's context, or two requests share a rollout id.
    """
    budgets = _budgets(requests, sampling, context_length(policy.model))
    if not requests:
        return []
    was_training = policy.model.training
    policy.model.eval()
    try:
        with torch.inference_mode():
            return _Decoding(policy, requests, sampling, budgets, batch, seed, entropy).run()
    finally:
        policy.model.train(was_training)


class _Decoding:
    """The state of one call: what each row of the batch is doing (arrays over slots), and histories over requests."""

    def __init__(
        self,
        policy: CausalPolicy,
        requests: Sequence[Request],
        sampling: Sampling,
        budgets: np.ndarray,
        batch: int,
        seed: int,
        entropy: bool,
    ) -> None:
        self.model, self.requests, self.sampling, self.batch = policy.model, requests, sampling, batch
        self.head = Head.of(self.model)
        if self.head.weight.dtype != torch.float32:
            # Once per call instead of at every step.
            bias = None if self.head.bias is None else self.head.bias.float()
            self.head = Head(self.head.weight.float(), bias, self.head.scale, self.head.softcap)
        vocabulary = self.head.weight.shape[0]
        self.stopper = Stopper(policy.tokenizer, stop_ids(policy), sampling.stop, vocabulary)
        self.budgets = budgets
        self.streams = noise.keys(seed, [request.rollout_id for request in requests])
        n, longest = len(requests), int(budgets.max())
        self.tokens = np.zeros((n, longest), dtype=np.int32)
        self.logprobs = np.zeros((n, longest), dtype=np.float32)
        self.entropies = np.zeros((n, longest), dtype=np.float32) if entropy else None
        self.counts = np.zeros(n, dtype=np.int64)
        self.stopped = np.zeros(n, dtype=bool)
        # Longest prompts first, samples of a prompt side by side.
        prompts = [tuple(request.prompt_tokens) for request in requests]
        self.pending = sorted(range(n), key=lambda i: (-len(prompts[i]), prompts[i], i))
        self.capacity = len(prompts[self.pending[0]]) + min(longest, kv_cache.FIRST_TOKENS)
        self.cache = kv_cache.make(self.model, self.capacity)
        self.owner = np.zeros(0, dtype=np.int64)
        self.lengths = np.zeros(0, dtype=np.int64)
        self.alive = np.zeros(0, dtype=bool)
        self.next = torch.zeros(0, dtype=torch.long, device=self.model.device)

    def run(self) -> list[Completion]:
        while self._admit():
            states = self.cache.step(self.next, self.lengths)
            self.lengths += 1
            self._emit(states, np.arange(len(self.owner)))
        return [self._completion(i) for i in range(len(self.requests))]

    def _admit(self) -> bool:
        """Fills free slots with pending requests, or drops them; False when nothing is left to do."""
        while self.pending or self.alive.any():
            idle = len(self.alive) - int(self.alive.sum())
            if self.pending:
                free = self.batch if not self.alive.any() else idle
                if free < max(1, self.batch // SLACK) or (self.alive.any() and not self.cache.mixed):
                    break
                self._start(min(free, len(self.pending)))
                # A first token may already end its row.
                continue
            if idle >= max(1, len(self.alive) // SLACK):
                self._keep(np.flatnonzero(self.alive))
            break
        return bool(self.alive.any())

    def _start(self, count: int) -> None:
        if not self.alive.any():
            self._reset()
        if not self.cache.mixed:
            sizes = [len(self.requests[i].prompt_tokens) for i in self.pending[:count]]
            count = sizes.count(sizes[0])
        taken, self.pending = self.pending[:count], self.pending[count:]
        if not len(self.alive):
            self.owner, self.lengths = np.full(count, -1), np.zeros(count, dtype=np.int64)
            self.alive = np.zeros(count, dtype=bool)
            self.next = torch.zeros(count, dtype=torch.long, device=self.model.device)
        slots = np.flatnonzero(~self.alive)[:count]
        self.owner[slots] = taken
        self.lengths[slots] = [len(self.requests[i].prompt_tokens) for i in taken]
        self.alive[slots] = True
        for part in self._prefill_parts(slots):
            self._prefill(part)

    def _reset(self) -> None:
        self.cache = kv_cache.make(self.model, self.capacity)
        self.owner, self.lengths, self.alive = self.owner[:0], self.lengths[:0], self.alive[:0]

    def _prefill_parts(self, slots: np.ndarray) -> list[np.ndarray]:
        """Cuts slots where the prompt length changes, or (mixed caches only) the distinct prompts are too many."""
        parts: list[list[int]] = []
        prompts: set[tuple[int, ...]] = set()
        for slot in slots:
            prompt = tuple(self.requests[self.owner[slot]].prompt_tokens)
            tokens = len(prompt) * (len(prompts | {prompt}))
            same = bool(parts) and self.lengths[parts[-1][-1]] == len(prompt)
            if not same or (self.cache.mixed and tokens > PREFILL_TOKENS):
                parts.append([])
                prompts = set()
            parts[-1].append(int(slot))
            prompts.add(prompt)
        return [np.array(part) for part in parts]

    def _prefill(self, slots: np.ndarray) -> None:
        distinct: dict[tuple[int, ...], int] = {}
        source = [distinct.setdefault(tuple(self.requests[i].prompt_tokens), len(distinct)) for i in self.owner[slots]]
        device = self.model.device
        index = torch.tensor(source, device=device)
        prompts = torch.tensor(list(distinct), device=device)
        states = self.cache.prefill(prompts, index, torch.from_numpy(slots).to(device), len(self.owner))
        self._emit(states[index], slots)

    def _emit(self, states: Tensor, slots: np.ndarray) -> None:
        """Draws the next token of the rows in `slots` from their states [K, H]; records it where the row is alive."""
        owner = self.owner[slots]
        counts = self.counts[owner]
        logits = self.head.logits(states)
        uniforms = torch.from_numpy(noise.uniform(self.streams[owner], counts)).to(logits.device)
        drawn, logp = draw.draw(logits, uniforms, self.sampling)
        if len(slots) == len(self.owner):
            self.next = drawn
        else:
            self.next[torch.from_numpy(slots).to(drawn.device)] = drawn
        new = drawn.cpu().numpy()
        live = self.alive[slots]
        if not live.all():
            slots, owner, counts, new = slots[live], owner[live], counts[live], new[live]
        self.tokens[owner, counts] = new
        self.logprobs[owner, counts] = logp.float().cpu().numpy()[live]
        if self.entropies is not None:
            self.entropies[owner, counts] = draw.entropy(logits).cpu().numpy()[live]
        counts = counts + 1
        self.counts[owner] = counts
        stops = self.stopper.stops(new, self.tokens, owner, counts)
        self.stopped[owner] = stops
        ended = stops | (counts >= self.budgets[owner])
        if ended.any():
            self.alive[slots[ended]] = False

    def _keep(self, slots: np.ndarray) -> None:
        rows = torch.from_numpy(slots).to(self.model.device)
        self.cache.select(rows)
        self.owner, self.lengths, self.alive = self.owner[slots], self.lengths[slots], self.alive[slots]
        self.next = self.next[rows]

    def _completion(self, i: int) -> Completion:
        n = int(self.counts[i])
        return Completion(
            self.tokens[i, :n].tolist(),
            self.logprobs[i, :n].tolist(),
            "stop" if self.stopped[i] else "length",
            None if self.entropies is None else self.entropies[i, :n].tolist(),
        )


def _budgets(requests: Sequence[Request], sampling: Sampling, context: int | None) -> np.ndarray:
    """Most tokens [N] of each completion."""
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
                    f"rollout {request.rollout_id}: its prompt has {size} tokens, the policy's context holds "
                    f"{context}, prompt and completion together; leave long prompts out, or use a longer context"
                )
            budgets[i] = min(budgets[i], context - size)
    return budgets
