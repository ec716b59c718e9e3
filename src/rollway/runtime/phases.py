"""What a job's time is spent on: `load` (files, model), `work` (its arithmetic), `write`; and its start before that."""

import os
import time

from rollway.runtime.client import start_time

_marks: list[tuple[str, float]] = []
_process: list[int] = []


def stands_for(process: int) -> None:
    """The process that waits for this job, with which the job began: the warm worker's client."""
    _process[:] = [process]


def begin() -> None:
    """A new job: it imports its stage and reads its settings."""
    _marks[:] = [("load", time.perf_counter())]


def enter() -> None:
    """The stage itself begins. Unless it marks when its work does, all that it does is work."""
    _marks[1:] = [("load", time.perf_counter())]


def mark(phase: str) -> None:
    """From here on the time is `phase`'s: "work" or "write". Does nothing where no job has begun."""
    if _marks:
        _marks.append((phase, time.perf_counter()))


def seconds() -> dict[str, float]:
    """Wall seconds of each phase so far."""
    marks = list(_marks)
    if len(marks) == 2:
        marks[1] = ("work", marks[1][1])
    ends = [begun for _, begun in marks[1:]] + [time.perf_counter()]
    spent: dict[str, float] = {}
    for (phase, begun), end in zip(marks, ends, strict=True):
        spent[phase] = spent.get(phase, 0.0) + end - begun
    return spent


def since_start() -> float | None:
    """Seconds since the process started that this job is, in steps of the kernel's clock (10 ms); None off Linux."""
    ticks = start_time(_process[0] if _process else os.getpid())
    if ticks is None:
        return None
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
