"""Files appear whole, by rename, or not at all."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rollway.errors import RollwayError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is flushed to disk and renamed, on failure removed.

    Raises RollwayError when the disk is full or the folder cannot be written.
    """
    temporary = path.parent / f".tmp-{path.name}-{os.getpid()}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _fsync(temporary)
        os.replace(temporary, path)
        _fsync(path.parent)
    except OSError as error:
        raise RollwayError(f"{path}: cannot be written ({error.strerror or error}); nothing was changed") from error
    finally:
        temporary.unlink(missing_ok=True)


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
    except (ValueError, UnicodeDecodeError) as error:
        raise RollwayError(
            f"{path}: damaged ({error}); delete it and run `snakemake {path}` again ({made_by})"
        ) from error


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
