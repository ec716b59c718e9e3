"""Runs that train on stored completions, through the real Snakemake: those of other runs, and imported ones."""

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
from workflow.project import TINY, Project

ROLLOUTS = "r0000/p0/rollouts-000.parquet"
MU = [f"results/mu{n}-s{{seed}}/{ROLLOUTS}" for n in (1, 2)]


def stored(*files: str) -> dict[str, Any]:
    return {"group": 2, "engine": {"kind": "stored", "files": list(files)}}


SOURCE = {"recipe": "sft", "rounds": 1, "rollout": {"prompts": 56, "group": 2}, "evaluate": {"every": 1}}
TWO_BEHAVIOURS = deep_merge(
    TINY,
    {
        "warmups": {"early": {**TINY["warmups"]["tiny"], "sft": {"steps": 20, "batch": 32, "lr": 3.0e-3}}},
        "defaults": {"rounds": 3, "rollout": {"prompts": 8}},
        "runs": {
            "mu1": SOURCE,
            "mu2": {**SOURCE, "warmup": "early"},
            "copg": {"recipe": "copg", "rollout": stored(*MU)},
        },
    },
)
del TWO_BEHAVIOURS["runs"]["grpo"]


def read(project: Project, path: str) -> list[dict[str, Any]]:
    return pq.ParquetFile(project.folder / "results" / path).read().to_pylist()


def test_a_run_trains_on_the_rollouts_of_two_others(tmp_path: Path) -> None:
    project = Project(tmp_path / "p", TWO_BEHAVIOURS)
    jobs = project.planned("all_rollouts")
    assert jobs["rollout"] == 2 + 3
    assert jobs["warmup"] == 2
    assert "train" not in jobs, "all rounds of an offline run can be rolled out before any of them is trained on"
    project.snakemake()
    assert "Nothing to be done" in project.snakemake().stdout

    originals = {row["rollout_id"]: row for n in (1, 2) for row in read(project, f"mu{n}-s0/{ROLLOUTS}")}
    behaviours = {row["policy"] for row in originals.values()}
    assert len(behaviours) == 2
    seen: list[str] = []
    for r in range(3):
        rows = read(project, f"copg-s0/r{r:04d}/p0/rollouts-000.parquet")
        assert len(rows) == 16
        for one, other in zip(rows[::2], rows[1::2], strict=True):
            assert one["group_id"] == other["group_id"]
            assert {one["policy"], other["policy"]} == behaviours, "one completion of each file"
        for row in rows:
            original = originals[row["parent_id"]]
            kept = ("prompt_id", "tokens", "logprobs", "text", "policy", "policy_round", "prompt_tokens", "finish")
            assert {name: row[name] for name in kept} == {name: original[name] for name in kept}
            assert (row["source"], row["round"]) == ("offline", r)
        seen += [row["prompt_id"] for row in rows[::2]]
    assert len(set(seen)) == 24, "no prompt comes again before all were used"
    rewards = {row["rollout_id"]: row["reward"] for row in read(project, "copg-s0/r0000/p0/scores/exact-000.parquet")}
    assert len(rewards) == 16, "the run's own scorers judge them"
    manifest = json.loads((project.folder / "results/copg-s0/r0003/policy.json").read_text())
    assert manifest["updates"] == 3
    counted = "SELECT count(*) AS n FROM scored WHERE run = 'copg-s0' AND reward IS NOT NULL"
    assert json.loads(project.rollway("sql", counted, "--format", "json").stdout) == [{"n": 48}]

    # Changes of temperature, and of how evaluation samples, leave the stored rows as they are.
    project.write_config(runs={"copg": {"rollout": {"sampling": {"temperature": 0.5, "max_tokens": 5}}}})
    jobs = project.planned("results/copg-s0/r0003/policy.json")
    assert jobs["train"] == 3
    assert "rollout" not in jobs

    # Another config may read files that runs of this one have left.
    alone = {key: value for key, value in project.config.items() if key != "runs"}
    project.config = {**alone, "runs": {"ipo": {"recipe": "copg", "rollout": stored(*MU)}}}
    project.write_config()
    jobs = project.planned()
    assert jobs["rollout"] == 3
    assert "warmup" not in jobs


