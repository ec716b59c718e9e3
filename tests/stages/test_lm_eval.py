"""lm-eval on a policy: what is run, what is read of its answer, and the harness itself where it is installed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rollway.config import load_experiment
from rollway.config.lm_eval import LmEvalConfig
from rollway.errors import RollwayError
from rollway.runtime.plan import Plan
from rollway.runtime.specs import STAGE_VERSION, LmEvalSpec
from rollway.stages import lm_eval
from rollway.store.catalog import open_catalog
from stages.test_expert_rollouts import here
from workflow.project import TINY

TASK = """task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/sums.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
generation_kwargs: {until: ["\\n"], max_gen_toks: 3, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""
ANSWER = {
    "results": {
        "sums": {"alias": "sums", "exact_match,none": 0.25, "exact_match_stderr,none": 0.1, "sample_len": 4},
        "gsm": {
            "exact_match,strict-match": 0.5,
            "exact_match_stderr,strict-match": "N/A",
            "exact_match,flexible-extract": 1,
        },
    },
    "configs": {"sums": {"metadata": {"version": 1.0, "pretrained": "/somewhere"}}},
    "n-samples": {"sums": {"original": 20, "effective": 4}},
    "pretty_env_info": "a host",
    "model_name": "/somewhere",
    "config": {"model": "hf", "model_args": "pretrained=/somewhere", "batch_size": "8"},
}
STAND_IN = '''"""Says what it was given and answers like lm_eval."""
import argparse, json, pathlib, sys

def main():
    parser = argparse.ArgumentParser()
    for name in "model model_args tasks batch_size seed device output_path include_path limit".split():
        parser.add_argument(f"--{name}")
    args = parser.parse_args(sys.argv[2:])
    model = pathlib.Path(dict(part.split("=") for part in args.model_args.split(","))["pretrained"])
    if args.tasks == "unheard_of":
        sys.exit("Tasks not found: unheard_of")
    out = pathlib.Path(args.output_path) / "model"
    out.mkdir(parents=True)
    files = sorted(path.name for path in model.iterdir())
    answer = {"results": {"sums": {"exact_match,none": 0.5}}, "given": sys.argv[1:], "files": files}
    (out / "results_2000.json").write_text(json.dumps(answer))

if __name__ == "__main__":
    main()
'''


def spec(**config: Any) -> LmEvalSpec:
    given = LmEvalConfig.model_validate({"tasks": ["sums"], **config})
    return LmEvalSpec(version=STAGE_VERSION["lm_eval"], seed=3, round=2, lm_eval=given)


def evaluated(tmp_path: Path, folder: Path, **config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    metrics, answers = folder / "lm_eval.json", folder / "lm_eval_results.json"
    lm_eval.run(spec(**config), policy=here(tmp_path).policy, metrics=metrics, answers=answers)
    return json.loads(metrics.read_text()), json.loads(answers.read_text())


def test_figures_are_one_per_task_metric_and_filter_with_normal_intervals() -> None:
    found = {row["name"]: row["value"] for row in lm_eval.read(ANSWER)}
    assert found.pop("lm_eval/sums/exact_match/low") == pytest.approx(0.25 - 0.196, abs=1e-4)
    assert found.pop("lm_eval/sums/exact_match/high") == pytest.approx(0.25 + 0.196, abs=1e-4)
    assert found == {
        "lm_eval/sums/exact_match": 0.25,
        "lm_eval/gsm/exact_match/strict-match": 0.5,
        "lm_eval/gsm/exact_match/flexible-extract": 1,
    }
    with pytest.raises(RollwayError, match="gave no figure for sums"):
        lm_eval.read({"results": {"sums": {"alias": "sums"}}})


def test_what_names_the_machine_is_not_kept() -> None:
    kept = lm_eval.portable(ANSWER)
    assert "somewhere" not in json.dumps(kept) and "a host" not in json.dumps(kept)
    assert kept["results"] == ANSWER["results"] and kept["config"] == {"model": "hf", "batch_size": "8"}


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module `lm_eval` that answers at once, in the place of the harness."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/lm_eval.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    monkeypatch.delenv(lm_eval.PYTHON, raising=False)


@pytest.mark.usefixtures("stand_in")
def test_the_policy_is_given_as_a_plain_model(tmp_path: Path) -> None:
    metrics, answers = evaluated(tmp_path, tmp_path, include="mine", limit=5, batch=4)
    assert metrics == {
        "round": 2,
        "stage": "lm_eval",
        "metrics": [{"step": 0, "name": "lm_eval/sums/exact_match", "value": 0.5}],
    }
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(answers["files"])
    given = answers["given"]
    options = dict(zip(given[1::2], given[2::2], strict=True))
    assert given[0] == "run" and options.pop("--output_path") and "dtype=float32" in options.pop("--model_args")
    assert options == {
        "--model": "hf",
        "--tasks": "sums",
        "--batch_size": "4",
        "--seed": "3",
        "--device": "cpu",
        "--include_path": "mine",
        "--limit": "5",
    }


@pytest.mark.usefixtures("stand_in")
def test_a_failure_says_what_the_harness_said(tmp_path: Path) -> None:
    with pytest.raises(RollwayError, match=r"^lm_eval failed on unheard_of \(exit code 1\): Tasks not found"):
        evaluated(tmp_path, tmp_path, tasks=["unheard_of"])
    assert not (tmp_path / "lm_eval.json").exists()


def test_without_the_harness_the_message_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "modules/lm_eval").mkdir(parents=True)
    (tmp_path / "modules/lm_eval/__init__.py").write_text("raise ImportError('none here')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    monkeypatch.setenv(lm_eval.PYTHON, sys.executable)
    expected = r"does not have \(ImportError: none here\); `pip install 'rollway\[lm-eval\]'`, or name the Python"
    with pytest.raises(RollwayError, match=expected):
        evaluated(tmp_path, tmp_path)
    monkeypatch.setenv(lm_eval.PYTHON, str(tmp_path / "no-python"))
    with pytest.raises(RollwayError, match="No such file"):
        evaluated(tmp_path, tmp_path)


def plan_of(lm: dict[str, Any] | None) -> Plan:
    given = {**TINY, "defaults": {**TINY["defaults"], "rounds": 5}, "runs": {"grpo": {"recipe": "grpo"}}}
    given["runs"]["grpo"] |= {} if lm is None else {"lm_eval": lm}
    return Plan(load_experiment(given))


def test_only_runs_that_ask_for_it_are_evaluated_and_others_change_in_nothing() -> None:
    assert plan_of(None).lm_evals.paths("grpo-s0") == []
    assert '"lm_eval"' not in plan_of(None).config_of("grpo-s0").model_dump_json()
    last = "results/grpo-s0/r0005/lm_eval.json"
    asked = plan_of({"tasks": ["sums"]})
    assert asked.lm_evals.paths("grpo-s0") == [last]
    assert last in asked.all_metrics()
    often = plan_of({"tasks": ["sums"], "every": 2})
    assert [path[16:21] for path in often.lm_evals.paths("grpo-s0")] == ["r0002", "r0004", "r0005"]


def _installed() -> str | None:
    """The Python that has lm-eval: the one the environment names, or this one."""
    named = os.environ.get(lm_eval.PYTHON)
    if named:
        return named if subprocess.run([named, "-c", "import lm_eval"], capture_output=True).returncode == 0 else None
    return sys.executable if importlib.util.find_spec("lm_eval") else None


@pytest.mark.slow
@pytest.mark.skipif(_installed() is None, reason=f"lm-eval is not installed: set ${lm_eval.PYTHON}")
def test_the_harness_itself_on_a_task_of_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/sums.yaml").write_text(TASK.replace("FOLDER", str(tmp_path / "mine")))
    rows = [{"q": f"{a}+{b}=", "answer": str(a + b)} for a in range(1, 6) for b in range(1, 5)]
    (tmp_path / "mine/sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folder = tmp_path / "results/grpo-s0/r0002"
    folder.mkdir(parents=True)
    metrics, answers = evaluated(tmp_path, folder, include=str(tmp_path / "mine"))
    names = [row["name"] for row in metrics["metrics"]]
    assert names[0] == "lm_eval/sums/exact_match" and 0.0 <= metrics["metrics"][0]["value"] <= 1.0
    assert answers["n-samples"] == {"sums": {"original": 20, "effective": 20}}
    with open_catalog(tmp_path / "results") as catalog:
        found = catalog.execute("SELECT run, round, name FROM seen_metrics WHERE stage = 'lm_eval'").fetchall()
    assert ("grpo-s0", 2, "lm_eval/sums/exact_match") in found
