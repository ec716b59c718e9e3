"""No worker and no stage outlives the workflow, however it ends."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from rollway.config import deep_merge
from workflow.project import TINY, Project


def processes_of(folder: Path) -> list[str]:
    """Command lines of all processes that mention the folder or work in it."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            inside = os.readlink(entry / "cwd") == str(folder)
        except OSError:
            continue
        if command and (inside or str(folder) in command):
            found.append(command)
    return found


def wait_until_gone(folder: Path, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while left := processes_of(folder):
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.2)


def long_project(folder: Path) -> Project:
    return Project(folder, deep_merge(TINY, {"warmups": {"tiny": {"sft": {"steps": 100_000}}}}))


def test_after_success_and_after_an_error(tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.snakemake("results/tasks/spell/train.parquet")
    wait_until_gone(tmp_path)
    (tmp_path / "words.jsonl").write_text("{broken\n")
    project.snakemake("results/tasks/spell/train.parquet", check=False)
    wait_until_gone(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
def test_after_a_signal_in_the_middle_of_a_stage(tmp_path: Path, number: signal.Signals) -> None:
    project = long_project(tmp_path)
    running = subprocess.Popen(
        project.command("--cores", "2", "results/warmups/tiny-s0/policy.json"),
        cwd=tmp_path,
        env=project.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        started = tmp_path / "logs/warmups/tiny-s0.log"
        deadline = time.monotonic() + 90
        while not started.exists():
            assert time.monotonic() < deadline, "the warm-up did not start"
            time.sleep(0.1)
        time.sleep(1.0)
        # A terminal's Ctrl-C, and a batch system's SIGTERM, reach the whole group; SIGKILL here hits Snakemake alone.
        os.kill(running.pid, number) if number == signal.SIGKILL else os.killpg(running.pid, number)
        running.wait(timeout=60)
        wait_until_gone(tmp_path, 60)
    finally:
        running.kill()
    assert not (tmp_path / "results/warmups/tiny-s0/policy.json").exists()
