"""Writes what `crash.py --docs` saw into docs/torture.md, and every kill into docs/torture/kills.csv."""

import csv
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torture.crash import Outcome

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "torture.md"
LOG = ROOT / "docs" / "torture" / "kills.csv"
BEGIN, END = "<!-- kills: written by tests/torture/crash.py --docs -->", "<!-- end of kills -->"


def write(outcome: "Outcome", rows: Sequence[Sequence[str]]) -> None:
    PAGE.write_text(with_kills(PAGE.read_text(), "\n".join([*said(outcome), "", *table(rows)])))
    LOG.parent.mkdir(exist_ok=True)
    with LOG.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["kill", "project", "stage", "job", "way", "ms_after_start", "at_work", "files_that_differ"])
        for number, (project, kill) in enumerate(outcome.kills, start=1):
            wrong = sum(name.startswith(f"project {project}: ") for name in outcome.differing)
            job = kill.log.removeprefix("logs/").removesuffix(".log")
            row = [number, project, kill.stage, job, kill.way, round(kill.delay * 1000), int(kill.at_work), wrong]
            writer.writerow(row)


def with_kills(page: str, text: str) -> str:
    """The page with `text` between its two marks."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def said(outcome: "Outcome") -> list[str]:
    """In words: how much was killed, where, and what came of it."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    at_work = sum(kill.at_work for _, kill in outcome.kills)
    came = f"**{len(outcome.differing)} differ**" if outcome.differing else "**all are equal**"
    lines = [
        f"{len(outcome.kills)} kills (seed {outcome.seed}) in {outcome.projects} projects, {outcome.cold} of them",
        f"without the warm worker: {outcome.files} files compared with the uninterrupted run's, {came}.",
        f"{at_work} kills met the job at work, the others just after its end. Took {outcome.minutes:.0f} minutes on",
        f"{platform.machine()} with {os.cpu_count()} cores, {datetime.now(UTC):%Y-%m-%d},",
        f"commit `{commit.stdout.strip()}`.",
        "Every kill: [torture/kills.csv](torture/kills.csv).",
    ]
    return [*lines, *(f"\n- {name}" for name in outcome.differing)]


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = rows
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return [*lines, *(f"| {' | '.join('' if cell == '0' else cell for cell in row)} |" for row in body)]
