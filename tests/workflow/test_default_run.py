"""The default run, as the README shows it: slow, so `make test-all` runs it."""

import time
from pathlib import Path

import pytest
import yaml

from workflow.project import ROOT, Project


@pytest.mark.slow
def test_the_default_run_learns_in_each_of_three_seeds(tmp_path: Path) -> None:
    """Held-out pass@1 rises by at least 0.25 from warm-up to the last round (issue A)."""
    config = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    config["runs"]["grpo"]["seeds"] = [0, 1, 2]
    project = Project(tmp_path, config)
    started = time.monotonic()
    project.snakemake(timeout=3600)
    seconds = time.monotonic() - started
    last = config["defaults"]["rounds"]
    query = f"SELECT run, round, pass_1 FROM learning WHERE round IN (0, {last}) ORDER BY run, round"
    rows = project.rollway("sql", query, "--format", "csv").stdout.strip().splitlines()[1:]
    figures = [float(row.split(",")[2]) for row in rows]
    gains = [after - before for before, after in zip(figures[::2], figures[1::2], strict=True)]
    print(f"gains {gains}, {seconds:.0f} s for three seeds")
    assert len(gains) == 3
    assert min(gains) >= 0.25
