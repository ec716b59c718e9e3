"""Finished projects, made once per file of tests; a test that changes one takes a copy."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rollway.config import deep_merge
from torture import subject
from workflow.project import Project

ONE_ROUND = {"defaults": {"rounds": 1}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """One round."""
    return _run(tmp_path_factory.mktemp("finished") / "project", deep_merge(subject.config("few"), ONE_ROUND))


@pytest.fixture(scope="module")
def continued(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The same, and a second round."""
    folder = tmp_path_factory.mktemp("continued") / "project"
    shutil.copytree(finished.folder, folder, symlinks=True)
    return _run(folder, subject.config("few"))


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Every stage: with a reward model, a critic and MLflow."""
    return _run(tmp_path_factory.mktemp("every") / "project", deep_merge(subject.config("every"), ONE_ROUND))


@pytest.fixture
def copied(finished: Project, tmp_path: Path) -> Callable[..., Project]:
    """Copies the project with one round; keywords change its config."""

    def copy(**changes: object) -> Project:
        shutil.copytree(finished.folder, tmp_path / "project", symlinks=True)
        return Project(tmp_path / "project", deep_merge(finished.config, changes))

    return copy


def _run(folder: Path, config: dict[str, object]) -> Project:
    project = Project(folder, config)
    project.snakemake()
    return project
