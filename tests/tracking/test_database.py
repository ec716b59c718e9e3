"""MLflow's SQLite file: whole or not there, whenever the process that makes it is killed."""

import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rollway.errors import RollwayError
from rollway.tracking import database
from rollway.tracking.mlflow_projection import project
from store.synthetic import make_results

MAKE = "import sys; from rollway.tracking.database import prepare; prepare(sys.argv[1])"


def test_only_files_are_made(tmp_path: Path) -> None:
    for uri in ("http://127.0.0.1:1", "postgresql://u:p@h/db", "sqlite://", "sqlite:///:memory:", "mlruns"):
        assert database.file_of(uri) is None
        database.prepare(uri)
    assert database.file_of("sqlite:///a/mlflow.db") == Path("a/mlflow.db")
    assert database.file_of("sqlite:////a/mlflow.db") == Path("/a/mlflow.db")
    kept = tmp_path / "mlflow.db"
    kept.write_bytes(b"mine")
    database.prepare(f"sqlite:///{kept}")
    assert kept.read_bytes() == b"mine"


def test_a_kill_while_it_is_made_leaves_none(tmp_path: Path) -> None:
    """Killed between migrations, three times later; then made, without a leftover."""
    path = tmp_path / "mlflow.db"
    command = [sys.executable, "-c", MAKE, f"sqlite:///{path}"]
    for size in (1, 100_000, 300_000):
        running = subprocess.Popen(command, cwd=tmp_path)
        made = tmp_path / f".tmp-mlflow.db-{running.pid}"
        while running.poll() is None and not (made.exists() and made.stat().st_size >= size):
            time.sleep(0.002)
        running.kill()
        assert running.wait() == -9, "it was done before it was killed"
        assert not path.exists()
    subprocess.run(command, cwd=tmp_path, check=True)
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["mlflow.db"]
    results = make_results(tmp_path / "results", {"a-s0": 1})
    assert project(results, "a-s0", project="p", uri=f"sqlite:///{path}")


def test_one_that_an_older_rollway_left_half_made_is_told(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE _alembic_tmp_trace_info (name TEXT)")
    results = make_results(tmp_path / "results", {"a-s0": 1})
    with pytest.raises(RollwayError, match=r"already exists.*mend .*mlflow\.db, or move it away \(a new one is made\)"):
        project(results, "a-s0", project="p", uri=f"sqlite:///{path}")
