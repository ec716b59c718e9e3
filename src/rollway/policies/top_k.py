"""The likeliest tokens of every position with their log-probs, a block of the vocabulary at a time.

Logits of shape [n, V] exist only where they are few, as in `head`: a running log-sum-exp and a running top K go over
blocks of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rollway.errors import RollwayError
from rollway.policies.head import Head, block_logits, blocks_of, full_precision
from rollway.policies.logprobs import Row, completion_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class TopK:
    """What a model says at n positions; nats, float32 (float64 where hidden states are)."""

    logp: Tensor
    """[n] log-prob of the given token."""
    entropy: Tensor
    """[n] over the whole vocabulary."""
    ids: Tensor
    """[n, K] int64, the likeliest first; of equal ones the lower id first."""
    logprobs: Tensor
    """[n, K] their log-probs under the full softmax: what is missing to 1 is the tail's."""


@torch.no_grad()
def top_k(head: Head, states: Tensor, targets: Tensor, k: int, temperature: float = 1.0) -> TopK:
    """All of `TopK` at logits / temperature, for hidden states [n, H] and tokens `targets` [n].

    Raises RollwayError when k is larger than the vocabulary.
    """
    n, vocabulary = len(states), len(head.weight)
    if k > vocabulary:
        raise RollwayError(f"top_k {k} is larger than the vocabulary of {vocabulary} tokens; lower it")
    zero = states.new_zeros(n, dtype=torch.promote_types(states.dtype, torch.float32))
    largest, total, spread, target = zero - torch.inf, zero, zero, zero.clone()
    values, ids = zero[:, None][:, :0], targets.new_empty(n, 0)
    full, after = full_precision(states), (head.scale, head.softcap)
    for block in blocks_of(n, vocabulary, states.device.type):
        logits = block_logits(full, head.weight, head.bias, block, after) / temperature
        new = torch.maximum(largest, logits.amax(dim=1))
        shift = largest - new
        shrink = shift.exp()
        # spread = sum exp(z - m) (z - m), which moves with m; before the first block it is 0, and m is -inf.
        moved = torch.where(total > 0, shrink * (spread + shift * total), 0.0)
        below = logits - new[:, None]
        share = below.exp()
        total, spread = total * shrink + share.sum(dim=1), moved + (share * below).sum(dim=1)
        largest = new
        here = ((targets >= block.start) & (targets < block.stop)).nonzero()[:, 0]
        target[here] = logits[here, targets[here] - block.start]
        if k:
            found, at = _largest(logits, None, min(k, logits.shape[1]))
            values, ids = torch.cat([values, found], dim=1), torch.cat([ids, at + block.start], dim=1)
            values, ids = _largest(values, ids, min(k, values.shape[1]))
    at = ids.argsort(dim=1)
    values, order = values.gather(1, at).sort(dim=1, descending=True, stable=True)
    ids = ids.gather(1, at.gather(1, order))
    log = largest + total.log()
    return TopK(target - log, total.log() - spread / total, ids, values - log[:, None])


def row_top_k(
    model: PreTrainedModel,
    rows: Sequence[Row],
    k: int,
    *,
    temperature: float = 1.0,
    packed: bool = False,
    vocabulary: int | None = None,
) -> list[TopK]:
    """One forward over `rows`; for each row what the model says of its tokens, in their order.

    A position is found by its token: the state that a row's t-th token is predicted from, however long its prompt.
    vocabulary: distributions are over the ids below it, those beyond have no mass; None: over all that the model has.
    Raises RollwayError when a prompt is empty, or k larger than the vocabulary.
    """
    width = max((len(row.tokens) for row in rows), default=0)
    states, targets, _ = completion_states(model, rows, packed, width)
    head = Head.of(model) if vocabulary is None else Head.of(model).first(vocabulary)
    found = top_k(head, states, targets, k, temperature)
    counts = [len(row.tokens) for row in rows]
    pieces = (found.logp, found.entropy, found.ids, found.logprobs)
    return [TopK(*parts) for parts in zip(*(piece.split(counts) for piece in pieces), strict=True)]


def _largest(values: Tensor, ids: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of values [n, v] with their ids [n, v] (None: 0, 1, 2, ...), in no order; of equal
    values those with the lowest ids."""
    found, at = values.topk(k, dim=1, sorted=False)
    # torch.topk does not say which of equal values it takes: rows with more of the least one are sorted.
    unsure = ((values >= found.amin(dim=1, keepdim=True)).sum(dim=1) > k).nonzero()[:, 0]
    if len(unsure):
        some = values[unsure]
        by_id = (
            torch.arange(some.shape[1], device=some.device).expand_as(some) if ids is None else ids[unsure].argsort(1)
        )
        order = some.gather(1, by_id).argsort(dim=1, descending=True, stable=True)[:, :k]
        at[unsure] = by_id.gather(1, order)
        found = values.gather(1, at)
    return found, at if ids is None else ids.gather(1, at)
