"""`rollway diff`: settings, held-out results on the same prompts, metrics; and what cannot be compared."""

import json
from pathlib import Path

import pytest

from rollway.cli import main
from rollway.comparison.diff import diff, text
from rollway.errors import RollwayError
from store.synthetic import CONFIG, make_results, write_metrics, write_run_info


@pytest.fixture
def results(tmp_path: Path) -> Path:
    make_results(tmp_path, {"a-s0": 2})
    make_results(tmp_path, {"b-s0": 3})
    config = {**CONFIG, "train": {"optimizer": {"lr": 0.002, "eps": 1e-8}, "objective": {"kl": None}}, "rounds": 3}
    write_run_info(tmp_path, "b-s0", recipe="dr-grpo", config=config, rounds=3)
    return tmp_path


def test_settings_that_differ_and_no_others(results: Path) -> None:
    found = diff(results, "a-s0", "b-s0")
    assert found.settings == {
        "recipe": ("grpo", "dr-grpo"),
        "rounds": ("2", "3"),
        "train.optimizer.eps": ("(not set)", "1e-08"),
        "train.optimizer.lr": ("0.001", "0.002"),
    }
    assert diff(results, "a-s0", "a-s0").settings == {}
    assert "config: the same" in text(diff(results, "a-s0", "a-s0"))


def test_results_are_compared_where_both_are_evaluated(results: Path) -> None:
    path = results / "b-s0/r0002/evals.parquet"
    (results / "b-s0/r0001/evals.parquet").replace(path)
    found = diff(results, "a-s0", "b-s0")
    assert found.evaluated == 2
    assert found.passed == (0.75, 0.5)
    assert found.difference is not None and found.difference.value == -0.25
    assert found.flipped_right == []
    shown = text(found)
    assert "round 2, 3 prompts in common: 0.750 -> 0.500, -0.250 [-0.250, -0.250]" in shown
    assert "note: compared at round 2: evaluated up to rounds 2 and 3" in shown
    assert "rollouts of rounds 0-2" in shown


def test_prompts_that_flipped(results: Path) -> None:
    found = diff(results, "a-s0", "b-s0")
    back = diff(results, "b-s0", "a-s0")
    assert (found.flipped_right, found.flipped_wrong) == ([], [])
    (results / "b-s0/r0002/evals.parquet").unlink()
    (results / "a-s0/r0000/evals.parquet").replace(results / "a-s0/r0001/evals.parquet")
    (results / "a-s0/r0002/evals.parquet").unlink()
    found = diff(results, "a-s0", "b-s0")
    assert found.flipped_right == ["heldout-0", "heldout-1", "heldout-2"]
    back = diff(results, "b-s0", "a-s0")
    assert back.flipped_wrong == found.flipped_right


def test_what_is_missing_is_said(results: Path) -> None:
    for path in results.glob("a-s0/r*/evals.parquet"):
        path.unlink()
    (results / "a-s0/run.json").unlink()
    write_metrics(results / "a-s0/r0001/curate.json", 1, "curate", {"reward_mean": None})
    shown = text(diff(results, "a-s0", "b-s0"))
    assert "note: a-s0 has no run.json: nothing is known of its config" in shown
    assert "held-out results cannot be compared" in shown
    assert [line.split()[2] for line in shown.split("\n") if "reward_mean" in line] == ["0"]


def test_a_run_that_is_not_there(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RollwayError, match=r"is not a run of .*; did you mean a-s0\?"):
        diff(results, "a", "b-s0")
    assert main(["diff", "--results", str(results), "a-s0", "c-s0"]) == 1
    assert "did you mean" in capsys.readouterr().err


def test_runs_of_two_folders(results: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = make_results(tmp_path_factory.mktemp("other"), {"a-s0": 2})
    assert main(["diff", "--results", str(results), "a-s0", f"{other}/a-s0"]) == 0
    found = diff(results, "a-s0", f"{other}/a-s0")
    assert found.settings == {}
    assert found.difference is not None and found.difference.value == 0.0
    assert json.dumps(found.passed) == "[0.75, 0.75]"