def test_imported_text_is_tokenised_and_trained_on(tmp_path: Path) -> None:
    project = Project(tmp_path / "p", deep_merge(TINY, {"defaults": {"rounds": 1}}))
    words = [json.loads(line)["word"] for line in (project.folder / "words.jsonl").read_text().splitlines()]

    def publish(*texts: str) -> None:
        lines = [json.dumps({"q": f"{w}>", "a": t.format(w=w, r=w[::-1])}) for w in words for t in texts]
        (project.folder / "published.jsonl").write_text("\n".join(lines) + "\n")
        mapping = ("--map", "prompt=q", "completion=a")
        said = project.rollway("import", "published.jsonl", "--run", "published", *mapping).stdout
        assert f"{len(lines)} rollouts, 0 scores, 64 prompts" in said

    publish("{r}", "{w}")
    offline = {"recipe": "dpo", "rollout": stored(f"results/published/{ROLLOUTS}")}
    project.config = {**project.config, "runs": {"dpo": offline}}
    project.write_config()
    project.snakemake("results/dpo-s0/r0001/policy.json")
    rows = read(project, f"dpo-s0/{ROLLOUTS}")
    assert len(rows) == 8
    assert {len(row["tokens"]) for row in rows} == {3}, "two letters and the end"
    assert all(row["text"] in (word, word[::-1]) for row in rows for word in [row["text"]])
    metrics = json.loads((project.folder / "results/dpo-s0/r0001/metrics.json").read_text())["metrics"]
    trained = {row["name"]: row["value"] for row in metrics}
    assert trained["skipped"] == 0
    assert trained["grad_norm"] > 0

    project.write_config(runs={"grpo": {"recipe": "grpo", "rollout": stored(f"results/published/{ROLLOUTS}")}})
    project.snakemake("results/grpo-s0/r0001/policy.json")
    project.write_config(
        runs={"tis": {"recipe": "tis", "rollout": stored(f"results/published/{ROLLOUTS}"), "schedule": []}}
    )
    failed = project.snakemake("results/tis-s0/r0001/policy.json", check=False)
    assert failed.returncode != 0
    assert "holds no behaviour log-prob, which the objective of round 0 needs" in failed.stdout
    del project.config["runs"]["tis"]
    project.write_config()

    publish("{r}", "{w}", "{w}{w}")
    assert project.planned("results/dpo-s0/r0001/policy.json")["rollout"] == 1, "another import is rolled out anew"


def test_a_file_that_holds_no_rollouts_is_named(tmp_path: Path) -> None:
    project = Project(tmp_path / "p", deep_merge(TINY, {"defaults": {"rounds": 1}}))
    project.snakemake("results/tasks/spell/heldout.parquet")
    project.config = {
        **project.config,
        "runs": {"dpo": {"recipe": "dpo", "rollout": stored("results/tasks/spell/heldout.parquet")}},
    }
    project.write_config()
    failed = project.snakemake(f"results/dpo-s0/{ROLLOUTS}", check=False)
    assert failed.returncode != 0
    assert "heldout.parquet: holds the table 'prompts', not rollouts" in failed.stdout


def plan(changes: dict[str, Any]) -> Plan:
    made = Plan(load_experiment(deep_merge(TWO_BEHAVIOURS, changes)))
    check(made)
    return made


def at(run: str, **wildcards: str) -> Any:
    return SimpleNamespace(run=run, **wildcards)


def test_seeds_read_their_own_files() -> None:
    made = plan({"defaults": {"seeds": [0, 3]}})
    inputs = made.stored_rollouts(at("copg-s3", round="0001"))
    assert inputs == [f"results/mu{n}-s3/{ROLLOUTS}" for n in (1, 2)]
    assert set(inputs) <= made.made_rollouts


def test_stored_rounds_need_the_first_policy_only_and_evaluation_samples() -> None:
    made = plan({})
    assert made.rollout_policy(at("copg-s0", round="0002")) == "results/warmups/tiny-s0/policy.json"
    assert json.loads(made.evaluate_spec(at("copg-s0", round="0002")))["engine"] == {"kind": "transformers"}


def test_a_run_may_replay_its_own_earlier_rounds() -> None:
    own = [f"results/self-s{{seed}}/r000{r}/p0/rollouts-000.parquet" for r in (0, 1)]
    change = [{"from": 2, "rollout": stored(*own)}]
    made = plan({"runs": {"self": {"recipe": "grpo", "rounds": 4, "lag": 1, "schedule": change}}})
    assert made.stored_rollouts(at("self-s0", round="0001")) == []
    assert made.rollout_policy(at("self-s0", round="0001")) == "results/warmups/tiny-s0/policy.json"
    assert made.stored_rollouts(at("self-s0", round="0003")) == [file.format(seed=0) for file in own]


