"""A live teacher that is a larger warm-up's policy, through the plan and the real Snakemake."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rollway.config import deep_merge, load_experiment
from rollway.config.base import ConfigError
from rollway.config.teachers import LIVE_TEACHER
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


def at(round: int, scorer: str = LIVE_TEACHER) -> Any:
    return SimpleNamespace(run="gkd-s0", round=f"{round:04d}", scorer=scorer, next=f"{round + 1:04d}")


def test_without_a_scorer_the_model_itself_is_checked_before_use() -> None:
    """In the task's prompt, before the first round, and where the schedule names another model."""
    other = {"from": 3, "train": {"teacher": {"model": {"seed": 1}}}}
    made = Plan(load_experiment(config(rounds=4, schedule=[other])))
    check(made)
    folder = "results/gkd-s0"
    first, again = (f"{folder}/{r}/teacher-{LIVE_TEACHER}.json" for r in ("r0000", "r0003"))
    assert made.teachers.checks("gkd-s0") == [first, again]
    assert made.teachers.checks_before(at(0)) == [first]
    assert made.teachers.checks_before(at(1)) == []
    assert made.teachers.checks("plain-s0") == []
    spec = json.loads(made.teachers.check_spec(at(0)))
    assert spec["config"] == {"kind": "teacher", "model": {"kind": "warmup", "name": "wise"}}
    assert made.teachers.checked_model(at(3)) == ["results/warmups/wise-s1/policy.json"]
    assert made.teachers.checked_needs(at(0)) == made.teachers.checked_files(at(0)) == []


def test_how_the_model_is_checked_trains_nothing_anew() -> None:
    asked = {**LIVE, "check": {"otherwise": "stop", "every": 2}}
    plain, stopped, nobody = (
        Plan(load_experiment(config(given, rounds=4))) for given in (LIVE, asked, {**LIVE, "check": None})
    )
    assert len({made.train_spec(at(1)) for made in (plain, stopped, nobody)}) == 1
    assert [len(made.teachers.checks("gkd-s0")) for made in (plain, stopped, nobody)] == [1, 2, 0]
    assert json.loads(stopped.teachers.check_spec(at(2)))["config"]["check"] == {"otherwise": "stop"}


def test_a_scorer_that_stands_for_the_model_is_checked_in_its_place() -> None:
    """Its context and `needs`, once. A stored teacher that is the same model (MiniLLM's rewards) is looked at once too;
    another model's context is read by the trainer's."""
    told = {"kind": "teacher", "model": {"kind": "live"}, "top_k": 0, "context": [{"prompt": "{answer}>{prompt}"}]}
    private, stored = {**LIVE, "context": "privileged"}, {"kind": "warmup", "name": "wise"}
    scored = {"curate": {"teacher": "teacher"}, "score": {"scorers": {"teacher": told}}}

    def checks(teacher: dict[str, Any], **run: Any) -> list[str]:
        made = Plan(load_experiment(config(teacher, **run)))
        return [Path(path).stem for path in made.teachers.checks("gkd-s0")]

    assert checks(private, **scored) == ["teacher-teacher"]
    minillm = {
        "recipe": "minillm",
        "curate": {"teacher": "teacher"},
        "score": {"scorers": {"teacher": {"model": stored}}},
    }
    assert checks(LIVE, **minillm) == ["teacher-teacher"]
    other = deep_merge(minillm, {"score": {"scorers": {"teacher": {"model": {"seed": 1}}}}})
    assert checks(LIVE, **other) == ["teacher-teacher", f"teacher-{LIVE_TEACHER}"]
    read = deep_merge(scored, {"score": {"scorers": {"teacher": {"model": {**stored, "seed": 1}}}}})
    made = Plan(load_experiment(config(private, **read)))
    assert json.loads(made.teachers.check_spec(at(0)))["config"]["context"] == told["context"]
    with pytest.raises(ConfigError, match=r"train\.teacher\.check: has no effect, score\.scorers\.teacher stands for"):
        load_experiment(config({**private, "check": {"rollouts": 8}}, **scored))


def test_a_check_that_nobody_makes_is_refused() -> None:
    own = {"kind": "live", "weights": "initial", "check": {"rollouts": 8}}
    with pytest.raises(ConfigError, match=r"check has no effect without `model`"):
        load_experiment(config(own))
    with pytest.raises(ConfigError, match=r"cannot be called 'train\.teacher'"):
        load_experiment(config(score={"scorers": {LIVE_TEACHER: {"kind": "exact"}}}))


def test_a_scorer_that_nothing_reads_any_more_is_taken_out() -> None:
    """As the page of GKD writes it: null in place of the recipe's stored teacher."""
    kept, dropped = (
        Plan(load_experiment(config(score={"scorers": {"teacher": teacher}})))
        for teacher in ({"kind": "teacher", "model": {"kind": "warmup", "name": "wise"}}, None)
    )
    folder = "results/gkd-s0/r0000/p0/scores"
    assert f"{folder}/teacher-000.parquet" in kept.all_scores()
    assert [path for path in dropped.all_scores() if path.startswith(folder)] == [f"{folder}/exact-000.parquet"]
    assert dropped.teachers.checks("gkd-s0") == kept.teachers.checks("gkd-s0")


@pytest.mark.slow
def test_a_round_beside_a_larger_warm_up(tmp_path: Path) -> None:
    project = Project(tmp_path, config())
    project.snakemake("results/gkd-s0/r0001/policy.json", timeout=600)
    said = json.loads((tmp_path / "results/gkd-s0/r0001/metrics.json").read_text())
    figures = {m["name"]: m["value"] for m in said["metrics"]}
    assert figures["distill/share"] == 1.0
    assert figures["distill/divergence"] > 0.0
    looked = json.loads((tmp_path / f"results/gkd-s0/r0000/teacher-{LIVE_TEACHER}.json").read_text())
    assert f"{LIVE_TEACHER}/better" in {m["name"] for m in looked["metrics"]}
    # Taught anew, the warm-up's policy is another, and the round is trained again.
    project.write_config(warmups={"wise": {"sft": {"steps": 91}}})
    assert "train" in project.snakemake("-n", "results/gkd-s0/r0001/policy.json", timeout=600).stdout
