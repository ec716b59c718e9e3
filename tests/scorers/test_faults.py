"""Scorers that raise, hang, answer nonsense or change their mind: what is recorded, what stops, what is kept."""

import json
import os
import time
from pathlib import Path

import pyarrow as pa
import pytest

from rollway.config.scorers import ExactScorer, FormatScorer, PythonScorer, ScoreConfig
from rollway.curation import fault_shares
from rollway.errors import RollwayError
from rollway.runtime.specs import ScoreSpec
from rollway.scorers import ScorerFailed
from rollway.stages import score as stage
from rollway.store import parquet
from rollway.store.catalog import run_sql
from store.synthetic import rollout_rows, write, write_prompts

CODE = """
import os, pathlib, subprocess, sys, time

CALLS = []

def odd(row):
    CALLS.append(row)
    text = row["completion"]
    if text == "loop":
        while True: pass
    if text == "stubborn":
        while True:
            try: time.sleep(60)
            except BaseException: pass
    if text == "child":
        subprocess.run(["sleep", "987654"])
    if text == "power": return 10 ** 10 ** 10
    if text == "gone": os._exit(3)
    if text == "exit": sys.exit(4)
    if text == "raise": raise ValueError("half a character: \\ud800")
    if text == "print": print('{"reward": 9}', flush=True); sys.stdin.read()
    if text == "huge": return 10 ** 400
    if text == "named": return {"reward": 1, "\\ud800": 2}
    return {"reward": 1.0, "calls": len(CALLS), "pid": os.getpid()}

def moody(row):
    # A second look imports this file anew: what changes lies outside of it, as a clock or a server does.
    calls = pathlib.Path(__file__).with_name("calls.txt")
    text = row["completion"]
    with calls.open("a") as file: print(text, file=file)
    times = calls.read_text().split().count(text)
    if text == "tires" and times > 1: raise RuntimeError("enough")
    return {"reward": times if text == "grows" else 1.0 / times if text == "falls" else 0.5, "times": times}
"""


@pytest.fixture
def code(tmp_path):
    (tmp_path / "mine.py").write_text(CODE)
    return tmp_path


def rows_of(make_row, *texts):
    return [make_row(text, number=n) for n, text in enumerate(texts)]


def limited(**given):
    return PythonScorer.model_validate({"function": "mine.py:odd", "timeout": 1.0, "max_error_share": 1.0, **given})


def test_a_call_that_hangs_is_killed_with_all_it_started_and_costs_its_own_row(code, make_row, run):
    texts = ["a", "loop", "b", "stubborn", "child", "power", "c"]
    start = time.monotonic()
    found = run(limited(), rows_of(make_row, *texts))
    assert time.monotonic() - start < 30
    assert [row["reward"] for row in found] == [1, 0, 1, 0, 0, 0, 1]
    hung = [row["error"] for row in found if row["error"] is not None]
    assert hung == ["the function took longer than timeout 1 s, and was killed"] * 4
    assert not running("987654")
    assert not running("rollway.scorers.python_worker")


def test_in_a_process_of_its_own_the_function_is_what_it_is_here(code, make_row, run):
    """Its state lasts from row to row, it prints and reads what it likes, and what it raises is that row's error."""
    found = run(limited(), rows_of(make_row, "a", "print", "raise", "exit", "gone", "huge", "named", "b"))
    here = run(limited(timeout=None), rows_of(make_row, "a", "raise", "exit", "huge", "named", "b"))
    by_text = {0: "a", 1: "print", 2: "raise", 3: "exit", 4: "gone", 5: "huge", 6: "named", 7: "b"}
    said = {by_text[n]: row for n, row in enumerate(found)}
    assert said["a"]["reward"] == said["print"]["reward"] == said["b"]["reward"] == 1
    first, last = dict(said["a"]["components"]), dict(said["b"]["components"])
    assert first["pid"] not in (os.getpid(), last["pid"])  # the one that ended itself was replaced
    assert dict(said["print"]["components"])["calls"] == 2
    assert said["gone"]["error"] == "the function ended its process with status 3"
    for name, row in zip(["a", "raise", "exit", "huge", "named", "b"], here, strict=True):
        assert (row["reward"], row["error"]) == (said[name]["reward"], said[name]["error"]), name
    assert "ValueError: half a character: ?" in said["raise"]["error"]
    assert "OverflowError" in said["huge"]["error"]
    assert dict(said["named"]["components"]) == {"?": 2.0}


def test_an_unusable_function_is_said_as_without_a_limit(code, make_row, run):
    (code / "slow.py").write_text("import os\nos._exit(5)\n")
    with pytest.raises(RollwayError, match=r"mine\.py has no function 'nobody'; it has odd, moody"):
        run(limited(function="mine.py:nobody"), rows_of(make_row, "a"))
    with pytest.raises(RollwayError, match=r"slow\.py:f ends the process that imports it"):
        run(limited(function="slow.py:f"), rows_of(make_row, "a"))


