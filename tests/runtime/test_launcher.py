"""The launcher that the workflow's jobs find first on their PATH, and that falls back to the command."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from rollway.runtime import warm

if not sys.platform.startswith("linux"):
    pytest.skip("the warm worker needs Linux", allow_module_level=True)


def test_jobs_find_the_launcher_and_it_falls_back_to_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the Snakefile's handlers do it: the worker takes the job, and the same command runs cold without it."""
    command = Path(sys.executable).parent / "rollway"
    if not command.exists():
        pytest.skip("rollway is not installed beside this Python")
    monkeypatch.delenv("ROLLWAY_WORKER", raising=False)
    monkeypatch.setenv("PATH", f"{command.parent}:/usr/bin:/bin")
    before = os.environ["PATH"]
    place = tmp_path / "results" / ".worker"
    warm.start(str(place / "socket"), SimpleNamespace(local_exec=True), str(tmp_path / "results"))
    try:
        assert shutil.which("rollway") == str(place / "bin" / "rollway")
        assert describe(tmp_path / "warm") == {"warm": True}
    finally:
        warm.stop(str(place / "socket"))
    assert os.environ["PATH"] == before and "ROLLWAY_WORKER" not in os.environ
    monkeypatch.setenv("PATH", f"{place / 'bin'}:{before}")
    assert describe(tmp_path / "cold") == {"warm": False}
    monkeypatch.setenv("ROLLWAY_WORKER", str(place / "socket"))
    assert describe(tmp_path / "gone") == {"warm": False}


def describe(folder: Path) -> dict[str, bool]:
    """Runs the cheapest stage through whatever `rollway` is on the PATH."""
    run = {"name": "a", "recipe": "grpo", "title": "t", "seed": 0, "task": "x", "warmup": "w", "rounds": 1}
    spec = json.dumps({"version": 1, "info": run, "settings": "{}"})
    words = ["rollway", "stage", "describe", "--spec", spec, "--log", str(folder / "a.log")]
    subprocess.run([*words, "--run", str(folder / "run.json")], check=True, timeout=120)
    assert json.loads((folder / "run.json").read_text())["name"] == "a"
    return {"warm": json.loads((folder / "a.usage.json").read_text())["warm"]}
