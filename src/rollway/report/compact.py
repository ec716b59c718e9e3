"""Curves, jobs and prompts as short lists, each with a limit, so that a page of any folder stays small."""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import duckdb

from rollway.report.data import Curve, Point, Points, Run
from rollway.report.pack import numbers
from rollway.report.rollouts import spread
from rollway.report.usage import Job
from rollway.store.queries import rows as ask

MAX_POINTS = 150_000
"""Points of the standard curves, and as many of the other metrics."""
MAX_JOBS = 40_000
"""Rows (stage, run, round) of what jobs took."""
MAX_PROMPT = 4000
"""Characters of a message."""
MAX_PROMPTS = 2_000_000
"""Characters of all prompts that are shown in full."""
MAX_ASKED = 200
"""Characters of a held-out prompt of which no sample is shown."""


def curves(found: Sequence[Curve]) -> list[dict[str, Any]]:
    """Every curve with all its runs; beyond MAX_POINTS evenly spread rounds of each, the first and the last among
    them."""
    lines = sum(len(curve.series) for curve in found)
    most = max(20, MAX_POINTS // max(1, lines))
    return [
        {
            "title": curve.title,
            "note": curve.note,
            "series": {run: columns(thinned(points, most)) for run, points in curve.series.items()},
        }
        for curve in found
    ]


def thinned(points: Sequence[Point], most: int) -> Sequence[Point]:
    if len(points) <= most:
        return points
    return [points[place] for place in spread(list(range(len(points))), most)]


def columns(points: Sequence[Point]) -> list[list[Any]]:
    """[rounds, values] or [rounds, values, lows, highs]."""
    found: list[list[Any]] = [[p.round for p in points], numbers(p.value for p in points)]
    if any(p.low is not None for p in points):
        found += [numbers(p.low for p in points), numbers(p.high for p in points)]
    return found


def metrics(points: Points, runs: Sequence[Run]) -> dict[str, Any]:
    """Every metric by name, for the curves that a reader chooses; the rarest are left out beyond MAX_POINTS."""
    known = {run.run for run in runs}
    series = {f"{s}: {n}": {r: p for r, p in of.items() if r in known} for (s, n), of in points.items()}
    sizes = {name: sum(map(len, of.values())) for name, of in series.items() if "rejected_token/" not in name}
    kept, total = set(), 0
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        if sizes[name] and total + sizes[name] <= MAX_POINTS:
            kept.add(name)
            total += sizes[name]
    return {name: {r: columns(p) for r, p in series[name].items()} for name in sorted(kept)}


def jobs(found: Sequence[Job]) -> list[list[Any]]:
    """[stage, run, round, seconds, CPU seconds, peak MB]: jobs of one stage and round together; evenly spread rounds of
    each run beyond MAX_JOBS."""
    together: dict[tuple[str, str | None, int | None], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for job in found:
        row = together[job.stage, job.run, job.round]
        row[0], row[1], row[2] = row[0] + job.seconds, row[1] + job.cpu_seconds, max(row[2], job.peak_mb)
    rounds: dict[str | None, set[int]] = defaultdict(set)
    for _, run, round_ in together:
        if round_ is not None:
            rounds[run].add(round_)
    share = MAX_JOBS / max(1, len(together))
    kept = {run: set(spread(sorted(of), max(2, int(len(of) * min(1.0, share))))) for run, of in rounds.items()}
    return [
        [stage, run, round_, round(seconds, 3), round(cpu, 3), peak]
        for (stage, run, round_), (seconds, cpu, peak) in together.items()
        if round_ is None or round_ in kept[run]
    ]


def prompts(catalog: duckdb.DuckDBPyConnection, in_full: Iterable[str], asked: Iterable[str]) -> dict[str, Any]:
    """Prompt -> [task, split, [[role, content]], answer]; contents are cut, and say by how much."""
    full = set(in_full)
    wanted = sorted({*full, *asked})
    most = max(MAX_ASKED, min(MAX_PROMPT, MAX_PROMPTS // max(1, len(full))))
    catalog.execute("CREATE TEMP TABLE wanted AS SELECT unnest($1::VARCHAR[]) AS prompt_id", [wanted])
    query = f"""SELECT prompt_id, min(task), min(split), min(messages), min(left(answer, {MAX_PROMPT}))
        FROM prompts JOIN wanted USING (prompt_id) GROUP BY prompt_id ORDER BY prompt_id"""
    return {
        prompt: [task, split, _messages(messages, most if prompt in full else MAX_ASKED), answer]
        for prompt, task, split, messages, answer in ask(catalog, query)
    }


def _messages(text: str, most: int) -> list[list[str]]:
    try:
        return [[str(m["role"]), _cut(str(m["content"]), most)] for m in json.loads(text)]
    except (ValueError, TypeError, KeyError):
        return [["prompt", _cut(text, most)]]


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]} [... {len(text) - most:,} more characters]"
