"""The R^2 that chooses PF-PPO's filter: the worked numbers, numpy's own fit, and bins by a loop."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollway.errors import RollwayError
from rollway.evaluation.filter_fit import FilterFit, Line, best_filter, bin_means, fit_filter, least_squares

REWARD = np.array([-0.875, -0.25, 0.125, 0.625, 0.925])
SCORE = np.array([0.0, 0.5, 0.5, 0.5, 1.0])


def test_worked_numbers() -> None:
    line = least_squares(REWARD, SCORE)
    assert line.r2 == pytest.approx(0.798226, abs=5e-7)
    assert line.intercept == pytest.approx(0.451220, abs=5e-7)
    assert line.slope == pytest.approx(0.443459, abs=5e-7)


def test_worked_numbers_through_bins() -> None:
    """Two responses around each of the five means, in six bins from -0.9 to 0.95, of which one stays empty."""
    around = np.array([0.025, 0.03, 0.05, 0.01, 0.025])
    reward = np.concatenate([REWARD - around, REWARD + around])
    fit = fit_filter(reward, np.concatenate([SCORE, SCORE]), np.ones(10), 6)
    assert (fit.bins, fit.rows) == (5, 10)
    assert fit.line.r2 == pytest.approx(0.798226, abs=5e-7)
    assert fit.line.intercept == pytest.approx(0.451220, abs=5e-7)
    assert fit.line.slope == pytest.approx(0.443459, abs=5e-7)


def test_bins_are_right_open_but_for_the_last() -> None:
    """Edges at 0, 1, 2, 3: an edge belongs to the bin above it, 3 to the last bin."""
    reward = np.array([0.0, 0.5, 1.0, 2.0, 3.0])
    x, y = bin_means(reward, np.array([0.0, 2.0, 4.0, 6.0, 8.0]), np.ones(5), 3)
    assert x.tolist() == [0.25, 1.0, 2.5]
    assert y.tolist() == [1.0, 4.0, 7.0]


def test_weights_count_within_a_bin_and_not_between_bins() -> None:
    reward = np.array([0.0, 0.2, 1.5, 3.0])
    truth = np.array([0.0, 1.0, 5.0, 2.0])
    x, y = bin_means(reward, truth, np.array([3.0, 1.0, 1.0, 1.0]), 3)
    assert x.tolist() == pytest.approx([0.05, 1.5, 3.0])
    assert y.tolist() == pytest.approx([0.25, 5.0, 2.0])
    heavy = fit_filter(reward, truth, np.array([3.0, 1.0, 1.0, 1.0]), 3)
    heavier = fit_filter(reward, truth, np.array([3.0, 1.0, 100.0, 1.0]), 3)
    assert heavy.line == heavier.line
    assert heavy.mean_truth == pytest.approx((1 + 5 + 2) / 6)
    assert heavier.mean_reward == pytest.approx((0.2 + 150 + 3) / 105)


def test_rows_of_weight_zero_are_absent() -> None:
    """They do not stretch the range of the bins either."""
    reward, truth = np.array([-9.0, 0.0, 1.0, 2.0, 9.0]), np.array([7.0, 0.0, 1.0, 1.0, 7.0])
    fit = fit_filter(reward, truth, np.array([0.0, 1.0, 1.0, 1.0, 0.0]), 6)
    assert fit == fit_filter(reward[1:4], truth[1:4], np.ones(3), 6)
    assert fit.rows == 3


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(5, 60), bins=st.integers(3, 20))
def test_against_a_loop_and_numpys_fit(seed: int, count: int, bins: int) -> None:
    rng = np.random.default_rng(seed)
    reward, truth, weight = (
        rng.normal(size=count),
        rng.normal(size=count),
        rng.random(count) * (rng.random(count) > 0.2),
    )
    kept = [(r, s, w) for r, s, w in zip(reward, truth, weight, strict=True) if w > 0]
    low, high = min(r for r, _, _ in kept), max(r for r, _, _ in kept)
    groups: dict[int, list[tuple[float, float, float]]] = {}
    for r, s, w in kept:
        groups.setdefault(min(bins - 1, int((r - low) / (high - low) * bins)), []).append((r, s, w))
    if len(groups) < 3:
        return
    x = [sum(w * r for r, _, w in g) / sum(w for *_, w in g) for _, g in sorted(groups.items())]
    y = [sum(w * s for _, s, w in g) / sum(w for *_, w in g) for _, g in sorted(groups.items())]
    slope, intercept = np.polyfit(x, y, 1)
    fit = fit_filter(reward, truth, weight, bins)
    assert (fit.line.slope, fit.line.intercept) == pytest.approx((slope, intercept), abs=1e-9)
    assert fit.line.r2 == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2, abs=1e-9)
    scaled = fit_filter(reward, truth, 7 * weight, bins)
    assert scaled.line.r2 == pytest.approx(fit.line.r2, abs=1e-12)


@pytest.mark.parametrize(
    ("reward", "truth", "weight", "bins", "says"),
    [
        ([1.0, 2.0, 3.0], [0.0, 1.0, 2.0], [0.0, 0.0, 0.0], 6, "no row has a weight above 0"),
        ([0.5, 0.5, 0.7], [0.0, 1.0, 2.0], [1.0, 1.0, 0.0], 6, "all rewards are 0.5"),
        ([0.0, 0.0, 1.0], [0.0, 1.0, 2.0], [1.0, 1.0, 1.0], 6, "2 of 6 bins"),
        ([0.0, 1.0, 2.0], [0.5, 0.5, 0.5], [1.0, 1.0, 1.0], 6, "true score of every bin is 0.5"),
        ([0.0, 1.0, 2.0], [0.0, 1.0, 2.0], [1.0, 1.0, 1.0], 21, "3 to 20"),
        ([0.0, 1.0, 2.0], [0.0, 1.0, 2.0], [1.0, 1.0, 1.0], 2, "3 to 20"),
    ],
)
def test_what_cannot_be_fitted(
    reward: list[float], truth: list[float], weight: list[float], bins: int, says: str
) -> None:
    with pytest.raises(RollwayError, match=says):
        fit_filter(np.array(reward), np.array(truth), np.array(weight), bins)


def test_the_choice_is_among_those_that_keep_negatives() -> None:
    fits = {
        name: FilterFit(Line(0.0, 1.0, r2), 6, 10, 0.0, 0.0)
        for name, r2 in (("none", 0.886), ("bon", 0.999), ("br", 0.952), ("bw", 0.952))
    }
    assert best_filter(fits, {"none", "br", "bw"}) == "br"
    assert best_filter(fits, {"none"}) == "none"
    assert best_filter(fits, set()) is None
