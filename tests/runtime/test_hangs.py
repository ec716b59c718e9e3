"""What tests do about commands that hang (hangs.py)."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import hangs


def hanging(folder: Path, *, times: int) -> Callable[[bool], str]:
    """A program that starts one that spins; it does not end the first `times` times."""
    marks = folder / "marks"
    spin = "import pathlib, sys\nif len(pathlib.Path(sys.argv[1]).read_text()) <= int(sys.argv[2]):\n  while True: pass"
    command = [sys.executable, "-c", "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"]

    def run(again: bool) -> str:
        marks.write_text((marks.read_text() if marks.exists() else "") + ("b" if again else "a"))
        process = subprocess.Popen([*command, spin, str(marks), str(times)])
        try:
            process.communicate(timeout=2 if len(marks.read_text()) <= times else 60)
        except subprocess.TimeoutExpired:
            told = hangs.abort(process.pid)
            process.wait()
            raise hangs.Hung(told) from None
        return marks.read_text()

    return run


def test_a_command_that_hangs_once_is_told_of_and_run_again(tmp_path: Path) -> None:
    with pytest.warns(hangs.HangWarning, match=r"(?s)while True.*\d+ R \S+ \+[1-9]\d* ticks"):
        assert hangs.once_more(hanging(tmp_path, times=1)) == "ab"


@pytest.mark.filterwarnings("ignore::hangs.HangWarning")
def test_a_command_that_hangs_twice_fails_and_leaves_no_process(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="while True"):
        hangs.once_more(hanging(tmp_path, times=2))
    assert (tmp_path / "marks").read_text() == "ab"
    assert str(tmp_path) not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
