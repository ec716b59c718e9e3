"""Counter-based noise."""

import numpy as np

from rollway.sampling.noise import keys, uniform


def test_splitmix64_reference_values():
    """First outputs of the published generator for seed 1234567 (Vigna's splitmix64.c)."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    got = uniform(np.array([1234567], dtype=np.uint64), np.arange(4))
    assert np.allclose(got, [((e >> 12) + 0.5) * 2.0**-52 for e in expected], rtol=0, atol=0)


def test_open_interval_at_the_extremes():
    assert 0.0 < 0.5 * 2.0**-52
    assert ((2**52 - 1) + 0.5) * 2.0**-52 < 1.0


def test_uniform_and_uncorrelated():
    numbers = uniform(keys(0, [f"r{i}" for i in range(400)])[:, None], np.arange(500)[None])
    assert ((numbers > 0) & (numbers < 1)).all()
    counts = np.histogram(numbers, bins=100, range=(0, 1))[0]
    expected = numbers.size / 100
    assert ((counts - expected) ** 2 / expected).sum() < 160  # chi-square, 99 degrees: p = 1e-4 at 160
    for other in (np.roll(numbers, 1, axis=0), np.roll(numbers, 1, axis=1)):
        assert abs(np.corrcoef(numbers.ravel(), other.ravel())[0, 1]) < 0.01


def test_depends_on_seed_name_and_position_only():
    a = uniform(keys(0, ["x", "y"]), np.array([3, 3]))
    assert a[0] != a[1]
    assert uniform(keys(0, ["y"]), np.array([3]))[0] == a[1]
    assert uniform(keys(1, ["y"]), np.array([3]))[0] != a[1]
    assert uniform(keys(0, ["y"]), np.array([4]))[0] != a[1]
