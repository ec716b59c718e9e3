"""Comparisons as text and as SVG pictures."""

from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING

from rollway.comparison.runs import CONFIDENCE, RunComparison, learning_curve
from rollway.printable import printable
from rollway.report import svg
from rollway.report.data import Point

if TYPE_CHECKING:
    from rollway.comparison.filters import FilterComparison
    from rollway.comparison.gradients import GradientComparison, Measured


def runs_table(comparison: RunComparison) -> str:
    """Aligned text: one line per run and k, under a sentence that says what the numbers are."""
    header = ["run", "seeds", "round", "pass@k", "", "interval", "difference", "interval", "p", "tokens", "seconds", ""]
    lines = [header]
    for o in comparison.outcomes:
        paired = o.difference is not None
        lines.append(
            [
                o.name,
                str(o.seeds),
                str(o.round),
                f"pass@{o.k}",
                f"{o.value:.3f}",
                f"[{o.low:.3f}, {o.high:.3f}]",
                f"{o.difference:+.3f}" if paired else "-",
                f"[{o.difference_low:+.3f}, {o.difference_high:+.3f}]" if paired else "-",
                "-" if o.p_holm is None else f"{o.p_holm:.2g}",
                "unknown" if o.tokens_per_seed is None else f"{o.tokens_per_seed:,.0f}",
                "unknown" if o.seconds_per_seed is None else f"{o.seconds_per_seed:,.0f}",
                o.verdict + (f" ({o.note})" if o.note else ""),
            ]
        )
    count = sum(o.p_holm is not None for o in comparison.outcomes)
    share = f"{100 * CONFIDENCE:g} %"
    text = [
        f"final held-out pass@k; intervals: {share}, bootstrap over seeds and prompts; tokens and seconds per seed",
        aligned(lines),
    ]
    if comparison.baseline is None:
        text.append("no baseline: name one with --baseline RUN to see paired differences")
    else:
        text.append(
            f"difference: from {comparison.baseline} on the same prompts and seeds; p: the larger of bootstrap and "
            f"t-test over seeds, Holm-corrected for {count} comparison{'' if count == 1 else 's'}"
        )
    text += [f"left out: {sentence}" for sentence in comparison.left_out]
    return "\n".join(text)


def curves_svg(comparison: RunComparison) -> str:
    """Learning curves of every run, a panel per k, with intervals over seeds and prompts as bands."""
    panels = {}
    for k in comparison.ks:
        panels[f"held-out pass@{k}"] = [
            svg.Line(c.name, i % svg.COLOURS, [Point(r, v.value, v.low, v.high) for r, v in learning_curve(c, k)])
            for i, c in enumerate(comparison.contenders)
        ]
    return panels_svg(panels)


