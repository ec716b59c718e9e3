"""`lag: 1` generates the next round while this one is trained, where there are two GPUs, without a word from the user.

The GPUs are names in CUDA_VISIBLE_DEVICES: jobs lock them and Snakemake counts them, and torch computes on the CPU.
"""

import json
from pathlib import Path

import pytest

from rollway.config import deep_merge
from rollway.runtime.device import shared
from workflow.project import TINY, Project

ROUNDS = 4


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Locks on GPUs go to a folder of the test's own."""
    (tmp_path / "locks").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "locks"))
    return monkeypatch


def spans(project: Project, pattern: str) -> list[tuple[float, float]]:
    """When the jobs whose usage files match began and ended, in the order of their rounds."""
    files = sorted((project.folder / "logs" / "grpo-s0").glob(pattern))
    assert files, f"no job matches {pattern}"
    usages = [json.loads(file.read_text()) for file in files]
    return [(usage["began"], usage["began"] + usage["seconds"]) for usage in usages]


def overlapping(project: Project) -> int:
    """Rollout jobs that ran while a train job did."""
    trained = spans(project, "r*/train.usage.json")
    rollouts = spans(project, "r*/rollout-p0-000.usage.json")
    return sum(any(start < end and begin < stop for start, stop in trained) for begin, end in rollouts)


def run(folder: Path, lag: int) -> Project:
    settings = {"lag": lag, "rounds": ROUNDS, "rollout": {"prompts": 32, "group": 8, "sampling": {"max_tokens": 16}}}
    project = Project(folder, deep_merge(TINY, {"defaults": settings}))
    project.snakemake(f"results/grpo-s0/r{ROUNDS:04d}/policy.json")
    return project


@pytest.mark.slow
def test_two_gpus_overlap_rollout_and_training(tmp_path: Path, gpus: pytest.MonkeyPatch) -> None:
    gpus.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert overlapping(run(tmp_path / "lagged", 1)) >= 1


@pytest.mark.slow
def test_one_gpu_is_given_to_one_job_at_a_time(tmp_path: Path, gpus: pytest.MonkeyPatch) -> None:
    gpus.setenv("CUDA_VISIBLE_DEVICES", "0")
    project = run(tmp_path / "single", 1)
    assert overlapping(project) == 0
    assert not any("waiting for" in path.read_text() for path in (project.folder / "logs").rglob("*.log"))


def test_without_lag_a_rollout_needs_the_policy_of_the_round_before(tmp_path: Path, gpus: pytest.MonkeyPatch) -> None:
    """The plan itself: with lag 1 the rollouts of round 2 need one update, without it two."""
    updates = {}
    for lag in (0, 1):
        settings = {"lag": lag, "rounds": ROUNDS}
        project = Project(tmp_path / f"lag{lag}", deep_merge(TINY, {"defaults": settings}))
        updates[lag] = project.planned("results/grpo-s0/r0002/p0/rollouts-000.parquet")["train"]
    assert updates == {0: 2, 1: 1}


def test_this_machines_gpus_are_what_snakemake_may_give_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert shared(local=True) == {"mlflow": 1, "gpu": 2}
    assert shared(local=False) == {"mlflow": 1}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert shared(local=True) == {"mlflow": 1}
