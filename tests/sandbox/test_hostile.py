"""Every hostile program is contained and scored 0; those that can be shown to work outside do work there."""

import os
import subprocess
import sys
import threading
import time

import psutil
import pytest

from rollway.config.scorers import ProgramScorer
from rollway.scorers import program as scorer
from sandbox import hostile

CASES = [pytest.param(case, id=case.name) for case in hostile.ALL]
BITING = [pytest.param(case, id=case.name) for case in hostile.ALL if case.works_outside]
FORMATS = {"stdio": "stdio", "tests": "humaneval", "asserts": "mbpp"}


@pytest.fixture
def judge(world, make_row, monkeypatch):
    monkeypatch.setenv("ROLLWAY_TEST_KEY", world.secret)

    def judge(case, *programs, **settings):
        given = {"cpu": 1, "wall": 8.0, "memory": 256, "output": 1, **case.settings, **settings}
        config = ProgramScorer(format=FORMATS[case.by], code="all", **given)
        rows = [make_row(text, number=n, meta=world.meta(case)) for n, text in enumerate(programs)]
        return scorer.verdicts("s", config, rows, 1)

    return judge


@pytest.mark.parametrize("case", CASES)
def test_contained_and_scored_0(case, world, judge):
    if case.name == "other_architecture" and os.uname().machine != "x86_64":
        pytest.skip("machine code of x86_64")
    started = time.monotonic()
    [verdict] = judge(case, world.written_for(case))
    assert verdict.error is None
    assert verdict.reward == 0.0
    assert verdict.components == {"passed": 0.0, **({case.ends: 1.0} if case.ends else {})}
    assert time.monotonic() - started < 25.0
    assert world.untouched()
    assert not left_behind()


def left_behind():
    """Processes of this test's boxes that still live."""
    return [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("case", BITING)
def test_works_where_nothing_contains_it(case, world, tmp_path, monkeypatch):
    """The attack is real: a plain interpreter, or tests in one process with the program, fall for it."""
    monkeypatch.setenv("ROLLWAY_TEST_KEY", world.secret)
    text, meta = world.written_for(case), world.meta(case)
    if case.by == "tests":
        text = f"{meta['prompt']}\n{text}\n{meta['test']}\ncheck(answer)\n"
    if case.by == "asserts":
        text = "\n".join([text, *meta["test_list"]])
    file = tmp_path / "program.py"
    file.write_text(text)
    done = subprocess.run([sys.executable, str(file)], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    world.victim.write_text("unchanged")
    if case.by != "stdio":
        assert done.returncode == 0
    else:
        assert "pwned" in done.stdout.split()


def test_the_honest_program_passes_both_kinds_of_tests(world, judge):
    stdio, tests = hostile.RESOURCES[0], hostile.VERDICT[0]
    assert [v.reward for v in judge(stdio, "print('pwned')")] == [1.0]
    honest = f"def answer(n):\n    return {world.marker!r} if n == 3 else 94720\n"
    assert [v.reward for v in judge(tests, honest)] == [1.0]


def test_nothing_passes_from_a_program_to_the_next(world, judge):
    case = next(c for c in hostile.ALL if c.name == "home")
    first = """
import builtins, os, sys, random
open("left", "w").write("x")
os.environ["LEFT"] = "x"
builtins.left = sys.modules["left"] = True
sys.path.insert(0, "/scratch")
"""
    second = """
import builtins, os, sys
left = os.listdir(".") or "LEFT" in os.environ or hasattr(builtins, "left") or "left" in sys.modules
print("held" if left else "pwned")
"""
    assert [v.reward for v in judge(case, first, second)] == [0.0, 1.0]


def test_tests_stay_out_of_memory_of_later_programs(world, judge):
    """The honest program's tests and text were in the same boxes before."""
    case = next(c for c in hostile.ALL if c.name == "reads_memory")
    honest = f"def answer(n):\n    return {world.marker!r} if n == 3 else 94720\n"
    assert [v.reward for v in judge(case, honest, case.program)] == [1.0, 0.0]


def test_a_box_dies_with_the_process_that_opened_it(tmp_path):
    script = """
import os, time
from rollway.config.scorers import ProgramScorer
from rollway.sandbox.client import Box, file_of
from rollway.scorers.program import limits
box = Box(limits(ProgramScorer(format="stdio", cpu=30, wall=60.0)), [], [])
box.start("script", [file_of(b"while True: pass"), file_of(b""), os.open("/dev/null", os.O_WRONLY)])
print(box._process.pid, flush=True)
time.sleep(60)
"""
    judge = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    box = psutil.Process(int(judge.stdout.readline()))
    deadline = time.monotonic() + 20
    while len(family := box.children(recursive=True)) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(family) == 3, "server, keeper and program"
    judge.kill()
    judge.wait()
    judge.stdout.close()
    _, alive = psutil.wait_procs([box, *family], timeout=20)
    assert not alive


def test_threads_of_the_judge_work_at_once(world, judge):
    """Four sleepers in four boxes, each until its limit of 3 s."""
    case = next(c for c in hostile.ALL if c.name == "sleeper")
    started = time.monotonic()
    found = judge(case, *(f"import time\ntime.sleep(60 + {n})" for n in range(4)), wall=3.0, parallel=4)
    assert [v.components.get("timeout") for v in found] == [1.0] * 4
    assert time.monotonic() - started < 4 * 3.0
    assert threading.active_count() < 50
