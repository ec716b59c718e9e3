"""Data in a page: JSON, compressed, as text that no HTML parser can read anything into."""

import base64
import gzip
import json
import math
from collections.abc import Iterable
from typing import Any

LEVEL = 6
UNKNOWN = 9999
"""Stands for a log-prob or an entropy that nobody knows, in hundredths of a nat."""


def pack(value: Any) -> str:
    """gzip of the JSON in base64: its alphabet has no `<`, so nothing in the data can end the element it lies in.

    The same value gives the same text. Raises ValueError on NaN and infinities: use `number`.
    """
    text = json.dumps(value, allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    raw = text.encode("utf-8", "surrogatepass").decode("utf-8", "replace").encode()
    return base64.b64encode(gzip.compress(raw, LEVEL, mtime=0)).decode("ascii")


def number(value: float | None, digits: int = 4) -> float | None:
    """Rounded to significant digits; None where there is no finite number."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{digits}g}")


def numbers(values: Iterable[float | None], digits: int = 4) -> list[float | None]:
    return [number(value, digits) for value in values]
