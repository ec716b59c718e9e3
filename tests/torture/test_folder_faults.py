"""A results folder under other hands: clocks that jump, two workflows, an open report, moved, of an older schema."""

import http.client
import json
import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq
import pytest

from rollway.errors import RollwayError
from rollway.report import serve
from rollway.store import parquet
from rollway.store.catalog import write_database
from torture.test_disk_faults import different
from workflow.project import Project

LAST_CENTURY, NEXT_CENTURY = 9e8, 5e9


def set_times(project: Project, time_of: Callable[[], float]) -> None:
    """Of every file and folder of the results, as a clock that jumped would have left them."""
    for path in (project.folder / "results").rglob("*"):
        moment = time_of()
        os.utime(path, (moment, moment), follow_symlinks=False)


def test_clocks_that_jump(copied: Callable[..., Project], continued: Project) -> None:
    """File times in the past, in the future and in any order start nothing anew; a round more gives the same bytes.

    Snakemake by itself would stop at the first job, whose output is older than an input of the future.
    """
    project = copied()
    draw = random.Random(0)
    for time_of in (
        lambda: LAST_CENTURY,
        lambda: NEXT_CENTURY,
        lambda: draw.uniform(LAST_CENTURY, NEXT_CENTURY),
    ):
        set_times(project, time_of)
        assert project.planned() == {}
    project.write_config(defaults={"rounds": 2})
    assert {name: n for name, n in project.planned().items() if name in ("warmup", "rollout", "train")} == {
        "rollout": 2,
        "train": 1,
    }
    assert "dated in the future" in project.snakemake().stdout
    assert different(continued, project) == []


def start(project: Project, *args: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        project.command("--cores", "2", *args),
        cwd=project.folder,
        env=project.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for(path: Path, running: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 300
    while not path.exists():
        assert running.poll() is None and time.monotonic() < deadline, running.communicate()[0]
        time.sleep(0.01)


def test_a_second_workflow_in_the_same_folder_is_refused(copied: Callable[..., Project], continued: Project) -> None:
    project = copied(defaults={"rounds": 2})
    at_work = project.folder / "results/.worker/worker.log"
    at_work.unlink()
    first = start(project)
    wait_for(at_work, first)
    second = project.snakemake(check=False)
    output, _ = first.communicate(timeout=300)
    assert second.returncode == 1
    assert "Directory cannot be locked" in second.stdout and "--unlock" in second.stdout
    assert first.returncode == 0, output
    assert different(continued, project) == []


@pytest.mark.slow
def test_two_workflows_that_heed_no_lock_write_no_wrong_bytes(
    copied: Callable[..., Project], continued: Project
) -> None:
    """One may stop, at a file that the other one took away; when both are done a third run mends what is missing."""
    project = copied(defaults={"rounds": 2})
    both = [start(project, "--nolock") for _ in range(2)]
    for running in both:
        output, _ = running.communicate(timeout=300)
        assert "mistake in rollway" not in output, output
    project.snakemake("--nolock")
    assert different(continued, project) == []


def test_a_stage_is_run_again_while_the_report_is_open(copied: Callable[..., Project], finished: Project) -> None:
    """Asked all the time, the page is there all the time, and is the new one in the end."""
    project = copied()
    made = serve.server(project.folder / "results", 0, "test")
    port = made.server_address[1]
    threading.Thread(target=made.serve_forever, daemon=True).start()
    answers: list[tuple[int, bytes]] = []
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request("GET", "/", headers={"Host": f"127.0.0.1:{port}"})
            answer = connection.getresponse()
            answers.append((answer.status, answer.read()))
            connection.close()

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        project.snakemake("--forcerun", "rollout", "score", "curate", "train", "evaluate")
    finally:
        over.set()
        asking.join()
        made.shutdown()
        made.server_close()
    assert len(answers) > 3
    assert [body for status, body in answers if status != 200][:1] == []
    assert all(body.rstrip().endswith(b"</html>") for _, body in answers)
    assert different(finished, project) == []


def test_a_file_older_than_the_others_changes_the_page(tmp_path: Path) -> None:
    """The clock was set back: what appears now is dated before what is there."""
    folder = tmp_path / "grpo-s0/r0000"
    folder.mkdir(parents=True)
    os.utime(folder, (NEXT_CENTURY, NEXT_CENTURY))
    (tmp_path / "other-s0/r0000").mkdir(parents=True)
    before = serve.fingerprint(tmp_path)
    (tmp_path / "other-s0/r0000/batch.parquet").write_text("")
    os.utime(tmp_path / "other-s0/r0000", (LAST_CENTURY, LAST_CENTURY))
    assert serve.fingerprint(tmp_path) != before


@pytest.mark.slow
def test_a_project_that_was_moved(copied: Callable[..., Project], continued: Project, tmp_path: Path) -> None:
    project = copied()
    # The copy's catalogue still shows the folder that it was copied from.
    write_database(project.folder / "results")
    project.folder.rename(tmp_path / "elsewhere")
    moved = Project(tmp_path / "elsewhere", project.config)
    assert moved.planned() == {}
    rows = moved.rollway("sql", "SELECT count(*) AS n FROM scored", "--format", "csv").stdout.split()
    assert rows == ["n", "16"]
    assert "nothing wrong" in moved.rollway("verify").stdout
    moved.rollway("report")
    database = moved.folder / "results/rollway.duckdb"
    with duckdb.connect(str(database), read_only=True) as connection, pytest.raises(duckdb.Error):
        connection.execute("FROM rollouts").fetchall()
    moved.snakemake("--force", "results/rollway.duckdb")
    with duckdb.connect(str(database), read_only=True) as connection:
        assert connection.execute("SELECT count(*) FROM rollouts").fetchall() == [(16,)]
    moved.write_config(defaults={"rounds": 2})
    moved.snakemake()
    assert different(continued, moved) == []


def older(path: Path, version: bytes) -> None:
    """As a rollway of another schema version would have written it."""
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, b"rollway.schema": version}), path)