@pytest.mark.parametrize(
    ("run", "says"),
    [
        ({"rollout": stored("results/mu3-s{seed}/x.parquet")}, "mu3-s0/x.parquet: no such file, and no run of this"),
        ({"rollout": stored(f"results/bad-s{{seed}}/{ROLLOUTS}")}, "would be made of itself"),
        ({"rollout": stored(*MU), "lag": 1}, r"runs\.bad\.lag: has no effect on stored completions"),
        ({"rollout": {**stored(*MU), "passes": 2, "refill": {}}}, r"rollout\.refill: has no effect on stored"),
    ],
)
def test_plans_without_sense_are_refused(run: dict[str, Any], says: str) -> None:
    with pytest.raises(RollwayError, match=says):
        plan({"runs": {"bad": {"recipe": "copg", **run}}})


def rollouts_of(run: str, round: int) -> str:
    return f"results/{run}-s{{seed}}/r000{round}/p0/rollouts-000.parquet"


@pytest.mark.parametrize(
    ("runs", "circle"),
    [
        # Straight from each other.
        (
            {
                "a": {"recipe": "copg", "rollout": stored(rollouts_of("b", 0))},
                "b": {"recipe": "copg", "rollout": stored(rollouts_of("a", 0))},
            },
            "a-s0/r0000 -> b-s0/r0000 -> a-s0/r0000",
        ),
        # By way of the policies that sample what is taken.
        (
            {
                "a": {"recipe": "copg", "rollout": stored(rollouts_of("b", 2))},
                "b": {
                    "recipe": "grpo",
                    "schedule": [
                        {"from": 1, "rollout": stored(rollouts_of("a", 0))},
                        {"from": 2, "rollout": {"engine": {"kind": "transformers"}}},
                    ],
                },
            },
            "a-s0/r0000 -> b-s0/r0001 -> a-s0/r0000",
        ),
        # A run's own rollouts of later rounds, sampled by what it would learn from them.
        (
            {
                "a": {
                    "recipe": "grpo",
                    "rollout": stored(rollouts_of("a", 2)),
                    "schedule": [{"from": 2, "rollout": {"engine": {"kind": "transformers"}}}],
                }
            },
            "a-s0/r0001 -> a-s0/r0001|a-s0/r0000 -> a-s0/r0000",
        ),
    ],
)
def test_completions_that_would_be_made_of_themselves_are_refused(runs: dict[str, Any], circle: str) -> None:
    with pytest.raises(
        RollwayError, match=rf"runs\.a\.rollout\.engine\.files: .* would be made of itself \(({circle})"
    ):
        plan({"runs": runs})


def test_rounds_taken_from_each_other_in_order_are_no_circle() -> None:
    """Two runs that pass completions on: no policy is asked of the rounds that take them."""
    a = {"recipe": "grpo", "schedule": [{"from": 1, "rollout": stored(rollouts_of("b", 0))}]}
    b = {"recipe": "grpo", "schedule": [{"from": 1, "rollout": stored(rollouts_of("a", 0))}]}
    made = plan({"runs": {"a": a, "b": b}})
    assert made.stored_rollouts(at("a-s0", round="0001")) == ["results/b-s0/r0000/p0/rollouts-000.parquet"]


def test_a_file_that_a_run_makes_is_known_however_it_is_spelled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    file = f"results/mu1-s0/{ROLLOUTS}"
    for spelled in (f"results/../results/mu1-s{{seed}}/{ROLLOUTS}", f"./{file}", str(tmp_path / file)):
        made = plan({"runs": {"copg": {"rollout": stored(spelled)}}})
        assert made.stored_rollouts(at("copg-s0", round="0000")) == [file]
        with pytest.raises(RollwayError, match=f"names {file} twice"):
            plan({"runs": {"copg": {"rollout": stored(spelled, file)}}})
    with pytest.raises(RollwayError, match="would be made of itself"):
        plan({"runs": {"copg": {"rollout": stored(f"results/x/../copg-s{{seed}}/{ROLLOUTS}")}}})
