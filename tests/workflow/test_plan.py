"""The plan by itself: paths, inputs and specs, without running Snakemake."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from rollway.config import deep_merge, load_experiment
from rollway.errors import RollwayError
from rollway.runtime.plan import Plan
from rollway.runtime.plan_checks import check
from rollway.store import parquet
from rollway.store.tables import ROLLOUTS
from store.synthetic import rollout_rows
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


def test_a_forks_first_round_may_replay_across_its_parents_change_of_temperature() -> None:
    change = [{"from": 2, "rollout": {"sampling": {"temperature": 0.5}}}]
    child = {"recipe": "r2vpo", "rollout": {"sampling": {"temperature": 0.5}}}
    for stage in ("rollout", "score"):
        runs = {"grpo": {"schedule": change}, "child": {**child, "fork": {"run": "grpo", "round": 2, "stage": stage}}}
        with pytest.raises(RollwayError, match=r"runs\.child.*round 2 would replay rollouts sampled at another temper"):
            plan({"runs": runs})
    plan({"runs": {**runs, "child": {**runs["child"], "curate": {"select": None, "replay": 0}}}})


def test_replayed_rounds_of_a_truncated_sampler_need_a_correction() -> None:
    corrected = {"rollout": {"sampling": {"top_p": 0.9}}, "train": {"objective": {"correction": "tis"}}}
    change = {"from": 2, "rollout": {"sampling": {"top_p": 1.0}}, "train": {"objective": {"correction": "none"}}}
    unweighed = {"recipe": "grpo", **corrected, "schedule": [change]}
    plan({"runs": {"grpo": unweighed}})
    change["train"]["objective"]["ratio"] = {"kind": "token", "denominator": "behavior"}
    with pytest.raises(RollwayError, match=r"round 2 trains on rollouts of a truncated sampler .* in round 0:"):
        plan({"runs": {"grpo": {**unweighed, "curate": {"replay": 2}}}})


WEIGHED = {
    "curate": {"advantage": {"sql": "grpo"}, "replay": 1},
    "train": {"objective": {"ratio": {"kind": "token", "denominator": "behavior"}, "gate": "clip"}},
}
EXACT = {"exact": {"kind": "exact"}}
SECOND = {"second": {"kind": "format", "pattern": "a"}}


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (
            {
                "schedule": [
                    {"from": 2, "score": {"scorers": {**EXACT, **SECOND}, "reward": {"second": 0.5, "exact": 1.0}}}
                ]
            },
            "round 2 would replay round 0, where scorer second does not exist; declare it alike for all rounds",
        ),
        (
            {
                "score": {"scorers": {**EXACT, **SECOND}, "reward": {"exact": 1.0, "second": 0.5}},
                "schedule": [{"from": 3, "score": {"scorers": {"second": {"pattern": "b"}}}}],
            },
            "round 3 would replay round 0, where scorer second is another one",
        ),
    ],
)
def test_one_batch_holds_the_verdicts_of_one_scorer_of_a_name(run: dict[str, Any], words: str) -> None:
    """Each round is scored as its own recipe says, so that replayed ones lack a scorer that came later."""
    with pytest.raises(RollwayError, match=rf"runs\.grpo\.curate\.replay: {words}"):
        plan({"runs": {"grpo": {"recipe": "r2vpo", **run}}})
    assert plan({"runs": {"grpo": {"recipe": "grpo", **run}}})


def test_a_later_reward_may_weigh_a_scorer_that_all_rounds_record() -> None:
    score = {"scorers": {**EXACT, **SECOND}, "reward": {"exact": 1.0}, "correct": "exact"}
    change = [{"from": 2, "score": {"reward": {"second": 0.5}}}]
    made = plan({"runs": {"grpo": {"recipe": "r2vpo", "score": score, "schedule": change}}})
    assert "results/grpo-s0/r0000/p0/scores/second-000.parquet" in made.batch_scores(at("grpo-s0", round="0002"))


@pytest.mark.parametrize("recipe", ["grpo", "dapo", "gspo", "fiberpo", "ppo", "reinforce", "rloo", "psr", "cispo"])
def test_stale_rollouts_do_not_pass_for_the_current_policys(recipe: str) -> None:
    replaying = {"recipe": recipe, "curate": {"replay": 2}}
    with pytest.raises(RollwayError, match=r"runs\.grpo\.curate\.replay: round 1 would train on rollouts of earlier"):
        plan({"runs": {"grpo": replaying}})
    correction = {"kind": "tis", "level": "sequence"}
    plan({"runs": {"grpo": {**replaying, "train": {"objective": {"correction": correction}}}}})


@pytest.mark.parametrize("recipe", ["sft", "rft", "dpo", "ipo", "copg", "r2vpo", "tis"])
def test_what_imitates_compares_or_weighs_may_replay(recipe: str) -> None:
    plan({"runs": {"grpo": {"recipe": recipe, "curate": {"replay": 4}}}})


@pytest.mark.parametrize("known", ["none", "some"])
def test_stored_text_alone_cannot_be_weighed_against_who_wrote_it(tmp_path: Path, known: str) -> None:
    """Also where it is replayed by a round that samples; a file where only some rows lack log-probs is the stage's."""
    rows = rollout_rows("other", 0)
    lost = rows if known == "none" else rows[1:]
    for row in lost:
        row["logprobs"] = [float("nan")] * 3
    file = tmp_path / "text.parquet"
    parquet.write(file, pa.Table.from_pylist(rows, schema=ROLLOUTS.schema()), "rollouts")
    stored = {"rollout": {"engine": {"kind": "stored", "files": [str(file)]}}}
    back = [{"from": 1, "rollout": {"engine": {"kind": "transformers"}}}]
    for run, words in (
        ({"recipe": "tis", **stored}, "round 0 needs of the rollouts of round 0"),
        ({"recipe": "r2vpo", **stored, "schedule": back}, "round 0 needs of the rollouts of round 0"),
        ({"recipe": "r2vpo", "schedule": [{"from": 2, **stored}]}, "round 2 needs of the rollouts of round 2"),
        ({"recipe": "sft", **stored, "schedule": [deep_merge(back[0], WEIGHED)]}, "round 1 needs of the rollouts of"),
    ):
        if known == "some":
            plan({"runs": {"grpo": run}})
            continue
        with pytest.raises(RollwayError, match=rf"text.parquet: holds no behaviour log-prob.*{words}"):
            plan({"runs": {"grpo": run}})
    plan({"runs": {"grpo": {"recipe": "grpo", **stored}}})


