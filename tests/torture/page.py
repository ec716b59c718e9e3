"""Writes what `crash.py --docs` saw into docs/torture.md, and every kill into a table in docs/torture/."""

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
END = "<!-- end of kills -->"


def log(project: str) -> Path:
    return PAGE.parent / "torture" / f"kills_{project}.csv"


def begin(project: str) -> str:
    """What the page has before the kills of a kind of project."""
    return f"<!-- kills of {project}: written by tests/torture/crash.py --project {project} --docs -->"


def write(outcome: "Outcome", rows: Sequence[Sequence[str]], project: str) -> None:
    """project: a key of subject.PROJECTS."""
    text = "\n".join([*said(outcome, project), "", *table(rows)])
    PAGE.write_text(with_kills(PAGE.read_text(), text, project))
    log(project).parent.mkdir(exist_ok=True)
    with log(project).open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["kill", "project", "stage", "job", "way", "ms_after_start", "at_work", "files_that_differ"])
        for number, (at, kill) in enumerate(outcome.kills, start=1):
            wrong = sum(name.startswith(f"project {at}: ") for name in outcome.differing)
            name = kill.log.removeprefix("logs/").removesuffix(".log")
            row = [number, at, kill.stage, name, kill.way, round(kill.delay * 1000), int(kill.at_work), wrong]
            writer.writerow(row)


def with_kills(page: str, text: str, project: str) -> str:
    """The page with `text` between the two marks of a kind of project."""
    before, rest = page.split(begin(project))
    _, after = rest.split(END, 1)
    return f"{before}{begin(project)}\n\n{text}\n\n{END}{after}"


def said(outcome: "Outcome", project: str) -> list[str]:
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
        f"Every kill: [{log(project).name}](torture/{log(project).name}).",
    ]
    return [*lines, *(f"\n- {name}" for name in outcome.differing)]


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = rows
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return [*lines, *(f"| {' | '.join('' if cell == '0' else cell for cell in row)} |" for row in body)]