def test_tables_of_an_older_schema_version_are_refused_and_made_anew(
    copied: Callable[..., Project], finished: Project
) -> None:
    project = copied()
    path = "results/grpo-s0/r0000/p0/rollouts-000.parquet"
    older(project.folder / path, b"0")
    done = project.snakemake("results/grpo-s0/r0000/batch.parquet", check=False)
    assert done.returncode == 1
    assert f"{path}: schema version 0, this rollway reads 1; rerun the stage" in done.stdout
    assert f"`snakemake --force {path}`" in done.stdout
    assert "mistake in rollway" not in done.stdout
    wrong = project.rollway("verify", check=False)
    assert wrong.returncode == 1 and f"{path}: schema version 0" in wrong.stdout
    project.snakemake("--force", path)
    project.snakemake()
    assert different(finished, project) == []


@pytest.mark.parametrize("version", [b"2", b"one", b""])
def test_so_are_tables_of_a_newer_schema_version(finished: Project, tmp_path: Path, version: bytes) -> None:
    path = tmp_path / "batch.parquet"
    shutil.copy(finished.folder / "results/grpo-s0/r0000/batch.parquet", path)
    older(path, version)
    with pytest.raises(
        RollwayError, match=f"schema version {version.decode()}, this rollway reads 1; .*use the rollway"
    ):
        parquet.read(path)


@pytest.mark.slow
def test_a_policy_of_another_version_is_refused_and_made_anew(
    copied: Callable[..., Project], continued: Project
) -> None:
    project = copied(defaults={"rounds": 2})
    path = project.folder / "results/grpo-s0/r0001/policy.json"
    held: dict[str, Any] = json.loads(path.read_text())
    path.write_text(json.dumps({**held, "version": 0}))
    done = project.snakemake("all_rollouts", check=False)
    assert done.returncode == 1 and "mistake in rollway" not in done.stdout
    place = "results/grpo-s0/r0001/policy.json"
    assert f"{place}: version 0, this rollway reads 1; rerun the warmup or train stage" in done.stdout
    assert f"`snakemake --force {place}`" in done.stdout
    project.snakemake("--force", place)
    project.snakemake()
    assert different(continued, project) == []
