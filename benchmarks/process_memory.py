"""Memory of a process and of everything that it started, sampled: shared pages are counted once (PSS)."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

INTERVAL = 0.05
"""Seconds between samples."""


@dataclass
class Peak:
    """The largest sum so far, and what it was made of."""

    total: int = 0
    """Bytes."""
    parts: dict[str, int] = field(default_factory=dict)
    """Bytes by process, named by its command and number."""
    samples: int = 0


@contextmanager
def watched(root: int) -> Iterator[Peak]:
    """Samples process `root` and its descendants until the block ends."""
    peak, done = Peak(), threading.Event()

    def sample() -> None:
        while not done.wait(INTERVAL):
            parts = {pid: size for pid in descendants(root) if (size := proportional(pid))}
            peak.samples += 1
            if sum(parts.values()) > peak.total:
                peak.total = sum(parts.values())
                peak.parts = {f"{_command(pid)} ({pid})": size for pid, size in parts.items()}

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def descendants(root: int) -> list[int]:
    """`root` and all processes below it; one that is starting or ending may be missed."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and (parent := _parent(entry)):
            children.setdefault(parent, []).append(int(entry.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def proportional(pid: int) -> int:
    """Bytes: private pages, and of shared ones a share by the number of processes. 0 when the process is gone."""
    try:
        rows = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(row.split()[1]) * 1024 for row in rows if row.startswith("Pss:")), 0)


def _parent(entry: Path) -> int:
    try:
        return int((entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _command(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return "?"
    words = [word for word in words if word]
    if "stage" in words:
        return " ".join(words[words.index("stage") :][:2])
    named = [Path(word).name for word in words[:4] if not word.startswith("-")]
    return " ".join(named)[:60] or "?"
