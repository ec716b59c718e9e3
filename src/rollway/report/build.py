"""The HTML report: one file, no network, no script."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from rollway.report import data, svg, table
from rollway.report import samples as shown
from rollway.store.atomic import write_text
from rollway.store.catalog import open_catalog


def build(results: Path, out: Path, *, title: str = "rollway", logs: Path | None = None) -> None:
    """Writes the report of a results folder, empty and unfinished ones included: what is missing is said on the page.

    `logs`: folder with the stages' `*.usage.json`; with it the page also says where time went (and its bytes then
    depend on the machine; without it the same results give the same bytes). Model output is escaped and the page runs
    no script.
    """
    from jinja2 import Environment, StrictUndefined

    runs = data.read(results)
    with open_catalog(results) as catalog:
        curves = data.curves(catalog, runs)
        rows = table.before_after(catalog, runs)
        samples = shown.samples(catalog, runs)
    colours = _colours(runs)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["signed"] = lambda value: "" if value is None else f"{value:+.3f}"
    environment.filters["short"] = lambda value: "" if value is None else f"{value:.4g}"
    environment.filters["visible"] = visible
    page = environment.from_string(_asset("page.html.j2")).render(
        title=title,
        style=_asset("style.css"),
        chart_style=_asset("chart.css"),
        runs=runs,
        names=list(colours.items()),
        panels=[(curve, _panel(curve, runs, colours)) for curve in curves],
        rows=[(table.cells_of(row), row.recipe, colours[row.name]) for row in rows],
        samples=samples,
        shown_runs=[run for run in runs if run.run in samples],
        configs=[(run, yaml.safe_dump(run.info["config"], sort_keys=True)) for run in runs if run.info.get("config")],
        times=data.stage_times(logs),
        notices=_notices(runs, curves, rows, samples),
        limits={"groups": shown.GROUPS_PER_ROUND, "rounds": shown.MAX_ROUNDS, "runs": shown.MAX_RUNS},
    )
    write_text(out, page)


def curves_svg(results: Path, out: Path, titles: tuple[str, ...] = ("held-out pass@1", "reward")) -> None:
    """Writes one SVG picture with the named curves side by side, for a README: static, and right in light and dark."""
    runs = data.read(results)
    with open_catalog(results) as catalog:
        curves = [curve for curve in data.curves(catalog, runs) if curve.title in titles]
    colours = _colours(runs)
    width, height = 360, 270
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width * max(1, len(curves))} {height}" '
        f'font-family="system-ui, sans-serif"><style>{_asset("chart.css")}</style>'
        '<rect class="page" width="100%" height="100%"/>'
    ]
    for number, curve in enumerate(curves):
        inner = svg.chart(_lines(curve, runs, colours), width - 20, 200).removeprefix("<svg ")
        parts.append(f'<text class="title" x="{number * width + 14}" y="24">{visible(curve.title)}</text>')
        parts.append(f'<svg x="{number * width + 6}" y="36" width="{width - 20}" height="200" {inner}')
    for number, (name, colour) in enumerate(colours.items()):
        x = 14 + number * 130
        parts.append(
            f'<line class="line mean c{colour}" x1="{x}" x2="{x + 18}" y1="{height - 16}" y2="{height - 16}"/>'
        )
        parts.append(f'<text class="tick" x="{x + 24}" y="{height - 12}">{visible(name)}</text>')
    write_text(out, "".join([*parts, "</svg>\n"]))


def visible(text: Any) -> Any:
    """Escapes HTML and makes control characters visible, so that model output is inert and nothing in it hides."""
    from markupsafe import Markup, escape

    safe = "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in str(text))
    return Markup(escape(safe))


def _asset(name: str) -> str:
    return (files("rollway.report") / name).read_text(encoding="utf-8")


def _colours(runs: list[data.Run]) -> dict[str, int]:
    return {name: i % svg.COLOURS for i, name in enumerate(dict.fromkeys(run.name for run in runs))}


def _lines(curve: data.Curve, runs: list[data.Run], colours: dict[str, int]) -> list[svg.Line]:
    means = data.mean_over_seeds(runs, curve.series)
    seeds = [
        svg.Line(run.run, colours[run.name], curve.series[run.run], thin=True)
        for run in runs
        if run.run in curve.series and means.get(run.name) is not curve.series[run.run]
    ]
    return [*seeds, *(svg.Line(name, colours[name], points) for name, points in means.items())]


def _panel(curve: data.Curve, runs: list[data.Run], colours: dict[str, int]) -> Any:
    from markupsafe import Markup

    return Markup(svg.chart(_lines(curve, runs, colours)))


def _notices(
    runs: list[data.Run], curves: list[data.Curve], rows: list[table.Row], samples: dict[str, list[shown.Group]]
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
    behind = [run.run for run in runs if _unfinished(run, curves)]
    if behind:
        notices.append(f"Not all rounds of their config are there (running, failed or stopped): {', '.join(behind)}.")
    without = [run.run for run in runs[: shown.MAX_RUNS] if run.run not in samples]
    if without:
        notices.append(f"No rollouts yet: {', '.join(without)}.")
    if len(runs) > shown.MAX_RUNS:
        notices.append(f"Rollouts are shown of the first {shown.MAX_RUNS} of {len(runs)} runs; `rollway sql` has all.")
    return notices


def _unfinished(run: data.Run, curves: list[data.Curve]) -> bool:
    rounds = run.info.get("rounds")
    reached = {point.round for curve in curves for point in curve.series.get(run.run, [])}
    return rounds is not None and max(reached, default=-1) < int(rounds)
