"""Discriminators in the plan and through the real Snakemake: one per round, each made of the one before."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from rollway.config import deep_merge, load_experiment
from rollway.errors import RollwayError
from rollway.runtime.plan import Plan
from rollway.runtime.plan_checks import check
from rollway.runtime.retention import prunable
from workflow.project import TINY, Project

TEXT = {"references": ["results/teacher-s{seed}/r0000/p0/rollouts-000.parquet"]}
TEACHER = {"recipe": "sft", "rounds": 1, "rollout": {"prompts": 40, "group": 1}}


def scorer(**given: Any) -> dict[str, Any]:
    return {"score": {"scorers": {"discriminator": {"kind": "discriminator", **given}}}}


def plan(runs: dict[str, Any], **changes: Any) -> Plan:
    made = Plan(load_experiment({**deep_merge(TINY, {"defaults": {"rounds": 3}, **changes}), "runs": runs}))
    check(made)
    return made


def at(run: str, round: int, **more: str) -> Any:
    return SimpleNamespace(run=run, round=f"{round:04d}", scorer="discriminator", p="0", shard="000", **more)


def model(run: str, round: int) -> str:
    return f"results/{run}/r{round:04d}/discriminators/discriminator/reward_model.json"


def test_every_round_goes_on_from_the_one_before() -> None:
    made = plan({"gad": {"recipe": "gad", "seeds": [0, 1]}})
    for run in ("gad-s0", "gad-s1"):
        first, second = at(run, 0), at(run, 1)
        assert made.discriminators.rollouts(second) == [f"results/{run}/r0001/p0/rollouts-000.parquet"]
        assert made.discriminators.previous(first) == []
        assert made.discriminators.policy(first) == [f"results/warmups/tiny-{run[-2:]}/policy.json"]
        assert made.discriminators.previous(second) == [model(run, 0)]
        assert made.discriminators.policy(second) == []
        assert made.scoring_reward_model(second) == [model(run, 1)]
        assert json.loads(made.score_spec(second))["trained"] == model(run, 1)
        assert made.scores_with_a_model(second)
        assert json.loads(made.discriminators.spec(second))["seed"] == int(run[-1])
        assert f"results/{run}/r0002/discriminator-discriminator.json" in made.metrics_of(run)
    assert made.discriminators.references(at("gad-s0", 0)) == []


def test_a_fork_takes_its_parents_where_it_takes_the_scores() -> None:
    fork = {"recipe": "gad", "fork": {"run": "gad", "round": 1, "stage": "score"}}
    runs = {"gad": {"recipe": "gad"}, "same": fork, "other": {**fork, **scorer(training={"epochs": 3})}}
    made = plan(runs)
    assert made.scoring_reward_model(at("same-s0", 1)) == [model("gad-s0", 1)]
    assert made.discriminators.previous(at("same-s0", 2)) == [model("gad-s0", 1)]
    assert made.scoring_reward_model(at("other-s0", 1)) == [model("other-s0", 1)]
    assert made.discriminators.rollouts(at("other-s0", 1)) == ["results/gad-s0/r0001/p0/rollouts-000.parquet"]
    assert made.discriminators.previous(at("other-s0", 1)) == [model("other-s0", 0)]
    own = [path for path in made.metrics_of("same-s0") if "discriminator" in path]
    assert own == ["results/same-s0/r0002/discriminator-discriminator.json"]


def test_the_teachers_text_may_be_another_runs() -> None:
    made = plan({"teacher": TEACHER, "gad": {"recipe": "gad", "seeds": [0], **scorer(**TEXT)}})
    assert made.discriminators.references(at("gad-s0", 1)) == ["results/teacher-s0/r0000/p0/rollouts-000.parquet"]


def test_one_that_comes_later_starts_from_the_policy_of_round_0() -> None:
    both = {"exact": {"kind": "exact"}, **scorer()["score"]["scorers"]}
    late = {"from": 1, "score": {"scorers": both, "reward": {"exact": 1.0, "discriminator": 1.0}}}
    made = plan({"grpo": {"recipe": "grpo", "schedule": [late]}})
    assert made.scoring_reward_model(at("grpo-s0", 1)) == [model("grpo-s0", 1)]
    assert made.discriminators.policy(at("grpo-s0", 1)) == ["results/warmups/tiny-s0/policy.json"]
    assert made.discriminators.previous(at("grpo-s0", 2)) == [model("grpo-s0", 1)]


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ({"score": {"correct": "discriminator"}}, "says whose a text is and not whether it is right"),
        ({"rollout": {"engine": {"kind": "stored", "files": ["x.parquet"]}}}, "stored completions are none of it"),
        (scorer(needs=["exact"]), "`needs` has no effect on kind discriminator"),
        (scorer(heldout_share=1.0), "less than 1"),
        (scorer(references=["results/gad-s0/r0002/p0/rollouts-000.parquet"]), "references would be made of it"),
    ],
)
def test_what_makes_no_sense_is_refused(run: dict[str, Any], words: str) -> None:
    with pytest.raises(RollwayError, match=words):
        plan({"gad": {"recipe": "gad", **run}})


def test_weights_of_early_rounds_may_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last two rounds' stay, and what a fork goes on from."""
    monkeypatch.chdir(tmp_path)
    fork = {"recipe": "gad", "fork": {"run": "gad", "round": 2, "stage": "score"}}
    long = {"defaults": {"rounds": 6}}
    alone, forked = plan({"gad": {"recipe": "gad"}}, **long), plan({"gad": {"recipe": "gad"}, "dr": fork}, **long)
    for r in range(6):
        made = Path(model("gad-s0", r))
        (made.parent / "weights").mkdir(parents=True)
        made.write_text("{}")
    for found, gone in ((alone, (0, 1, 2, 3)), (forked, (0, 3))):
        assert prunable(found) == [Path(model("gad-s0", r)).parent / "weights" for r in gone]


def test_gad_through_snakemake(tmp_path: Path) -> None:
    """Two rounds against the text of another run: what each round's D says is the reward of its rollouts."""
    run = {
        "recipe": "gad",
        "rounds": 2,
        "rollout": {"prompts": 8},
        **scorer(**TEXT, training={"epochs": 4, "lr": 3e-3}),
    }
    project = Project(tmp_path, {**TINY, "runs": {"teacher": TEACHER, "gad": run}})
    scored = [f"results/gad-s0/r000{r}/p0/scores/discriminator-000.parquet" for r in (0, 1)]
    project.snakemake(scored[1])
    assert project.planned(*scored) == {}
    query = "SELECT round, step, name, value FROM metrics WHERE run = 'gad-s0' AND stage = 'discriminator'"
    rows = json.loads(project.rollway("sql", query, "--format", "json").stdout)
    names = {row["name"].removeprefix("discriminator/") for row in rows}
    assert {"loss", "before_accuracy", "heldout_accuracy", "heldout_log_loss", "pairs_train"} <= names
    assert {row["round"] for row in rows} == {0, 1}
    for path in scored:
        assert len(set(pq.read_table(tmp_path / path)["reward"].to_pylist())) > 4
