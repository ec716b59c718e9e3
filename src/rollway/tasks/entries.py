"""Task sources: files and datasets -> entries, each with the words that name it in messages."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rollway.config import assets
from rollway.config.tasks import (
    BuiltinSource,
    HuggingFaceSource,
    JsonlSource,
    ParquetSource,
    ReasoningGymSource,
    Source,
)
from rollway.errors import RollwayError, unread
from rollway.tasks.procedural import reasoning_gym_entries


@dataclass(frozen=True)
class Entry:
    """One entry of a source. `meta` is what its verifier needs beside the fields."""

    where: str
    fields: dict[str, Any]
    meta: dict[str, Any] = field(default_factory=dict)


def read_entries(source: Source, root: Path) -> list[Entry]:
    """All entries of a source; relative paths start at `root`.

    Raises RollwayError naming file and line on missing, broken or empty data.
    """
    match source:
        case ReasoningGymSource():
            label = f"reasoning_gym {source.dataset}"
            entries = [Entry(f"{label} entry {i}", f, m) for i, (f, m) in enumerate(reasoning_gym_entries(source))]
        case HuggingFaceSource():
            label = source.path
            rows = _huggingface_rows(source, root)
            entries = [Entry(f"{label} row {i}", row) for i, row in enumerate(rows)]
        case JsonlSource():
            label = source.path
            entries = list(_jsonl_entries(root / source.path, label))
        case ParquetSource():
            label = source.path
            entries = [Entry(f"{label} row {i}", row) for i, row in enumerate(_parquet_rows(root / source.path, label))]
        case BuiltinSource():
            path = assets.find("data", source.name, ".jsonl")
            label = f"data/{path.name}"
            entries = list(_jsonl_entries(path, label))
    if not entries:
        raise RollwayError(f"{label}: holds no entries; give a source with at least one")
    return entries


def _jsonl_entries(path: Path, label: str) -> Iterator[Entry]:
    for number, line in enumerate(_bytes_of(path, label).split(b"\n"), start=1):
        where = f"{label} line {number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise RollwayError(
                f"{where}: not UTF-8 (byte {line[error.start]:#04x} at {error.start}); convert the file to UTF-8"
            ) from None
        if not text:
            continue
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RollwayError(f"{where}: not JSON ({error}); mend or delete the line") from None
        if not isinstance(fields, dict):
            raise RollwayError(
                f"{where}: holds a JSON {type(fields).__name__}, not an object; "
                'each line must be {"field": value, ...}'
            )
        yield Entry(where, fields)


def _bytes_of(path: Path, label: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise RollwayError(f"{label}: no such file ({path}); correct the path of the task's source") from None
    except OSError as error:
        raise unread(label, error) from None


def _parquet_rows(path: Path, label: str) -> list[dict[str, Any]]:
    if not path.is_file():
        raise RollwayError(f"{label}: no such file ({path}); correct the path of the task's source")
    try:
        with pq.ParquetFile(path) as file:
            return file.read().to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise RollwayError(f"{label}: not a whole Parquet file ({_first_line(error)}); fetch it again") from None
    except UnicodeDecodeError as error:
        raise RollwayError(f"{label}: a text column is not UTF-8 ({error}); convert the file to UTF-8") from None


def _huggingface_rows(source: HuggingFaceSource, root: Path) -> list[dict[str, Any]]:
    import datasets

    local = root / source.path
    try:
        loaded = datasets.load_dataset(
            str(local) if local.exists() else source.path,
            source.name,
            split=source.split,
            revision=source.revision,
            data_files=_local_files(source.data_files, root),
        )
    except Exception as error:
        # The library raises a dozen types for wrong names, splits, files or connections; the innermost says it.
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise RollwayError(
            f"{source.path}: datasets.load_dataset failed ({type(cause).__name__}: {_first_line(cause)}); "
            "check path, name, split and data_files of the task's source, and the network for a hub dataset"
        ) from error
    return [dict(row) for row in loaded]


def _local_files(files: str | list[str] | dict[str, str] | None, root: Path) -> Any:
    def resolve(name: str) -> str:
        return name if "://" in name else str(root / name)

    match files:
        case None:
            return None
        case str():
            return resolve(files)
        case list():
            return [resolve(name) for name in files]
        case dict():
            return {split: resolve(name) for split, name in files.items()}


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
