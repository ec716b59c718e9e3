"""Teachers in the plan, and through the real Snakemake: scored once, carried into the batch, asked by SQL."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from rollway.config import deep_merge, load_experiment
from rollway.config.base import ConfigError
from rollway.errors import RollwayError
from rollway.runtime.plan import Plan
from rollway.runtime.plan_checks import check
from rollway.store.catalog import run_sql
from workflow.project import TINY, Project

BIGGER = {"bigger": {**TINY["warmups"]["tiny"], "policy": {**TINY["warmups"]["tiny"]["policy"], "hidden": 48}}}
EXACT = {"exact": {"kind": "exact"}}


def taught(model: dict[str, Any], teacher: str | None = "wise", **given: Any) -> dict[str, Any]:
    scorer = {"kind": "teacher", "model": model, **given}
    run: dict[str, Any] = {"score": {"scorers": {**EXACT, "wise": scorer}, "reward": {"exact": 1.0}}}
    if teacher is not None:
        run |= {"curate": {"teacher": teacher}, "train": {"objective": {"distill": {}}}}
    return run


def plan(*changes: dict[str, Any]) -> Plan:
    config = {"warmups": BIGGER, "defaults": {"rounds": 4}, "runs": {"grpo": {"recipe": "grpo", "seeds": [3]}}}
    for change in changes:
        config = deep_merge(config, change)
    made = Plan(load_experiment(deep_merge(TINY, config)))
    check(made)
    return made


def at(round: int, scorer: str = "wise", run: str = "grpo-s3") -> Any:
    return SimpleNamespace(run=run, round=f"{round:04d}", p="0", shard="000", scorer=scorer, next=f"{round + 1:04d}")


@pytest.mark.parametrize(
    ("model", "round", "file"),
    [
        ({"kind": "warmup", "name": "bigger"}, 2, "results/warmups/bigger-s0/policy.json"),
        ({"kind": "warmup", "name": "bigger", "seed": 5}, 2, "results/warmups/bigger-s5/policy.json"),
        ({"kind": "policy"}, 0, "results/warmups/tiny-s3/policy.json"),
        ({"kind": "policy"}, 2, "results/grpo-s3/r0002/policy.json"),
        ({"kind": "policy", "age": 2}, 3, "results/grpo-s3/r0001/policy.json"),
        ({"kind": "policy", "age": 2}, 1, "results/warmups/tiny-s3/policy.json"),
        ({"kind": "policy", "age": "initial"}, 3, "results/warmups/tiny-s3/policy.json"),
        ({"kind": "policy", "policy": "ema"}, 3, "results/grpo-s3/r0003/policy.json"),
    ],
)
def test_scores_wait_for_the_teacher(model: dict[str, Any], round: int, file: str) -> None:
    made = plan({"runs": {"grpo": taught(model)}})
    spec = json.loads(made.score_spec(at(round)))
    assert (spec["policy"], spec["teacher"]) == ("results/warmups/tiny-s3/policy.json", file)
    assert made.teachers.policies(at(round)) == list(dict.fromkeys([spec["policy"], file]))
    assert made.scores_with_a_model(at(round))


def test_other_scorers_are_planned_as_ever() -> None:
    made = plan({"runs": {"grpo": taught({"kind": "policy"})}})
    spec = json.loads(made.score_spec(at(1, "exact")))
    assert spec == json.loads(plan().score_spec(at(1, "exact")))
    assert made.teachers.policies(at(1, "exact")) == []


def test_a_hugging_face_folder_is_an_input(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    made = plan({"runs": {"grpo": taught({"kind": "huggingface", "name": str(tmp_path)})}})
    assert made.scorer_files(at(0)) == [str(tmp_path / "model.safetensors")]
    assert "teacher" not in json.loads(made.score_spec(at(0)))


def test_only_the_named_teacher_is_waited_for() -> None:
    recorded = plan({"runs": {"grpo": taught({"kind": "policy", "age": 1}, teacher=None)}})
    assert recorded.batch_scores(at(1)) == plan().batch_scores(at(1))
    assert recorded.curate_spec(at(1)) == plan().curate_spec(at(1))
    used = plan({"runs": {"grpo": taught({"kind": "policy", "age": 1})}})
    assert [Path(path).name for path in used.batch_scores(at(1))] == ["exact-000.parquet", "wise-000.parquet"]
    assert json.loads(used.curate_spec(at(1)))["teacher_columns"] == ["teacher_logprob"]


def test_references_are_inputs_made_first_or_there() -> None:
    file = "results/other-s0/r0000/p0/rollouts-000.parquet"
    model, context = {"kind": "policy"}, [{"prompt": "{reference}{prompt}"}]
    run = {"runs": {"grpo": taught(model, references=[file], context=context)}}
    with pytest.raises(RollwayError, match=r"wise.references: results/other-s0/.*: no such file, and no run of this"):
        plan(run)
    made = plan(run, {"runs": {"other": {"recipe": "grpo"}}})
    assert made.scorer_files(at(1)) == [file]
    own = ["results/grpo-s3/r0002/p0/rollouts-000.parquet"]
    with pytest.raises(RollwayError, match=r"wise-000.parquet: its teacher's references would be made of it"):
        plan({"runs": {"grpo": taught(model, references=own, context=context)}})


def test_a_fork_takes_its_parents_scores() -> None:
    fork = {"recipe": "dr-grpo", "seeds": [3], "fork": {"run": "grpo", "round": 1, "stage": "score"}}
    both = taught({"kind": "policy", "age": 1})
    made = plan({"runs": {"grpo": both, "dr": {**fork, **both}}})
    assert made.score_paths("dr-s3", 1, 0, "wise") == ["results/grpo-s3/r0001/p0/scores/wise-000.parquet"]
    other = plan({"runs": {"grpo": both, "dr": {**fork, **taught({"kind": "policy", "age": "initial"})}}})
    assert other.score_paths("dr-s3", 1, 0, "wise") == ["results/dr-s3/r0001/p0/scores/wise-000.parquet"]


def test_a_warm_up_that_is_not_there() -> None:
    with pytest.raises(
        ConfigError, match=r"runs.grpo.score.scorers.wise.model.name: 'huge' is not in warmups \(tiny, b"
    ):
        plan({"runs": {"grpo": taught({"kind": "warmup", "name": "huge"})}})


@pytest.mark.slow
def test_a_larger_teacher_and_the_policy_with_the_answer(tmp_path: Path) -> None:
    """One run distils from a bigger warm-up; SQL asks its scores, and those of the policy that read the answer."""
    hinted = {"kind": "teacher", "model": {"kind": "policy"}, "context": [{"prompt": "{answer}>{prompt}"}], "top_k": 4}
    run = deep_merge(
        taught({"kind": "warmup", "name": "bigger"}), {"recipe": "grpo", "score": {"scorers": {"hinted": hinted}}}
    )
    project = Project(tmp_path, deep_merge(TINY, {"warmups": BIGGER, "runs": {"grpo": run}, "defaults": {"rounds": 2}}))
    project.snakemake("all_scores", "results/grpo-s0/r0001/batch.parquet")
    batch = pq.read_table(tmp_path / "results/grpo-s0/r0001/batch.parquet")
    assert batch.column_names[-1] == "teacher_logprob"
    lengths = pq.read_table(
        tmp_path / "results/grpo-s0/r0001/p0/rollouts-000.parquet", columns=["rollout_id", "length"]
    )
    by_id = dict(zip(*(column.to_pylist() for column in lengths.columns), strict=True))
    for row in batch.to_pylist():
        assert len(row["teacher_logprob"]) == by_id[row["rollout_id"]]
    query = "SELECT round, scorer, rollouts FROM teachers ORDER BY ALL"
    answers = json.loads(run_sql(tmp_path / "results", query, "json"))
    assert [(a["round"], a["scorer"], a["rollouts"]) for a in answers] == [
        (round, scorer, 16) for round in range(2) for scorer in ("hinted", "wise")
    ]
