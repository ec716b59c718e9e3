"""A finished project, and a copy of it for each test that spoils it."""

import shutil
from pathlib import Path

import pytest

from rollway.config import deep_merge
from workflow.project import TINY, Project


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds of GRPO, and a fork of it, in two shards."""
    changes = {
        "defaults": {"rollout": {"shards": 2}, "keep": {"last": 2}},
        "runs": {"fork": {"recipe": "dr-grpo", "fork": {"run": "grpo", "round": 1, "stage": "score"}}},
        "mlflow": {"enabled": False},
    }
    config = deep_merge(TINY, changes)
    project = Project(tmp_path_factory.mktemp("verify"), config)
    project.snakemake()
    return project.folder / "results"


@pytest.fixture
def results(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "results")
    return tmp_path / "results"
