"""Reward models in the plan and through the real Snakemake: trained on one run's pairs, applied by another's scorer."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from rollway.config import deep_merge, load_experiment
from rollway.errors import RollwayError
from rollway.runtime.plan import Plan
from rollway.runtime.plan_checks import check
from workflow.project import ROOT, TINY, Project

EXACT = {"exact": {"kind": "exact"}}
TAUGHT = {"scorers": {**EXACT, "taught": {"kind": "reward_model", "trained": "judge"}}, "correct": "exact"}
WARMUP = {"kind": "warmup", "name": "tiny"}


def model(**pairs: Any) -> dict[str, Any]:
    return {"base": WARMUP, "pairs": {"kind": "run", "run": "grpo", **pairs}}


def using(reward: dict[str, float] | None = None, **more: Any) -> dict[str, Any]:
    return {"recipe": "grpo", "score": {**TAUGHT, "reward": reward or {"taught": 1.0}}, **more}


def plan(changes: dict[str, Any]) -> Plan:
    made = Plan(load_experiment(deep_merge(TINY, {"defaults": {"rounds": 3}, **changes})))
    check(made)
    return made


def two_runs(**pairs: Any) -> dict[str, Any]:
    return {"runs": {"grpo": {"recipe": "grpo"}, "rm": using()}, "reward_models": {"judge": model(**pairs)}}


def test_training_reads_the_rounds_named_and_scoring_reads_the_model() -> None:
    made = plan(two_runs(rounds=[2, 0]))
    w: Any = SimpleNamespace(reward_model="judge")
    assert made.reward_models.policy(w) == ["results/warmups/tiny-s0/policy.json"]
    assert made.reward_models.rollouts(w) == [f"results/grpo-s0/r000{r}/p0/rollouts-000.parquet" for r in (0, 2)]
    assert made.reward_models.scores(w) == [f"results/grpo-s0/r000{r}/p0/scores/exact-000.parquet" for r in (0, 2)]
    assert made.reward_models.prompts(w) == ["results/tasks/spell/train.parquet"]
    assert [Path(path).name for path in made.reward_models.files(w)] == ["best_worst.sql"]
    applied = ["results/reward_models/judge/reward_model.json"]
    for scorer, read in (("taught", applied), ("exact", [])):
        at: Any = SimpleNamespace(run="rm-s0", round="0001", p="0", shard="000", scorer=scorer)
        assert made.scoring_reward_model(at) == read
        assert json.loads(made.score_spec(at)).get("trained") == next(iter(read), None)


def test_evaluation_may_be_by_a_reward_model() -> None:
    judged = {**TAUGHT, "correct": "taught", "reward": {"taught": 1.0}, "threshold": 0.5}
    changes = two_runs()
    changes["runs"]["rm"] = {"recipe": "grpo", "score": judged}
    made = plan(changes)
    at: Any = SimpleNamespace(run="rm-s0", round="0003")
    assert made.evaluating_reward_model(at) == ["results/reward_models/judge/reward_model.json"]
    assert json.loads(made.evaluate_spec(at))["trained"] == "results/reward_models/judge/reward_model.json"
    assert made.evaluating_reward_model(SimpleNamespace(run="grpo-s0", round="0003")) == []


def test_a_forks_pairs_are_its_parents_rollouts() -> None:
    fork = {"recipe": "dr-grpo", "fork": {"run": "grpo", "round": 1, "stage": "score"}}
    made = plan({"runs": {"grpo": {"recipe": "grpo"}, "dr": fork}, "reward_models": {"judge": model(run="dr")}})
    w: Any = SimpleNamespace(reward_model="judge")
    assert made.reward_models.rollouts(w) == ["results/grpo-s0/r0000/p0/rollouts-000.parquet"]


def test_a_schedule_ranks_each_round_by_its_own_reward() -> None:
    scorers = {**EXACT, "short": {"kind": "format", "pattern": "[a-z]{2}"}}
    changed = {"score": {"scorers": scorers, "reward": {"short": 1.0}, "correct": "exact"}}
    grpo = {"recipe": "grpo", "schedule": [{"from": 1, **changed}]}
    made = plan({"runs": {"grpo": grpo}, "reward_models": {"judge": model(rounds=[0, 1])}})
    w: Any = SimpleNamespace(reward_model="judge")
    assert [path.split("/")[2:] for path in made.reward_models.scores(w)] == [
        ["r0000", "p0", "scores", "exact-000.parquet"],
        ["r0001", "p0", "scores", "exact-000.parquet"],
        ["r0001", "p0", "scores", "short-000.parquet"],
    ]
    rounds = json.loads(made.reward_models.spec(w))["rounds"]
    assert "reward" not in rounds[0]["score"]
    assert rounds[1]["score"]["reward"]["short"] == 1.0


def test_a_run_may_use_a_model_taught_by_its_own_first_round() -> None:
    itself = model(run="rm", reward={"exact": 1.0})
    assert plan({"runs": {"rm": using()}, "reward_models": {"judge": itself}})
    lagging = model(run="rm", rounds=[0, 1], reward={"exact": 1.0})
    assert plan({"runs": {"rm": using(lag=1)}, "reward_models": {"judge": lagging}})
    recorded = model(run="rm", rounds=[0, 1, 2])
    assert plan({"runs": {"rm": using({"exact": 1.0})}, "reward_models": {"judge": recorded}})


def test_right_and_wrong_ones_wait_for_no_score_of_the_reward() -> None:
    """What pairs by `correct` alone reads no reward: a run that its own model rewards may teach it so."""
    made = plan({"runs": {"rm": using()}, "reward_models": {"judge": model(run="rm", pair={"sql": "right_wrong"})}})
    w: Any = SimpleNamespace(reward_model="judge")
    assert made.reward_models.scores(w) == ["results/rm-s0/r0000/p0/scores/exact-000.parquet"]


def test_a_reward_model_that_no_scorer_names_changes_nothing_else() -> None:
    one, other = plan({}), plan({"reward_models": {"spare": model()}})
    at: Any = SimpleNamespace(run="grpo-s0", round="0001", next="0001", p="0", shard="000", scorer="exact")
    for name in ("rollout_spec", "score_spec", "curate_spec", "train_spec", "evaluate_spec", "describe_spec"):
        assert getattr(one, name)(at) == getattr(other, name)(at)


def stored(run: str, round: int) -> dict[str, Any]:
    return {"engine": {"kind": "stored", "files": [f"results/{run}-s{{seed}}/r000{round}/p0/rollouts-000.parquet"]}}


def test_stored_completions_wait_for_no_policy() -> None:
    """Its own scores train the run's policies, but none of them wrote the round that teaches it."""
    taken = using(rollout=stored("grpo", 0))
    itself = model(run="c", rounds=[1], reward={"exact": 1.0})
    assert plan({"runs": {"grpo": {"recipe": "grpo"}, "c": taken}, "reward_models": {"judge": itself}})


