"""report: one HTML page about all runs of a results folder."""

from pathlib import Path

from rollway.runtime.specs import ReportSpec


def run(spec: ReportSpec, *, html: Path) -> None:
    """Writes the report of the folder that `html` lies in."""
    from rollway.report import build

    build.build(html.parent, html, title=spec.project)