def test_hangs_beyond_the_share_end_the_scoring_at_once(code, make_row, run):
    start = time.monotonic()
    with pytest.raises(
        ScorerFailed, match=r"failed on 2 of 60 .*\(57 were not asked any more\); the first, rollout r1"
    ):
        run(limited(max_error_share=0.02, timeout=0.3), rows_of(make_row, "a", *["loop"] * 59))
    assert time.monotonic() - start < 15


def test_judging_twice_finds_what_is_no_function_of_the_row(code, make_row, run, capsys):
    texts = ["grows", "falls", "tires", "same"]
    config = PythonScorer(function="mine.py:moody", recheck=1.0, max_error_share=0.25)
    found = run(config, rows_of(make_row, *texts))
    assert [row["reward"] for row in found] == [1.0, 0.5, 0.0, 0.5]
    assert [dict(row["components"]).get("unstable") for row in found] == [1.0, 1.0, None, 0.0]
    assert found[2]["error"] == "the second time, after a reward of 0.5: mine.py line 32: RuntimeError: enough"
    told = capsys.readouterr().err
    assert "scorer s: 2 of 3 rollouts judged twice got another reward the second time" in told


def test_only_the_drawn_share_is_judged_twice(code, make_row, run, capsys):
    rows = [make_row("same", number=n) for n in range(200)]
    found = run(PythonScorer(function="mine.py:moody", recheck=0.25), rows)
    twice = [row for row in found if "unstable" in dict(row["components"])]
    assert 25 < len(twice) < 75
    again = run(PythonScorer(function="mine.py:moody", recheck=0.25), rows)
    assert [row["rollout_id"] for row in again if "unstable" in dict(row["components"])] == [
        row["rollout_id"] for row in twice
    ]


@pytest.fixture
def files(code, monkeypatch):
    """A pass of four rollouts on disk, and its prompts, in a working folder with the functions."""
    monkeypatch.chdir(code)
    write_prompts(Path("results"))
    place = Path("results/run-s0/r0000/p0/rollouts-000.parquet")
    texts = ["a", "raise", "gone", "b"]
    made = [row | {"text": text} for row, text in zip(rollout_rows("run-s0", 0), texts, strict=False)]
    write(place, made, "rollouts")
    return place


def scored(files: Path, **given: object) -> Path:
    config = PythonScorer.model_validate({"function": "mine.py:odd", "timeout": 20.0, **given})
    out = files.parent / "scores" / "mine-000.parquet"
    prompt_file = Path("results/tasks/add/train.parquet")
    stage.run(
        ScoreSpec(version=1, scorer="mine", config=config),
        prompts=prompt_file,
        rollouts=files,
        needs=[],
        scores=out,
        cache=Path("cache"),
    )
    return out


def test_what_was_scored_is_kept_where_the_stage_stops_and_goes_when_it_succeeds(files):
    kept = files.parent / "scores" / "failed" / "mine-000.parquet"
    with pytest.raises(RollwayError, match=rf"failed on 2 of 4 .*What was scored until then is in {kept}") as caught:
        scored(files, max_error_share=0.25)
    assert "\n" not in str(caught.value)
    assert not (files.parent / "scores" / "mine-000.parquet").exists()
    told = json.loads(run_sql(Path("results"), f"SELECT reward, error IS NULL AS whole FROM '{kept}'", "json"))
    assert told == [
        {"reward": 1.0, "whole": True},
        {"reward": 0.0, "whole": False},
        {"reward": 0.0, "whole": False},
        {"reward": 1.0, "whole": True},
    ]
    out = scored(files, max_error_share=0.5)
    assert parquet.rows(out) == 4
    assert not kept.parent.exists()


def test_errors_and_changes_of_mind_are_metrics_where_they_are_allowed(files):
    config = {"function": "mine.py:odd", "timeout": 20.0, "max_error_share": 0.5, "recheck": 1.0}
    out = scored(files, **config)
    score = ScoreConfig.model_validate(
        {"scorers": {"mine": {"kind": "python", **config}}, "reward": {"mine": 1.0}, "correct": None}
    )
    assert fault_shares({"mine": [out]}, score, 0) == {"score_mine_errors": 0.5, "score_mine_unstable": 0.0}
    assert fault_shares({"mine": [out]}, score, 1) == {}  # a replayed round's
    plain = {"scorers": {"mine": {"kind": "python", "function": "mine.py:odd"}}, "reward": {"mine": 1}, "correct": None}
    assert fault_shares({"mine": [out]}, ScoreConfig.model_validate(plain), 0) == {}


def test_text_scorers_and_teachers_keep_what_failed_too(files, monkeypatch):
    """Every scorer that stops says so by the same exception, with what there is."""
    from rollway.scorers.run import check_errors

    with pytest.raises(ScorerFailed) as caught:
        check_errors("s", FormatScorer(pattern="x"), 1, [("r0", "why")], pa.table({"rollout_id": ["r0"]}))
    assert caught.value.scores.num_rows == 1
    check_errors("s", ExactScorer(max_error_share=1.0), 1, [("r0", "why")], pa.table({"rollout_id": ["r0"]}))


def running(words: str) -> bool:
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and words.encode() in (entry / "cmdline").read_bytes():
                return True
        except OSError:
            continue
    return False
