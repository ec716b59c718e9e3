"""Files and folders appear whole: the order of the calls, what is left behind, what is said."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from rollway.errors import RollwayError, of_system, unread, unwritten
from rollway.policies.tensor_files import system_errors
from rollway.store import atomic


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is flushed and renamed, in order, by name."""
    seen: list[tuple[str, str]] = []
    flush, replace, rename = atomic.flush, os.replace, Path.rename
    monkeypatch.setattr(atomic, "flush", lambda path: (seen.append(("flush", path.name)), flush(path)))
    monkeypatch.setattr(atomic.os, "replace", lambda a, b: (seen.append(("rename", b.name)), replace(a, b)))
    monkeypatch.setattr(Path, "rename", lambda a, b: (seen.append(("rename", b.name)), rename(a, b)))
    return seen


def test_a_file_is_flushed_before_it_gets_its_name_and_the_folder_after(
    tmp_path: Path, calls: list[tuple[str, str]]
) -> None:
    atomic.write_text(tmp_path / "x.json", "1")
    assert calls == [("flush", f".tmp-x.json-{os.getpid()}"), ("rename", "x.json"), ("flush", tmp_path.name)]


def test_so_are_the_files_of_a_folder(tmp_path: Path, calls: list[tuple[str, str]]) -> None:
    target = tmp_path / "main"
    target.mkdir()
    (target / "old").write_text("")
    with atomic.atomic_folder(target) as temporary:
        (temporary / "a").write_text("1")
        (temporary / "deeper").mkdir()
        (temporary / "deeper/b").write_text("2")
    renamed = calls.index(("rename", "main"))
    assert {name for _, name in calls[:renamed]} == {"a", "deeper", "b", f".tmp-main-{os.getpid()}"}
    assert calls[renamed:] == [("rename", "main"), ("flush", tmp_path.name)]
    assert sorted(path.name for path in target.rglob("*")) == ["a", "b", "deeper"]


def test_what_fails_in_a_folder_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "main"
    target.mkdir()
    (target / "old").write_text("")

    def fill() -> None:
        with atomic.atomic_folder(target) as temporary:
            (temporary / "new").write_text("")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(
        RollwayError, match=r"main: cannot be written \(No space left on device\); nothing was changed;"
    ):
        fill()
    assert [path.name for path in tmp_path.iterdir()] == ["main"]
    assert [path.name for path in target.iterdir()] == ["old"]


def test_what_killed_processes_left_is_removed_and_what_others_write_is_not(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    live = os.getppid()
    for name in (
        f".tmp-x.json-{dead.pid}",
        f".tmp-x.json-{dead.pid}.wal",
        f".tmp-y.json-{dead.pid}",
        f".tmp-x.json-{live}",
        ".tmp-x.json-mine",
    ):
        (tmp_path / name).write_text("")
    (tmp_path / f".tmp-x.json-{dead.pid}-more").mkdir()
    (tmp_path / f".tmp-x.json-{dead.pid}-more/file").write_text("")
    atomic.write_text(tmp_path / "x.json", "1")
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == sorted([f".tmp-y.json-{dead.pid}", f".tmp-x.json-{live}", ".tmp-x.json-mine", "x.json"])


def test_a_full_disk_is_no_error_of_safetensors() -> None:
    for said in ("I/O error: No space left on device (os error 28)", "IoError(Os { code: 28, kind: StorageFull })"):
        with pytest.raises(OSError, match="No space left") as raised, system_errors():
            raise SafetensorError(f"Error while serializing: {said}")
        assert raised.value.errno == errno.ENOSPC
    with pytest.raises(SafetensorError), system_errors():
        raise SafetensorError("Error while deserializing header: invalid JSON")


def test_sentences() -> None:
    path = Path("results/x.json")
    full = OSError(errno.ENOSPC, "Error writing bytes to file. Detail: [errno 28] No space left on device")
    said = "results/x.json: cannot be written (No space left on device); nothing was changed; free space on that disk"
    assert str(unwritten(path, full)) == f"{said} and run it again"
    assert str(unread(path, OSError("odd\nwords"))) == "results/x.json: cannot be read (odd words)"
    broken = OSError(errno.EIO, "Input/output error", "a.sql")
    assert str(of_system(broken)).startswith("a.sql: Input/output error; check the disk")
    assert of_system(OSError(errno.ENOENT, "No such file")) is None
    assert of_system(ValueError("x")) is None


def test_json_that_cannot_be_read_is_not_called_missing(tmp_path: Path) -> None:
    (tmp_path / "x.json").mkdir()
    with pytest.raises(RollwayError, match=r"x\.json: cannot be read \(Is a directory\); remove the folder"):
        atomic.read_json(tmp_path / "x.json", "a stage")
