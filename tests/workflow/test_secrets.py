"""A small project with secrets in its environment, in somebody's home: every byte that it writes is looked at."""

import json
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from report.page import Page
from rollway.config import deep_merge
from workflow.project import TINY, Project

WHO = "alice-of-the-tests"
SECRETS = {
    "JUDGE_KEY": "judge-key-5f1d7c2e9a",
    "HF_TOKEN": "hf_" + "Qx" * 17,
    "OPENAI_API_KEY": "sk-proj-" + "Zw9" * 10,
    "AWS_SECRET_ACCESS_KEY": "aws/secret+7h2kd83jf",
    "MLFLOW_TRACKING_PASSWORD": "mlflow-word-83hd72",
    "WANDB_API_KEY": "b4c9" * 10,
    "PLAIN_SETTING": "an-ordinary-value-of-the-environment",
}
OF_THE_PLACE = ("results/rollway.duckdb", "mlflow.db", ".snakemake/")
"""What has to name the project's folder: DuckDB's views, MLflow's artifacts, and Snakemake's own notes."""


class Server(BaseHTTPRequestHandler):
    """A judge that repeats the key it was sent, in its verdict's reason and in what is no verdict."""

    keys: list[str] = []

    def do_POST(self) -> None:
        key = self.headers["Authorization"].removeprefix("Bearer ")
        self.keys.append(key)
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][0]["content"]
        if asked.endswith("a"):
            self.send_response(400)
            body = f"bad request with {key}".encode()
        else:
            self.send_response(200)
            text = f"no verdict, but {key}" if asked.endswith("b") else json.dumps({"reason": key, "score": 7})
            body = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


class Guarded(Project):
    """With the secrets in the environment, and a home that the project lies in."""

    home: Path

    def environment(self) -> dict[str, str]:
        return super().environment() | SECRETS | {"HOME": str(self.home), "USER": WHO, "LOGNAME": WHO}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    judge = {
        "kind": "judge",
        "url": f"http://127.0.0.1:{server.server_address[1]}/v1",
        "model": "m",
        "key_env": "JUDGE_KEY",
        "prompt": "{completion}",
        "retries": 0,
        "max_error_share": 1.0,
        "requests_per_second": 1000,
    }
    changes = {
        "warmups": {"tiny": {"sft": {"steps": 15}}},
        "defaults": {"rounds": 1, "score": {"scorers": {"exact": {"kind": "exact"}, "judge": judge}}},
        "mlflow": {"usage": True},
    }
    home = tmp_path_factory.mktemp("homes") / WHO
    made = Guarded(home / "project", deep_merge(TINY, changes))
    made.home = home
    made.said = made.snakemake("--printshellcmds").stdout  # type: ignore[attr-defined]
    made.said += made.rollway("sql", "SELECT * FROM scores").stdout  # type: ignore[attr-defined]
    made.said += made.rollway("status", "--no-check", "--configfile", "config.yaml").stdout  # type: ignore[attr-defined]
    yield made
    server.shutdown()


def contents(path: Path) -> bytes:
    """A file's bytes and, where they are packed, what is in them."""
    raw = path.read_bytes()
    if path.suffix == ".parquet":
        raw += str(pq.read_table(path).to_pylist()).encode() + str(pq.read_schema(path).metadata).encode()
    if path.name == "report.html":
        page = Page(path)
        raw += json.dumps([page.text, page.summary, page.parts], default=str).encode()
    return raw


def files(project: Guarded) -> dict[str, Path]:
    """Everything under the home but what a test run puts there by itself."""
    found = [path for path in sorted(project.home.rglob("*")) if path.is_file() and not path.is_symlink()]
    return {str(path.relative_to(project.folder)): path for path in found if path.is_relative_to(project.folder)} | {
        f"~/{path.relative_to(project.home)}": path for path in found if not path.is_relative_to(project.folder)
    }


def test_the_judge_was_asked_with_its_key_and_failed_where_it_should(project: Guarded) -> None:
    assert set(Server.keys) == {SECRETS["JUDGE_KEY"]}
    query = "SELECT DISTINCT error FROM scores WHERE error IS NOT NULL"
    errors = project.rollway("sql", query, "--format", "csv").stdout
    assert "***" in errors


def test_no_secret_of_the_environment_is_written_anywhere(project: Guarded) -> None:
    written = files(project)
    assert {"results/report.html", "results/rollway.duckdb", "mlflow.db"} <= written.keys()
    assert any(name.startswith("logs/") for name in written)
    assert any(name.startswith("mlruns/") for name in written)
    assert any(name.startswith("results/.cache/") for name in written)
    for name, path in written.items():
        found = contents(path)
        leaked = [key for key, value in SECRETS.items() if value.encode() in found]
        assert leaked == [], name
    said = project.said  # type: ignore[attr-defined]
    assert [key for key, value in SECRETS.items() if value in said] == []


def test_the_home_and_its_owner_are_named_only_where_a_path_must_be_whole(project: Guarded) -> None:
    naming = [name for name, path in files(project).items() if WHO.encode() in contents(path)]
    assert [name for name in naming if not name.startswith(OF_THE_PLACE)] == []
    for name in naming:
        rest = contents(files(project)[name]).replace(str(project.folder).encode(), b"")
        if not name.startswith(".snakemake/"):
            assert WHO.encode() not in rest, name


def test_nothing_is_pickled(project: Guarded) -> None:
    """By name, by content (protocols 2 to 5 begin so and end with a full stop), and inside of archives."""
    for name, path in files(project).items():
        assert path.suffix not in (".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib", ".npy"), name
        raw = path.read_bytes()
        assert not (raw[:1] == b"\x80" and raw[1:2] in b"\x02\x03\x04\x05" and raw[-1:] == b"."), name
        if zipfile.is_zipfile(path):
            assert not [member for member in zipfile.ZipFile(path).namelist() if member.endswith(".pkl")], name


def test_a_secret_in_the_config_stops_before_anything_is_written(tmp_path: Path) -> None:
    secret = "hf_" + "T" * 34
    project = Project(tmp_path / "p", deep_merge(TINY, {"mlflow": {"uri": f"http://me:{secret}@localhost"}}))
    done = project.snakemake(check=False)
    assert done.returncode != 0
    assert "`mlflow.uri` holds an access token" in done.stdout
    assert secret not in done.stdout
    left = [path for path in sorted((tmp_path / "p").rglob("*")) if path.is_file() and path.name != "config.yaml"]
    assert [path.name for path in left if secret.encode() in path.read_bytes()] == []
    assert not (tmp_path / "p/results").exists()
