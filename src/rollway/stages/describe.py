"""describe: what a run is, for tables and reports."""

import json
from pathlib import Path

from rollway.runtime.specs import DescribeSpec
from rollway.store.atomic import write_json


def run(spec: DescribeSpec, *, run: Path) -> None:
    """Writes run.json: recipe, seed, lineage and the resolved config."""
    write_json(run, {**spec.info.model_dump(mode="json"), "config": json.loads(spec.settings)})
