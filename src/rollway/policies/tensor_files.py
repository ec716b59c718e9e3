"""What goes wrong while safetensors files are written, in Python's own terms."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def system_errors() -> Iterator[None]:
    """Raises OSError where safetensors reports what the system said: a full disk is no SafetensorError."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)|\bcode: (\d+)\b", str(error))
        if number is None:
            raise
        code = int(number[1] or number[2])
        raise OSError(code, os.strerror(code)) from error
