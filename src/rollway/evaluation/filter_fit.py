"""How well a line through binned rewards predicts true scores: the choice of a filter in PF-PPO (arXiv 2409.06957).

Eq. 6 of the paper's R^2 is on groups of responses with similar reward; how they are grouped and fitted is
reconstructed: equal-width bins over the rewards that the filter keeps, means by the filter's weights, and an ordinary
least-squares line through the bins, each bin counting once.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rollway.errors import RollwayError

Numbers = NDArray[np.float64]

BINS = 6
MOST_BINS = 20
LEAST_BINS = 3
"""A line goes through any two points."""


@dataclass(frozen=True)
class Line:
    """shat = intercept + slope x, and the share of the variance of y that it explains."""

    intercept: float
    slope: float
    r2: float


@dataclass(frozen=True)
class FilterFit:
    """A filter's line, and what it keeps: non-empty bins, rows of weight > 0, means under its weights."""

    line: Line
    bins: int
    rows: int
    mean_reward: float
    mean_truth: float


def fit_filter(reward: Numbers, truth: Numbers, weight: Numbers, bins: int = BINS) -> FilterFit:
    """reward, truth, weight [N], weights >= 0 in any scale.

    Raises RollwayError when nothing is kept, the kept rewards are all equal, they fill fewer than 3 bins, or the true
    scores of all bins are equal, so that there is nothing to predict.
    """
    kept = weight > 0
    if not kept.any():
        raise RollwayError("no row has a weight above 0")
    r, s, w = reward[kept], truth[kept], weight[kept]
    x, y = bin_means(r, s, w, bins)
    return FilterFit(
        line=least_squares(x, y),
        bins=len(x),
        rows=len(r),
        mean_reward=float(np.average(r, weights=w)),
        mean_truth=float(np.average(s, weights=w)),
    )


def bin_means(reward: Numbers, truth: Numbers, weight: Numbers, bins: int) -> tuple[Numbers, Numbers]:
    """Weighted mean reward and mean true score [B] of the non-empty bins, by rising reward.

    `bins` of equal width between the smallest and the largest reward, right-open but for the last. Weights > 0.
    Raises RollwayError as `fit_filter`.
    """
    if not LEAST_BINS <= bins <= MOST_BINS:
        raise RollwayError(f"{bins} bins: give {LEAST_BINS} to {MOST_BINS}")
    low, high = float(reward.min()), float(reward.max())
    if low == high:
        raise RollwayError(f"all rewards are {low:g}")
    inner = np.linspace(low, high, bins + 1)[1:-1]
    place = np.searchsorted(inner, reward, side="right")
    mass = np.bincount(place, weight, bins)
    full = np.bincount(place, minlength=bins) > 0
    if full.sum() < LEAST_BINS:
        raise RollwayError(f"the rewards fill {full.sum()} of {bins} bins, and a line needs {LEAST_BINS}")
    means = [np.bincount(place, weight * values, bins)[full] / mass[full] for values in (reward, truth)]
    return means[0], means[1]


def least_squares(x: Numbers, y: Numbers) -> Line:
    """Ordinary least squares of y on x, unweighted; x not all equal. Raises RollwayError when all of y is equal."""
    dx, dy = x - x.mean(), y - y.mean()
    total = float(dy @ dy)
    if total == 0.0 or y.min() == y.max():
        raise RollwayError(f"the mean true score of every bin is {y[0]:g}")
    slope = float(dx @ dy) / float(dx @ dx)
    left = dy - slope * dx
    return Line(intercept=float(y.mean() - slope * x.mean()), slope=slope, r2=1.0 - float(left @ left) / total)


def best_filter(fits: Mapping[str, FilterFit], keep_negatives: Collection[str]) -> str | None:
    """The filter with the largest R^2 among those that keep negatives, the first of equals; None without any."""
    candidates = [name for name in fits if name in keep_negatives]
    return max(candidates, key=lambda name: fits[name].line.r2, default=None)
