"""Methods whose parts contradict each other, or that the run cannot feed, are refused before any job runs."""

from pathlib import Path
from typing import Any

import pytest

from rollway.config import deep_merge, load_experiment, recipe_names
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
        (
            {"recipe": "reinforce-plus-plus", "score": {"reward": {"exact": 2.0}}, "train": {"advantage": {"kl": 0.0}}},
            ["score.reward.exact: 2 cancels"],
        ),
        (
            {"recipe": "grpo", "curate": {"advantage": {"sql": "gdpo"}}, "score": {"reward": {"exact": 2.0}}},
            ["score.reward.exact: 2 cancels"],
        ),
        # Rollouts of earlier rounds that are drawn from and not shown, and the other way round.
        (
            {"recipe": "r2vpo", "curate": {"replay": 0}},
            ["curate.replay: shows 0 earlier rounds", "replay.sql draws from 4", "(curate.select.max_age)"],
        ),
        ({"recipe": "r2vpo", "curate": {"select": {"max_age": 9}}}, ["shows 4", "draws from 9", "`replay: 9`"]),
        ({"recipe": "r2vpo", "curate": {"select": {"share": 1.5}}}, ["curate.select.share: 1.5 is not in (0, 1)"]),
        ({"recipe": "r2vpo", "curate": {"select": {"share": 1.0}}}, ["curate.select.share: 1.0 is not in (0, 1)"]),
        ({"recipe": "r2vpo", "curate": {"select": {"max_age": 0}}}, ["curate.select.max_age: 0 is not in [1, inf)"]),
        (
            {
                "recipe": "r2vpo",
                "curate": {"select": None, "replay": 0},
                **objective(gate={"dual": {"versions": 5}}),
            },
            ["gate.dual.versions: 5 dual variables", "no rows of age 1", "versions: 1"],
        ),
        # Passes that would be empty.
        (
            {"recipe": "dapo", "curate": {"filter": None}},
            ["rollout.refill", "there is no filter", "`rollout: {passes: 1, refill: null}`"],
        ),
        (
            {"recipe": "dapo", "rollout": {"refill": {"oversample": 0.5}}},
            ["rollout.refill.oversample", "greater than or equal to 1"],
        ),
        # What SQL makes and nothing reads.
        *(
            ({"recipe": name, "curate": {"advantage": {"sql": "grpo"}}}, ["curate.advantage: has no effect", "reads"])
            for name in ("sft", "rft", "dpo", "copg")
        ),
        ({"recipe": "grpo", "curate": {"route": {"sql": "source"}}}, ["curate.route: has no effect"]),
        (
            {"recipe": "w-reinforce", "curate": {"reward": {"sql": "threshold", "threshold": 0.5}}},
            ["curate.reward: has no effect", "`curate: {reward: null}`"],
        ),
        ({"recipe": "sft", "curate": {"reward": {"sql": "overlong"}}}, ["curate.reward: has no effect"]),
        (
            {"recipe": "grpo", "curate": {"pair": {"sql": "best_worst"}}},
            ["curate.pair: the objective compares no pairs", "curate.filter"],
        ),
        (
            {"recipe": "grpo", "train": {"optimizer": {"schedule": {"floor": 0.1}}}},
            ["train.optimizer.schedule: constant ignores `floor`"],
        ),
        # A bound that is needed.
        (
            {"recipe": "grpo", "curate": {"weight": {"sql": "threshold", "keep": "top_bottom", "high": 0.5}}},
            ["curate.weight.low: is missing"],
        ),
        # Advantages that the ratio cannot take, and none at all.
        *(
            ({"recipe": "gspo", "train": {"advantage": given}, "curate": curate}, ["train.advantage", "sequence_token"])
            for given, curate in (({"kind": "whiten"}, {}), ({"kind": "returns"}, {"advantage": None}))
        ),
        (
            {"recipe": "grpo", "curate": {"advantage": None}},
            ["the objective needs an advantage, and nothing makes one", "set curate.advantage"],
        ),
        # Rows that would stand in a group several times.
        (
            {"recipe": "copg", **objective(preference={"form": "group"})},
            ["curate.pair: copg compares all rows of a group", "several times"],
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
        {"recipe": "gspo", "curate": {"advantage": None}, "train": {"advantage": {"kind": "leave_one_out"}}},
        {"recipe": "r2vpo", "curate": {"select": None, "replay": 0}},
        {"recipe": "r2vpo", "curate": {"select": {"max_age": 2}}, **objective(gate={"dual": {"versions": 5}})},
        {"recipe": "copg", "curate": {"reward": {"sql": "threshold", "threshold": 0.5}}},
        {"recipe": "dapo", "curate": {"filter": None}, "rollout": {"passes": 1, "refill": None}},
        {"recipe": "dr-grpo", "score": {"reward": {"exact": 2.0}}},
        {"recipe": "grpo", "score": {"reward": {"exact": 2.0}}, "curate": {"filter": {"sql": "informative_groups"}}},
    ],
)
def test_parts_that_go_together(run: dict[str, Any]) -> None:
    plan(run)


