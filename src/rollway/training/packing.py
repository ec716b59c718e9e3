"""Which rows share an optimiser batch: groups and pairs stay whole, every row is used exactly once per epoch."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def units(groups: Sequence[int] | None, pairs: Sequence[tuple[int, int]], rows: int) -> list[list[int]]:
    """What one optimiser batch must hold whole: rows joined by a group (None: groups may be cut) or by a pair."""
    leader = list(range(rows))

    def find(n: int) -> int:
        while leader[n] != n:
            leader[n] = leader[leader[n]]
            n = leader[n]
        return n

    first: dict[int, int] = {}
    same_group = [] if groups is None else [(first.setdefault(g, n), n) for n, g in enumerate(groups)]
    for a, b in [*same_group, *pairs]:
        low, high = sorted((find(a), find(b)))
        leader[high] = low
    out: dict[int, list[int]] = {}
    for n in range(rows):
        out.setdefault(find(n), []).append(n)
    return list(out.values())


def minibatches(units: Sequence[Sequence[int]], count: int, seed: int, shuffle: int) -> list[NDArray[np.int64]]:
    """One epoch: every unit in exactly one of `count` optimiser batches (fewer when there are fewer units).

    The order is a function of (seed, shuffle) alone. Nothing is repeated or padded to make batches even. Rows stand in
    ascending order inside a batch.
    """
    order = np.random.default_rng([seed, shuffle]).permutation(len(units))
    parts = np.array_split(order, max(1, min(count, len(units))))
    return [np.array(sorted(n for u in part for n in units[u]), dtype=np.int64) for part in parts]
