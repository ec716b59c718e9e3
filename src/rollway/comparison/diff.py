"""`rollway diff`: two runs against each other, what was asked of them and what came of it."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import duckdb

from rollway.comparison.settings import evaluation_settings
from rollway.errors import RollwayError
from rollway.evaluation.intervals import Difference, paired_difference
from rollway.printable import printable
from rollway.store.catalog import with_catalog
from rollway.store.lineage import read_runs
from rollway.store.queries import rows

FIGURES = {
    "curate": ("reward_mean", "correct_share", "length_mean", "truncated_share", "groups_with_signal_share"),
    "train": ("entropy_old", "kl_old", "clip_share", "grad_norm", "gap_mean"),
}
"""Metrics that are set side by side, where both runs have them in some round."""
_INFO = ("recipe", "seed", "task", "warmup", "rounds", "parent", "fork_round", "fork_stage")
_SHOWN_PROMPTS = 5
ABSENT = "(not set)"


@dataclass(frozen=True)
class Side:
    """One run: its folder's name, the results folder it is in, and the content of its run.json ({} where imported)."""

    run: str
    results: Path
    info: dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """One metric in the last round that both have; values are means over the round's updates."""

    stage: str
    name: str
    round: int
    a: float
    b: float


@dataclass(frozen=True)
class RunDiff:
    """Two runs, b against a. `settings`: key -> both values; `notes`: in words, what cannot be compared and why."""

    a: Side
    b: Side
    settings: dict[str, tuple[str, str]]
    rounds: tuple[list[int], list[int]]
    """Rounds with rollouts."""
    evaluated: int | None
    """The last round that both evaluated on at least one prompt in common."""
    passed: tuple[float, float] | None
    """pass@1 over the prompts in common."""
    difference: Difference | None
    flipped_right: list[str]
    """Prompts less than half right in a and at least half right in b."""
    flipped_wrong: list[str]
    figures: list[Figure]
    notes: list[str]


def diff(results: Path, a: str, b: str) -> RunDiff:
    """Config, held-out results on the same prompts, and metrics of two runs; PATH/RUN names one of another folder.

    Raises RollwayError when a run is not there.
    """
    sides = [_side(results, name) for name in (a, b)]
    notes: list[str] = []
    notes += [f"{side.run} has no run.json: nothing is known of its config" for side in sides if not side.info]
    settings = {}
    if all(side.info for side in sides):
        flat = [_flat(side.info) for side in sides]
        keys = dict.fromkeys([*flat[0], *flat[1]])
        both = {key: (flat[0].get(key, ABSENT), flat[1].get(key, ABSENT)) for key in keys}
        settings = {key: values for key, values in both.items() if values[0] != values[1]}
    read = [_read(side) for side in sides]
    evaluated, shares = _in_common(read[0].shares, read[1].shares, notes)
    difference, passed, right, wrong = None, None, list[str](), list[str]()
    if evaluated is not None:
        before, after = shares
        difference = paired_difference(before, after)
        passed = (sum(before.values()) / len(before), sum(after.values()) / len(after))
        right = [p for p in before if before[p] < 0.5 <= after[p]]
        wrong = [p for p in before if after[p] < 0.5 <= before[p]]
        notes += _other_evaluation(sides, evaluated)
    return RunDiff(
        sides[0],
        sides[1],
        settings,
        (read[0].rounds, read[1].rounds),
        evaluated,
        passed,
        difference,
        right,
        wrong,
        _figures(read[0].metrics, read[1].metrics),
        notes,
    )


def text(found: RunDiff) -> str:
    """The difference for a terminal."""
    a, b = found.a.run, found.b.run
    parts = [f"{a} against {b}", "", *_settings_lines(found), "", "results"]
    for side, rounds in zip((a, b), found.rounds, strict=True):
        parts.append(f"  {side}: " + (f"rollouts of rounds {_ranges(rounds)}" if rounds else "no rollouts yet"))
    if found.evaluated is not None and found.passed is not None and found.difference is not None:
        d = found.difference
        parts.append(
            f"  held-out pass@1, round {found.evaluated}, {d.prompts} prompts in common: "
            f"{found.passed[0]:.3f} -> {found.passed[1]:.3f}, "
            f"{d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}] (95 %, bootstrap over prompts)"
        )
        for word, prompts in (("right", found.flipped_right), ("wrong", found.flipped_wrong)):
            some = ", ".join(printable(p) for p in prompts[:_SHOWN_PROMPTS])
            more = f" and {len(prompts) - _SHOWN_PROMPTS} more" if len(prompts) > _SHOWN_PROMPTS else ""
            parts.append(
                f"  flipped {word}: {len(prompts)} prompt{'' if len(prompts) == 1 else 's'}"
                + (f" ({some}{more})" if prompts else "")
            )
    if found.figures:
        lines = [["stage", "metric", "round", a, b, "difference"]]
        lines += [
            [f.stage, f.name, str(f.round), _number(f.a), _number(f.b), _number(f.b - f.a, "+")] for f in found.figures
        ]
        parts += ["", *_table(lines)]
    parts += ["", *(f"note: {note}" for note in found.notes)] if found.notes else []
    return "\n".join(parts)


def _settings_lines(found: RunDiff) -> list[str]:
    if not found.a.info or not found.b.info:
        return []
    if not found.settings:
        return ["config: the same"]
    lines = [["", found.a.run, found.b.run]]
    lines += [[key, *(_cut(value) for value in values)] for key, values in found.settings.items()]
    return ["config", *_table(lines)]