def test_every_recipe_is_planned_once_its_scorers_are_there() -> None:
    """The trial run of the SQL on no rows refuses no method of ours."""
    teacher = {"teacher": TINY["warmups"]["tiny"]}
    for name in recipe_names():
        score = JUDGE if name in ("dagrpo", "ovd") else {}
        text = {"runs": {"teacher": {"recipe": "sft", "rounds": 1}}} if name == "seqkd" else {}
        plan({"recipe": name, "score": score}, warmups=teacher, **text)


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


def test_sql_that_reads_what_sql_made(tmp_path: Path) -> None:
    """An advantage that only a pair or a choice of rows goes by acts; so does a route."""
    (tmp_path / "mine.sql").write_text("-- My own.\nSELECT rollout_id FROM scored WHERE abs(advantage) > 0\n")
    chosen = {"advantage": {"sql": "grpo"}, "select": {"sql": str(tmp_path / "mine.sql")}}
    plan({"recipe": "sft", "curate": chosen})
    (tmp_path / "mine.sql").write_text("-- My own.\nSELECT rollout_id FROM scored WHERE route = 'right'\n")
    routed = {"route": {"sql": "correctness"}, "select": {"sql": str(tmp_path / "mine.sql")}}
    plan({"recipe": "grpo", "curate": routed})
    refused({"recipe": "sft", "curate": {"advantage": {"sql": "grpo"}, **routed}}, ["curate.advantage: has no effect"])
    (tmp_path / "mine.sql").write_text("-- My own.\nSELECT rollout_id, 2 * reward AS advantage FROM scored\n")
    plan({"recipe": "grpo", "curate": {"advantage": None, "select": {"sql": str(tmp_path / "mine.sql")}}})


def test_token_advantages_of_sql_under_a_ratio_of_rows(tmp_path: Path) -> None:
    text = "-- My own.\nSELECT rollout_id, reward AS advantage, [reward::FLOAT] AS token_advantage FROM scored\n"
    (tmp_path / "mine.sql").write_text(text)
    own = {"curate": {"advantage": {"sql": str(tmp_path / "mine.sql")}}}
    refused({"recipe": "gspo", **own}, ["curate.advantage: makes one advantage per token", "`ratio: sequence_token`"])
    plan({"recipe": "gspo-token", **own})


def test_the_number_of_dual_variables_stays() -> None:
    """By schedule or fork: the checkpoint holds those of the rounds before."""

    def versions(count: int) -> dict[str, Any]:
        return objective(gate={"dual": {"versions": count}})

    words = ["round 1: train.objective.gate.dual.versions asks for 2", "holds 1", "keep their number"]
    refused({"recipe": "r2vpo", "rounds": 2, "schedule": [{"from": 1, **versions(2)}]}, words)
    parent = {"parent": {"recipe": "r2vpo", "rounds": 2}}
    fork = {"recipe": "r2vpo", "rounds": 2, "fork": {"run": "parent", "round": 0, "stage": "train"}}
    refused({**fork, **versions(2)}, words, runs=parent)
    plan(fork, runs=parent)
    plan({**fork, **versions(2), "fork": {"run": "parent", "round": 0, "stage": "score"}}, runs=parent)
    plan({**fork, **objective(gate={"dual": "fixed"})}, runs=parent)
    plan({"recipe": "r2vpo", "rounds": 2, "schedule": [{"from": 1, **objective(gate={"dual": "fixed"})}]})
    # What a fork leaves behind is not held against it, and rounds before it are its parent's.
    plan({**fork, **versions(2), "fork": {**fork["fork"], "optimizer": "fresh"}}, runs=parent)
    later = {"run": "parent", "round": 1, "stage": "train", "optimizer": "fresh"}
    plan({**fork, **versions(2), "rounds": 3, "fork": later}, runs=parent)
    words[0] = "round 2: train.objective.gate.dual.versions asks for 2"
    refused({**fork, **versions(2), "rounds": 3, "fork": {**later, "optimizer": "carried"}}, words, runs=parent)


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
    none = {"curate": {"route": None}, "train": {"objective": {"anchors": "none"}}}
    change = [{"from": 1, "rollout": {"experts": 0}, **none}]
    run = {"recipe": "dagrpo", "score": JUDGE, "schedule": change}
    plan(run)
    refused({**run, "curate": {"replay": 1}}, ["round 1 would train on rollouts of round 0", "experts' solutions"])
