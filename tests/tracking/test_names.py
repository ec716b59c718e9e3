"""Traces do not tell who ran the project."""

import sqlite3
from pathlib import Path

import pytest

from rollway.tracking import mlflow_projection
from store.synthetic import make_results


def test_the_login_name_is_not_in_mlflows_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "somebody-by-name")
    results = make_results(tmp_path / "results", {"grpo-s0": 1})
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    mlflow_projection.project(results, "grpo-s0", project="p", uri=uri, traces=2)
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        users = database.execute("SELECT value FROM trace_request_metadata WHERE key = 'mlflow.user'").fetchall()
    assert users == [("rollway",), ("rollway",)]
    assert b"somebody-by-name" not in (tmp_path / "mlflow.db").read_bytes()