def panels_svg(panels: Mapping[str, Sequence[svg.Line]]) -> str:
    """Charts side by side under their titles, with one legend: each has the same lines in the same order."""
    width, panel_height = 380, 210
    names = [line.label for line in next(iter(panels.values()))]
    per_row = max(1, width * len(panels) // 150)
    height = 250 + 18 * -(-len(names) // per_row)
    parts = [_open(width * len(panels), height), f"<style>{_chart_style()}</style>"]
    parts.append('<rect class="page" width="100%" height="100%"/>')
    for column, (title, lines) in enumerate(panels.items()):
        inner = svg.chart(lines, width - 20, panel_height).removeprefix("<svg ")
        parts.append(f'<text class="title" x="{column * width + 14}" y="24">{_safe(title)}</text>')
        parts.append(f'<svg x="{column * width + 6}" y="34" width="{width - 20}" height="{panel_height}" {inner}')
    for i, name in enumerate(names):
        x, y = 14 + 150 * (i % per_row), 262 + 18 * (i // per_row)
        colour = i % svg.COLOURS
        parts.append(f'<line class="line mean c{colour}" x1="{x}" x2="{x + 18}" y1="{y - 4}" y2="{y - 4}"/>')
        parts.append(f'<text class="tick" x="{x + 24}" y="{y}">{_safe(name)}</text>')
    return "".join([*parts, "</svg>\n"])


def gradients_table(comparison: "GradientComparison") -> str:
    """Aligned text: a line per recipe, the cosine matrix, and what was left out and why."""
    header = ["recipe", "norm", "rows used", "tokens used", "gated", "effective tokens", "ess", "loss"]
    lines = [header, *(_cells(name, m) for name, m in comparison.measured.items())]
    names = list(comparison.measured)
    numbers = {name: str(i + 1) for i, name in enumerate(names)}
    matrix = [["cosine", *numbers.values()]]
    matrix += [[f"{numbers[a]} {a}", *(_cosine(comparison.cosine[a, b]) for b in names)] for a in names]
    policy = "its policy" if comparison.at == "same" else f"the policy of round {comparison.round + 1}"
    text = [f"gradients on the rollouts of {comparison.run}, round {comparison.round}, at {policy}"]
    if names:
        text += [aligned(lines), "", aligned(matrix)]
    text += [f"left out: {name}: {printable(reason)}" for name, reason in comparison.reasons.items()]
    return "\n".join(text)


def filters_table(comparison: "FilterComparison") -> str:
    """Aligned text: a line per filter, what was left out and why, and the choice."""
    lines = [["filter", "R2", "slope", "intercept", "bins", "rows", "E[reward]", "E[truth]", "keeps negatives"]]
    for one in comparison.filters:
        fit = comparison.fits.get(one.name)
        if fit is not None:
            numbers = (fit.line.r2, fit.line.slope, fit.line.intercept)
            means = (fit.mean_reward, fit.mean_truth)
            kept = [str(fit.bins), str(fit.rows)]
            told = "yes" if one.keeps_negatives else "no"
            lines.append([one.name, *(f"{x:.3f}" for x in numbers), *kept, *(f"{x:.3f}" for x in means), told])
    c = comparison
    rounds = f"round{'' if len(c.rounds) == 1 else 's'} {', '.join(map(str, c.rounds))}"
    buffer = f"{c.run}, {rounds}, {c.rollouts} rollouts of {c.groups} groups"
    text = [f"line of {c.truth} on {c.reward} in {c.bins} bins: {buffer}", aligned(lines)]
    if c.failed:
        text.append(f"a scorer failed on {c.failed} rollouts, which count with the score 0")
    text += [f"left out: {name}: {printable(reason)}" for name, reason in c.reasons.items()]
    if c.chosen is None:
        text.append("chosen: none of those that could be fitted keeps negatives")
    else:
        given = ", ".join(f"{k}: {v}" for one in c.filters if one.name == c.chosen for k, v in one.weight.items())
        text.append(f"chosen: {c.chosen}, the largest R2 of those that keep negatives; curate.weight: {{{given}}}")
    return "\n".join(text)


def heat_map(comparison: "GradientComparison") -> str:
    """The cosine matrix as coloured cells: blue 1, white 0, red -1, grey where a gradient is 0."""
    names, size = list(comparison.measured), 46
    left = 14 + 7 * max((len(name) for name in names), default=0)
    top = 44 + 6 * max((len(name) for name in names), default=0)
    title = f"cosine of gradients, {comparison.run}, round {comparison.round}"
    parts = [_open(max(left + size * len(names) + 60, 8 * len(title) + 16), top + size * len(names) + 16)]
    parts.append('<rect width="100%" height="100%" fill="#fff"/>')
    parts.append(f'<text x="8" y="20" font-size="13" font-weight="600" fill="#1c2024">{_safe(title)}</text>')
    for i, a in enumerate(names):
        middle = size * i + size / 2
        parts.append(_label(a, left - 6, top + middle + 4, "end"))
        x, y = left + middle, top - 6
        parts.append(f'<g transform="rotate(-50 {x:g} {y:g})">{_label(a, x, y, "start")}</g>')
        for j, b in enumerate(names):
            value = comparison.cosine[a, b]
            x, y = left + size * j, top + size * i
            ink = "#fff" if value is not None and abs(value) > 0.6 else "#1c2024"
            parts.append(
                f'<rect x="{x}" y="{y}" width="{size - 1}" height="{size - 1}" fill="{colour(value)}">'
                f"<title>{_safe(a)} and {_safe(b)}: {_cosine(value)}</title></rect>"
                f'<text x="{x + size / 2:g}" y="{y + size / 2 + 4:g}" font-size="11" text-anchor="middle" '
                f'fill="{ink}" pointer-events="none">{_cosine(value)}</text>'
            )
    return "".join([*parts, "</svg>\n"])


def colour(cosine: float | None) -> str:
    """From red (-1) over white (0) to blue (1)."""
    if cosine is None:
        return "#d5d9dd"
    end = (11, 111, 184) if cosine > 0 else (179, 48, 44)
    mixed = [round(255 + (channel - 255) * min(1.0, abs(cosine))) for channel in end]
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell, a rule under the first line."""
    cells = [[printable(cell) for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * width for width in widths]
    shown = [cells[0], rule, *cells[1:]]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in shown)


def _cells(name: str, m: "Measured") -> list[str]:
    return [
        name,
        f"{m.norm:.4g}",
        f"{m.rows_used} of {m.rows}",
        f"{m.tokens_used} of {m.tokens}",
        "-" if m.gated is None else f"{100 * m.gated:.1f} %",
        f"{m.effective_tokens:.1f}",
        "-" if m.ess is None else f"{m.ess:.3f}",
        f"{m.loss:.4g}",
    ]


def _cosine(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _label(text: str, x: float, y: float, anchor: str) -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="11" text-anchor="{anchor}" fill="#1c2024">{_safe(text)}</text>'


def _open(width: float, height: float) -> str:
    size = f'width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="system-ui, sans-serif">'


def _chart_style() -> str:
    return (files("rollway.report") / "chart.css").read_text(encoding="utf-8")


def _safe(text: str) -> str:
    return escape(printable(text))
