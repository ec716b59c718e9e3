"""The HTML report: one file, no network. What it shows is read and counted here; scripts in it only draw."""

import html
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import duckdb

from rollway.report import bundle, compact, data, facts, health, heldout, rollouts, structure, table, usage
from rollway.report.pack import pack
from rollway.report.pieces import Pieces
from rollway.report.text import colours_of, visible
from rollway.runtime import status
from rollway.store.atomic import write_text
from rollway.store.catalog import with_catalog


def build(results: Path, out: Path, *, title: str = "rollway", logs: Path | None = None) -> None:
    """Writes the report of a results folder, empty and unfinished ones included: what is missing is said on the page.

    `logs`: folder with the stages' `*.usage.json`; with it the page also says where time went (and its bytes then
    depend on the machine; without it the same results give the same bytes).
    """
    write_text(out, render(results, title=title, logs=logs))


def title_of(results: Path) -> str:
    """The title of the report that is there; `rollway` where there is none."""
    page = results / "report.html"
    if not page.is_file():
        return "rollway"
    with page.open(encoding="utf-8", errors="replace") as file:
        found = re.search("<title>(.*?)</title>", file.read(4096))
    return html.unescape(found[1]) if found else "rollway"


def render(results: Path, *, title: str = "rollway", logs: Path | None = None, live: bool = False) -> str:
    """The page as text. `live`: it asks the server that it came from whether there is something new."""
    from jinja2 import Environment, StrictUndefined

    runs = data.read(results)
    jobs = usage.read_jobs(logs, {run.run for run in runs})
    summary, parts, rows = with_catalog(results, lambda catalog: _gather(catalog, results, runs, jobs))
    colours = colours_of(runs)
    summary |= {"title": title, "live": live, "colours": colours}
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["visible"] = visible
    return environment.from_string((files("rollway.report") / "page.html.j2").read_text(encoding="utf-8")).render(
        title=title,
        live=live,
        runs=runs,
        colours=colours,
        style=bundle.styles(),
        script=bundle.script(),
        script_hash=bundle.script_hash(),
        rows=[(table.cells_of(row), row.recipe, colours[row.name]) for row in rows],
        notices=summary["notices"],
        summary=pack(summary),
        parts=[(name, pack(part)) for name, part in parts.items()],
    )


def _gather(
    catalog: duckdb.DuckDBPyConnection, results: Path, runs: list[data.Run], jobs: list[usage.Job]
) -> tuple[dict[str, Any], dict[str, Any], list[table.Row]]:
    """What every view needs at once; rollouts by run, which the page reads when they are asked for; the table."""
    known = facts.collect(catalog, runs)
    points, not_numbers = data.read_points(catalog)
    tokens = facts.tokens_by_round(catalog)
    curves = [
        *data.curves(points, runs),
        *_counted("tokens", "sampled in the round", runs, tokens),
        *_counted("seconds", "wall time of the round's jobs, evaluation included", runs, usage.seconds_by_round(jobs)),
    ]
    chosen = rollouts.pick(catalog, runs, known)
    heldout.collect(catalog)
    counts = heldout.counts(catalog, runs)
    rows = table.before_after(catalog, runs, counted="counted")
    shown = rollouts.read(catalog, results, known)
    samples = heldout.samples(catalog, chosen or [run.run for run in runs[: rollouts.MAX_RUNS]], counts["points"])
    parts = _parts(runs, shown, samples, Pieces(results))
    in_full = {prompt for each in (*shown.values(), *samples.values()) for prompt in each.prompts}
    stages = status.stages_of_folder(results, [run.run for run in runs])
    gaps = {run: words for run, of_run in stages.items() if (words := status.missing(of_run))}
    summary = {
        "runs": [_run(run, known, shown.get(run.run), samples.get(run.run)) for run in runs],
        "curves": compact.curves(curves),
        "metrics": compact.metrics(points, runs),
        "heldout": counts,
        "prompts": compact.prompts(catalog, in_full, counts["prompts"]),
        "health": [_check(check) for check in health.check(catalog, runs, points, known, gaps)],
        "jobs": compact.jobs(jobs),
        "totals": [
            [t.stage, t.jobs, round(t.seconds, 3), round(t.cpu_seconds, 3), t.peak_mb] for t in usage.totals(jobs)
        ],
        "tokens": [[run, r, count] for (run, r), count in tokens.items()],
        "rules": structure.RULES,
        "forks": structure.forks(runs),
        "configs": {run.run: structure.flat(run.info["config"]) for run in runs if run.info.get("config")},
        "differences": structure.differences(runs),
        "notices": _notices(runs, curves, rows, shown, gaps, not_numbers),
        "limits": _limits(known, shown, samples, counts),
    }
    return summary, parts, rows


