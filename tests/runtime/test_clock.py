"""Results that are dated in the future."""

import os
import time
from pathlib import Path

import pytest

from rollway.runtime import clock


def test_what_is_of_the_future_is_dated_to_now(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    times = {"old": 9e8, "ahead": 5e9, "deeper/ahead": 5e9}
    for name, moment in times.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (moment, moment))
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    before = time.time()
    clock.settle(str(tmp_path))
    assert (tmp_path / "old").stat().st_mtime == 9e8
    for name in ("ahead", "deeper/ahead"):
        assert before <= (tmp_path / name).stat().st_mtime <= time.time()
    assert "2 files" in capsys.readouterr().err
    clock.settle(str(tmp_path))
    clock.settle(str(tmp_path / "not there"))
    assert capsys.readouterr().err == ""
