"""Bad input through the real command line: one sentence with place and mend; nothing half-written."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rollway.config import deep_merge
from workflow.project import TINY, Project


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """One finished round."""
    project = Project(tmp_path_factory.mktemp("finished"), deep_merge(TINY, {"defaults": {"rounds": 1}}))
    project.snakemake("results/grpo-s0/r0001/policy.json")
    return project


@pytest.fixture
def project(finished: Project, tmp_path: Path) -> Project:
    shutil.copytree(finished.folder, tmp_path / "p")
    return Project(tmp_path / "p", finished.config)


def fails(project: Project, *args: str) -> str:
    """Runs snakemake, which must fail without a traceback of ours and leave no temporary file."""
    done = project.snakemake(*args, check=False)
    assert done.returncode != 0, done.stdout
    assert "this is a mistake in rollway" not in done.stdout, done.stdout
    results = project.folder / "results"
    assert not list(results.rglob(".tmp-*"))
    return done.stdout


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"defaults": {"train": {"optimzer": {"lr": 1.0}}}},
            ["runs.grpo", "train.optimzer", "did you mean `optimizer`"],
        ),
        ({"defaults": {"rounds": "many"}}, ["runs.grpo", "`rounds`", "'many'"]),
        ({"defaults": {"task": "spel"}}, ["runs.grpo.task", "'spel'", "spell"]),
        ({"runs": {"grpo": {"recipe": "gpro"}}}, ["'gpro'", "did you mean", "grpo"]),
        ({"runs": {"grpo": {"curate": {"advantage": {"sql": "gprpo"}}}}}, ["'gprpo'", "did you mean", "grpo"]),
        ({"defaults": {"evaluate": {"samples": 2, "k": [4]}}}, ["pass@4 of 2 samples", "evaluate.samples"]),
        ({"defaults": {"rollout": {"sampling": {"top_k": 5}}}}, ["top_k", "train.objective.correction"]),
        ({"runs": {"grpo": {"fork": {"run": "grpo", "round": 0}}}}, ["runs.grpo.fork", "circle"]),
        ({"runs": {"grpo": {"schedule": [{"from": 9, "train": {"epochs": 2}}]}}}, ["from 9", "has no effect"]),
    ],
)
def test_wrong_configs_are_refused_at_planning_time(tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
    message = fails(Project(tmp_path, deep_merge(TINY, changes)), "-n")
    assert "rollway: error:" in message
    for word in words:
        assert word in message, message


def test_a_recipe_that_extends_itself(tmp_path: Path) -> None:
    project = Project(tmp_path, deep_merge(TINY, {"runs": {"grpo": {"recipe": "loop.yaml"}}}))
    (tmp_path / "loop.yaml").write_text("extends: loop.yaml\n")
    assert "extends itself" in fails(project, "-n")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["words.jsonl", "no such file"]),
        ('{"word": "ab", "answer": "ba"}\n{"word": \n', ["words.jsonl", "line 2"]),
        ("", ["words.jsonl"]),
        ('{"wort": "ab", "answer": "ba"}\n', ["words.jsonl", "word"]),
        ('{"word": "ab", "answer": "ba"}\n', ["heldout"]),
    ],
)
def test_bad_task_files(tmp_path: Path, text: str | None, words: list[str]) -> None:
    project = Project(tmp_path)
    path = tmp_path / "words.jsonl"
    path.unlink() if text is None else path.write_text(text)
    message = fails(project, "results/tasks/spell/train.parquet")
    for word in words:
        assert word in message, message
    assert not (tmp_path / "results/tasks/spell/train.parquet").exists()


def test_duplicate_prompt_ids(tmp_path: Path) -> None:
    project = Project(tmp_path, deep_merge(TINY, {"tasks": {"spell": {"id": "key"}}}))
    rows = [json.dumps({"key": f"k{n % 10}", "word": f"w{n}", "answer": "x"}) for n in range(20)]
    (tmp_path / "words.jsonl").write_text("\n".join(rows))
    message = fails(project, "results/tasks/spell/train.parquet")
    assert "k0" in message
    assert "line" in message


def test_a_prompt_without_answer_where_the_verifier_needs_one(project: Project) -> None:
    text = (project.folder / "words.jsonl").read_text().replace('"answer": "ba"', '"answer": null')
    (project.folder / "words.jsonl").write_text(text)
    project.write_config(warmups={"tiny": {"sft": None, "task": None}})
    message = fails(project, "all_scores")
    assert "answer" in message


def test_a_prompt_longer_than_the_context(project: Project) -> None:
    project.write_config(
        tasks={"spell": {"prompt": "{word}" * 20 + ">"}}, warmups={"tiny": {"sft": None, "task": None}}
    )
    message = fails(project, "all_rollouts")
    assert "context" in message
    assert "32" in message


@pytest.mark.parametrize(
    ("sql", "words"),
    [
        ("SELEC rollout_id FROM scored", ["mine.sql", "syntax error"]),
        ("SELECT rollout_id, rewrd AS advantage FROM scored", ["mine.sql", "rewrd", "reward"]),
        ("SELECT reward AS advantage FROM scored", ["mine.sql", "rollout_id"]),
        ("SELECT rollout_id, 0.0/0.0 AS advantage FROM scored", ["mine.sql"]),
        ("COPY scored TO 'x.csv'", ["mine.sql", "SELECT"]),
    ],
)
def test_bad_sql(project: Project, sql: str, words: list[str]) -> None:
    (project.folder / "mine.sql").write_text(f"-- My own advantage.\n{sql}\n")
    project.write_config(runs={"grpo": {"curate": {"advantage": {"sql": "mine.sql", "eps": None}}}})
    project.config["runs"]["grpo"]["curate"]["advantage"] = {"sql": "mine.sql"}
    project.write_config()
    before = (project.folder / "results/grpo-s0/r0000/batch.parquet").read_bytes()
    message = fails(project, "results/grpo-s0/r0000/batch.parquet")
    for word in words:
        assert word in message, message
    left = project.folder / "results/grpo-s0/r0000/batch.parquet"
    assert not left.exists() or left.read_bytes() == before


@pytest.mark.parametrize(
    ("body", "words"),
    [("raise RuntimeError('boom')", ["RuntimeError: boom"]), ("return float('nan')", ["nan"]), ("return 'x'", ["str"])],
)
def test_a_scorer_that_fails_is_recorded_per_row_and_stops_at_the_threshold(
    project: Project, body: str, words: list[str]
) -> None:
    (project.folder / "mine.py").write_text(f"def judge(row):\n    {body}\n")
    mine = {"kind": "python", "function": "mine.py:judge"}
    scorers = {"exact": {"kind": "exact"}, "mine": mine}
    project.write_config(defaults={"score": {"scorers": scorers, "reward": {"exact": 1.0}, "correct": "exact"}})
    message = fails(project, "all_scores")
    for word in [*words, "16 of 16", "max_error_share"]:
        assert word in message, message
    project.write_config(defaults={"score": {"scorers": {"mine": {"max_error_share": 1.0}}}})
    project.snakemake("all_scores")
    errors = project.rollway(
        "sql", "SELECT count(*) AS n FROM scores WHERE error IS NOT NULL", "--format", "csv"
    ).stdout
    assert errors.split() == ["n", "16"]


def test_a_truncated_parquet_file(project: Project) -> None:
    path = project.folder / "results/grpo-s0/r0000/p0/rollouts-000.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    message = fails(
        project,
        "--forcerun",
        "score",
        "--rerun-triggers",
        "mtime",
        "--",
        "results/grpo-s0/r0000/p0/scores/exact-000.parquet",
    )
    assert "rollouts-000.parquet" in message
    assert "not a whole Parquet file" in message


def test_a_checkpoint_of_a_wrong_shape(project: Project) -> None:
    from safetensors.numpy import load_file, save_file

    path = project.folder / "results/warmups/tiny-s0/weights/main/model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name][:-1]
    save_file(tensors, path)
    message = fails(
        project,
        "--forcerun",
        "rollout",
        "--rerun-triggers",
        "mtime",
        "--",
        "results/grpo-s0/r0000/p0/rollouts-000.parquet",
    )
    assert "model.safetensors" in message
    assert "snakemake --force" in message


def test_a_group_of_one_and_equal_rewards_pass_the_policy_on(tmp_path: Path) -> None:
    """No signal at all: a clear notice, the policy unchanged, no NaN."""
    config = deep_merge(TINY, {"defaults": {"rounds": 1, "rollout": {"group": 1}}})
    project = Project(tmp_path, config)
    output = project.snakemake().stdout
    assert "no rollout carries a signal" in output
    weights = project.bytes_of("**/weights/main/model.safetensors")
    assert len(set(weights.values())) == 1
    metrics = json.loads((tmp_path / "results/grpo-s0/r0001/metrics.json").read_text())["metrics"]
    assert {m["name"]: m["value"] for m in metrics}["skipped"] == 1.0


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from rollway.errors import RollwayError
    from rollway.store import atomic

    path = tmp_path / "x.json"
    atomic.write_json(path, {"old": 1})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(RollwayError, match=r"x\.json: cannot be written \(No space left on device\)"):
        atomic.write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
