"""Tokens that a policy might have written in another one's place: drawn from its logits, or all of them at once.

Logits of shape [n, V] exist only where they are few, as in `head`: a block of the vocabulary is made when it is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rollway.policies.head import Head, Slopes, before_after, block_logits, blocks_of, full_precision

_INSIDE = 1.0 - 2.0**-30
"""Largest share of a block's probability: rounding never carries a draw into the next position's numbers."""


@dataclass(frozen=True)
class Counted:
    """What candidates say of n positions and their own tokens (OTR, arXiv 2509.26313)."""

    hit: Tensor
    """[n] share of the candidates that are the position's own token; a constant."""
    missed: Tensor
    """[n] mean over all candidates of the log-prob of those that are not; differentiable."""


@torch.no_grad()
def draw(head: Head, states: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """Ids [n, K], each drawn from softmax(logits / temperature) at its position, with replacement.

    uniform [n, K]: float64 numbers in (0, 1), on the device of the states [n, H]. The distribution function is inverted
    at them: first among the blocks of the vocabulary, then within one. Equal numbers give equal ids.
    """
    full, after = full_precision(states), (head.scale, head.softcap)
    # Probabilities are float64 beside the logits.
    blocks = blocks_of(2 * len(states), len(head.weight), states.device.type)

    def logits(block: slice) -> Tensor:
        return block_logits(full, head.weight, head.bias, block, after) / temperature

    masses = torch.stack([logits(block).logsumexp(1) for block in blocks], dim=1).double()
    edges = masses.softmax(1).cumsum(1)
    edges = edges / edges[:, -1:]
    chosen = torch.searchsorted(edges, uniform.contiguous(), right=True).clamp(max=len(blocks) - 1)
    below = torch.nn.functional.pad(edges, (1, 0)).gather(1, chosen)
    share = (uniform - below) / (edges.gather(1, chosen) - below)
    ids = torch.zeros_like(chosen)
    for number, block in enumerate(blocks):
        rows, columns = (chosen == number).nonzero(as_tuple=True)
        if not len(rows):
            continue
        within = logits(block).double().softmax(1).cumsum(1)
        # All positions on one line, so that one search serves them: position i has the numbers from i to i + 1.
        line = within / within[:, -1:] + torch.arange(len(within), device=within.device)[:, None]
        wanted = rows + share[rows, columns].clamp(0.0, _INSIDE)
        found = torch.searchsorted(line.flatten(), wanted, right=True) - rows * within.shape[1]
        ids[rows, columns] = found.clamp(0, within.shape[1] - 1) + block.start
    return ids


def of_drawn(head: Head, states: Tensor, targets: Tensor, ids: Tensor, temperature: float) -> Counted:
    """Of candidates `ids` [n, K], by log-probs at logits / temperature; states [n, H], targets [n]."""
    logp = head.values_at(states, targets, (temperature,), False, ids, temperature)[2]
    hits = ids == targets[:, None]
    return Counted(hits.to(logp).mean(1), torch.where(hits, 0.0, logp).mean(1))


def of_all(head: Head, states: Tensor, targets: Tensor, temperature: float, kappa: float) -> Counted:
    """Of infinitely many candidates, drawn at logits / (temperature kappa): each token counts as its probability p'.

    With p of logits / temperature: hit = p'(y), missed = sum_{a != y} p'(a) ln p(a). p' is a constant, so that
    d missed / d z_v = (p'_v [v != y] - p_v (1 - p'(y))) / temperature. A second derivative is refused.
    """
    hit, missed = _OfAll.apply(
        states, head.weight, head.bias, targets, (head.scale, head.softcap), temperature, temperature * kappa
    )
    return Counted(hit, missed)


class _OfAll(torch.autograd.Function):
    """See `of_all`. One pass over the vocabulary and one back; keeps sums [n]."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        after: tuple[float, float | None],
        temperature: float,
        heated: float,
    ) -> tuple[Tensor, Tensor]:
        full, blocks = full_precision(states), blocks_of(len(states), len(weight), states.device.type)
        largest = full.new_full((len(states),), -torch.inf)
        total, total_heated, spread = (torch.zeros_like(largest) for _ in range(3))
        own = torch.zeros_like(largest)
        for block in blocks:
            logits = block_logits(full, weight, bias, block, after)
            new = torch.maximum(largest, logits.amax(dim=1))
            # Before the first block all sums are 0 and the largest logit is -inf.
            shift = torch.where(largest.isinf(), 0.0, largest - new)
            shrink = (shift / heated).exp()
            spread = shrink * (spread + shift * total_heated)
            total, total_heated, largest = total * (shift / temperature).exp(), total_heated * shrink, new
            below = logits - new[:, None]
            share = (below / heated).exp()
            total = total + (below / temperature).exp().sum(1)
            total_heated, spread = total_heated + share.sum(1), spread + share.mul_(below).sum(1)
            here = ((targets >= block.start) & (targets < block.stop)).nonzero()[:, 0]
            own[here] = logits[here, targets[here] - block.start]
        log, log_heated = total.log(), total_heated.log()
        hit = ((own - largest) / heated - log_heated).exp()
        every = spread / total_heated / temperature - log
        missed = every - hit * ((own - largest) / temperature - log)
        ctx.after, ctx.temperature, ctx.heated, ctx.blocks = after, temperature, heated, blocks
        ctx.mark_non_differentiable(hit)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(states, weight, bias, targets, largest, log, log_heated, hit)
        return hit, missed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor | None, given: Tensor | None) -> tuple[Tensor | None, ...]:
        if given is None:
            return (None,) * 7
        states, weight, bias, targets, largest, log, log_heated, hit = ctx.saved_tensors
        full = full_precision(states)
        found = Slopes.of(states, weight, bias, ctx.needs_input_grad[:3])
        for block in ctx.blocks:
            logits = block_logits(full, weight, bias, block, ctx.after)
            below = logits - largest[:, None]
            slope = (below / ctx.heated - log_heated[:, None]).exp()
            here = ((targets >= block.start) & (targets < block.stop)).nonzero()[:, 0]
            slope[here, targets[here] - block.start] = 0.0
            slope = slope - (below / ctx.temperature - log[:, None]).exp() * (1.0 - hit)[:, None]
            slope = before_after(slope * (given / ctx.temperature)[:, None], logits, ctx.after)
            found.add(block, slope, full, weight)
        return *found.given(states.dtype), None, None, None, None