def _counted(title: str, note: str, runs: Sequence[data.Run], counts: dict[tuple[str, int], Any]) -> list[data.Curve]:
    series: dict[str, list[data.Point]] = {}
    for (run, round), value in sorted(counts.items()):
        series.setdefault(run, []).append(data.Point(round, float(value)))
    series = {run.run: series[run.run] for run in runs if run.run in series}
    return [data.Curve(title, note, series)] if series else []


def _run(
    run: data.Run, known: facts.Facts, shown: rollouts.Shown | None, samples: rollouts.Shown | None
) -> dict[str, Any]:
    info = run.info
    return {
        "run": run.run,
        "name": run.name,
        "seed": run.seed,
        **{key: info.get(key) for key in ("recipe", "title", "task", "rounds", "parent", "fork_round", "fork_stage")},
        "has": known.rounds.get(run.run, []),
        "rollouts": sorted(set(shown.columns["round"])) if shown else [],
        "samples": sorted(set(samples.columns["round"])) if samples else [],
    }


def _parts(
    runs: Sequence[data.Run], shown: dict[str, rollouts.Shown], samples: dict[str, rollouts.Shown], pieces: Pieces
) -> dict[str, Any]:
    found = {}
    for run in runs:
        both = {"rollouts": shown.get(run.run), "samples": samples.get(run.run)}
        there = {name: each for name, each in both.items() if each is not None}
        if there:
            ids = {token for each in there.values() for token in each.token_ids}
            rounds = {round for each in there.values() for round in each.columns["round"]}
            part: dict[str, Any] = {name: each.columns for name, each in there.items()}
            found[run.run] = part | {"pieces": pieces.of(run.run, run.info, rounds, ids)}
    return found


def _check(check: health.Check) -> dict[str, Any]:
    verdicts = [[v.run, v.level, v.text] for v in check.verdicts]
    return {
        "title": check.title,
        "meaning": check.meaning,
        "level": check.level,
        "verdicts": verdicts,
        "unknown": check.unknown,
    }


def _limits(
    known: facts.Facts, shown: dict[str, rollouts.Shown], samples: dict[str, rollouts.Shown], counts: dict[str, Any]
) -> dict[str, Any]:
    of_all = sum(len(each.columns["id"]) for each in shown.values())
    return {
        "rollouts": known.rollouts,
        "shown": of_all,
        "samples": sum(len(each.columns["prompt"]) for each in samples.values()),
        "asked": counts["asked"],
        "prompts": len(counts["prompts"]),
        "head": rollouts.HEAD,
        "tail": rollouts.TAIL,
        "group": rollouts.MAX_GROUP,
        "unknown": rollouts.UNKNOWN,
    }


def _notices(
    runs: list[data.Run],
    curves: list[data.Curve],
    rows: list[table.Row],
    shown: dict[str, rollouts.Shown],
    gaps: dict[str, str],
    not_numbers: list[str],
) -> list[str]:
    """What is not there, in words."""
    if not runs:
        return ["This results folder holds no run yet."]
    notices = []
    absent = data.missing(curves)
    if absent:
        notices.append(f"No figures yet for: {', '.join(absent)}.")
    if not rows:
        notices.append("No evaluation has finished yet, so there is no before and after.")
    if gaps:
        behind = [f"{run} ({words})" for run, words in gaps.items()]
        notices.append(f"Not all rounds are there (running, failed or stopped); missing are: {_list(behind)}.")
    without = [run.run for run in runs if run.run not in shown]
    if without and len(without) < len(runs) and len(runs) > rollouts.MAX_RUNS:
        notices.append(f"Rollouts are shown of {len(shown)} of {len(runs)} runs; `rollway sql` has all.")
    elif without:
        notices.append(f"No rollouts yet: {_list(without)}.")
    if not_numbers:
        notices.append(f"Metrics without a number in some round (of nothing, or not finite): {_list(not_numbers)}.")
    return notices


def _list(names: Sequence[str], most: int = 12) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
