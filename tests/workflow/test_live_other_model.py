"""A live teacher that is a larger warm-up's policy, through the plan and the real Snakemake."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rollway.config import deep_merge, load_experiment
from rollway.config.base import ConfigError
from rollway.runtime.plan import Plan
from rollway.runtime.plan_checks import check
from workflow.project import TINY, Project

WISE = {**TINY["warmups"]["tiny"], "policy": {**TINY["warmups"]["tiny"]["policy"], "layers": 2}, "sft": {"steps": 90}}
LIVE = {"kind": "live", "model": {"kind": "warmup", "name": "wise"}}


def config(teacher: dict[str, Any] = LIVE, **run: Any) -> dict[str, Any]:
    exact = {"teacher": teacher, "objective": {"distill": {"estimate": "exact"}}}
    scorers = {"teacher": {"kind": "teacher", "model": {"kind": "warmup", "name": "wise"}}}
    gkd = {"recipe": "gkd", "curate": {"teacher": None}, "score": {"scorers": scorers}, "train": exact, **run}
    few = {"rounds": 1, "rollout": {"prompts": 8, "group": 1}, "evaluate": {"every": 9}}
    runs = {"gkd": gkd, "plain": {"recipe": "grpo"}}
    return deep_merge(TINY, {"warmups": {"wise": WISE}, "defaults": few}) | {"runs": runs}


def test_the_train_job_reads_the_warm_up() -> None:
    made = Plan(load_experiment(config()))
    check(made)
    w = SimpleNamespace(run="gkd-s0", next="0001")
    assert made.teachers.other(w) == ["results/warmups/wise-s0/policy.json"]
    assert json.loads(made.train_spec(w))["teacher"] == "results/warmups/wise-s0/policy.json"
    assert made.reference_policy(w) == []
    # Nothing of it in other runs' jobs, so that their results stay.
    other = SimpleNamespace(run="plain-s0", next="0001")
    assert made.teachers.other(other) == []
    assert "teacher" not in json.loads(made.train_spec(other))


def test_a_local_folder_of_hugging_face_is_an_input(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "notes.txt"):
        (tmp_path / name).write_text("{}")
    made = Plan(load_experiment(config({"kind": "live", "model": {"kind": "huggingface", "name": str(tmp_path)}})))
    w = SimpleNamespace(run="gkd-s0", next="0001")
    assert made.teachers.other(w) == [str(tmp_path / "config.json"), str(tmp_path / "model.safetensors")]
    assert "teacher" not in json.loads(made.train_spec(w))


def test_a_warm_up_that_there_is_not_is_named() -> None:
    with pytest.raises(
        ConfigError, match=r"runs\.gkd\.train\.teacher\.model\.name: 'wiser' is not in warmups \(tiny, wise"
    ):
        load_experiment(config({"kind": "live", "model": {"kind": "warmup", "name": "wiser"}}))


def test_the_model_in_its_context_is_checked_before_use() -> None:
    told = {"kind": "teacher", "model": {"kind": "live"}, "top_k": 0, "context": [{"prompt": "{answer}>{prompt}"}]}
    private = {**LIVE, "context": "privileged"}
    made = Plan(load_experiment(config(private, curate={"teacher": "teacher"}, score={"scorers": {"teacher": told}})))
    w = SimpleNamespace(run="gkd-s0", round="0000", scorer="teacher")
    assert json.loads(made.teachers.check_spec(w))["config"]["model"] == {"kind": "warmup", "name": "wise"}
    assert made.teachers.checked_model(w) == ["results/warmups/wise-s0/policy.json"]


@pytest.mark.slow
def test_a_round_beside_a_larger_warm_up(tmp_path: Path) -> None:
    project = Project(tmp_path, config())
    project.snakemake("results/gkd-s0/r0001/policy.json", timeout=600)
    said = json.loads((tmp_path / "results/gkd-s0/r0001/metrics.json").read_text())
    figures = {m["name"]: m["value"] for m in said["metrics"]}
    assert figures["distill/share"] == 1.0
    assert figures["distill/divergence"] > 0.0
    # Taught anew, the warm-up's policy is another, and the round is trained again.
    project.write_config(warmups={"wise": {"sft": {"steps": 91}}})
    assert "train" in project.snakemake("-n", "results/gkd-s0/r0001/policy.json", timeout=600).stdout
