import os
import subprocess
import sys
import time

import pytest

from rollway.config.scorers import MathVerifyScorer
from rollway.errors import RollwayError
from rollway.scorers import math_verify, read_answer

HANG = r"$10^{10^{10^{10}}} + 7^{7^{7^{7}}} \mod 13$"


def test_equalities_in_order(make_row, run):
    cases = [
        ("4", "4", 1.0),
        (r"So \boxed{4}.", "4", 1.0),
        (r"\boxed{4} or \boxed{5}", "5", 0.0),
        ("The answer is 0.5", r"\frac{1}{2}", 1.0),
        (r"\boxed{\frac{2}{4}}", "1/2", 1.0),
        (r"$x + 1$", "1+x", 1.0),
        ("#### 70000", "70,000", 1.0),
        (r"\boxed{25}", "025", 1.0),
        (r"\boxed{5}", "4", 0.0),
        ("no idea", "4", 0.0),
        ("", "4", 0.0),
        ("   ", "4", 0.0),
        (r"\boxed{", "4", 0.0),
    ]
    rows = [make_row(text, answer, number=n) for n, (text, answer, _) in enumerate(cases)]
    found = run(MathVerifyScorer(), rows)
    assert [row["reward"] for row in found] == [reward for _, _, reward in cases]
    assert all(row["error"] is None for row in found)


def test_extraction_comes_first_where_asked_for(make_row, run):
    rows = [
        make_row(text, "1/2", number=n) for n, text in enumerate(["3 and 2\n#### 0.5", "#### 1/2", "0.5", "#### }"])
    ]
    assert [row["reward"] for row in run(MathVerifyScorer(extract="hash", processes=1), rows)] == [1, 1, 0, 0]


def test_a_hang_costs_its_own_row_only(make_row, run, monkeypatch):
    monkeypatch.setattr(math_verify, "_WORKER", "tests_slow_worker")
    rows = [make_row(text, number=n) for n, text in enumerate(["1", "hang", "die", "1", "crash", "2", "print"])]
    start = time.monotonic()
    found = run(MathVerifyScorer(timeout=0.5, processes=1, max_error_share=0.2), rows)
    assert time.monotonic() - start < 60
    assert [row["reward"] for row in found] == [1.0, 0.0, 0.0, 1.0, 0.0, 2.0, 1.0]
    assert dict(found[1]["components"]) == {"timeout": 1.0}
    assert dict(found[2]["components"]) == {"memory": 1.0}
    assert "status 3" in found[4]["error"]


@pytest.fixture(autouse=True)
def slow_worker(tmp_path, monkeypatch):
    """A worker of the same protocol that hangs, dies or crashes on demand."""
    (tmp_path / "tests_slow_worker.py").write_text(
        """
import json, os, signal, sys, types
math_verify = sys.modules["math_verify"] = types.ModuleType("math_verify")
from rollway.scorers import math_verify_worker as real
def parse(text, parsing_timeout):
    if text == "hang":
        while True: sum(range(10**6))
    if text == "die": os.kill(os.getpid(), signal.SIGKILL)
    if text == "crash": os._exit(3)
    if text == "print": print("reward: 1")
    return [text]
math_verify.parse = parse
math_verify.verify = lambda gold, given, timeout_seconds: 2.0 if given == ["2"] else 1.0
real.main(float(sys.argv[1]))
"""
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])


def test_a_huge_power_does_not_stop_the_run(make_row, run):
    found = run(
        MathVerifyScorer(timeout=1.0, processes=1), [make_row(HANG, number=0), make_row(r"\boxed{4.0}", number=1)]
    )
    assert [row["reward"] for row in found] == [0.0, 1.0]
    assert found[0]["error"] is None


def test_answers_that_are_no_mathematics_or_missing_are_errors(make_row, run):
    with pytest.raises(RollwayError, match="first, rollout r0: the prompt has no answer"):
        run(MathVerifyScorer(), [make_row("4", None)])
    with pytest.raises(RollwayError, match="not mathematics"):
        run(MathVerifyScorer(), [make_row("4", "$$")])


def test_workers_end_with_their_scorer(make_row, run):
    """Those that other tests of this process keep, as the fuzzing does, are none of it."""

    def workers():
        listing = subprocess.run(["ps", "-o", "pid,args", "--ppid", str(os.getpid())], capture_output=True, text=True)
        return {line for line in listing.stdout.splitlines() if "math_verify_worker" in line}

    before = workers()
    run(MathVerifyScorer(processes=1), [make_row("5.0", "5", number=0)])
    assert workers() <= before


def test_answers_for_majority_votes():
    assert read_answer(MathVerifyScorer(), r"\boxed{4}") == "4"
    assert read_answer(MathVerifyScorer(), "it is 5.") == "5"
    assert read_answer(MathVerifyScorer(), " x ") == "x"
