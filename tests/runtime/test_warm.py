"""The Snakefile's handlers, where there is no warm worker."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from rollway.errors import RollwayError
from rollway.runtime import client, warm


@pytest.fixture(autouse=True)
def inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    """A workflow that was started by a job of another one."""
    monkeypatch.setenv("ROLLWAY_WORKER", "/elsewhere/socket")
    monkeypatch.setenv("ROLLWAY_ENGINES", "1:/elsewhere")


def start(folder: Path, local: bool = True) -> None:
    warm.start(str(folder / "socket"), SimpleNamespace(local_exec=local), str(folder))


def assert_none() -> None:
    assert "ROLLWAY_WORKER" not in os.environ
    assert "ROLLWAY_ENGINES" not in os.environ


def test_a_worker_that_does_not_start_leaves_no_other_ones_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise RollwayError("the folder is another user's")

    monkeypatch.setattr(client, "start", refuse)
    start(tmp_path)
    assert "stages start cold: the folder is another user's" in capsys.readouterr().err
    assert_none()


def test_neither_does_a_machine_without_warm_workers_nor_a_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "start", lambda *_: None)
    start(tmp_path)
    assert_none()
    monkeypatch.setenv("ROLLWAY_WORKER", "/elsewhere/socket")
    start(tmp_path, local=False)
    assert_none()


def test_off_is_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROLLWAY_WORKER", "off")
    monkeypatch.setattr(client, "start", lambda *_: pytest.fail("a worker was started"))
    start(tmp_path)
    assert_none()
