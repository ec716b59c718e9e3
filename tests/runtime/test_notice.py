"""Progress bars: drawn at a terminal, by one job at a time; elsewhere nothing is written."""

import io
import os
import pty
import select
import subprocess
import sys
import threading
import time

import pytest

from rollway.runtime import notice

STAGE = """
import time
from rollway.runtime.notice import progress, tick
with progress("rollout r3", 40) as bar:
    for n in range(40):
        time.sleep(0.02)
        tick(1, tokens=100, reward=float(n % 2))
    bar.reach(40, "part 1/1 [bold]")
    time.sleep(0.3)
print("end", flush=True)
"""


def at_a_terminal(code: str, jobs: int = 1) -> bytes:
    """What `jobs` processes that share a terminal write on it."""
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    children = [
        subprocess.Popen([sys.executable, "-c", code], stderr=slave, stdout=slave, stdin=slave, env=environment)
        for _ in range(jobs)
    ]
    os.close(slave)
    seen, deadline = b"", time.monotonic() + 120
    try:
        while time.monotonic() < deadline and seen.count(b"end\r\n") < jobs:
            if select.select([master], [], [], 1.0)[0]:
                seen += os.read(master, 65536)
    except OSError:
        pass  # the last writer has closed its side
    finally:
        for child in children:
            child.kill()
            child.wait()
        os.close(master)
    return seen


def test_a_bar_says_tokens_per_second_and_the_reward_so_far() -> None:
    seen = at_a_terminal(STAGE)
    assert b"rollout r3" in seen
    assert b"40/40" in seen
    assert b" tokens/s  reward 0.500  part 1/1 [bold]" in seen


def test_jobs_that_share_a_terminal_do_not_draw_over_each_other() -> None:
    """Two at once: both end, and one bar is drawn at a time, so the terminal never holds two."""
    code = STAGE.replace("print(", "import rollway.runtime.notice as n; print(")
    seen = at_a_terminal(f"import sys\n{code}", jobs=2)
    assert seen.count(b"end\r\n") == 2
    assert b"40/40" in seen
    hidden = seen.count(b"\x1b[?25l")
    assert 1 <= hidden <= 2
    assert seen.find(b"\x1b[?25l", seen.find(b"\x1b[?25l") + 1) in (-1, *range(seen.find(b"\x1b[?25h"), len(seen)))


def test_nothing_is_written_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with notice.progress("score exact", 10) as bar:
        notice.tick(3, tokens=30, reward=1.0)
        notice.tick(reward=0.0)
        bar(2, "loss 0.5")
        assert (bar.done, bar.tokens) == (6, 30)
        assert bar.said().endswith("tokens/s  reward 0.750  loss 0.5")
        bar.reach(4)
        assert bar.done == 6
        bar.reach(99)
        assert bar.done == 10
    assert capsys.readouterr() == ("", "")


def test_ticks_outside_of_a_stage_and_of_inner_stages_go_where_they_belong() -> None:
    notice.tick(tokens=5)
    with notice.progress("outer", 2) as outer:
        with notice.progress("inner", 2) as inner:
            notice.tick()
        notice.tick()
    assert (outer.done, inner.done) == (1, 1)


def test_threads_tick_the_same_bar() -> None:
    with notice.progress("rollout", 4000) as bar:
        threads = [threading.Thread(target=lambda: [notice.tick(tokens=1) for _ in range(1000)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (bar.done, bar.tokens) == (4000, 4000)


def test_a_stderr_that_is_no_file_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with notice.progress("x", 1) as bar:
        bar(1)
    assert bar.done == 1
