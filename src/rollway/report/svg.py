"""Line charts as SVG text: small, static, coloured by CSS variables so that they follow light and dark."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from rollway.report.data import Point

COLOURS = 8
Place = Callable[[float], str]
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 8, 26


@dataclass(frozen=True)
class Line:
    """One line: its label, colour number, points, and whether it is drawn thin (a seed behind its mean)."""

    label: str
    colour: int
    points: list[Point]
    thin: bool = False


def chart(lines: Sequence[Line], width: int = 340, height: int = 190) -> str:
    """An SVG element with axes, bands where points have intervals, lines, and a tooltip per point."""
    values = [v for line in lines for p in line.points for v in (p.value, p.low, p.high) if v is not None]
    rounds = [p.round for line in lines for p in line.points]
    if not values:
        return ""
    ticks = nice_ticks(min(values), max(values))
    x0, x1 = min(rounds), max(max(rounds), min(rounds) + 1)

    def x(round: float) -> str:
        return _n(_LEFT + (round - x0) / (x1 - x0) * (width - _LEFT - _RIGHT))

    def y(value: float) -> str:
        share = (value - ticks[0]) / (ticks[-1] - ticks[0])
        return _n(height - _BOTTOM - share * (height - _TOP - _BOTTOM))

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" xmlns="http://www.w3.org/2000/svg">']
    parts += [
        f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y(tick)}" y2="{y(tick)}"/>'
        f'<text class="tick" x="{_LEFT - 5}" y="{y(tick)}" dy="3.5" text-anchor="end">{tick:.4g}</text>'
        for tick in ticks
    ]
    parts += [
        f'<text class="tick" x="{x(tick)}" y="{height - 9}" text-anchor="middle">{tick}</text>'
        for tick in round_ticks(x0, x1)
    ]
    parts += [_band(line, x, y) for line in lines]
    parts += [_path(line, x, y) for line in sorted(lines, key=lambda line: not line.thin)]
    return "".join([*parts, "</svg>"])


def _band(line: Line, x: Place, y: Place) -> str:
    ends = [(p.round, p.low, p.high) for p in line.points if p.low is not None and p.high is not None]
    if line.thin or len(ends) < 2:
        return ""
    corners = [f"{x(r)},{y(high)}" for r, _, high in ends] + [f"{x(r)},{y(low)}" for r, low, _ in reversed(ends)]
    return f'<polygon class="band c{line.colour}" points="{" ".join(corners)}"/>'


def _path(line: Line, x: Place, y: Place) -> str:
    corners = " ".join(f"{x(p.round)},{y(p.value)}" for p in line.points)
    kind = "seed" if line.thin else "mean"
    drawn = f'<polyline class="line {kind} c{line.colour}" points="{corners}"/>'
    if line.thin:
        return drawn
    return drawn + "".join(
        f'<circle class="dot c{line.colour}" cx="{x(p.round)}" cy="{y(p.value)}" r="2.4">'
        f"<title>{escape(line.label)}, round {p.round}: {p.value:.4g}{_interval(p)}</title></circle>"
        for p in line.points
    )


def _interval(point: Point) -> str:
    return "" if point.low is None or point.high is None else f" [{point.low:.4g}, {point.high:.4g}]"


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that enclose [low, high], about `count` steps apart."""
    if high - low < 1e-12 * max(abs(low), abs(high), 1e-300):
        pad = abs(low) * 0.1 or 0.5
        low, high = low - pad, high + pad
    raw = (high - low) / count
    base = 10.0 ** math.floor(math.log10(raw))
    step = next(base * m for m in (1, 2, 2.5, 5, 10) if base * m >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) if step > 1e-9 else i * step for i in range(first, last + 1)]


def round_ticks(first: int, last: int, count: int = 6) -> list[int]:
    """Whole rounds, evenly spaced, at most about `count`."""
    step = max(1, math.ceil((last - first) / count))
    for nice in (1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500, 1000):
        if nice >= step:
            step = nice
            break
    return list(range(math.ceil(first / step) * step, last + 1, step))


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
