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
    size = _sizes(mask, x)
    base = rollback_gate(up, level.up, size) - rollback_gate(down, level.down, size)
    return _total(base, x, up, down, residual, mask)


def fibre_regimes(x: Tensor, mask: Tensor, level: Level, residual: float) -> dict[str, Tensor]:
    """What to watch, each [N, T]: s+ and s-, rows rolled back or zeroed in either channel, clipped residuals."""
    x = x.detach()
    up, down = (s[:, None].expand_as(x) for s in channel_aggregates(x, mask))
    size = _sizes(mask, x)[:, None]
    zeroed = (up >= (1 + 1 / size) * level.up) | (down >= (1 + 1 / size) * level.down)
    beyond = (up > level.up) | (down > level.down)
    clipped = torch.where(x >= 0, x - up, x + down).abs() > residual
    shares = {"fibre/rolled_back_share": beyond & ~zeroed, "fibre/zeroed_share": zeroed, "fibre/clipped_share": clipped}
    return {"fibre/up": up, "fibre/down": down} | {name: share.to(x) for name, share in shares.items()}


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
    group_ids, of_group = torch.unique(group[live], return_inverse=True)
    domain_ids, of_domain = torch.unique(domain[live], return_inverse=True)
    if len(torch.unique(of_group * len(domain_ids) + of_domain)) != len(group_ids):
        raise ValueError("a prompt group spans several domains; give each prompt one domain")
    group_domain = of_domain.new_zeros(len(group_ids)).scatter_(0, of_group, of_domain)
    sizes = _sizes(mask, x)[live]
    group_sizes = sizes.new_zeros(len(group_ids)).index_add(0, of_group, sizes)
    domain_sizes = sizes.new_zeros(len(domain_ids)).index_add(0, of_domain, sizes)
    up, down = channel_aggregates(x, mask)
    base = x.new_zeros(len(x))
    for sign, s_all, which in ((1.0, up, "up"), (-1.0, down, "down")):
        budgets = [level.up if which == "up" else level.down for level in levels]
        s = s_all[live]
        s_group = _mean_by(s, of_group, len(group_ids))
        s_domain = _mean_by(s_group, group_domain, len(domain_ids))
        gated = (
            rollback_gate(s_domain, budgets[0], domain_sizes)[of_domain]
            + rollback_gate(s_group - s_domain[group_domain], budgets[1], group_sizes)[of_group]
            + rollback_gate(s - s_group[of_group], budgets[2], sizes)
        )
        base = base.index_put((live.nonzero()[:, 0],), sign * gated, accumulate=True)
    return _total(base, x, up, down, residual, mask)


def total_variation_ratio(x: Tensor, mask: Tensor, delta: float) -> Tensor:
    """1 + clip(r - 1, -B, B), B = max(T delta - sum over the row's other tokens of |r - 1|, 0) (APC-Obj, eq. 3)."""
    moved = torch.where(mask, x.exp() - 1, 0.0)
    spent = moved.abs()
    room = (mask.sum(1, keepdim=True) * delta - (spent.sum(1, keepdim=True) - spent)).clamp(min=0.0)
    return 1 + torch.minimum(torch.maximum(moved, -room), room)


def _total(base: Tensor, x: Tensor, up: Tensor, down: Tensor, residual: float, mask: Tensor) -> Tensor:
    rose = x >= 0
    same = torch.where(rose, x - up[:, None], x + down[:, None])
    opposite = torch.where(rose, -down[:, None], up[:, None])
    log_f = same.clamp(-residual, residual) - opposite.clamp(-residual, residual)
    return torch.where(mask, base[:, None] + log_f, 0.0).exp()


def _sizes(mask: Tensor, x: Tensor) -> Tensor:
    return mask.sum(1).clamp(min=1).to(x.dtype)


def _mean_by(x: Tensor, index: Tensor, size: int) -> Tensor:
    total = x.new_zeros(size).index_add(0, index, x)
    return total / torch.bincount(index, minlength=size).clamp(min=1)