def test_the_files_of_a_local_model_are_inputs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """So that other weights in the same folder are trained on, and scored with, anew; what lies on the hub is none."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for name in ("model.safetensors", "config.json", "tokenizer.json", "README.md"):
        (tmp_path / "mine" / name).touch()
    expected = ["mine/config.json", "mine/model.safetensors", "mine/tokenizer.json"]
    for name, files in (("mine", expected), ("org/hub", [])):
        scorer = {"kind": "reward_model", "name": name}
        run = {"recipe": "grpo", "score": {"scorers": {**EXACT, "rm": scorer}, "reward": {"rm": 1.0}}}
        judge = {**model(), "base": {"kind": "huggingface", "name": name}}
        made = plan({"runs": {"grpo": run}, "reward_models": {"judge": judge}})
        at: Any = SimpleNamespace(run="grpo-s0", round="0000", p="0", shard="000", scorer="rm", reward_model="judge")
        assert made.scorer_files(at) == files
        assert made.reward_models.files(at)[1:] == files


CIRCLE = r"circle|waits for them"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"runs": {"rm": using()}}, r"runs.rm.score.scorers.taught.trained: 'judge' is not in reward_models"),
        (
            {"reward_models": {"judge": {**model(), "base": {"kind": "warmup", "name": "big"}}}},
            r"reward_models.judge.base.name: 'big' is not in warmups \(tiny\)",
        ),
        ({"reward_models": {"judge": model(run="ppo")}}, r"pairs.run: 'ppo' is not in runs \(grpo\)"),
        ({"reward_models": {"judge": model(seed=3)}}, r"pairs.seed: run grpo has the seeds \[0\]"),
        ({"reward_models": {"judge": model(rounds=[3])}}, "rounds: run grpo has rounds 0 to 2; raise its `rounds`"),
        ({"reward_models": {"judge": model(rounds=[])}}, "empty or repeats a round"),
        (
            {"reward_models": {"judge": model(reward={})}},
            "judge.pairs.run.reward.*weigh a scorer, or leave `reward` out",
        ),
        ({"reward_models": {"judge": model(reward={"exact": 0.0})}}, "gives every rollout the same reward"),
        (
            {"reward_models": {"judge": model(reward={"exact": 1.0}, pair={"sql": "right_wrong"})}},
            "judge.pairs: `reward` has no effect, right_wrong does not read the reward; remove it",
        ),
        ({"reward_models": {"judge": model(reward={"x": 1.0})}}, r"pairs.reward: 'x' is not a scorer of run grpo"),
        (
            {"reward_models": {"judge": model(pair={"sql": "best_wrst"})}},
            "judge.pairs: 'best_wrst'.*did you mean best_w",
        ),
        ({"reward_models": {"judge": model(pair={"sql": "best_worst", "n": 1})}}, "declares no such parameter"),
        ({"reward_models": {"r0001": model()}}, "named like the folder of a round"),
        ({"reward_models": {"my judge": model()}}, "names are made of letters"),
        # Its own scores rank the rollouts that teach it.
        ({"runs": {"rm": using()}, "reward_models": {"judge": model(run="rm")}}, r"\(judge -> judge\).*`pairs.reward`"),
        # Its own scores shaped the policy that wrote them.
        (
            {"runs": {"rm": using()}, "reward_models": {"judge": model(run="rm", rounds=[1], reward={"exact": 1})}},
            CIRCLE,
        ),
        # The same through another model and its run.
        (
            {
                "runs": {
                    "rm": using(),
                    "other": {
                        "recipe": "grpo",
                        "score": {
                            "scorers": {**EXACT, "second": {"kind": "reward_model", "trained": "two"}},
                            "reward": {"second": 1.0},
                            "correct": "exact",
                        },
                    },
                },
                "reward_models": {"judge": model(run="other"), "two": model(run="rm")},
            },
            r"judge -> two -> judge",
        ),
        # By way of completions taken from a run that it rewards.
        (
            {
                "runs": {"src": using(), "c": {"recipe": "grpo", "rollout": stored("src", 1)}},
                "reward_models": {"judge": model(run="c")},
            },
            r"judge.pairs: .*\(judge -> c-s0/r0000 -> judge\)",
        ),
        # A scorer that only reads the model's scores is no way out.
        (
            {
                "runs": {
                    "rm": {
                        "recipe": "grpo",
                        "score": {
                            "scorers": {
                                **TAUGHT["scorers"],
                                "both": {"kind": "python", "function": "m:f", "needs": ["taught"]},
                            },
                            "reward": {"both": 1.0},
                            "correct": "exact",
                        },
                    }
                },
                "reward_models": {"judge": model(run="rm")},
            },
            CIRCLE,
        ),
        # Later passes of a round read the scores of its earlier ones.
        (
            {
                "runs": {
                    "rm": using(rollout={"passes": 2, "refill": {}}, curate={"filter": {"sql": "informative_groups"}})
                },
                "reward_models": {"judge": model(run="rm", reward={"exact": 1})},
            },
            CIRCLE,
        ),
    ],
)
def test_names_and_circles_are_refused_at_planning_time(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RollwayError, match=words):
        plan(changes)


def test_scoring_with_a_model_asks_for_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    project = Project(tmp_path, deep_merge(TINY, {"defaults": {"rounds": 1}, **two_runs()}), warm=False)
    said = project.snakemake("-n", "all_scores").stdout
    asked = {}
    for job in re.split(r"^rule ", said, flags=re.MULTILINE):
        log = re.search(r"log: logs/(\S+?)\.log", job)
        if log and "resources:" in job:
            asked[log[1]] = "gpu=1" in job
    assert asked["rm-s0/r0000/score-p0-taught-000"]
    assert not asked["rm-s0/r0000/score-p0-exact-000"]
    assert asked["reward_models/judge"]
    assert asked["grpo-s0/r0000/rollout-p0-000"]


def test_from_pairs_to_rewards_through_snakemake(tmp_path: Path) -> None:
    """One run's rollouts teach a model that another run is rewarded by; what changed is rerun, and only that."""
    wide = {"rounds": 1, "rollout": {"prompts": 32, "group": 4, "sampling": {"max_tokens": 4}}}
    judge = model(pair={"sql": "mine.sql"}) | {"epochs": 8, "batch": 8, "lr": 3e-3}
    config = {
        "defaults": wide,
        "runs": {"grpo": {"recipe": "grpo"}, "rm": using()},
        "reward_models": {"judge": judge, "spare": model(), "empty": model(pair={"sql": "none.sql"})},
    }
    project = Project(tmp_path, deep_merge(TINY, config))
    sql = (ROOT / "workflow/sql/pairs/best_worst.sql").read_text()
    (tmp_path / "mine.sql").write_text(sql)
    (tmp_path / "none.sql").write_text("SELECT rollout_id, group_id AS pair_id, finish AS role FROM scored WHERE false")
    made, scored = "results/reward_models/judge/reward_model.json", "results/rm-s0/r0000/p0/scores/taught-000.parquet"
    project.snakemake(scored)
    assert project.planned(scored) == {}
    assert project.planned("results/reward_models/spare/reward_model.json") == {"reward_model": 1}
    written = project.bytes_of("reward_models/judge/**/*")

    assert len(set(pq.read_table(tmp_path / scored).column("reward").to_pylist())) > 30
    query = "SELECT run, round, name, value FROM metrics WHERE stage = 'reward_model' AND name LIKE '%accuracy'"
    rows = json.loads(project.rollway("sql", query, "--format", "json").stdout)
    assert {(row["run"], row["round"]) for row in rows} == {("reward_models/judge", None)}
    assert {row["name"] for row in rows} == {"heldout_accuracy", "train_accuracy"}

    project.warm = False
    project.snakemake("--force", made)
    assert project.bytes_of("reward_models/judge/**/*") == written, "warm or cold, the bytes are the same"
    (tmp_path / "mine.sql").write_text(sql + "\n-- another comment\n")
    assert project.planned(scored) == {"reward_model": 1, "score": 1}
    (tmp_path / "mine.sql").write_text(sql)

    failed = project.snakemake("results/reward_models/empty/reward_model.json", check=False)
    assert "reward_models.empty: none.sql makes no pair of the rollouts of rounds [0] of run grpo" in failed.stdout
    weights = tmp_path / "results/reward_models/judge/weights/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    failed = project.snakemake("--force", scored, check=False)
    assert "model.safetensors: its content is not what" in failed.stdout
    assert f"snakemake --force {made}" in failed.stdout
    assert "this is a mistake in rollway" not in failed.stdout
