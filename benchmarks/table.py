"""Writes docs/benchmarks.md's tables from history.jsonl: the latest result of every case, and how each moved."""

import json
from pathlib import Path
from typing import Any

HISTORY = Path(__file__).parent / "history.jsonl"
PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
BEGIN, END = "<!-- results: written by benchmarks/run.py -->", "<!-- end of results -->"


def write() -> None:
    """Replaces what stands between the two marks of the page."""
    PAGE.write_text(page())


def page() -> str:
    """The page as it should be."""
    before, rest = PAGE.read_text().split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{render(history())}\n{END}{after}"


def history() -> list[dict[str, Any]]:
    """Every recorded result, oldest first."""
    return [json.loads(row) for row in HISTORY.read_text().splitlines()] if HISTORY.exists() else []


def render(rows: list[dict[str, Any]]) -> str:
    """One table per machine, then the figures over time."""
    latest: dict[tuple[str, ...], dict[str, Any]] = {}
    over_time: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = (row["machine"], row["bench"], row["case"], row["peer"])
        latest[key] = row
        over_time.setdefault(key, []).append(row)
    parts = []
    for machine in dict.fromkeys(key[0] for key in latest):
        mine = [row for key, row in latest.items() if key[0] == machine]
        parts += [f"### {machine}", "", *_latest(mine), ""]
    if over_time:
        parts += ["### Figures over time", "", *_history(over_time), ""]
    return "\n".join(parts)


def _latest(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| bench | case | ours | peer | figure (range) | bar [goal] | reached | commit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    notes: list[str] = []
    for row in rows:
        peer = f"{row['peer']}: {_cost(row['theirs']['median'], row['unit'])}" if row["theirs"] else ""
        low, high = row["range"]
        figure = f"{row['figure']:.3g} ({low:.3g} to {high:.3g})"
        figure += " x" if row["theirs"] else f" {row['unit']}"
        bar = (
            "" if row["bar"] is None else row["bar"] + ("" if row["goal"] is None else f" [{row['goal'].split()[-1]}]")
        )
        mark = ""
        if row["note"]:
            notes = notes if row["note"] in notes else [*notes, row["note"]]
            mark = f" ({notes.index(row['note']) + 1})"
        lines.append(
            f"| `{row['bench']}` | {row['case']}{mark} | {_cost(row['ours']['median'], row['unit'])} | {peer} |"
            f" {figure} | {bar} | {_verdict(row)} | {_commit(row)} |"
        )
    versions = ", ".join(f"{name} {number}" for name, number in rows[-1]["versions"].items())
    return [*lines, "", *(f"{n}. {note}" for n, note in enumerate(notes, 1)), "", f"With {versions}."]


def _history(over_time: dict[tuple[str, ...], list[dict[str, Any]]]) -> list[str]:
    lines = ["| bench | case | peer | figures: date, commit |", "|---|---|---|---|"]
    for (_, bench, case, peer), rows in over_time.items():
        figures = "; ".join(f"{row['figure']:.3g} ({row['date']}, {_commit(row)})" for row in rows)
        lines.append(f"| `{bench}` | {case} | {peer} | {figures} |")
    return lines


def _verdict(row: dict[str, Any]) -> str:
    if row["reached"] is None:
        return ""
    return "yes" if row["reached"] else "**no**"


def _commit(row: dict[str, Any]) -> str:
    return f"`{row['commit']}`" + (" and changes" if row["changed"] else "")


def _cost(value: float, unit: str) -> str:
    return f"{value:.3g} {unit}"
