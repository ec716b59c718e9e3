import numpy as np
import pytest

from rollway.errors import RollwayError
from rollway.evaluation.intervals import bootstrap_means, holm, interval, paired_difference


def test_bootstrap_means_have_the_mean_and_spread_that_theory_gives():
    values = np.random.default_rng(1).normal(2.0, 3.0, 400)
    means = bootstrap_means(values, 4000)
    assert means.mean() == pytest.approx(values.mean(), abs=0.01)
    assert means.std() == pytest.approx(values.std() / 20, rel=0.05)


def test_same_seed_same_interval_and_columns_are_drawn_together():
    values = np.random.default_rng(2).random((50, 2))
    assert interval(values[:, 0], 500, 0.95) == interval(values[:, 0], 500, 0.95)
    np.testing.assert_allclose(bootstrap_means(values, 500)[:, 1], bootstrap_means(values[:, 1], 500), rtol=1e-12)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(300):
        found = interval(rng.random(80) < 0.4, 300, 0.9)
        hits += found.low <= 0.4 <= found.high
    assert 0.84 <= hits / 300 <= 0.96


def test_no_variation_no_width():
    found = interval([0.5] * 10, 100, 0.95)
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)


def test_no_prompts_is_refused():
    with pytest.raises(RollwayError):
        interval([], 10, 0.95)


def test_paired_difference_cancels_difficulty():
    rng = np.random.default_rng(4)
    hard = rng.random(60)
    a = {f"p{i}": h for i, h in enumerate(hard)}
    b = {f"p{i}": h + 0.05 + rng.normal(0, 0.01) for i, h in enumerate(hard)}
    found = paired_difference(a, b, resamples=2000)
    assert found.low > 0.04
    assert found.high < 0.06
    assert found.p_value < 0.01
    assert found.better == 60
    assert found.worse == 0
    assert found.prompts == 60
    back = paired_difference(b, a, resamples=2000)
    assert back.value == pytest.approx(-found.value)


def test_no_difference_is_not_claimed():
    a = {f"p{i}": 0.5 for i in range(10)}
    found = paired_difference(a, a, resamples=200)
    assert (found.value, found.low, found.high, found.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_false_claims_stay_near_alpha():
    rng = np.random.default_rng(5)
    claims = 0
    for _ in range(200):
        a, b = ({f"p{i}": v for i, v in enumerate(rng.random(40))} for _ in range(2))
        claims += paired_difference(a, b, resamples=300).p_value < 0.05
    assert claims / 200 < 0.11


def test_other_prompts_are_refused():
    with pytest.raises(RollwayError, match="q"):
        paired_difference({"p": 1.0}, {"q": 1.0})


def test_holm_worked_example():
    # Holm (1979) by hand: 0.01 * 4, 0.02 * 3, then never falling below the largest so far.
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.02})
    assert found == pytest.approx({"a": 0.04, "d": 0.06, "c": 0.06, "b": 0.06})
    assert list(found) == ["a", "b", "c", "d"]
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}
