"""Calibration of margins: by hand, against a direct count, and where the margins are the truth."""

import math

import numpy as np
import pytest

from rollway.evaluation.calibration import calibration


def test_worked_by_hand() -> None:
    """Margins 0, 2, -1: confidences .5, .880797, .731059; right .5, 1, 0."""
    found = calibration([0.0, 2.0, -1.0])
    assert found.accuracy == pytest.approx(0.5)
    assert found.log_loss == pytest.approx((math.log(2) + math.log(1 + math.exp(-2)) + math.log(1 + math.e)) / 3)
    assert found.brier == pytest.approx((0.25 + (1 - 0.8807970780) ** 2 + 0.7310585786**2) / 3)
    assert found.ece == pytest.approx((0.0 + (1 - 0.8807970780) + 0.7310585786) / 3)
    filled = {b.low: (b.count, b.confidence, b.accuracy) for b in found.table if b.count}
    assert filled == {
        0.5: (1, 0.5, 0.5),
        0.7: (1, pytest.approx(0.7310585786), 0.0),
        0.85: (1, pytest.approx(0.8807970780), 1.0),
    }
    assert [(b.low, b.high) for b in found.table] == [(0.5 + n / 20, pytest.approx(0.55 + n / 20)) for n in range(10)]
    assert found.table[1].accuracy is None and found.table[1].confidence is None


def test_equals_a_direct_count() -> None:
    margins = np.random.default_rng(0).normal(0.5, 2.0, 500)
    found = calibration(margins)
    error, counts = 0.0, 0
    for n in range(10):
        low, high = 0.5 + 0.05 * n, 0.55 + 0.05 * n
        inside = [m for m in margins if low <= 1 / (1 + math.exp(-abs(m))) < high or (n == 9 and abs(m) > 30)]
        counts += len(inside)
        if inside:
            confidence = sum(1 / (1 + math.exp(-abs(m))) for m in inside) / len(inside)
            accuracy = sum(m > 0 for m in inside) / len(inside)
            error += len(inside) * abs(accuracy - confidence) / len(margins)
            assert found.table[n].accuracy == pytest.approx(accuracy)
            assert found.table[n].confidence == pytest.approx(confidence)
        assert found.table[n].count == len(inside)
    assert counts == 500
    assert found.ece == pytest.approx(error)
    assert found.brier == pytest.approx(np.mean((1 - 1 / (1 + np.exp(-margins))) ** 2))


def test_margins_that_are_the_truth_are_calibrated_and_doubled_ones_are_not() -> None:
    rng = np.random.default_rng(1)
    size = np.abs(rng.normal(0.0, 1.5, 20_000))
    sign = np.where(rng.random(len(size)) < 1 / (1 + np.exp(-size)), 1.0, -1.0)
    true, loud = calibration(sign * size), calibration(2.0 * sign * size)
    assert true.ece < 0.015
    assert loud.ece > 0.08
    assert loud.accuracy == true.accuracy
    assert loud.log_loss > true.log_loss


def test_extreme_margins_stay_finite() -> None:
    found = calibration([1e6, -1e6])
    assert found.log_loss == pytest.approx(5e5)
    assert found.brier == pytest.approx(0.5)
    assert found.table[9].count == 2
