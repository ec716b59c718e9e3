"""What the report shows, read from the catalogue: runs and curves."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

from rollway.store.lineage import read_runs
from rollway.store.queries import rows as ask


@dataclass(frozen=True)
class Run:
    """One run as the report knows it. `name` is shared by the seeds of one entry in `runs:`."""

    run: str
    name: str
    seed: int
    info: dict[str, Any]


@dataclass(frozen=True)
class Point:
    """One round of one curve; low and high are None where there is no interval."""

    round: int
    value: float
    low: float | None = None
    high: float | None = None


Points = dict[tuple[str, str], dict[str, list[Point]]]
"""(stage, metric) -> run -> its points in order of rounds."""


@dataclass(frozen=True)
class Curve:
    """One figure over rounds: run -> its points in order of rounds."""

    title: str
    note: str
    series: dict[str, list[Point]]


@dataclass(frozen=True)
class Figure:
    """A curve of the report: title, explanation, and the metrics that may hold it: of each run the first it has."""

    title: str
    note: str
    names: tuple[tuple[str, str], ...]


FIGURES = (
    Figure("held-out pass@1", "share of right answers", (("evaluate", "pass@1"),)),
    Figure("reward", "mean over the round's rollouts", (("curate", "reward_mean"), ("curate", "reward"))),
    Figure("right rollouts", "share of the round's rollouts", (("curate", "correct_share"),)),
    Figure("length", "tokens per rollout, mean", (("curate", "length_mean"), ("evaluate", "length"))),
    Figure("truncated", "share of rollouts cut at the token limit", (("curate", "truncated_share"),)),
    Figure("groups with signal", "share of groups whose rewards differ", (("curate", "groups_with_signal_share"),)),
    Figure(
        "entropy", "nats per token, of the policy that is updated", (("train", "entropy_old"), ("train", "entropy"))
    ),
    Figure("KL to old policy", "nats per token (k3), mean over updates", (("train", "kl_old"), ("train", "kl"))),
    Figure("KL to reference", "nats per token (k3), mean over updates", (("train", "kl_reference"),)),
    Figure("clip share", "share of tokens whose ratio is clipped", (("train", "clip_share"), ("train", "gate_share"))),
    Figure("gradient norm", "before clipping, mean over updates", (("train", "grad_norm"),)),
    Figure("engine gap", "nats, |engine - trainer| log-prob per token", (("train", "gap_mean"),)),
    Figure("loss", "mean over updates", (("train", "loss"),)),
    Figure("critic's loss", "mean over updates", (("train", "loss/value"),)),
    Figure("critic", "share of the value targets' variance that it explains", (("train", "value_explained"),)),
    Figure("missing groups", "groups short of the prompt batch after all passes", (("curate", "groups_missing"),)),
)
OPTIONAL = {"KL to reference", "clip share", "engine gap", "critic's loss", "critic", "missing groups"}
"""Curves that some methods do not have: nothing is said where they are missing."""


def read(results: Path) -> list[Run]:
    """Every run that has a folder with rounds or a run.json, sorted by name and seed."""
    infos = read_runs(results)
    with_rounds = {path.parent.name for path in results.glob("*/r[0-9][0-9][0-9][0-9]")}
    runs = [_run(run, infos.get(run, {})) for run in sorted({*infos, *with_rounds})]
    return sorted(runs, key=lambda run: (run.name, run.seed, run.run))


def _run(run: str, info: dict[str, Any]) -> Run:
    base, _, seed = run.rpartition("-s")
    guessed = (base, int(seed)) if base and seed.isdigit() else (run, 0)
    return Run(run, str(info.get("name") or guessed[0]), int(info.get("seed", guessed[1])), info)


def curves(points: Points, runs: Sequence[Run]) -> list[Curve]:
    """The curves that have at least one point. Training figures are means over the round's updates."""
    known = {run.run for run in runs}
    figures = [*FIGURES[:1], *_more_evaluations(points), *FIGURES[1:]]
    found = []
    for figure in figures:
        series: dict[str, list[Point]] = {}
        for name in reversed(figure.names):
            series |= {run: values for run, values in points.get(name, {}).items() if run in known}
        if series:
            found.append(Curve(figure.title, figure.note, series))
    return found


def missing(curves: Sequence[Curve]) -> list[str]:
    """Titles of the standard curves that have no point yet."""
    have = {curve.title for curve in curves}
    return [figure.title for figure in FIGURES if figure.title not in have and figure.title not in OPTIONAL]


def _more_evaluations(points: Points) -> list[Figure]:
    """pass@k for the largest k and maj@k, as far as they were asked for."""
    names = sorted((int(name.split("@")[1]), name) for stage, name in points if stage == "evaluate" and "@" in name)
    largest = {name.split("@")[0]: name for k, name in names if k > 1}
    notes = {"pass": "one of k samples is right", "maj": "the majority of k samples is right"}
    return [
        Figure(f"held-out {largest[kind]}", note, (("evaluate", largest[kind]),))
        for kind, note in notes.items()
        if kind in largest
    ]


def read_points(catalog: duckdb.DuckDBPyConnection) -> tuple[Points, list[str]]:
    """Every metric by run and round, the mean over a round's steps; and the names of metrics that have no finite value
    in some round, for example the mean of nothing."""
    rows = ask(
        catalog,
        """SELECT stage, name, run, round, avg(value ORDER BY step) FILTER (isfinite(value)) FROM seen_metrics
        GROUP BY ALL ORDER BY ALL""",
    )
    values = {(s, name.removeprefix(f"{s}/"), run, round): value for s, name, run, round, value in rows}
    points: Points = defaultdict(dict)
    empty = set()
    for (stage, name, run, round), value in values.items():
        if value is None:
            empty.add(name)
        elif not name.endswith(("/low", "/high")):
            ends = [values.get((stage, f"{name}/{end}", run, round)) for end in ("low", "high")]
            points[stage, name].setdefault(run, []).append(Point(round, value, *ends))
    return points, sorted(empty)


def mean_over_seeds(runs: Sequence[Run], series: dict[str, list[Point]]) -> dict[str, list[Point]]:
    """Run name -> mean over its seeds in rounds that all of them have reached; low and high are the extreme seeds.

    With one seed the points keep their own intervals.
    """
    means: dict[str, list[Point]] = {}
    for name in sorted({run.name for run in runs}):
        seeds = [series[run.run] for run in runs if run.name == name and series.get(run.run)]
        if len(seeds) == 1:
            means[name] = seeds[0]
        elif seeds:
            by_round = [{point.round: point.value for point in points} for points in seeds]
            shared = sorted(set.intersection(*(set(values) for values in by_round)))
            at = {round: [values[round] for values in by_round] for round in shared}
            means[name] = [Point(r, math.fsum(v) / len(v), min(v), max(v)) for r, v in at.items()]
    return {name: points for name, points in means.items() if points}
