"""`rollway status` as text: a line per run, then what is missing, failed, being written and stale, and why."""

import os
from collections.abc import Sequence
from pathlib import Path

from rollway.printable import printable
from rollway.runtime.stale import Outlook
from rollway.runtime.status import STAGES, RunState, StageState, ranges

_MOST = 8
"""Causes, failures and gaps that are listed one by one."""


def runs_table(states: Sequence[RunState]) -> str:
    """A line per run: rounds that are whole by stage, held-out accuracy, and how it stands."""
    lines = [["run", "recipe", *STAGES, "pass@1", ""]]
    for state in states:
        cells = [_share(state.stages[stage]) for stage in STAGES]
        lines.append([printable(state.run), printable(state.recipe), *cells, _accuracy(state), _standing(state)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def notes(states: Sequence[RunState]) -> list[str]:
    """What is missing in the middle, what failed, what is half written, and teachers no better than the policy;
    at most a few of each, the rest counted."""
    found: list[str] = []
    gaps = []
    for state in states:
        for name, stage in state.stages.items():
            inner = [r for r in stage.missing if r < max(stage.done, default=-1)]
            if inner:
                gaps.append(f"{state.run}: {name} of round {ranges(inner)} is missing, later rounds are there")
    failures = [
        f"{state.run}: {printable(message)} ({log})" for state in states for log, message in state.failures.items()
    ]
    parts = [
        f"{state.run}: rollout of {folder} is half done, {count} part{'s' if count > 1 else ''} kept"
        for state in states
        for folder, count in state.parts.items()
    ]
    teachers = [f"{state.run}: {printable(sentence)}" for state in states for sentence in state.teachers]
    told = (("missing", gaps), ("failed", failures), ("half written", parts), ("teacher", teachers))
    for title, sentences in told:
        found += [f"{title}: {sentence}" for sentence in sentences[:_MOST]]
        if len(sentences) > _MOST:
            found.append(f"{title}: {len(sentences) - _MOST} more")
    return found


def at_work(folder: Path) -> str | None:
    """Whether Snakemake holds the folder: its locks are there while it runs, and after it was killed."""
    locks = folder / ".snakemake" / "locks"
    if locks.is_dir() and any(locks.iterdir()):
        return "Snakemake holds this folder: it is running, or it was killed (then: snakemake --unlock)"
    return None


def outlook_lines(outlook: Outlook) -> list[str]:
    """What Snakemake would run, by cause."""
    if not outlook.jobs:
        return ["up to date: snakemake has nothing to do"]
    count = f"{outlook.jobs} job{'' if outlook.jobs == 1 else 's'}"
    lines = [f"to do: {count}, of which {outlook.following} follow from others and {outlook.reporting} only report"]
    width = max((len(f"{cause.rule} {cause.run}") for cause in outlook.causes[: 2 * _MOST]), default=0)
    for cause in outlook.causes[: 2 * _MOST]:
        rounds = f" rounds {ranges(cause.rounds)}" if cause.rounds else ""
        lines.append(f"  {f'{cause.rule} {cause.run}'.ljust(width)} {rounds}: {printable(cause.why)}")
    if len(outlook.causes) > 2 * _MOST:
        lines.append(f"  {len(outlook.causes) - 2 * _MOST} more causes: snakemake -n")
    return lines


def relative(path: Path) -> str:
    """As short as it can be written from here."""
    short = os.path.relpath(path)
    return short if len(short) < len(str(path)) else str(path)


def _share(stage: StageState) -> str:
    if stage.planned is None:
        return str(len(stage.done)) if stage.done else "-"
    return f"{len(stage.done)}/{stage.planned}"


def _accuracy(state: RunState) -> str:
    if state.first is None or state.last is None:
        return "-"
    if state.first == state.last:
        return f"{state.last[1]:.3f} (r{state.last[0]})"
    return f"{state.first[1]:.3f} -> {state.last[1]:.3f} (r{state.last[0]})"


def _standing(state: RunState) -> str:
    if state.failures:
        return "failed"
    if state.whole:
        return "complete" if any(stage.done for stage in state.stages.values()) else "empty"
    if state.parts:
        return "in progress"
    return "incomplete" if any(stage.done for stage in state.stages.values()) else "not started"
