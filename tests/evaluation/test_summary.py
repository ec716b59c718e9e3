import pyarrow as pa
import pytest

from rollway.config.experiment import EvaluateConfig
from rollway.errors import RollwayError
from rollway.evaluation.summary import prompt_figures, summarise

CONFIG = EvaluateConfig(samples=2, k=[1, 2], bootstrap=200)


def evals(rows):
    names = ["prompt_id", "sample", "correct", "reward", "length", "finish", "answer"]
    return pa.table({name: [row[i] for row in rows] for i, name in enumerate(names)})


ROWS = [
    ("p", 0, True, 1.0, 3, "stop", "4"),
    ("p", 1, False, 0.0, 5, "length", "5"),
    ("q", 0, True, 1.0, 2, "stop", "7"),
    ("q", 1, True, 1.0, 2, "stop", "7"),
]


def test_figures_by_hand():
    found = {m["name"]: m["value"] for m in summarise(evals(ROWS), CONFIG)}
    assert found["pass@1"] == 0.75
    assert found["avg@2"] == 0.75
    assert found["pass@2"] == 1.0
    assert found["maj@2"] == 0.75
    assert found["length"] == 3.0
    assert found["truncated"] == 0.25
    assert found["reward"] == 0.75
    assert found["prompts"] == 2
    assert found["samples"] == 4
    assert found["pass@1/low"] == 0.5
    assert found["pass@1/high"] == 1.0


def test_row_order_does_not_matter():
    assert summarise(evals(ROWS), CONFIG) == summarise(evals(ROWS[::-1]), CONFIG)


def test_too_few_samples_names_the_prompt():
    with pytest.raises(RollwayError, match="prompt q has 1 samples"):
        prompt_figures(evals(ROWS[:3]), [1, 2])


def test_empty_is_refused():
    with pytest.raises(RollwayError, match="no samples"):
        summarise(evals([]), CONFIG)