def test_a_fork_does_not_take_what_its_parent_replayed_for_its_own() -> None:
    child = {"recipe": "grpo", "fork": {"run": "grpo", "round": 3, "stage": "curate"}}
    with pytest.raises(RollwayError, match=r"runs\.child\.curate\.replay: round 3 would train on rollouts of earlier"):
        plan({"runs": {"grpo": {"recipe": "r2vpo"}, "child": child}})


def test_a_scorer_that_no_filter_reads_refills_nothing(tmp_path: Path) -> None:
    """Pass 1 samples what the filter of pass 0 lost; a scorer of the advantage alone does not decide that."""
    later = at("grpo-s0", round="0001", p="1", shard="000")
    score = {"scorers": {**EXACT, **SECOND}, "reward": {"exact": 1.0}, "correct": "exact"}
    own = {"sql": str(tmp_path / "second.sql")}
    (tmp_path / "second.sql").write_text("-- My own.\nSELECT rollout_id, reward * second AS advantage FROM scored\n")
    plain, more = (
        plan({"runs": {"grpo": {"recipe": "dapo", **given}}})
        for given in ({}, {"score": score, "curate": {"advantage": own}})
    )
    assert "second" in json.loads(more.curate_spec(at("grpo-s0", round="0001")))["score"]["scorers"]
    assert more.rollout_spec(later) == plain.rollout_spec(later)
    assert more.earlier_scores(later) == plain.earlier_scores(later)
    assert "results/grpo-s0/r0001/p0/scores/exact-000.parquet" in plain.earlier_scores(later)


def test_progress_reaches_the_filter_of_later_passes(tmp_path: Path) -> None:
    """Only where reward or filter takes it: another step's horizon is no part of what a pass samples."""
    (tmp_path / "rising.sql").write_text(
        "-- My own.\n-- param progress: double, how far\nSELECT rollout_id FROM scored WHERE reward >= $progress\n"
    )
    run = {"recipe": "grpo", "rollout": {"passes": 2, "refill": {}}}
    filtered = {"filter": {"sql": str(tmp_path / "rising.sql")}, "horizon": 8}
    selected = {
        "filter": {"sql": "informative_groups"},
        "select": {"sql": "d3s", "n_init": 2, "n_final": 4},
        "horizon": 8,
    }
    for curate, horizon in ((filtered, 8), (selected, None)):
        made = plan({"runs": {"grpo": {**run, "curate": curate}}})
        specs = [json.loads(made.rollout_spec(at("grpo-s0", round="0001", p=p, shard="000"))) for p in ("0", "1")]
        assert [spec.get("horizon") for spec in specs] == [None, horizon]


def test_the_specs_of_refilled_rounds_are_those_of_before() -> None:
    """Word for word: finished runs of dapo and ngrpo must not be made anew."""
    for recipe in ("dapo", "ngrpo"):
        made = plan({"runs": {"grpo": {"recipe": recipe}}})
        spec = json.loads(made.rollout_spec(at("grpo-s0", round="0001", p="1", shard="000")))
        curate = json.loads(made.curate_spec(at("grpo-s0", round="0001")))
        assert spec["score"] == curate["score"]
        assert {name: spec.get(name) for name in ("reward", "filter")} == {
            name: curate["curate"].get(name) for name in ("reward", "filter")
        }
        assert "horizon" not in spec


def test_a_fork_after_curation_trains_on_what_its_parent_replayed() -> None:
    child = {"recipe": "r2vpo", "fork": {"run": "grpo", "round": 3, "stage": "curate"}}
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
    refilled = {"rounds": 1, "curate": {"filter": {"sql": "informative_groups"}}}
    few, many = (plan({"defaults": {**refilled, "rollout": {"passes": n, "refill": {}}}}) for n in (2, 3))
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
