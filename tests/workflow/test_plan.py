"""The plan by itself: paths, inputs and specs, without running Snakemake."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from rollway.config import deep_merge, load_experiment
from rollway.errors import RollwayError
from rollway.runtime.plan import Plan
from rollway.runtime.plan_checks import check
from workflow.project import TINY


def plan(changes: dict[str, Any]) -> Plan:
    made = Plan(load_experiment(deep_merge(TINY, {"defaults": {"rounds": 6}, **changes})))
    check(made)
    return made


def at(run: str, **wildcards: str) -> Any:
    return SimpleNamespace(run=run, **wildcards)


def fork(**settings: Any) -> dict[str, Any]:
    return {"dr": {"recipe": "dr-grpo", "fork": {"run": "grpo", "round": 2, "stage": "score"}, **settings}}


def test_a_fork_recomputes_log_probs_at_the_temperature_its_parent_sampled_at() -> None:
    made = plan({"runs": fork(rollout={"sampling": {"temperature": 0.5}})})
    assert json.loads(made.train_spec(at("dr-s0", next="0003")))["temperature"] == 1.0
    assert json.loads(made.train_spec(at("dr-s0", next="0004")))["temperature"] == 0.5


def test_a_fork_of_a_truncated_sampler_needs_a_correction() -> None:
    truncated = {"rollout": {"sampling": {"top_p": 0.9}}, "train": {"objective": {"correction": "tis"}}}
    whole = {"rollout": {"sampling": {"top_p": 1.0}}}
    with pytest.raises(RollwayError, match=r"runs\.dr: round 2 trains on rollouts of a truncated sampler"):
        plan({"runs": {"grpo": truncated, **fork(**whole)}})


def test_replay_across_a_change_of_temperature_is_refused() -> None:
    change = [{"from": 3, "rollout": {"sampling": {"temperature": 0.5}}}]
    with pytest.raises(RollwayError, match="round 3 would replay rollouts sampled at another temperature"):
        plan({"runs": {"grpo": {"recipe": "r2vpo", "schedule": change}}})


def test_a_fork_after_curation_trains_on_what_its_parent_replayed() -> None:
    child = {"recipe": "grpo", "fork": {"run": "grpo", "round": 3, "stage": "curate"}}
    made = plan({"runs": {"grpo": {"recipe": "r2vpo"}, "child": child}})
    paths = made.trained_rollouts(at("child-s0", next="0004"))
    assert [path.split("/")[2] for path in paths] == ["r0000", "r0001", "r0002", "r0003"]


def test_a_scorer_whose_needs_differ_is_scored_anew_by_a_fork() -> None:
    def scorers(pattern: str) -> dict[str, Any]:
        both = {"kind": "python", "function": "m:f", "needs": ["shape"]}
        return {"scorers": {"exact": {"kind": "exact"}, "shape": {"kind": "format", "pattern": pattern}, "both": both}}

    made = plan({"defaults": {"rounds": 6, "score": scorers("a")}, "runs": fork(score=scorers("b"))})
    assert made.score_paths("dr-s0", 2, 0, "exact")[0].startswith("results/grpo-s0/")
    for changed in ("shape", "both"):
        assert made.score_paths("dr-s0", 2, 0, changed)[0].startswith("results/dr-s0/")


def test_a_reward_may_need_a_scorer_that_is_only_recorded() -> None:
    both = {"kind": "python", "function": "m:f", "needs": ["shape"]}
    scorers = {"exact": {"kind": "exact"}, "shape": {"kind": "format", "pattern": "a"}, "both": both}
    made = plan({"defaults": {"rounds": 1, "score": {"scorers": scorers, "reward": {"both": 1.0}, "correct": "exact"}}})
    assert set(json.loads(made.curate_spec(at("grpo-s0", round="0000")))["score"]["scorers"]) == {"exact", "both"}


def test_how_often_is_evaluated_and_how_many_passes_there_may_be_change_no_spec() -> None:
    one, other = plan({}), plan({"defaults": {"rounds": 6, "evaluate": {"every": 3}}})
    assert one.evaluate_spec(at("grpo-s0", round="0003")) == other.evaluate_spec(at("grpo-s0", round="0003"))
    few, many = (plan({"defaults": {"rounds": 1, "rollout": {"passes": n, "refill": {}}}}) for n in (2, 3))
    first = at("grpo-s0", round="0000", p="0", shard="000")
    assert few.rollout_spec(first) == many.rollout_spec(first)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"runs": fork(rounds=2)}, "ends before the fork"),
        ({"runs": fork(schedule=[{"from": 1, "train": {"epochs": 2}}])}, "no effect before the fork"),
        ({"defaults": {"score": {"correct": None}}}, "score.correct"),
        ({"defaults": {"train": "x"}}, "train"),
        ({"defaults": {"rollout": {"passes": 11, "refill": {}}}}, "passes"),
        ({"defaults": {"score": {"scorers": {"my scorer": {"kind": "exact"}}}}}, "my scorer"),
        (
            {"defaults": {"score": {"scorers": {"mine": {"kind": "python", "function": "nope.py:f"}}}}},
            r"nope\.py: no such",
        ),
        (
            {
                "defaults": {
                    "score": {
                        "scorers": {
                            "a": {"kind": "python", "function": "m:f", "needs": ["b"]},
                            "b": {"kind": "python", "function": "m:f", "needs": ["a"]},
                        }
                    }
                }
            },
            "circle",
        ),
    ],
)
def test_settings_without_sense_are_refused(changes: dict[str, Any], words: str) -> None:
    base = {"score": {"scorers": {"exact": {"kind": "exact"}}, "reward": {"exact": 1.0}, "correct": "exact"}}
    with pytest.raises(RollwayError, match=words):
        plan(deep_merge({"defaults": {"rounds": 6, **base}}, changes))


def test_fewer_rounds_than_between_evaluations_are_fine() -> None:
    assert plan({"defaults": {"rounds": 2, "evaluate": {"every": 10}}}).evaluated_rounds("grpo-s0") == [0, 2]
