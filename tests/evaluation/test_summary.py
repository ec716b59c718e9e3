import pyarrow as pa
import pytest

from rollway.config.experiment import EvaluateConfig
from rollway.errors import RollwayError
from rollway.evaluation.pass_at_k import pass_auc
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


def test_area_under_pass_at_k_with_its_interval():
    rows = [(f"p{p}", n, n < c, float(n < c), 3, "stop", "4") for p, c in enumerate([1, 2, 8, 0, 4]) for n in range(8)]
    config = EvaluateConfig(samples=8, k=[1, 2, 4, 8], bootstrap=400)
    found = {m["name"]: m["value"] for m in summarise(evals(rows), config)}
    assert found["pass_auc"] == pytest.approx(pass_auc({k: found[f"pass@{k}"] for k in (1, 2, 4, 8)}))
    assert found["pass_auc/low"] < found["pass_auc"] < found["pass_auc/high"]
    assert found["pass@1/low"] < found["pass_auc/low"]
    shorter = EvaluateConfig(samples=8, k=[1, 8], bootstrap=400)
    assert "pass_auc" not in {m["name"] for m in summarise(evals(rows), shorter)}


def test_the_evaluation_of_the_papers_with_many_samples():
    """256 samples at temperature 0.6 and top-p 0.95 (NGRPO)."""
    ks = [2**n for n in range(9)]
    config = EvaluateConfig(samples=256, k=ks, temperature=0.6, top_p=0.95, bootstrap=50)
    rows = [
        (f"p{p}", n, n < c, float(n < c), 3, "stop", str(n % 3)) for p, c in enumerate([1, 128]) for n in range(256)
    ]
    found = {m["name"]: m["value"] for m in summarise(evals(rows), config)}
    assert found["pass@256"] == 1.0
    assert found["pass@64"] == pytest.approx((0.25 + 1.0) / 2, abs=1e-6)
    assert 0.25 < found["pass_auc"] < 0.75
