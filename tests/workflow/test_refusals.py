"""Methods whose parts contradict each other, or that the run cannot feed, are refused before any job runs."""

from pathlib import Path
from typing import Any

import pytest

from rollway.config import deep_merge, load_experiment, load_recipe, recipe_names
from rollway.errors import RollwayError
from rollway.runtime.plan import Plan
from rollway.runtime.plan_checks import check
from workflow.project import TINY

JUDGE = {"scorers": {"exact": {"kind": "exact"}, "judge": {"kind": "python", "function": "m:f"}}}


def plan(run: dict[str, Any], **changes: Any) -> Plan:
    made = Plan(load_experiment(deep_merge({**TINY, "runs": {"mine": run}}, changes)))
    check(made)
    return made


def refused(run: dict[str, Any], words: list[str], **changes: Any) -> None:
    with pytest.raises(RollwayError) as caught:
        plan(run, **changes)
    message = str(caught.value)
    assert "\n" not in message
    for word in ["runs.mine", *words]:
        assert word in message, message


def objective(**parts: Any) -> dict[str, Any]:
    return {"train": {"objective": parts}}


@pytest.mark.parametrize(
    ("run", "words"),
    [
        # A gate on single tokens and a ratio of whole rows.
        (
            {"recipe": "gspo", **objective(select={"kind": "entropy_top", "share": 0.2})},
            ["select entropy_top acts on single tokens", "`ratio: sequence_token`"],
        ),
        ({"recipe": "gspo", **objective(select="curvature")}, ["select curvature acts on single tokens"]),
        (
            {"recipe": "gspo", **objective(correction={"kind": "mis", "level": "token"})},
            ["correction mis at level token acts on single tokens", "`level: sequence`"],
        ),
        # Weights and scales that cancel.
        (
            {"recipe": "grpo", "score": {"reward": {"exact": 2.0}}},
            ["score.reward.exact: 2 cancels", "set it to 1.0", "dr_grpo"],
        ),
        (
            {"recipe": "reinforce-plus-plus-baseline", "score": {"reward": {"exact": 0.5}}},
            ["score.reward.exact: 0.5 cancels"],
        ),
        (
            {"recipe": "grpo", **objective(aggregate={"kind": "token_mean", "weights": "numerator"})},
            ["aggregate.weights: numerator has no effect", "set curate.weight"],
        ),
        (
            {
                "recipe": "copg",
                "curate": {"weight": {"sql": "pf_ppo", "keep": "bw"}},
                **objective(preference={"form": "group"}),
            },
            ["curate.weight: copg compares all rows of a group alike", "`form: pair`"],
        ),
        # A preference without pairs.
        (
            {"recipe": "dpo", "curate": {"pair": None}},
            ["preference: dpo compares pairs, and curation makes none", "set curate.pair", "right_wrong"],
        ),
        ({"recipe": "copg", "curate": {"pair": None}}, ["copg compares pairs", "or use `form: group`"]),
        # A judge, critic or demonstration that the run does not have.
        ({"recipe": "dagrpo"}, ["dagrpo.sql", '"judge" not found', "if judge is a scorer, add it to score.scorers"]),
        ({"recipe": "ppo", "train": {"critic": None}}, ["train.critic and train.objective.value go together"]),
        ({"recipe": "grpo", **objective(value={"clip": 0.2})}, ["critic"]),
        ({"recipe": "fiberpo-domain", "curate": {"route": None}}, ["fibre_domain", "set curate.route"]),
        # Experts and what stands in for their ratio.
        (
            {"recipe": "grpo", "rollout": {"experts": 1}},
            ["rollout.experts: nobody sampled", "train.objective.anchors: unit", "curate.route: {sql: source}"],
        ),
        (
            {"recipe": "dagrpo", "score": JUDGE, "rollout": {"experts": 0}},
            ["train.objective.anchors: act on experts' rollouts", "`rollout.experts: 1`"],
        ),
        ({"recipe": "dagrpo", "score": JUDGE, "curate": {"route": None}}, ["anchors", "{sql: source}"]),
        (
            {"recipe": "dagrpo", "score": JUDGE, "rollout": {"experts": 2}},
            ["rollout.experts", "less than or equal to 1"],
        ),
    ],
)
def test_conflicting_parts(run: dict[str, Any], words: list[str]) -> None:
    refused(run, words)


