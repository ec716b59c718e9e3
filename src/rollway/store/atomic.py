"""Files appear whole, by rename, or not at all."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rollway.errors import RollwayError, unread, unwritten


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is flushed to disk and renamed, on failure removed.

    Raises RollwayError when the disk is full or the folder cannot be written.
    """
    temporary = temporary_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, path.name)
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    except OSError as error:
        raise unwritten(path, error) from error
    finally:
        # On a read-only file system even a file that is not there cannot be removed.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `target`, which replaces it on success: flushed to disk, with all its files.

    Raises RollwayError as `atomic_path` does.
    """
    temporary = temporary_beside(target)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target.parent, target.name)
        temporary.mkdir()
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            flush(path)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        flush(target.parent)
    except OSError as error:
        raise unwritten(target, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def temporary_beside(path: Path) -> Path:
    """Its name begins with a dot and has another suffix, so that no pattern of a reader finds it."""
    return path.parent / f".tmp-{path.name}-{os.getpid()}"


def remove_leftovers(folder: Path, name: str) -> None:
    """Deletes what killed processes left of `name`: `.tmp-{name}-{pid}`, also with more after a `-` or `.`, as the log
    that DuckDB keeps beside a file."""
    pattern = re.compile(rf"\.tmp-{re.escape(name)}-(\d+)([-.].*)?")
    for entry in list(os.scandir(folder)):
        found = pattern.fullmatch(entry.name)
        if found and not _is_alive(int(found[1])):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    os.unlink(entry)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Canonical JSON: sorted keys, so that the same value gives the same bytes."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path, made_by: str) -> Any:
    """`made_by` says which stage writes the file, for the message. Raises RollwayError when missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RollwayError(f"{path}: missing; run `snakemake --force {path}` ({made_by})") from None
    except OSError as error:
        raise unread(path, error) from error
    except (ValueError, UnicodeDecodeError) as error:
        raise RollwayError(
            f"{path}: damaged ({error}); delete it and run `snakemake {path}` again ({made_by})"
        ) from error


def flush(path: Path) -> None:
    """What was written to a file, or the names in a folder, is on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
