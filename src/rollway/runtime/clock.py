"""A clock that was ahead, and was set right, leaves files dated in the future: no job could go on from them."""

import contextlib
import os
import time
from pathlib import Path

from rollway.runtime.notice import notice

AHEAD = 2.0
"""Seconds in the future from which a file counts: machines that share a disk differ by less."""


def settle(results: str) -> None:
    """Dates results that are of the future to now; says how many there were. Called by the Snakefile's `onstart`.

    Snakemake stops at a job whose output is older than an input of its own, and its output is dated now. What is dated
    anew is not run anew: Snakemake knows the bytes of what it made.
    """
    now = time.time()
    moved = 0
    for folder, _, files in os.walk(results):
        for name in files:
            # A temporary file of another process may be gone by now.
            with contextlib.suppress(OSError):
                path = Path(folder) / name
                if path.stat(follow_symlinks=False).st_mtime > now + AHEAD:
                    os.utime(path, (now, now), follow_symlinks=False)
                    moved += 1
    if moved:
        notice(f"{moved} files of {results} were dated in the future, by a clock that was ahead: now they are of today")