@pytest.mark.parametrize(
    "run",
    [
        {"recipe": "dagrpo", "score": JUDGE},
        {"recipe": "dagrpo", "score": JUDGE, **objective(correction={"kind": "tis", "level": "token", "cap": 2.0})},
        {"recipe": "dagrpo", "score": JUDGE, **objective(ratio={"kind": "token", "denominator": "behavior"})},
        {"recipe": "sft", "rollout": {"experts": 1}},
        {"recipe": "dpo", "rollout": {"experts": 1}},
        {"recipe": "reinforce", "rollout": {"experts": 1}},
        {"recipe": "copg", "curate": {"pair": None}, **objective(preference={"form": "group"})},
        {"recipe": "gspo", **objective(correction={"kind": "mis", "level": "sequence"})},
        {"recipe": "gspo", **objective(ratio="sequence_token", select={"kind": "entropy_top", "share": 0.2})},
        {"recipe": "gspo", **objective(select={"kind": "curvature", "level": "sequence"})},
        {"recipe": "d3s-gspo"},
        {"recipe": "dr-grpo", "score": {"reward": {"exact": 2.0}}},
        {"recipe": "grpo", "score": {"reward": {"exact": 2.0}}, "curate": {"filter": {"sql": "informative_groups"}}},
    ],
)
def test_parts_that_go_together(run: dict[str, Any]) -> None:
    plan(run)


def test_every_recipe_is_planned_once_its_scorers_are_there() -> None:
    """The trial run of the SQL on no rows refuses no method of ours."""
    for name in recipe_names():
        score = JUDGE if load_recipe(name).curate.advantage and "dagrpo" in name else {}
        plan({"recipe": name, "score": score})


@pytest.mark.parametrize(
    ("sql", "words"),
    [
        ("SELECT rollout_id, rewrd AS advantage FROM scored", ["mine.sql", "rewrd", "reward"]),
        ("SELECT rollout_id, quality AS advantage FROM scored", ["mine.sql", "if quality is a scorer"]),
        ("SELECT rollout_id FROM scored", ["mine.sql", "lacks the column advantage"]),
        ("SELECT rollout_id, text_hash AS advantage FROM scored", ["mine.sql", "not a number", "CAST"]),
        ("SELECT rollout_id, reward AS advantage, 1 AS x FROM scored", ["mine.sql", "returns x", "nothing reads"]),
        ("SELECT rollout_id, reward AS advantage FROM scores", ["mine.sql", "scores"]),
    ],
)
def test_sql_is_tried_on_no_rows(tmp_path: Path, sql: str, words: list[str]) -> None:
    (tmp_path / "mine.sql").write_text(f"-- My own advantage.\n{sql}\n")
    refused({"recipe": "grpo", "curate": {"advantage": {"sql": str(tmp_path / "mine.sql")}}}, words)


def test_a_column_of_a_scorer_of_the_run_is_known(tmp_path: Path) -> None:
    (tmp_path / "mine.sql").write_text("-- My own.\nSELECT rollout_id, quality + judge AS advantage FROM scored\n")
    own = {"curate": {"advantage": {"sql": str(tmp_path / "mine.sql")}}}
    scorers = {name: {"kind": "python", "function": "m:f"} for name in ("quality", "judge")}
    plan({"recipe": "grpo", "score": {"scorers": {"exact": {"kind": "exact"}, **scorers}}, **own})


def test_experts_need_a_task_with_solutions() -> None:
    none = {"spell": {"answer": None}}
    unlearnt = {"tiny": {"task": None, "sft": None}}
    score = {"scorers": {"judge": {"kind": "python", "function": "m:f"}}, "reward": {"judge": 1.0}, "correct": "judge"}
    words = ["rollout.experts: task spell has neither demonstrations nor answers", "tasks.spell.demonstration"]
    refused({"recipe": "dagrpo", "score": score}, words, tasks=none, warmups=unlearnt)
    plan({"recipe": "dagrpo", "score": score}, tasks={"spell": {"answer": None, "demonstration": "{answer}"}})


def test_a_fork_meets_its_parents_experts() -> None:
    parent = {"parent": {"recipe": "dagrpo", "score": JUDGE}}
    fork = {"recipe": "grpo", "score": JUDGE, "fork": {"run": "parent", "round": 0, "stage": "score"}}
    refused(fork, ["round 0 would train on rollouts of round 0", "experts' solutions", "anchors: unit"], runs=parent)
    plan({**fork, "recipe": "sft"}, runs=parent)


def test_replayed_experts() -> None:
    change = [{"from": 1, "rollout": {"experts": 0}, "train": {"objective": {"anchors": "none"}}}]
    run = {"recipe": "dagrpo", "score": JUDGE, "schedule": change}
    plan(run)
    refused({**run, "curate": {"replay": 1}}, ["round 1 would train on rollouts of round 0", "experts' solutions"])
