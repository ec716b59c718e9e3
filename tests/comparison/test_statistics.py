"""Intervals and p-values against closed forms, scipy, and simulated runs that do not differ."""

import numpy as np
import pytest
from scipy import stats

from rollway.comparison import statistics
from rollway.errors import RollwayError
from rollway.evaluation import interval


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 9, 10, 31, 100])
def test_student_tails_agree_with_scipy(degrees: int) -> None:
    for t in (0.0, 0.1, -0.7, 1.5, 2.776, -6.0, 40.0):
        assert statistics.student_tails(t, degrees) == pytest.approx(2 * stats.t.sf(abs(t), degrees), abs=1e-12)


def test_the_test_over_seeds_is_the_paired_t_test() -> None:
    gaps = np.array([0.1, 0.3, -0.05, 0.2, 0.15])
    assert statistics.seed_p(gaps) == pytest.approx(stats.ttest_1samp(gaps, 0.0).pvalue, abs=1e-12)
    assert np.isnan(statistics.seed_p(gaps[:1]))
    assert statistics.seed_p(np.zeros(5)) == 1.0
    assert statistics.seed_p(np.full(5, 0.25)) == 0.0


def test_resampled_means_have_the_variance_of_seeds_plus_that_of_prompts() -> None:
    rng = np.random.default_rng(0)
    seeds, prompts = rng.normal(size=6), rng.normal(size=40)
    values = seeds[:, None] + prompts[None, :]
    means = statistics.crossed_means(values, 20_000)
    assert means.mean() == pytest.approx(values.mean(), abs=0.01)
    # Of additive values, a resample's mean is that of the drawn seeds plus that of the drawn prompts.
    assert means.var() == pytest.approx(seeds.var() / 6 + prompts.var() / 40, rel=0.05)


def test_one_seed_leaves_the_bootstrap_over_prompts() -> None:
    values = np.random.default_rng(1).random(60)
    mine, known = statistics.crossed_interval(values[None, :], 20_000, 0.95), interval(values, 20_000, 0.95)
    assert mine.value == pytest.approx(known.value)
    assert (mine.low, mine.high) == pytest.approx((known.low, known.high), abs=0.005)


def test_nothing_to_draw_from_is_an_error() -> None:
    with pytest.raises(RollwayError, match="no seeds or no prompts"):
        statistics.crossed_means(np.zeros((0, 3)), 10)


def test_bootstrap_p_counts_both_tails() -> None:
    assert statistics.bootstrap_p(np.array([1.0] * 9)) == pytest.approx(2 / 10)
    assert statistics.bootstrap_p(np.array([-1.0, 1.0])) == 1.0


def test_runs_that_do_not_differ_are_rarely_called_different() -> None:
    """Five seeds, seed noise and prompt noise: at level 0.05 the larger p-value must not reject more than that."""
    rng = np.random.default_rng(2)
    tries, rejected = 300, 0
    for _ in range(tries):
        gaps = rng.normal(0, 0.05, (5, 1)) + rng.normal(0, 0.1, (1, 30)) + rng.normal(0, 0.3, (5, 30))
        p = max(statistics.bootstrap_p(statistics.crossed_means(gaps, 400)), statistics.seed_p(gaps.mean(axis=1)))
        rejected += p < 0.05
    assert rejected / tries <= 0.05
