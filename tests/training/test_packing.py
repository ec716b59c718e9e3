"""Optimiser batches: a partition of the rows, groups and pairs whole, a function of the seed alone."""

from hypothesis import given, settings
from hypothesis import strategies as st

from rollway.training.packing import minibatches, units


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=20), st.integers(1, 6), st.integers(0, 99), st.booleans())
def test_an_epoch_is_a_partition_that_keeps_units_whole(groups: list[int], count: int, seed: int, whole: bool) -> None:
    n = len(groups)
    pairs = [(k, n - 1 - k) for k in range(0, n // 2, 3)]
    together = units(groups if whole else None, pairs, n)
    assert sorted(row for unit in together for row in unit) == list(range(n))
    parts = minibatches(together, count, seed, 0)
    assert len(parts) == min(count, len(together))
    assert sorted(row for part in parts for row in part) == list(range(n))
    home = {int(row): k for k, part in enumerate(parts) for row in part}
    assert all(home[a] == home[b] for a, b in pairs)
    if whole:
        assert all(home[a] == home[b] for a in range(n) for b in range(n) if groups[a] == groups[b])


def test_the_shuffle_is_a_function_of_seed_and_number() -> None:
    rows = [[n] for n in range(40)]

    def drawn(seed: int, shuffle: int) -> list[list[int]]:
        return [part.tolist() for part in minibatches(rows, 4, seed, shuffle)]

    assert drawn(1, 2) == drawn(1, 2)
    assert drawn(1, 2) != drawn(1, 3)
    assert drawn(1, 2) != drawn(2, 2)
