"""Weights that are all alike cancel where the loss is divided by their sum: the train stage says so."""

from typing import Any

import pyarrow as pa
import pytest

from rollway.config.objectives import Objective
from rollway.stages.train import _weights_cancel


def objective(weights: str = "denominator") -> Objective:
    aggregate = {"kind": "token_mean", "weights": weights}
    return Objective.model_validate({"ratio": "token", "gate": "clip", "aggregate": aggregate})


@pytest.mark.parametrize(
    ("weights", "cancels"),
    [
        ([0.25] * 4, True),
        ([2.0, 2.0], True),
        ([0.25, 0.5], False),
        ([1.0, 1.0], False),
        ([None, None], False),
        ([0.0, 0.0], False),
        ([0.5], False),
        ([], False),
    ],
)
def test_equal_weights(weights: list[Any], cancels: bool) -> None:
    column = pa.chunked_array([pa.array(weights, pa.float64())])
    assert _weights_cancel(column, objective()) == cancels
    assert not _weights_cancel(column, objective("numerator"))
    assert _weights_cancel(column, Objective.model_validate({"preference": "dpo"})) == cancels
