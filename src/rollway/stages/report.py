"""report: one HTML page about all runs of a results folder."""

from pathlib import Path

from rollway.runtime.specs import ReportSpec


def run(spec: ReportSpec, *, html: Path) -> None:
    """Writes the report of the folder that `html` lies in, with the time that the jobs of its logs took."""
    from rollway.report import build, usage

    build.build(html.parent, html, title=spec.project, logs=usage.logs_of(html.parent))
