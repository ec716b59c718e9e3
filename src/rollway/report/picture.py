"""Learning curves as one static SVG picture, for a README or a tracking server."""

from collections.abc import Collection
from importlib.resources import files
from pathlib import Path

from rollway.report import data, svg
from rollway.report.text import colours_of, visible
from rollway.store.atomic import write_text
from rollway.store.catalog import with_catalog

WIDTH, HEIGHT, LEGEND = 360, 240, 30
"""Of one curve, and of the line of names below them."""


def curves_svg(results: Path, out: Path, titles: tuple[str, ...] = ("held-out pass@1", "reward")) -> None:
    """Writes the named curves of all runs side by side: static, and right in light and dark."""
    runs = data.read(results)
    points, _ = with_catalog(results, data.read_points)
    curves = [curve for curve in data.curves(points, runs) if curve.title in titles]
    write_text(out, _drawn(curves, runs, colours_of(runs), len(titles)))


def curves_of(results: Path, wanted: Collection[str]) -> str:
    """All standard curves of some runs, three in a row; empty where they have no figure yet.

    With a size of its own: MLflow's page shows a picture without one 0 pixels wide.
    """
    everyone = data.read(results)
    runs = [run for run in everyone if run.run in wanted]
    points, _ = with_catalog(results, data.read_points, of=wanted)
    curves = data.curves(points, runs)
    colours = {name: colour for name, colour in colours_of(everyone).items() if name in {run.name for run in runs}}
    return _drawn(curves, runs, colours, 3, sized=True) if curves else ""


def _drawn(
    curves: list[data.Curve], runs: list[data.Run], colours: dict[str, int], columns: int, *, sized: bool = False
) -> str:
    style = (files("rollway.report") / "chart.css").read_text(encoding="utf-8")
    wide = max(1, min(columns, len(curves)))
    high = max(1, -(-len(curves) // wide)) * HEIGHT + LEGEND
    size = f'width="{WIDTH * wide}" height="{high}" ' if sized else ""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}viewBox="0 0 {WIDTH * wide} {high}" '
        f'font-family="system-ui, sans-serif"><style>{style}</style>'
        '<rect class="page" width="100%" height="100%"/>'
    ]
    for number, curve in enumerate(curves):
        left, top = number % wide * WIDTH, number // wide * HEIGHT
        inner = svg.chart(_lines(curve, runs, colours), WIDTH - 20, 200).removeprefix("<svg ")
        parts.append(f'<text class="title" x="{left + 14}" y="{top + 24}">{visible(curve.title)}</text>')
        parts.append(f'<svg x="{left + 6}" y="{top + 36}" width="{WIDTH - 20}" height="200" {inner}')
    for number, (name, colour) in enumerate(colours.items()):
        x = 14 + number * 130
        parts.append(f'<line class="line mean c{colour}" x1="{x}" x2="{x + 18}" y1="{high - 16}" y2="{high - 16}"/>')
        parts.append(f'<text class="tick" x="{x + 24}" y="{high - 12}">{visible(name)}</text>')
    return "".join([*parts, "</svg>\n"])


def _lines(curve: data.Curve, runs: list[data.Run], colours: dict[str, int]) -> list[svg.Line]:
    means = data.mean_over_seeds(runs, curve.series)
    seeds = [
        svg.Line(run.run, colours[run.name], curve.series[run.run], thin=True)
        for run in runs
        if run.run in curve.series and means.get(run.name) is not curve.series[run.run]
    ]
    return [*seeds, *(svg.Line(name, colours[name], points) for name, points in means.items())]
