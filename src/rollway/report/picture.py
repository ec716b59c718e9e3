"""Learning curves as one static SVG picture, for a README."""

from importlib.resources import files
from pathlib import Path

from rollway.report import data, svg
from rollway.report.text import colours_of, visible
from rollway.store.atomic import write_text
from rollway.store.catalog import with_catalog


def curves_svg(results: Path, out: Path, titles: tuple[str, ...] = ("held-out pass@1", "reward")) -> None:
    """Writes the named curves side by side: static, and right in light and dark."""
    runs = data.read(results)
    points, _ = with_catalog(results, data.read_points)
    curves = [curve for curve in data.curves(points, runs) if curve.title in titles]
    colours = colours_of(runs)
    style = (files("rollway.report") / "chart.css").read_text(encoding="utf-8")
    width, height = 360, 270
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width * max(1, len(curves))} {height}" '
        f'font-family="system-ui, sans-serif"><style>{style}</style>'
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


def _lines(curve: data.Curve, runs: list[data.Run], colours: dict[str, int]) -> list[svg.Line]:
    means = data.mean_over_seeds(runs, curve.series)
    seeds = [
        svg.Line(run.run, colours[run.name], curve.series[run.run], thin=True)
        for run in runs
        if run.run in curve.series and means.get(run.name) is not curve.series[run.run]
    ]
    return [*seeds, *(svg.Line(name, colours[name], points) for name, points in means.items())]
