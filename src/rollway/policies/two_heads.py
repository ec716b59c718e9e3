"""A sum over the vocabulary that compares two models' distributions, a block of it at a time.

Neither model's logits [K, V] exist where they are many: one pass takes both log-sum-exps, a second adds up the terms,
and the backward pass makes each block again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rollway.policies.head import Head, Slopes, before_after, block_logits, blocks_of, full_precision

Term = Callable[[Tensor, Tensor], Tensor]
"""From log-probs of the fixed model and of the other one, of one shape, to each entry's share of the sum."""


def compared(
    head: Head, states: Tensor, fixed: Head, fixed_states: Tensor, term: Term, temperature: float = 1.0
) -> Tensor:
    """sum_v term(lp_v, lq_v) [K], lq of `head` at `states` [K, H], lp of `fixed` at `fixed_states` [K, H'], logits /
    temperature; differentiable in `head` and `states`, of any `term` that acts entry by entry.

    With s_v = d term / d lq_v: d sum / d z_v = (s_v - q_v sum_w s_w) / temperature. A second derivative is refused.
    """
    return compared_and_measured(head, states, fixed, fixed_states, term, (), temperature)[0]


def compared_and_measured(
    head: Head,
    states: Tensor,
    fixed: Head,
    fixed_states: Tensor,
    term: Term,
    measures: Sequence[Term],
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """As `compared`, and the sums over the vocabulary of each of `measures`, [K, M], constants: in the same passes."""
    return _Compared.apply(
        *(states, head.weight, head.bias, head, fixed, fixed_states.detach(), term, tuple(measures), temperature)
    )


class _Compared(torch.autograd.Function):
    """See `compared`. Keeps sums [K]."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        fixed: Head,
        fixed_states: Tensor,
        term: Term,
        measures: tuple[Term, ...],
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        # Of two models, and with a few copies more than one model's log-probs have: blocks of half the width.
        blocks = blocks_of(2 * len(states), len(weight), states.device.type)
        ctx.after, ctx.fixed, ctx.term = (head.scale, head.softcap), fixed, term
        ctx.temperature, ctx.blocks = temperature, blocks
        full, other = full_precision(states), full_precision(fixed_states)
        own_log = other_log = full.new_full((len(states),), -torch.inf)
        for block in blocks:
            z, _ = _scaled(full, weight, bias, block, ctx.after, temperature)
            own_log = torch.logaddexp(own_log, z.logsumexp(1))
            other_log = torch.logaddexp(other_log, _of(fixed, other, block, temperature).logsumexp(1))
        value, slopes = torch.zeros_like(own_log), torch.zeros_like(own_log)
        measured = own_log.new_zeros(len(states), len(measures))
        for block in blocks:
            z, _ = _scaled(full, weight, bias, block, ctx.after, temperature)
            lp, lq = _of(fixed, other, block, temperature) - other_log[:, None], z - own_log[:, None]
            each, slope = _with_slope(term, lp, lq, any(ctx.needs_input_grad[:3]))
            value += each.sum(1)
            for number, measure in enumerate(measures):
                measured[:, number] += measure(lp, lq).sum(1)
            if slope is not None:
                slopes += slope.sum(1)
        ctx.save_for_backward(states, weight, bias, fixed_states, own_log, other_log, slopes)
        ctx.mark_non_differentiable(measured)
        return value, measured

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, given: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        states, weight, bias, fixed_states, own_log, other_log, slopes = ctx.saved_tensors
        full, other = full_precision(states), full_precision(fixed_states)
        found = Slopes.of(states, weight, bias, ctx.needs_input_grad[:3])
        for block in ctx.blocks:
            z, logits = _scaled(full, weight, bias, block, ctx.after, ctx.temperature)
            lp = _of(ctx.fixed, other, block, ctx.temperature) - other_log[:, None]
            lq = z.sub_(own_log[:, None]) if z is not logits else z - own_log[:, None]
            _, slope = _with_slope(ctx.term, lp, lq, True)
            assert slope is not None
            slope = slope - lq.exp() * slopes[:, None]
            slope = before_after(slope * (given / ctx.temperature)[:, None], logits, ctx.after)
            found.add(block, slope, full, weight)
        return *found.given(states.dtype), None, None, None, None, None, None


def _scaled(
    states: Tensor, weight: Tensor, bias: Tensor | None, block: slice, after: Any, temperature: float
) -> tuple[Tensor, Tensor]:
    """Logits of a block over the temperature, and the logits themselves."""
    logits = block_logits(states, weight, bias, block, after)
    return (logits if temperature == 1.0 else logits / temperature), logits


def _of(head: Head, states: Tensor, block: slice, temperature: float) -> Tensor:
    return _scaled(states, head.weight, head.bias, block, (head.scale, head.softcap), temperature)[0]


def _with_slope(term: Term, lp: Tensor, lq: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
    """Terms of a block and, where wanted, their derivatives by lq."""
    if not wanted:
        return term(lp, lq), None
    with torch.enable_grad():
        leaf = lq.detach().requires_grad_()
        each = term(lp, leaf)
        slope = torch.autograd.grad(each.sum(), leaf)[0]
    return each.detach(), slope
