"""Which benches are run, where; what is refused; where the profile of the default run goes."""

import subprocess
import sys
from pathlib import Path

import pytest
import run
import workflow_overhead
from workflow_overhead import Job


def test_without_names_every_machine_runs_its_set() -> None:
    assert [name for name, _ in run.calls([], "cuda")] == list(run.GPU)
    assert {name for name, _ in run.calls([], "cpu")} == set(run.CPU)


def test_a_named_bench_without_a_gpu_form_runs_on_the_cpu_of_a_gpu_machine() -> None:
    assert run.calls(["curation"], "cuda") == [("curation", []), ("curation", ["--rows", "10000000"])]
    assert run.calls(["cli", "decode"], "cuda") == [("cli", []), ("decode", ["--device", "cuda"])]
    assert run.calls(["decode"], "cpu") == [("decode", [])]


def test_cpu_seconds_of_the_staged_case_are_refused() -> None:
    command = [sys.executable, str(Path(run.__file__).parent / "rl_step.py"), "--clock", "cpu", "--only", "staged"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "the staged one is timed by its files" in done.stderr


@pytest.fixture
def profile() -> str:
    """Two jobs that took 1 and 2 of 5 seconds; MLflow was imported for half a second."""
    train = Job("train", 1.0, 2.0, 0.25, {"load": 0.1, "work": 0.7, "write": 0.2})
    return workflow_overhead._table(5.0, [train, Job("track", 2.5, 4.5, 0.1, {"load": 0.5, "work": 1.5})])


def test_the_lines_of_the_profile_sum_to_the_wall(profile: str) -> None:
    rows = {line.split()[0]: line.split()[1:] for line in profile.splitlines()}
    assert rows["train"][1:] == ["0.00", "0.25", "0.10", "0.70", "0.20", "1.25"]
    assert rows["track"][1:] == ["0.40", "0.10", "0.50", "1.50", "0.00", "2.50"]
    assert rows["sum"][-1] == "5.00" and rows["share"][-1] == "100.0%"
    assert float(rows["start"][-1]) + float(rows["end"][-1]) == 1.25


def test_the_profile_is_kept_in_the_docs_and_replaced_there(profile: str) -> None:
    before = workflow_overhead.PAGE.read_text()
    once = workflow_overhead.with_profile(before, "default run, 20 rounds, seconds", profile)
    again = workflow_overhead.with_profile(once, "default run, 20 rounds, seconds", "another table")
    assert f"```text\n{profile}\n```" in once and "The default run, 20 rounds, seconds, on " in once
    assert profile not in again and "```text\nanother table\n```" in again
    for page in (once, again):
        assert before.startswith(page.split(workflow_overhead.BEGIN)[0])
        assert before.endswith(page.split(workflow_overhead.END)[1])
