"""What a file was made from: digests of the files that its job read, kept in the file itself."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from hashlib import file_digest
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

KEY = "rollway.inputs"
"""Of Parquet's key-value metadata; a metrics file has `inputs`."""
READ = {
    "rollout": ("prompts", "policy", "earlier_rollouts", "earlier_scores", "stored"),
    "score": ("prompts", "rollouts", "needs"),
    "curate": ("prompts", "rollouts", "scores"),
    "train": ("batch", "rollouts", "policy", "reference"),
    "evaluate": ("prompts", "policy"),
    "warmup": ("prompts",),
    "reward_model": ("prompts", "rollouts", "scores", "policy"),
    "discriminator": ("prompts", "rollouts", "references", "previous", "policy"),
    "check_teacher": ("prompts", "rollouts", "needs", "policy", "teacher"),
    "lm_eval": ("policy",),
}
"""Stage -> the arguments that are files which decide what it writes. Not those of prepare: the bytes of a project's
prompts name everything that follows."""

_read: dict[str, Sequence[Path]] = {}


@contextmanager
def made_from(files: Mapping[str, Path | Sequence[Path]]) -> Iterator[None]:
    """Within it, tables that are written say that they were made from these files (role -> paths)."""
    global _read
    before = _read
    _read = {role: [paths] if isinstance(paths, Path) else list(paths) for role, paths in files.items()}
    _digests.cache_clear()
    try:
        yield
    finally:
        _read = before
        _digests.cache_clear()


def inputs() -> dict[str, list[str]]:
    """Role -> digests of the job's files, in the order of its command line; empty outside of a job."""
    return dict(_digests())


@cache
def _digests() -> dict[str, list[str]]:
    return {role: [digest(path) for path in paths] for role, paths in sorted(_read.items()) if paths}


def metadata() -> dict[str, str]:
    """For a Parquet file's key-value metadata."""
    return {KEY: json.dumps(inputs(), sort_keys=True)} if _read else {}


def said() -> dict[str, dict[str, list[str]]]:
    """For a metrics file: its key `inputs`; nothing outside of a job, or of one that reads no such file."""
    return {"inputs": found} if (found := inputs()) else {}


def digest(path: Path) -> str:
    """16 hex digits of a file's sha256."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()[:16]


def recorded(path: Path) -> dict[str, list[str]]:
    """What a table or a metrics file says that it was made from; empty where it says nothing (files of before)."""
    try:
        if path.suffix == ".parquet":
            told = json.loads((pq.read_schema(path).metadata or {}).get(KEY.encode(), b"{}"))
        else:
            told = json.loads(path.read_text(encoding="utf-8")).get("inputs", {})
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, pa.ArrowException):
        return {}  # what is wrong with the file is said elsewhere
    return told if is_account(told) else {}


def is_account(told: object) -> bool:
    """Whether it is what files say of their inputs: digests by role."""
    return isinstance(told, dict) and all(
        isinstance(digests, list) and all(isinstance(digest, str) for digest in digests) for digests in told.values()
    )
