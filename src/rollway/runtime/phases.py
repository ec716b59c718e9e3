"""What a job's time is spent on: `load` (files, model), `work` (its arithmetic), `write`. Kept in its usage.json."""

import time

_marks: list[tuple[str, float]] = []


def begin() -> None:
    """A new job, which loads first."""
    _marks[:] = [("load", time.perf_counter())]


def mark(phase: str) -> None:
    """From here on the time is `phase`'s: "work" or "write". Does nothing where no job has begun."""
    if _marks:
        _marks.append((phase, time.perf_counter()))


def seconds() -> dict[str, float]:
    """Wall seconds of each phase so far. A stage that marked nothing has only worked."""
    if len(_marks) == 1:
        return {"work": time.perf_counter() - _marks[0][1]}
    spent: dict[str, float] = {}
    ends = [begun for _, begun in _marks[1:]] + [time.perf_counter()]
    for (phase, begun), end in zip(_marks, ends, strict=True):
        spent[phase] = spent.get(phase, 0.0) + end - begun
    return spent
