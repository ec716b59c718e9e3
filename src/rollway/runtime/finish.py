"""What the user sees when a workflow has ended well."""

import sys
from pathlib import Path


def show_results(results: str) -> None:
    """Prints the before/after table on stderr and says where to look further."""
    folder = Path(results)
    if not any(folder.glob("*/r*/evals.json")):
        return
    from rollway.report.table import before_after_table

    report = folder / "report.html"
    print(
        f"\n{before_after_table(folder)}\n\nreport: {report}\nask:    rollway sql --results {results}", file=sys.stderr
    )
