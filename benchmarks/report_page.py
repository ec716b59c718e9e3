"""How long the HTML report takes to build and to open, and how large it is, over a folder of a million rollouts.

    python benchmarks/report_page.py [--rollouts N] [--folder DIR] [--results DIR] [--repeats N] [--record]

The folder is that of benchmarks/queries.py; --results takes another one as it is. Opening is timed in a headless
Chromium, from the address to the drawn view, and left out where none is installed.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import harness
import queries

from rollway.report import build, usage

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from report.browser import browser, chromium

VIEWS = ("overview", "curves", "rollouts", "compare")


def main() -> int:
    options = harness.parser(__doc__.splitlines()[0] if __doc__ else None, repeats=3)
    options.add_argument("--rollouts", type=int, default=1_000_000)
    options.add_argument("--folder", type=Path, default=Path("benchmarks/.queries"))
    options.add_argument("--results", type=Path, help="time the report of this results folder")
    args = options.parse_args()
    results = args.results or args.folder / f"{args.rollouts}"
    if args.results is None and not (results / "whole").exists():
        queries.make_results(results, args.rollouts)
    with tempfile.TemporaryDirectory() as scratch:
        return harness.finish(measured(results, Path(scratch) / "report.html", args), args)


def measured(results: Path, page: Path, args: argparse.Namespace) -> list[harness.Result]:
    note = results.name if args.results else f"{args.rollouts:,} rollouts"
    logs = usage.logs_of(results)

    def make() -> None:
        build.build(results, page, logs=logs)

    found = [harness.measure("report", "build", make, bar=None, repeats=args.repeats, note=note)]
    size = page.stat().st_size / 1e6
    found.append(
        harness.measure("report", "size", lambda: size, bar=harness.at_most(10.0), repeats=1, unit="MB", note=note)
    )
    binary = chromium()
    if binary is None:
        print("no Chromium is installed: opening is not timed", file=sys.stderr)
        return found
    with browser(binary) as tab:
        for view in VIEWS:

            def show(view: str = view) -> None:
                tab.open(f"{page.as_uri()}#{view}")

            opening = f"opening at {view}"
            found.append(
                harness.measure("report", opening, show, bar=harness.at_most(3.0), repeats=args.repeats, note=note)
            )
    return found


if __name__ == "__main__":
    sys.exit(main())
