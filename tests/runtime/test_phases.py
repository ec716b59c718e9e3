"""What usage.json says of a job's time."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rollway.runtime import jobs, phases
from rollway.runtime.specs import STAGE_VERSION, CatalogSpec, dump


def _run(stage: Any, monkeypatch: pytest.MonkeyPatch, folder: Path) -> dict[str, Any]:
    monkeypatch.setattr("rollway.stages.catalog.run", stage)
    spec = dump(CatalogSpec(version=STAGE_VERSION["catalog"]))
    log = folder / "logs/catalog.log"
    assert jobs.run_stage(["catalog", "--spec", spec, "--log", str(log), "--database", "x"]) == 0
    return json.loads(log.with_suffix(".usage.json").read_text())


def test_phases_are_kept_apart_and_sum_to_the_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stage(spec: CatalogSpec, *, database: Path) -> None:
        time.sleep(0.05)
        phases.mark("work")
        time.sleep(0.1)
        phases.mark("write")

    begin = time.time()
    used = _run(stage, monkeypatch, tmp_path)
    assert used["phases"]["load"] >= 0.05 and used["phases"]["work"] >= 0.1 and "write" in used["phases"]
    assert sum(used["phases"].values()) == pytest.approx(used["seconds"], abs=0.001)
    assert begin <= used["began"] <= time.time()
    if sys.platform.startswith("linux"):
        assert used["starting"] > 0


def test_a_stage_without_marks_works_from_its_beginning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stage(spec: CatalogSpec, *, database: Path) -> None:
        time.sleep(0.05)

    used = _run(stage, monkeypatch, tmp_path)
    assert list(used["phases"]) == ["load", "work"] and used["phases"]["work"] >= 0.05
