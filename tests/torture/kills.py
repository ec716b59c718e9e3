"""Runs Snakemake until a job of one's choice has begun, and kills: everything, or a part of it, by which signal."""

import os
import re
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from hangs import descendants
from workflow.project import Project

WAYS = {
    "power": "SIGKILL to every process at once, as when the power goes",
    "snakemake": "SIGKILL to Snakemake alone",
    "worker": "SIGKILL to the warm worker",
    "job": "SIGKILL to the process of the job",
    "terminate": "SIGTERM to Snakemake and its process group",
    "terminate job": "SIGTERM to the process of the job",
    "interrupt": "SIGINT (Ctrl-C) to Snakemake and its process group",
}
WORKER = re.compile(r"worker (\d+) listens")
GONE = 240.0
"""Seconds within which everything that a dead Snakemake leaves must have ended by itself: a job without the worker, or
one that did not reach it any more, is done first."""


@dataclass(frozen=True)
class Aim:
    """A job, by its log, relative to the project; what to kill; and how many seconds after the job began."""

    stage: str
    log: str
    way: str
    delay: float


@dataclass(frozen=True)
class Kill:
    """What was done. `way`: another than was aimed at where that process had ended. `at_work`: the job ran still."""

    stage: str
    log: str
    way: str
    delay: float
    at_work: bool


def run_and_kill(project: Project, aim: Aim) -> Kill | None:
    """One call of Snakemake; None when it came to its end before the job began. Returns when every process is gone.

    Raises AssertionError where Snakemake fails by itself, or something outlives it.
    """
    log, worker_log = project.folder / aim.log, project.folder / "results/.worker/worker.log"
    for old in (log, worker_log):
        old.unlink(missing_ok=True)
    with (project.folder / "output").open("w") as output:
        running = subprocess.Popen(
            # A killed Snakemake leaves its lock; who it was is known here.
            project.command("--cores", "2", "--nolock"),
            cwd=project.folder,
            env=project.environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            # What a shell starts in the background ignores SIGINT, and so would all that it starts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    # The stage opens its log when it has read its command line.
    while not log.exists():
        if running.poll() is not None:
            _must_be_well(project, running)
            return None
        time.sleep(0.002)
    time.sleep(aim.delay)
    job = holder(log)
    way = aim.way
    if running.poll() is not None:
        _must_be_well(project, running)
        return None
    said = WORKER.search(worker_log.read_text(errors="replace")) if worker_log.exists() else None
    worker = int(said[1]) if said else None
    if not _kill(way, running, worker, job):
        way = "snakemake"
        _kill(way, running, worker, job)
    wait_until_gone(running, project.folder)
    return Kill(aim.stage, aim.log, way, aim.delay, job is not None)


def _must_be_well(project: Project, running: "subprocess.Popen[bytes]") -> None:
    if running.wait():
        raise AssertionError(f"Snakemake failed by itself:\n{(project.folder / 'output').read_text()[-5000:]}")


def holder(log: Path) -> int | None:
    """The process that has a job's log open: the job, warm or cold; None when it has ended."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if any(os.readlink(file) == str(log) for file in (entry / "fd").iterdir()):
                found.append(int(entry.name))
        except OSError:
            continue
    return min(found, default=None)


def _kill(way: str, running: "subprocess.Popen[bytes]", worker: int | None, job: int | None) -> bool:
    """Whether that process was still there to be killed."""
    match way:
        case "power":
            return _power_cut(running.pid)
        case "worker":
            return _signal(worker, signal.SIGKILL)
        case "job":
            return _signal(job, signal.SIGKILL)
        case "terminate job":
            return _signal(job, signal.SIGTERM)
        case "terminate":
            return _signal(running.pid, signal.SIGTERM, group=True)
        case "interrupt":
            return _signal(running.pid, signal.SIGINT, group=True)
        case _:
            return _signal(running.pid, signal.SIGKILL)


def _power_cut(root: int) -> bool:
    """All stop before the first is killed: none sees another one die, and does something about it."""
    stopped: set[int] = set()
    while new := set(descendants(root)) - stopped:
        for pid in new:
            _signal(pid, signal.SIGSTOP)
        stopped |= new
    killed = [_signal(pid, signal.SIGKILL) for pid in stopped]
    return any(killed)


def _signal(pid: int | None, number: signal.Signals, *, group: bool = False) -> bool:
    if pid is None:
        return False
    try:
        os.killpg(pid, number) if group else os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def wait_until_gone(running: "subprocess.Popen[bytes]", folder: Path) -> None:
    """Snakemake and all that works in the folder."""
    # Without the worker, on a machine that is busy, a project takes minutes.
    running.wait(timeout=1200)
    deadline = time.monotonic() + GONE
    while left := _at_work(folder):
        if time.monotonic() > deadline:
            raise AssertionError(f"still running after {GONE:g} s: {left}")
        time.sleep(0.02)


def _at_work(folder: Path) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.readlink(entry / "cwd") == str(folder):
                found.append((entry / "cmdline").read_text(errors="replace").replace("\0", " ")[:200])
        except OSError:
            continue
    return [command for command in found if command]
