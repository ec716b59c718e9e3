"""Commands that may hang: what every process of one was doing when its time was over, and one more try.

Two commands were seen to stand still, in some ten thousand jobs. The likely cause is mended: a warm worker whose
importing thread had ended with an error, so that jobs waited for it. But neither was caught at it. So a command that
outlives its time is told of with all that can be known of it, as a warning, and run once more. One that hangs twice
fails its test.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


class HangWarning(UserWarning):
    """A command that was killed because it did not end."""


class Hung(Exception):
    """Its text: what each process was doing."""


def once_more(command: Callable[[bool], T]) -> T:
    """What `command(False)` returns; where it raises Hung, what `command(True)` does."""
    try:
        return command(False)
    except Hung as hung:
        warnings.warn(f"run once more after a hang: {hung}", HangWarning, stacklevel=2)
    try:
        return command(True)
    except Hung as hung:
        raise AssertionError(str(hung)) from None


def run(
    command: Sequence[str], folder: Path, environment: Mapping[str, str], limit: float, *, stderr: int
) -> "subprocess.CompletedProcess[str]":
    """Runs a command in `folder`; stderr: subprocess.PIPE, or STDOUT to have both in one.

    Raises Hung, with what every process of it was doing and what it had said, when it takes longer than `limit`
    seconds; they are killed then.
    """
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**environment, "PYTHONFAULTHANDLER": "1"},
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        told = abort(process.pid)
        out, err = process.communicate()
        raise Hung(f"{command} took more than {limit:g} s:\n{told}\n== output\n{out[-20000:]}{err or ''}") from None
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def descendants(pid: int) -> list[int]:
    """Of a process: itself, its children, theirs, and so on."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
            except OSError:
                continue
            parents.setdefault(parent, []).append(int(entry.name))
    family = [pid]
    for member in family:
        family += parents.get(member, [])
    return family


def abort(pid: int) -> str:
    """Kills a process and what it started. Says of each what it was doing; where PYTHONFAULTHANDLER was set in its
    environment, its stderr then ends with the stacks of its threads."""
    family = descendants(pid)
    told = [doing(member) for member in family]
    for member in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(member, signal.SIGABRT)
    time.sleep(1.0)
    for member in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)
    return "\n".join(told)


def doing(pid: int) -> str:
    """Command, threads (state, kernel function, ticks spent within half a second) and, for what runs, native stacks."""
    try:
        folder = Path("/proc") / str(pid)
        words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        before = {task.name: _ticks(task) for task in (folder / "task").iterdir()}
        time.sleep(0.5)
        lines = [f"{pid} {words[:200]}"]
        runs = False
        for task in sorted((folder / "task").iterdir()):
            state = (task / "stat").read_text(errors="replace").rpartition(")")[2].split()[0]
            runs |= state == "R"
            spent = _ticks(task) - before.get(task.name, 0)
            lines.append(f"  {task.name} {state} {(task / 'wchan').read_text()} +{spent} ticks")
        return "\n".join([*lines, _native(pid)] if runs else lines)
    except OSError:
        return f"{pid} is gone"


def _ticks(task: Path) -> int:
    fields = (task / "stat").read_text(errors="replace").rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def _native(pid: int) -> str:
    gdb = shutil.which("gdb")
    if gdb is None:
        return "  (no gdb for native stacks)"
    command = [gdb, "-p", str(pid), "-batch", "-ex", "thread apply all bt 15"]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return "  (gdb took more than a minute)"
    return done.stdout[-4000:]
