"""The page of questions with their queries and answers: `python -m rollway.store.cookbook` asks them all anew.

The answers come from the tables in docs/cookbook/results, which a real small run left (docs/cookbook/config.yaml).
With --run that run is made again, and its tables are kept in place of those that are there.
"""

import argparse
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from rollway.errors import RollwayError
from rollway.store.atomic import write_text
from rollway.store.catalog import run_sql

PAGE = Path("docs/cookbook.md")
RESULTS = Path("docs/cookbook/results")
CONFIG = Path("docs/cookbook/config.yaml")
KEPT = (
    "tasks/*/*.parquet",
    "*/run.json",
    *(f"*/r[0-9]*/{name}" for name in ("*.parquet", "*.json", "p*/**/*.parquet")),
)
"""What of a results folder SQL reads: neither weights nor logs."""

_RECIPE = re.compile(
    r"^### \d+\. (?P<question>.+?)\n(?P<between>.*?)^```sql\n(?P<query>.*?)^```\n", re.MULTILINE | re.DOTALL
)
_ANSWER = re.compile(r"(^```sql\n(?P<query>.*?)^```\n\n)```text\n.*?^```\n", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Recipe:
    """One question of the page and its query."""

    question: str
    query: str


def read(page: Path = PAGE) -> list[Recipe]:
    """The questions of the page in order. Raises RollwayError where a question has no query."""
    text = page.read_text(encoding="utf-8")
    found = [Recipe(match["question"], match["query"].strip()) for match in _RECIPE.finditer(text)]
    headings = len(re.findall(r"^### \d+\. ", text, re.MULTILINE))
    if len(found) != headings or len(_ANSWER.findall(text)) != headings:
        raise RollwayError(f"{page}: of {headings} questions, some have no ```sql block with a ```text block after it")
    return found


def answered(page: Path = PAGE, results: Path = RESULTS) -> str:
    """The page with every answer as `rollway sql` prints it over `results`."""
    text = page.read_text(encoding="utf-8")
    return _ANSWER.sub(lambda match: f"{match[1]}```text\n{run_sql(results, match['query'].strip())}\n```\n", text)


def rerun(results: Path = RESULTS) -> None:
    """Makes the run of CONFIG with Snakemake and keeps its tables in `results`."""
    made = Path("results/cookbook")
    subprocess.run(["snakemake", "--cores", "2", "--configfile", str(CONFIG)], check=True)
    keep(made, results)


def keep(made: Path, results: Path) -> None:
    """Copies the tables of the folder `made` to `results`, whose own are deleted first."""
    shutil.rmtree(results, ignore_errors=True)
    for path in sorted({path for pattern in KEPT for path in made.glob(pattern)}):
        if path.name in ("policy.json", "tracked.json"):
            continue
        target = results / path.relative_to(made)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def main() -> None:
    """Rewrites the page in the current folder, the root of a checkout."""
    parser = argparse.ArgumentParser(prog="python -m rollway.store.cookbook", description=__doc__)
    parser.add_argument("--run", action="store_true", help="make the run of docs/cookbook/config.yaml anew first")
    if parser.parse_args().run:
        rerun()
    read()
    write_text(PAGE, answered())
    print(PAGE)


if __name__ == "__main__":
    main()
