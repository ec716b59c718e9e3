"""Aggregates over whole groups whose rows lie side by side, in the order and with the bits of DuckDB's own."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

MOST_ROWS_OF_A_GROUP = 4096
"""Sums go through all groups at once, place by place: larger groups are left to DuckDB."""


@dataclass
class Groups:
    """Sizes of consecutive groups."""

    sizes: NDArray[np.int64]

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        return np.cumsum(self.sizes) - self.sizes

    @cached_property
    def places(self) -> list[tuple[NDArray[np.int64] | slice, NDArray[np.int64]]]:
        """For every place in a group: the groups that have it, and the rows there."""
        most = int(self.sizes.max(initial=0))
        if len(self.sizes) and int(self.sizes.min()) == most:
            return [(slice(None), self.starts + place) for place in range(most)]
        held = [np.flatnonzero(self.sizes > place) for place in range(most)]
        return [(groups, self.starts[groups] + place) for place, groups in enumerate(held)]

    def to_rows(self, of_groups: NDArray) -> NDArray:
        """[G] -> [N]: each row gets its group's value."""
        return np.repeat(of_groups, self.sizes)


@dataclass
class Values:
    """Values without nulls, of groups. Sums are taken in row order, as DuckDB takes them."""

    values: NDArray
    groups: Groups

    @cached_property
    def sum(self) -> NDArray[np.float64]:
        total = np.zeros(len(self.groups.sizes))
        for groups, rows in self.groups.places:
            total[groups] += self.values[rows]
        return total

    @cached_property
    def squares(self) -> NDArray[np.float64]:
        """Sum of squared differences from the mean (Welford 1962, the recurrence that DuckDB uses)."""
        mean, squares = np.zeros(len(self.groups.sizes)), np.zeros(len(self.groups.sizes))
        for place, (groups, rows) in enumerate(self.groups.places):
            value = self.values[rows]
            before = value - mean[groups]
            mean[groups] += before / (place + 1)
            squares[groups] += before * (value - mean[groups])
        return squares


def _mean(values: Values) -> NDArray:
    return values.sum / values.groups.sizes


def _over(ddof: int, root: bool) -> Callable[[Values], NDArray]:
    """Variance or its root; NaN stands for NULL, where a sample of one has none."""

    def function(values: Values) -> NDArray:
        sizes = values.groups.sizes
        if ddof == 0:
            variance = np.where(sizes > 1, values.squares / sizes, 0.0)
        else:
            variance = np.where(sizes > 1, values.squares / np.maximum(sizes - 1, 1), np.nan)
        return np.sqrt(variance) if root else variance

    return function


def _at_starts(ufunc: np.ufunc) -> Callable[[Values], NDArray]:
    return lambda values: ufunc.reduceat(values.values, values.groups.starts)


FUNCTIONS: dict[str, Callable[[Values], NDArray]] = {
    "count": lambda values: values.groups.sizes,
    "sum": lambda values: values.sum,
    "avg": _mean,
    "mean": _mean,
    "min": _at_starts(np.minimum),
    "max": _at_starts(np.maximum),
    "bool_and": _at_starts(np.logical_and),
    "bool_or": _at_starts(np.logical_or),
    "stddev_samp": _over(1, root=True),
    "stddev": _over(1, root=True),
    "stddev_pop": _over(0, root=True),
    "var_samp": _over(1, root=False),
    "var_pop": _over(0, root=False),
}
"""Name in SQL -> [N] values of whole groups -> [G]."""

NEEDS_FLOATS = frozenset(FUNCTIONS) - {"count", "min", "max", "bool_and", "bool_or"}
"""Functions that DuckDB takes in other types where the values holds whole numbers."""
