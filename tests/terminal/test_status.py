"""`rollway status`: what is there, what failed, what is stale and why."""

import json
import shlex
from pathlib import Path

import pytest

from rollway.cli import main
from rollway.runtime import stale, status
from rollway.terminal import status as shown
from store.synthetic import make_results, write_run_info

SPECS = [{"scorer": "short", "config": {"cache": cache, "name": "it's"}, "version": 1} for cache in (3, 2)]
BEFORE, NOW = (shlex.quote(json.dumps(spec)) for spec in SPECS)
CHANGED = f"Params have changed since last execution: Union of exclusive params: before: {BEFORE} now: {NOW}"
DRY = f"""Building DAG of jobs...
[Wed Nov 25 06:34:36 2026]
rule train:
    input: results/a-s0/r0000/batch.parquet
    output: results/a-s0/r0001/policy.json, results/a-s0/r0001/metrics.json
    reason: Missing output files: results/a-s0/r0001/policy.json; Input files updated by another job: results/x
    wildcards: run=a-s0, next=0001
    resources: tmpdir=/tmp, gpu=0
[Wed Nov 25 06:34:36 2026]
rule train:
    reason: Missing output files: results/a-s0/r0003/policy.json
    wildcards: run=a-s0, next=0003
[Wed Nov 25 06:34:36 2026]
rule score:
    reason: {CHANGED}
    wildcards: run=a-s0, round=0002, p=0, scorer=short, shard=000
[Wed Nov 25 06:34:36 2026]
rule prepare:
    reason: Updated input files: words.jsonl
    wildcards: task=spell
[Wed Nov 25 06:34:36 2026]
rule evaluate:
    reason: Input files updated by another job: results/a-s0/r0001/policy.json
    wildcards: run=a-s0, round=0001
[Wed Nov 25 06:34:36 2026]
localrule all:
    reason: Input files updated by another job: results/report.html
[Wed Nov 25 06:34:36 2026]
rule curate:
    reason: Something new that Snakemake says
    wildcards: run=a-s0, round=0000
Job stats:
"""


def test_a_dry_run_is_told_by_cause() -> None:
    found = stale.outlook_of(list(stale.jobs(DRY)))
    told = {(c.rule, c.run): (c.why, c.rounds, c.jobs) for c in found.causes}
    assert told == {
        ("train", "a-s0"): ("missing", [0, 2], 2),
        ("score short", "a-s0"): ("config.cache 3 -> 2", [2], 1),
        ("prepare", "spell"): ("input changed: words.jsonl", [], 1),
        ("curate", "a-s0"): ("Something new that Snakemake says", [0], 1),
    }
    assert (found.following, found.reporting, found.jobs) == (1, 1, 7)
    lines = shown.outlook_lines(found)
    assert lines[0] == "to do: 7 jobs, of which 1 follow from others and 1 only report"
    assert "  train a-s0        rounds 0, 2: missing" in lines
    assert shown.outlook_lines(stale.outlook_of([])) == ["up to date: snakemake has nothing to do"]


def test_a_folder_without_its_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_results(tmp_path, {"a-s0": 3})
    write_run_info(tmp_path, "f-s0", parent="a-s0", fork_round=1, fork_stage="score", rounds=3)
    (tmp_path / "a-s0/run.json").write_text(
        json.dumps({**json.loads((tmp_path / "a-s0/run.json").read_text()), "rounds": 4})
    )
    (tmp_path / "a-s0/r0001/batch.parquet").unlink()
    partial = tmp_path / "a-s0/r0003/p0/.partial-key-0"
    partial.mkdir(parents=True)
    (partial / "part-00000.parquet").touch()
    log = tmp_path / "logs/a-s0/r0003/rollout-p0-000.log"
    log.parent.mkdir(parents=True)
    log.write_text("rollway: warming\nrollway: error: stage rollout: no \x1b[31m memory\n")
    fine = tmp_path / "logs/a-s0/r0000/train.log"
    fine.parent.mkdir(parents=True)
    fine.write_text("rollway: error: stage train: the first try\n")
    fine.with_suffix(".usage.json").write_text("{}")
    states = {state.run: state for state in status.of_folder(tmp_path)}
    assert states["a-s0"].stages["rollout"].missing == [3]
    assert states["a-s0"].stages["curate"].missing == [1, 3]
    assert states["a-s0"].parts == {"r0003": 1}
    assert list(states["a-s0"].failures) == [str(log)]
    assert states["f-s0"].stages["rollout"].done == [0, 1]
    assert states["f-s0"].stages["curate"].done == [0]
    assert states["a-s0"].last == (3, 1.0)
    assert main(["status", "--results", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "3/4      3/4    2/4" in out
    assert "missing: a-s0: curate of round 1 is missing, later rounds are there" in out
    assert "failed: a-s0: error: stage rollout: no \\x1b[31m memory" in out
    assert "half written: a-s0: rollout of r0003 is half done, 1 part kept" in out


def test_what_is_missing_is_what_the_config_plans(tmp_path: Path) -> None:
    """Evaluations by `every` and of the last policy; no scores without scorers; imported runs plan nothing."""
    make_results(tmp_path, {"a-s0": 3, "i-s0": 3})
    config = {"score": {"scorers": {}, "reward": {}, "correct": None}, "evaluate": {"every": 2}}
    write_run_info(tmp_path, "a-s0", rounds=5, config=config)
    (tmp_path / "i-s0/run.json").unlink()
    (tmp_path / "i-s0/r0001/batch.parquet").unlink()
    for path in (tmp_path / "a-s0").glob("r*/p0/scores/*"):
        path.unlink()
    found = status.stages_of_folder(tmp_path, ["a-s0", "i-s0"])
    assert status.missing(found["a-s0"]) == "rollout, curate, train of rounds 3-4; evaluate of rounds 4-5"
    assert found["a-s0"]["evaluate"] == status.StageState([0, 1, 2, 3], [4, 5], 4)
    assert status.missing(found["i-s0"]) == "curate of round 1"
    write_run_info(tmp_path, "a-s0", rounds=3, config=config)
    assert status.missing(status.stages_of_folder(tmp_path, ["a-s0"])["a-s0"]) == ""


def test_an_empty_folder_and_one_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--results", str(tmp_path)]) == 0
    assert "there is no run in this folder yet" in capsys.readouterr().out
    assert main(["status", "--results", str(tmp_path / "nowhere")]) == 1
    assert "no such results folder" in capsys.readouterr().err


def test_many_failures_are_counted(tmp_path: Path) -> None:
    make_results(tmp_path, {"a-s0": 1})
    for number in range(20):
        log = tmp_path / f"logs/a-s0/r{number:04d}/train.log"
        log.parent.mkdir(parents=True)
        log.write_text("rollway: error: stage train: why\n")
    said = shown.notes(status.of_folder(tmp_path))
    assert len(said) == 9
    assert said[-1] == "failed: 12 more"