def _side(results: Path, name: str) -> Side:
    path = Path(name)
    folder, run = (path.parent, path.name) if "/" in name else (results, name)
    runs = read_runs(folder) if folder.is_dir() else {}
    known = {*runs, *(p.parent.name for p in folder.glob("*/r[0-9][0-9][0-9][0-9]"))}
    if run not in known:
        same = sorted(other for other in known if other.rpartition("-s")[0] == run)
        near = same or get_close_matches(run, known, n=3, cutoff=0.4) or sorted(known)[:5]
        hint = f"did you mean {' or '.join(near)}?" if near else "it has none yet"
        raise RollwayError(f"diff: {run}: is not a run of {folder}; {hint}")
    return Side(run, folder, runs.get(run, {}))


def _flat(info: Mapping[str, Any]) -> dict[str, str]:
    """Dotted key -> value as JSON; of the config its own keys, of the rest what says which run it is."""
    found = {key: _written(info.get(key)) for key in _INFO}
    todo: list[tuple[str, Any]] = [("", info.get("config") or {})]
    while todo:
        key, value = todo.pop()
        if isinstance(value, dict) and value:
            todo += [(f"{key}.{name}" if key else name, value[name]) for name in sorted(value, reverse=True)]
        elif key and key.split(".")[0] not in ("title", "paper", "axes", "seeds", "fork", *_INFO):
            found[key] = _written(value)
    return found


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@dataclass(frozen=True)
class _Tables:
    rounds: list[int]
    shares: dict[int, dict[str, float]]
    metrics: dict[tuple[str, str], dict[int, float]]


def _read(side: Side) -> _Tables:
    return with_catalog(side.results, lambda catalog: _tables_of(catalog, side))


def _tables_of(catalog: duckdb.DuckDBPyConnection, side: Side) -> _Tables:
    rounds = [r[0] for r in _ask(catalog, "SELECT DISTINCT round FROM seen_rollouts WHERE run = ? ORDER BY 1", side)]
    shares: dict[int, dict[str, float]] = {}
    query = "SELECT round, prompt_id, c / n::DOUBLE FROM by_prompt WHERE run = ? ORDER BY ALL"
    for round, prompt, share in _ask(catalog, query, side):
        shares.setdefault(round, {})[prompt] = share
    metrics: dict[tuple[str, str], dict[int, float]] = {}
    query = """SELECT stage, name, round, avg(value ORDER BY step) FROM seen_metrics
        WHERE run = ? AND value IS NOT NULL AND isfinite(value) GROUP BY ALL ORDER BY ALL"""
    for stage, name, round, value in _ask(catalog, query, side):
        metrics.setdefault((stage, name.removeprefix(f"{stage}/")), {})[round] = value
    return _Tables(rounds, shares, metrics)


def _ask(catalog: duckdb.DuckDBPyConnection, query: str, side: Side) -> list[tuple[Any, ...]]:
    return rows(catalog, query, side.run)


def _in_common(
    a: dict[int, dict[str, float]], b: dict[int, dict[str, float]], notes: list[str]
) -> tuple[int | None, tuple[dict[str, float], dict[str, float]]]:
    """The last round both evaluated, and the shares right of the prompts that both have in it."""
    rounds = [r for r in sorted(a.keys() & b.keys()) if a[r].keys() & b[r].keys()]
    if not rounds:
        notes.append("no round is evaluated in both on a prompt in common: held-out results cannot be compared")
        return None, ({}, {})
    last = rounds[-1]
    shared = sorted(a[last].keys() & b[last].keys())
    if len(shared) < max(len(a[last]), len(b[last])):
        notes.append(f"{len(shared)} of {len(a[last].keys() | b[last].keys())} held-out prompts are in both")
    if last < max(max(a), max(b)):
        notes.append(f"compared at round {last}: evaluated up to rounds {max(a)} and {max(b)}")
    return last, ({p: a[last][p] for p in shared}, {p: b[last][p] for p in shared})


def _other_evaluation(sides: list[Side], round: int) -> list[str]:
    if not all(side.info for side in sides):
        return []
    mine, theirs = (evaluation_settings(side.info, round) for side in sides)
    other = [f"{name} {mine[name]} against {theirs[name]}" for name in mine if mine[name] != theirs[name]]
    return [f"evaluated with other settings: {', '.join(other)}"] if other else []


def _figures(a: dict[tuple[str, str], dict[int, float]], b: dict[tuple[str, str], dict[int, float]]) -> list[Figure]:
    found = []
    for stage, names in FIGURES.items():
        for name in names:
            mine, theirs = a.get((stage, name), {}), b.get((stage, name), {})
            shared = mine.keys() & theirs.keys()
            if shared:
                last = max(shared)
                found.append(Figure(stage, name, last, mine[last], theirs[last]))
    return found


def _table(lines: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  " + "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]


def _number(value: float, sign: str = "") -> str:
    return f"{value:{sign}.4g}" if math.isfinite(value) else str(value)


def _cut(value: str, most: int = 48) -> str:
    shown = printable(value)
    return shown if len(shown) <= most else shown[: most - 3] + "..."


def _ranges(numbers: list[int]) -> str:
    """0-4, 7: so that missing rounds are seen."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)
