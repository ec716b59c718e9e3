"""From token losses [N, T] to one number: a sum over rows and a denominator that belongs to the whole optimiser batch.

Row weights always scale a row's share of the sum; `weights: denominator` counts them in the denominator too (PF-PPO),
`numerator` does not (DaGRPO). Rows of weight 0 in a denominator are as if they were absent.
"""

import torch
from torch import Tensor

from rollway.config.objectives import (
    Aggregate,
    GroupMeanTokenSum,
    SeqMeanTokenMean,
    SeqMeanTokenSum,
    SeqSumConst,
    TokenMean,
)


def numerator(x: Tensor, keep: Tensor, weight: Tensor, aggregate: Aggregate) -> Tensor:
    """The sum that `denominator` divides. x, keep [N, T], weight [N] -> scalar; adds up over micro-batches."""
    per_row = torch.where(keep, x, 0.0).sum(1)
    match aggregate:
        case SeqMeanTokenMean():
            per_row = per_row / keep.sum(1).clamp(min=1)
        case SeqSumConst(l_max=l_max):
            per_row = per_row / l_max
        case TokenMean() | SeqMeanTokenSum() | GroupMeanTokenSum():
            pass
    return (weight * per_row).sum()


def denominator(
    keep: Tensor, weight: Tensor, aggregate: Aggregate, rows: Tensor | None = None, group: Tensor | None = None
) -> Tensor:
    """Kept tokens, rows or groups of the batch, weighted where the aggregation says so. Scalar, 0 for an empty batch.

    rows [N] bool: those that belong to the mean, kept tokens or not; None: all. group [N]: read by a mean over groups.
    """
    share = weight if aggregate.weights == "denominator" else torch.ones_like(weight)
    share = share if rows is None else torch.where(rows, share, 0.0)
    match aggregate:
        case TokenMean():
            return (share * keep.sum(1)).sum()
        case SeqMeanTokenMean(empty="leave_out") | SeqMeanTokenSum(empty="leave_out"):
            return (share * keep.any(1)).sum()
        case GroupMeanTokenSum():
            assert group is not None
            live = group[keep.any(1) & (weight != 0) & (share != 0)]
            return weight.new_tensor(len(live.unique()))
        case _:
            return share.sum()


def ratio_or_zero(top: Tensor, bottom: Tensor) -> Tensor:
    """top / bottom, and 0 where nothing was counted."""
    bottom = bottom.to(top.dtype)
    return torch.where(bottom != 0, top, 0.0) / torch.where(bottom != 0, bottom, 1.0)
