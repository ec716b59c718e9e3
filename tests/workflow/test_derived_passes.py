"""Derived passes in the plan, and both phases of SD-Zero through the real Snakemake."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from rollway.config import deep_merge, load_experiment, load_recipe
from rollway.config.base import ConfigError
from rollway.errors import RollwayError
from rollway.runtime.plan import Plan
from rollway.runtime.plan_checks import check
from rollway.store.catalog import run_sql
from workflow.project import TINY, Project

REVISION: dict[str, Any] = {
    "name": "revision",
    "parents": {"sql": "each"},
    "context": [{"prefix": "{completion}>{verdict}>", "right": "so", "wrong": "no"}],
}
SAMPLED: dict[str, Any] = {"runs": {"grpo": {"curate": {"filter": {"sql": "sampled"}}}}}
WISE: dict[str, Any] = {"warmups": {"wise": TINY["warmups"]["tiny"]}}


def plan(*changes: dict[str, Any]) -> Plan:
    config: dict[str, Any] = {"defaults": {"rounds": 4}, "runs": {"grpo": {"seeds": [3]}}}
    for change in changes:
        config = deep_merge(config, change)
    made = Plan(load_experiment(deep_merge(TINY, config)))
    check(made)
    return made


def derived(*entries: dict[str, Any], **given: Any) -> dict[str, Any]:
    return deep_merge({"runs": {"grpo": {"rollout": {"derive": [*entries]}}}}, given)


def at(round: int, number: int = 0, run: str = "grpo-s3") -> Any:
    return SimpleNamespace(
        run=run, round=f"{round:04d}", p=str(number), shard="000", scorer="exact", next=f"{round + 1:04d}"
    )


def test_specs_of_other_passes_are_those_without_it() -> None:
    with_it, without = plan(derived(REVISION)), plan()
    for spec in ("rollout_spec", "score_spec", "curate_spec", "train_spec", "evaluate_spec"):
        assert getattr(with_it, spec)(at(2)) == getattr(without, spec)(at(2)), spec
    assert with_it.derived.author(at(2)) == without.derived.author(at(2)) == []
    assert "derive" not in without.describe_spec(at(0))


def test_a_derived_pass_waits_for_the_scores_of_the_passes_before() -> None:
    hint = REVISION | {"name": "hint", "trained": "never"}
    made = plan(derived(hint, REVISION | {"attempts": 2, "parents": {"sql": "each"}}), SAMPLED)
    assert [*made.passes("grpo-s3", 1)] == [0, 1, 2, 3]
    folder = "results/grpo-s3/r0001"
    assert made.earlier_rollouts(at(1, 2)) == [f"{folder}/p{p}/rollouts-000.parquet" for p in (0, 1)]
    assert made.earlier_scores(at(1, 2)) == [f"{folder}/p{p}/scores/exact-000.parquet" for p in (0, 1)]
    assert [Path(path).name for path in made.refill_sql(at(1, 2))] == ["each.sql"]
    assert [made.derived.of(at(1, p)) and made.derived.of(at(1, p)).name for p in range(4)] == [
        *(None, "hint", "revision", "revision")
    ]
    specs = [json.loads(made.rollout_spec(at(1, p))) for p in (2, 3)]
    assert specs[0] | {"pass_number": 3} == specs[1]
    assert "attempts" not in specs[0]["rollout"]["derive"][0]
    assert len(made.batch_rollouts(at(1))) == len(made.batch_scores(at(1))) == 4


def test_authors_are_inputs() -> None:
    never = REVISION | {"trained": "never"}
    made = plan(derived(never | {"author": {"kind": "warmup", "name": "wise", "seed": 5}}), WISE, SAMPLED)
    assert made.derived.author(at(1, 1)) == ["results/warmups/wise-s5/policy.json"]
    assert json.loads(made.rollout_spec(at(1, 1)))["author"] == "results/warmups/wise-s5/policy.json"
    older = plan(derived(never | {"author": {"kind": "policy", "age": 2}}), SAMPLED)
    assert older.derived.author(at(3, 1)) == ["results/grpo-s3/r0001/policy.json"]
    assert json.loads(older.rollout_spec(at(3, 1)))["policy_round"] == 1
    with pytest.raises(ConfigError, match=r"derive.revision.author.name: 'nobody' is not in warmups"):
        plan(derived(never | {"author": {"kind": "warmup", "name": "nobody"}}), SAMPLED)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"ratio": {"kind": "token", "denominator": "behavior"}}, "the ratio divides by them"),
        ({"correction": {"kind": "tis", "cap": 2.0}}, "correction weighs by them"),
    ],
)
def test_log_probs_of_another_context_are_refused(objective: dict[str, Any], message: str) -> None:
    train = {"runs": {"grpo": {"train": {"objective": objective}}}}
    plan(derived(REVISION), train)
    with pytest.raises((ConfigError, RollwayError), match=message):
        plan(derived(REVISION | {"trained": "plain"}), train)


SAMPLED_FORM: dict[str, Any] = {"divergence": "reverse_kl", "estimate": "sampled"}


def test_the_gate_sends_derived_rows_to_the_teacher() -> None:
    """KEPO's hinted answers pass it by their reward; in the sampled form they would be taken for the policy's own."""
    kepo = {"recipe": "kepo", "train": {"objective": {"distill": SAMPLED_FORM}}}
    with pytest.raises(ConfigError, match=r"derive\.hinted\.trained: plain .* curate\.route\.sql gate sends them"):
        load_recipe("kepo", {"train": kepo["train"]})
    load_recipe("kepo", {"train": kepo["train"], "curate": {"filter": {"sql": "sampled"}}})
    load_recipe("kepo", {"train": kepo["train"], "curate": {"route": {"sql": "wrong_to_teacher"}}})


def test_the_sampled_form_of_opsd_takes_truncated_samples_of_derived_passes_too() -> None:
    """As it takes those of rollout.sampling, at log-probs of the whole vocabulary."""
    at = {**SAMPLED_FORM, "estimate": {"kind": "sampled", "at": "distill"}, "clip": None}
    over = {"rollout": {"derive": [REVISION]}, "train": {"objective": {"distill": at}}}
    assert load_recipe("opsd", over).rollout.sampling.top_p < 1.0
    weighed = deep_merge(over, {"train": {"objective": {"distill": {"importance": {"kind": "truncated", "cap": 2.0}}}}})
    with pytest.raises(ConfigError, match="truncate what is sampled"):
        load_recipe("opsd", weighed)


def test_truncated_samples_of_derived_passes_are_refused() -> None:
    """As those of rollout.sampling are, wherever their ratio is formed."""
    truncated = REVISION | {"sampling": {"top_p": 0.5}}
    for step in (truncated, truncated | {"trained": "plain"}, REVISION | {"sampling": {"top_k": 5}}):
        with pytest.raises(ConfigError, match=r"derive\.revision\.sampling\.top_p/top_k truncate"):
            plan(derived(step))
    plan(derived(truncated), {"runs": {"grpo": {"train": {"objective": {"correction": {"kind": "tis", "cap": 2.0}}}}}})
    plan(derived(truncated | {"trained": "never"}), SAMPLED)
    explained = truncated | {"name": "explanation", "trained": "plain"}
    plan({"runs": {"grpo": {"recipe": "expo", "rollout": {"derive": [explained]}}}})
    srt = {"runs": {"grpo": {"recipe": "sd-zero-srt", "rollout": {"derive": [truncated]}}}}
    plan(srt)


def test_another_models_text_is_not_taken_for_the_policys() -> None:
    foreign = REVISION | {"author": {"kind": "warmup", "name": "wise"}}
    behavior = {"runs": {"grpo": {"train": {"objective": {"ratio": {"kind": "token", "denominator": "behavior"}}}}}}
    with pytest.raises(ConfigError, match=r"derive\.revision\.author: the policy did not sample"):
        plan(WISE, derived(foreign))
    with pytest.raises(ConfigError, match="the policy did not sample"):
        plan(derived(REVISION | {"author": {"kind": "policy", "age": "initial"}}))
    plan(WISE, derived(foreign), behavior)
    explained = foreign | {"name": "explanation", "trained": "plain"}
    plan(WISE, {"runs": {"grpo": {"recipe": "expo", "rollout": {"derive": [explained]}}}})


def test_rows_that_are_never_trained_on_need_a_filter() -> None:
    never = REVISION | {"trained": "never"}
    with pytest.raises(ConfigError, match=r"derive\.revision\.trained: never.*set curate\.filter"):
        plan(derived(never))
    plan(derived(never), SAMPLED)


@pytest.mark.parametrize("template", ["{nonsense}{prompt}", "{prompt}{ metadata.word | lower }"])
def test_contexts_name_what_rows_have(template: str) -> None:
    with pytest.raises(ConfigError, match=r"a row has no field '(nonsense|metadata\.word)'; there are prompt, answer"):
        plan(derived(REVISION | {"context": [{"prompt": template}]}))
    plan(derived(REVISION | {"context": [{"prompt": "{{nonsense}}{prompt|lower}{meta.demonstration}"}]}))


def test_a_span_and_a_teacher_do_not_go_together() -> None:
    srt = {
        "recipe": "sd-zero",
        "rollout": {"derive": [REVISION]},
        "curate": {"filter": {"sql": "srt"}, "weight": {"sql": "srt"}},
        "score": {"scorers": {"teacher": {"context": REVISION["context"]}}},
    }
    with pytest.raises(RollwayError, match="returns span"):
        plan({"runs": {"grpo": srt}})


def test_one_threshold_says_what_is_right_in_both_phases() -> None:
    teacher = {"scorers": {"teacher": {"threshold": 0.5}}}
    with pytest.raises(ConfigError, match=r"scorers\.teacher\.threshold: 0\.5 is not score\.threshold, 1"):
        plan(deep_merge(ZERO, {"runs": {"zero": {"score": teacher}}}))
    with pytest.raises(ConfigError, match=r"runs\.zero: score\.threshold: 0\.5.*were given at 1"):
        plan(deep_merge(ZERO, {"runs": {"zero": {"score": {"threshold": 0.5, **teacher}}}}))
    both = {"runs": {"grpo": {"score": {"threshold": 0.5}}, "zero": {"score": {"threshold": 0.5, **teacher}}}}
    plan(deep_merge(ZERO, both))


@pytest.mark.parametrize(("recipe", "read"), [("sd-zero", "verdict"), ("sdpo", "sibling")])
def test_one_scorer_says_what_is_right_to_a_teacher_and_to_everything_else(recipe: str, read: str) -> None:
    other = {"other": {"kind": "exact", "extract": "last_number"}, "teacher": {"needs": ["other", "exact"]}}
    with pytest.raises(ConfigError, match=r"teacher\.needs: begins with other, .* score\.correct, exact: name that"):
        load_recipe(recipe, {"score": {"scorers": other}})
    other["teacher"]["needs"].reverse()
    contexts = load_recipe(recipe, {"score": {"scorers": other}}).score.scorers["teacher"].context
    assert any(context.names(read) for context in contexts)


def test_one_scorer_says_what_is_right_in_both_phases() -> None:
    """Whatever it is called: of the run that is forked, as it was up to the fork, and of every later segment."""
    loose = {"exact": {"kind": "exact", "ignore_case": True}}
    with pytest.raises(ConfigError, match=r"runs\.zero: score\.correct: exact is not the scorer that gave"):
        plan(deep_merge(ZERO, {"runs": {"zero": {"score": {"scorers": loose}}}}))
    renamed = {
        "scorers": {"mine": {"kind": "exact"}, "teacher": {"needs": ["mine"]}},
        "reward": {"mine": 1.0},
        "correct": "mine",
    }
    plan(deep_merge(ZERO, {"runs": {"zero": {"score": renamed}}}))
    later = {"runs": {"grpo": {"schedule": [{"from": 2, "score": {"scorers": loose, "threshold": 0.5}}]}}}
    plan(deep_merge(ZERO, later))
    with pytest.raises(ConfigError, match=r"runs\.zero: score\.(threshold|correct): .* the policy learnt to read"):
        plan(deep_merge(ZERO, later), {"runs": {"zero": {"fork": {"round": 2}}}})
    step = {"from": 3, "score": {"threshold": 0.5, "scorers": {"teacher": {"threshold": 0.5}}}}
    with pytest.raises(ConfigError, match=r"runs\.zero: score\.threshold: 0\.5.*were given at 1"):
        plan(deep_merge(ZERO, {"runs": {"zero": {"schedule": [step]}}}))


def test_both_phases_may_be_rounds_of_one_run() -> None:
    """Phase 1 in round 0, phase 2 from round 1 on, with and without another threshold."""

    def run(threshold: float) -> dict[str, Any]:
        teaches = {"kind": "teacher", "model": {"kind": "live"}, "needs": ["exact"], "context": REVISION["context"]}
        scorers = {"exact": {"kind": "exact"}, "teacher": {**teaches, "threshold": threshold}}
        score = {"threshold": threshold, "scorers": scorers}
        objective = {
            **{"distill": {"divergence": "reverse_kl", "estimate": "exact"}, "ratio": None, "gate": None},
            "aggregate": "seq_mean_token_mean",
        }
        train = {"teacher": {"kind": "live", "weights": "synced", "context": "privileged"}, "objective": objective}
        curate = {"teacher": "teacher", "filter": None, "weight": None}
        step = {"from": 1, "rollout": {"derive": []}, "score": score, "curate": curate, "train": train}
        return {"runs": {"grpo": {**ZERO["runs"]["grpo"], "axes": None, "schedule": [step]}}}

    plan(run(1.0))
    with pytest.raises(ConfigError, match=r"runs\.grpo: score\.threshold: 0\.5.*were given at 1"):
        plan(run(0.5))


def test_a_bad_parents_file_stops_the_plan(tmp_path: Path) -> None:
    (tmp_path / "mine.sql").write_text("SELECT rollout_id FROM scored WHERE rewrd > 0")
    with pytest.raises(RollwayError, match=r"runs.grpo: .*mine.sql.*rewrd"):
        plan(derived(REVISION | {"parents": {"sql": str(tmp_path / "mine.sql")}}))


ZERO: dict[str, Any] = {
    "runs": {
        "grpo": {"recipe": "sd-zero-srt", "rollout": {"derive": [REVISION]}},
        "zero": {
            "recipe": "sd-zero",
            "seeds": [3],
            "fork": {"run": "grpo", "round": 0, "stage": "train"},
            "rounds": 6,
            "score": {"scorers": {"teacher": {"context": REVISION["context"]}}},
            "train": {"teacher": {"sync": 2}},
        },
    }
}


def test_the_frozen_teacher_is_replaced_at_every_sync() -> None:
    """Of a fork of phase 1 after its round 0: frozen over rounds 1 and 2, 3 and 4, 5."""
    made = plan(ZERO)
    rounds = [made.reference_policy(at(r, run="zero-s3")) for r in range(1, 6)]
    first = "results/grpo-s3/r0001/policy.json"
    own = ["results/zero-s3/r0003/policy.json", "results/zero-s3/r0005/policy.json"]
    assert rounds == [[first], [first], [own[0]], [own[0]], [own[1]]]
    frozen = plan(deep_merge(ZERO, {"runs": {"zero": {"train": {"teacher": {"sync": None}}}}}))
    assert [frozen.reference_policy(at(r, run="zero-s3")) for r in range(1, 6)] == [[first]] * 5
    with pytest.raises(ConfigError, match="sync has no effect"):
        plan(deep_merge(ZERO, {"runs": {"zero": {"train": {"teacher": {"weights": "initial"}}}}}))


def test_phase_two_may_start_with_a_fresh_optimiser() -> None:
    made = plan(deep_merge(ZERO, {"runs": {"zero": {"fork": {"optimizer": "fresh"}}}}))
    specs = [json.loads(made.train_spec(at(r, run="zero-s3"))) for r in (1, 2)]
    assert [spec.pop("fresh", False) for spec in specs] == [True, False]
    carried = plan(ZERO)
    assert specs == [json.loads(carried.train_spec(at(r, run="zero-s3"))) for r in (1, 2)]
    early = {"fork": {"stage": "score", "optimizer": "fresh"}}
    with pytest.raises(ConfigError, match=r"fork\.optimizer: has no effect"):
        plan(deep_merge(ZERO, {"runs": {"zero": early}}))


def test_both_phases_run(tmp_path: Path) -> None:
    """Revisions are rollouts with parents, right ones are trained on in two spans, then the reviser teaches."""
    runs = {
        "srt": {"recipe": "sd-zero-srt", "rounds": 1, "rollout": {"group": 4, "derive": [REVISION]}},
        "zero": deep_merge(
            ZERO["runs"]["zero"],
            {"seeds": [0], "fork": {"run": "srt"}, "rounds": 2, "rollout": {"sampling": {"temperature": 1.0}}},
        ),
    }
    defaults = {**TINY["defaults"], "rollout": {"prompts": 8, "sampling": {"max_tokens": 4}}}
    config = {**TINY, "runs": runs, "defaults": defaults}
    project = Project(tmp_path, config)
    targets = ["results/zero-s0/r0002/policy.json", *(f"results/{run}-s0/run.json" for run in runs)]
    project.snakemake(*targets)
    results = tmp_path / "results"

    def ask(query: str) -> list[tuple]:
        return [tuple(row.values()) for row in json.loads(run_sql(results, query, "json"))]

    passes = (
        "SELECT pass, source, count(*), count(parent_id) FROM rollouts WHERE run = 'srt-s0' GROUP BY ALL ORDER BY 1"
    )
    assert ask(passes) == [(0, "policy", 32, 0), (1, "revision", 32, 32)]
    kept = ask(
        "SELECT count(*), count(*) FILTER (span = 'turn'), bool_and(s.correct), bool_and(s.source = 'revision')"
        " FROM batch AS b JOIN scored AS s USING (run, round, rollout_id) WHERE run = 'srt-s0'"
    )[0]
    right = ask("SELECT count(*) FROM scored WHERE run = 'srt-s0' AND correct AND source = 'revision'")[0][0]
    assert right > 0
    assert kept == (2 * right, right, True, True)
    schema = pq.read_schema(results / "srt-s0/r0000/p0/rollouts-000.parquet").names
    assert "train_prompt_tokens" not in schema
    read = ask(
        "SELECT count(*) FROM rollouts AS c JOIN rollouts AS p ON c.parent_id = p.rollout_id AND c.run = p.run"
        " WHERE c.prompt_tokens[:len(p.prompt_tokens)] = p.prompt_tokens"
        " AND len(c.prompt_tokens) = len(p.prompt_tokens) + c.prefix_length AND c.group_id = p.group_id"
    )[0][0]
    assert read == 32
    found = ask("SELECT value FROM metrics WHERE run = 'zero-s0' AND name = 'distill/divergence'")
    assert found[0][0] > 0.0
    assert (
        ask("SELECT count(*) FROM teacher_tokens")[0][0] == 0
    )  # A live reviser stores what it reads, not what it says.
    assert not project.planned(*targets)
