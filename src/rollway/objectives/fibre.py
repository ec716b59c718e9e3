"""Gated ratios of FiberPO (arXiv 2603.08239): trajectory aggregate and token residual.

x [N, T]: log-ratios, mask [N, T] bool. Nothing is detached. Rows without tokens enter no aggregate.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Level:
    """Budgets C+ (up) and C- (down) of one level, nats."""

    up: float
    down: float


def rollback_gate(x: Tensor, budget: float, size: Tensor) -> Tensor:
    """Identity within the budget, slope -T until (1 + 1/T) budget, then 0 (eq. 2). size: T, broadcast to x."""
    back = x.sign() * (size + 1) * budget - size * x
    out = torch.where(x.abs() <= budget, x, back)
    return torch.where(x.abs() < (1 + 1 / size) * budget, out, 0.0)


def channel_aggregates(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """s+ and s- [N]: mean over a row's tokens of the risen and the fallen part. Zero counts as risen."""
    rose = x >= 0
    count = mask.sum(1).clamp(min=1)
    up = torch.where(mask & rose, x, 0.0).sum(1) / count
    down = torch.where(mask & ~rose, -x, 0.0).sum(1) / count
    return up, down


def fibre_ratio(x: Tensor, mask: Tensor, level: Level, residual: float) -> Tensor:
    """exp(gated base + clipped residual) [N, T] (eqs. 3-5)."""
    up, down = channel_aggregates(x, mask)
    size = token_counts(mask, x)
    base = rollback_gate(up, level.up, size) - rollback_gate(down, level.down, size)
    return _total(base, x, up, down, residual, mask)


def gate_state(x: Tensor, budget: float, size: Tensor) -> Tensor:
    """int64: 0 where `rollback_gate` passes x on, 1 where it rolls it back, 2 where it gives 0."""
    return (x.abs() > budget).long() + (x.abs() >= (1 + 1 / size) * budget).long()


def clipped_residuals(x: Tensor, mask: Tensor, residual: float) -> Tensor:
    """bool [N, T]: tokens whose residual around their trajectory exceeds its width."""
    up, down = channel_aggregates(x, mask)
    return mask & (_residual(x, up, down).abs() > residual)


def fibre_domain_ratio(
    x: Tensor,
    mask: Tensor,
    domain: Tensor,
    group: Tensor,
    levels: tuple[Level, Level, Level],
    residual: float,
) -> Tensor:
    """The four-level form (reconstructed): domain, prompt group and trajectory gated around one another.

    domain, group [N]. A group belongs to the domain of its rows; one that spans domains raises ValueError.
    """
    live = mask.any(1)
    if not bool(live.any()):
        return torch.where(mask, x, 0.0).exp()
    up, down = channel_aggregates(x, mask)
    base = x.new_zeros(len(x))
    for sign, s in ((1.0, up), (-1.0, down)):
        budgets = [level.up if sign > 0 else level.down for level in levels]
        gates = domain_levels(s, mask, domain, group)
        gated = sum(
            (rollback_gate(g.value, budget, g.size)[g.of_row] for g, budget in zip(gates, budgets, strict=True)),
            start=x.new_zeros(()),
        )
        base = base.index_put((live.nonzero()[:, 0],), sign * gated, accumulate=True)
    return _total(base, x, up, down, residual, mask)


@dataclass(frozen=True)
class LevelInput:
    """What one level's gate sees: a value and a token total per unit, and each live row's unit."""

    value: Tensor
    size: Tensor
    of_row: Tensor


def domain_levels(s: Tensor, mask: Tensor, domain: Tensor, group: Tensor) -> tuple[LevelInput, LevelInput, LevelInput]:
    """Domains, prompt groups around their domain, and live rows around their group, of one channel's aggregates s [N].

    Raises ValueError when a group spans domains.
    """
    live = mask.any(1)
    group_ids, of_group = torch.unique(group[live], return_inverse=True)
    domain_ids, of_domain = torch.unique(domain[live], return_inverse=True)
    if len(torch.unique(of_group * len(domain_ids) + of_domain)) != len(group_ids):
        raise ValueError("a prompt group spans several domains; give each prompt one domain")
    group_domain = of_domain.new_zeros(len(group_ids)).scatter_(0, of_group, of_domain)
    sizes, own = token_counts(mask, s)[live], s[live]
    s_group = _mean_by(own, of_group, len(group_ids))
    s_domain = _mean_by(s_group, group_domain, len(domain_ids))
    return (
        LevelInput(s_domain, _sum_by(sizes, of_domain, len(domain_ids)), of_domain),
        LevelInput(s_group - s_domain[group_domain], _sum_by(sizes, of_group, len(group_ids)), of_group),
        LevelInput(own - s_group[of_group], sizes, torch.arange(len(own), device=s.device)),
    )


def total_variation_ratio(x: Tensor, mask: Tensor, delta: float) -> Tensor:
    """1 + clip(r - 1, -B, B), B = max(T delta - sum over the row's other tokens of |r - 1|, 0) (APC-Obj, eq. 3)."""
    moved = torch.where(mask, x.exp() - 1, 0.0)
    spent = moved.abs()
    room = (mask.sum(1, keepdim=True) * delta - (spent.sum(1, keepdim=True) - spent)).clamp(min=0.0)
    return 1 + torch.minimum(torch.maximum(moved, -room), room)


def _total(base: Tensor, x: Tensor, up: Tensor, down: Tensor, residual: float, mask: Tensor) -> Tensor:
    same = _residual(x, up, down)
    opposite = torch.where(x >= 0, -down[:, None], up[:, None])
    log_f = same.clamp(-residual, residual) - opposite.clamp(-residual, residual)
    return torch.where(mask, base[:, None] + log_f, 0.0).exp()


def _residual(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return torch.where(x >= 0, x - up[:, None], x + down[:, None])


def token_counts(mask: Tensor, x: Tensor) -> Tensor:
    """T [N] of each row as numbers of the type of x, at least 1."""
    return mask.sum(1).clamp(min=1).to(x.dtype)


def _mean_by(x: Tensor, index: Tensor, size: int) -> Tensor:
    return _sum_by(x, index, size) / torch.bincount(index, minlength=size).clamp(min=1)


def _sum_by(x: Tensor, index: Tensor, size: int) -> Tensor:
    return x.new_zeros(size).index_add(0, index, x)
