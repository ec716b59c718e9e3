"""The prompt of `rollway sql`: statements over several lines, completion, and a real terminal."""

import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rollway.store.catalog import open_catalog
from rollway.terminal import prompt
from store.synthetic import make_results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_results(tmp_path_factory.mktemp("prompt"), {"grpo-s0": 2, "dr-s0": 1})


def talk(results: Path, *lines: str) -> None:
    rest = iter(lines)

    def read(prompt: str) -> str:
        line = next(rest, None)
        if line is None:
            raise EOFError
        if line == "^C":
            raise KeyboardInterrupt
        return line

    prompt.run(results, read)


def test_statements_end_with_a_semicolon_or_an_empty_line(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    talk(results, "SELECT count(*) AS n", "FROM rollouts;", "SELECT 7 AS seven", "", "SELECT 'lost'", "^C", "SELECT 8;")
    out = capsys.readouterr().out
    assert "dr-s0, grpo-s0" in out
    assert "\n36\n" in out
    assert "seven" in out
    assert "8" in out
    assert "lost" not in out


def test_a_mistake_is_printed_and_the_prompt_goes_on(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    talk(
        results,
        "SELECT rewrd FROM scored;",
        "DROP VIEW scored;",
        ".nothing",
        "SELECT 41 + 1 AS x;",
        ".quit",
        "SELECT 5;",
    )
    out, err = capsys.readouterr()
    assert 'did you mean "reward"?\n' in err
    assert "^^^^^" in err
    assert "read-only" in err
    assert ".nothing: is no command" in err
    assert "42" in out
    assert "5" not in out.split("42")[1]


def test_new_scorers_appear_after_a_reload(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_results(tmp_path, {"a-s0": 1})
    session = prompt._Session(tmp_path)
    folder = tmp_path / "a-s0/r0000/p0/scores"
    (folder / "format-000.parquet").rename(folder / "wording-000.parquet")
    session.answer("SELECT wording FROM scored LIMIT 1;")
    session.answer(".reload")
    session.answer("SELECT max(wording) AS best FROM scored;")
    session.answer(".list")
    out, err = capsys.readouterr()
    assert 'no column "wording"' in err
    assert "best" in out
    assert "pass_at_k(n, c, k)" in out


def test_completion(results: Path) -> None:
    with open_catalog(results) as connection:
        completer = prompt.Completer(connection, ["grpo-s0", "dr-s0"])

    def options(text: str) -> list[str]:
        word = text.replace("(", " ").replace("=", " ").replace("'", " ").split(" ")[-1]
        return completer.options(text, word)

    assert options("SELECT * FROM sco") == ["scored", "scores"]
    assert options("SELECT rew")[0] == "reward"
    assert options("FROM groups SELECT sig") == ["signal"]
    assert options("SELECT pass_a") == ["pass_at_k("]
    assert options("FROM ma") == ["maj_at_k("]
    assert completer.options("SELECT 1 FROM scored AS a WHERE a.adv", "a.adv") == ["a.advantage"]
    assert completer.options("SELECT 1 FROM scored WHERE scored.adv", "scored.adv") == ["scored.advantage"]
    assert options("SELECT 1 FROM scored WHERE run = 'gr") == ["grpo-s0"]
    assert options("SELECT 1 FROM scored GRO")[-1] == "GROUP"
    assert completer.options(".re", ".re") == [".reload"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the pseudo-terminal of this test is Linux's")
def test_at_a_real_terminal(results: Path, tmp_path: Path) -> None:
    """Tab completes; the answer comes; the history is kept for the next time."""
    master, slave = pty.openpty()
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "TERM": "xterm"}
    child = subprocess.Popen(
        [sys.executable, "-c", "from rollway.cli import entry; entry()", "sql", "--results", str(results)],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=environment,
        start_new_session=True,
    )
    os.close(slave)
    try:
        wait_for(master, b"rollway> ")
        os.write(master, b"SELECT count(*) * 1000 AS n FROM rollo\t;\n")
        # Ctrl-D counts only once the prompt is there again.
        wait_for(master, b"36000.*rollway> ")
        os.write(master, b"\x04")
        assert child.wait(timeout=60) == 0
    finally:
        child.kill()
        os.close(master)
    assert "FROM rollouts" in (tmp_path / "rollway/sql_history").read_text()


def wait_for(terminal: int, pattern: bytes, seconds: float = 120) -> None:
    """Reads what the terminal shows until `pattern` is in it."""
    seen, end = b"", time.monotonic() + seconds
    while not re.search(pattern, seen, re.DOTALL):
        ready, _, _ = select.select([terminal], [], [], max(0.0, end - time.monotonic()))
        assert ready, seen
        seen += os.read(terminal, 4096)
