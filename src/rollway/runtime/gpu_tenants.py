"""Which GPUs hold a rollout engine that outlives its job, and whether that engine is awake.

Such an engine never holds a GPU's lock (`device_lock`): it computes only for a job that holds it, so that training and
an engine on one GPU cannot wait for each other. What it holds is a mark of its own, an flock that the kernel drops with
its process: jobs of the same workflow go back to its GPU, and other jobs keep away from it while it is awake, as long
as there is another.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Tenant:
    """An engine on a GPU."""

    owner: str
    """The folder of its workflow's engines."""
    awake: bool
    """Whether it holds the GPU's memory now."""


def tenant(folder: Path, gpu: str) -> Tenant | None:
    """The engine on a GPU; None when there is none, or it has ended."""
    try:
        descriptor = os.open(_file(folder, gpu), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        pass
    finally:
        os.close(descriptor)
    try:
        said = json.loads(_file(folder, gpu).read_text())
        return Tenant(str(said["owner"]), bool(said["awake"]))
    except (OSError, ValueError, KeyError):
        # It is moving in: whose it is will be said in a moment.
        return Tenant("", True)


def move_in(folder: Path, gpus: Sequence[str], owner: str) -> list[int]:
    """Descriptors that mark the GPUs for as long as the process that inherits them lives."""
    descriptors = []
    for gpu in gpus:
        descriptor = os.open(_file(folder, gpu), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        # Held by an engine that is ending: it cannot be long.
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        descriptors.append(descriptor)
    say(folder, gpus, Tenant(owner, True))
    return descriptors


def say(folder: Path, gpus: Sequence[str], now: Tenant) -> None:
    """Notes that the engine on these GPUs woke or went to sleep."""
    for gpu in gpus:
        _file(folder, gpu).write_text(json.dumps({"owner": now.owner, "awake": now.awake}))


def in_order(folder: Path, gpus: Sequence[str], engine: str | None) -> list[str]:
    """The GPUs that a job may take, best first. `engine`: the owner of the engine that the job will use.

    A job with an engine goes where its engine is; others take a GPU without one, then one whose engine sleeps. Where an
    engine of somebody else is awake a job goes only when that is so of every GPU.
    """
    ranks = {gpu: _rank(tenant(folder, gpu), engine) for gpu in gpus}
    quiet = [gpu for gpu in gpus if ranks[gpu] < 3]
    return sorted(quiet or gpus, key=lambda gpu: ranks[gpu])


def _rank(found: Tenant | None, engine: str | None) -> int:
    if found is None:
        return 1
    if engine is not None and found.owner == engine:
        return 0
    return 3 if found.awake else 2


def _file(folder: Path, gpu: str) -> Path:
    return folder / f"engine-{re.sub(r'[^A-Za-z0-9_-]', '_', gpu)}.lock"
