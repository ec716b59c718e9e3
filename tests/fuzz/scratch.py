"""Where inputs that are files lie while they are tried."""

import os
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

ROOT = Path(__file__).resolve().parents[2]


@cache
def scratch() -> Path:
    return Path(mkdtemp(prefix="rollway-fuzz-"))


def written(name: str, content: bytes | str) -> Path:
    path = scratch() / f"{os.getpid()}-{name}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return path
