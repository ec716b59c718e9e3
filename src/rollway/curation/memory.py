"""Keeps a process near the memory that its arrays take: allocators hold on to what was freed, for speed."""

import ctypes
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import pyarrow as pa

MANY_ROWS = 4_000_000
"""From here on memory counts for more than the 15 % of time that giving it back costs."""


_LIMIT = re.compile(r"\s*([0-9.]+)\s*([KMGT]?)(I?)B\s*", re.IGNORECASE)


def limit_bytes(memory_limit: str | None) -> float:
    """Of DuckDB's notation, "2GB" or "1.5GiB" say; infinite where nothing is limited, or a share of the machine is."""
    found = _LIMIT.fullmatch(memory_limit or "")
    if found is None:
        return float("inf")
    number, prefix, binary = found.groups()
    return float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " ")


@contextmanager
def frugal(rows: int) -> Iterator[None]:
    """Where rows are many, Arrow allocates by the C library for a while, so that `give_back` reaches all of it."""
    before = pa.default_memory_pool()
    if rows >= MANY_ROWS:
        pa.set_memory_pool(pa.system_memory_pool())
    try:
        yield
    finally:
        pa.set_memory_pool(before)


def give_back() -> None:
    """Returns freed memory to the system, where Arrow allocates by a C library that can."""
    trim = _trim()
    if trim is not None and pa.default_memory_pool().backend_name == "system":
        trim(0)


@cache
def _trim() -> "ctypes._NamedFuncPointer | None":
    """glibc's malloc_trim."""
    if sys.platform != "linux":
        return None
    try:
        return ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):  # Another C library.
        return None
