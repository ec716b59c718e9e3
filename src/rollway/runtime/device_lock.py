"""Shares this machine's GPUs among jobs, by an flock on a file per GPU: Snakemake counts GPUs but says not which."""

import fcntl
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rollway.errors import RollwayError
from rollway.runtime import gpu_tenants

POLL = 0.5
"""Seconds between tries while every GPU is taken."""


def default_folder() -> Path:
    """One folder per user and machine, never on a shared file system."""
    return Path(tempfile.gettempdir()) / f"rollway-gpus-{os.geteuid()}"


def on_cpu() -> bool:
    """Whether ROLLWAY_DEVICE=cpu keeps the stages off the machine's GPUs."""
    return os.environ.get("ROLLWAY_DEVICE") == "cpu"


def visible_devices(nodes: Path = Path("/dev")) -> list[str]:
    """What CUDA_VISIBLE_DEVICES names, or every NVIDIA GPU of the machine; none under ROLLWAY_DEVICE=cpu. Needs neither
    CUDA nor torch."""
    if on_cpu():
        return []
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return sorted((p.name[6:] for p in nodes.glob("nvidia*") if re.fullmatch(r"nvidia\d+", p.name)), key=int)
    names = [name.strip() for name in listed.split(",")]
    # CUDA ignores what follows the first invalid entry.
    end = next((place for place, name in enumerate(names) if name in ("", "-1")), len(names))
    return names[:end]


@contextmanager
def hold_devices(
    folder: Path | None = None, *, count: int = 1, nodes: Path = Path("/dev"), engine: str | None = None
) -> Iterator[list[str]]:
    """Waits for `count` free GPUs, holds them and sets CUDA_VISIBLE_DEVICES to them; yields their names.

    engine: the owner of the rollout engine that the job will use, see `gpu_tenants.in_order`.

    Yields [] and changes nothing where there is no GPU; under ROLLWAY_DEVICE=cpu it yields [] and hides them all. The
    kernel frees a GPU with the last process that holds it, however that ends. While waiting, stderr names the holders.
    Raises RollwayError when the machine has fewer GPUs than `count`, the folder is another user's, or CUDA is already
    in use in this process.
    """
    if on_cpu():
        _before_cuda()
        with _shown([]):
            yield []
        return
    devices = visible_devices(nodes)
    if not devices:
        yield []
        return
    if count > len(devices):
        raise RollwayError(f"the job needs {count} GPUs and this machine offers {len(devices)}: {', '.join(devices)}")
    _before_cuda()
    folder = _private(folder or default_folder())
    held = _wait(folder, devices, count, engine)
    try:
        with _shown(list(held)):
            yield list(held)
    finally:
        for descriptor in held.values():
            os.close(descriptor)


def _before_cuda() -> None:
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        raise RollwayError("a GPU must be chosen before CUDA is first used in this process")


@contextmanager
def _shown(devices: list[str]) -> Iterator[None]:
    """CUDA sees these for a while."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        yield
    finally:
        if before is None:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def _private(folder: Path) -> Path:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.lstat().st_uid != os.geteuid() or not folder.is_dir():
        raise RollwayError(f"{folder}: the folder of GPU locks belongs to another user; set TMPDIR to one of yours")
    return folder


def _wait(folder: Path, devices: list[str], count: int, engine: str | None) -> dict[str, int]:
    told = ""
    while len(held := _try(folder, _candidates(folder, devices, count, engine), count)) < count:
        # All or nothing: two jobs that each held a part would wait for each other for ever.
        for descriptor in held.values():
            os.close(descriptor)
        message = "; ".join(f"GPU {name} is held by process {_holder(folder, name)}" for name in devices)
        if message != told:
            print(f"rollway: waiting for {count} GPU: {message}", file=sys.stderr, flush=True)
            told = message
        time.sleep(POLL)
    return held


def _candidates(folder: Path, devices: list[str], count: int, engine: str | None) -> list[str]:
    found = gpu_tenants.in_order(folder, devices, engine)
    return found if len(found) >= count else devices


def _try(folder: Path, devices: list[str], count: int) -> dict[str, int]:
    held: dict[str, int] = {}
    for name in devices:
        descriptor = os.open(_file(folder, name), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            continue
        # At once, and never empty in between: whoever waits reads the last holder's number until then.
        size = os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        os.ftruncate(descriptor, size)
        held[name] = descriptor
        if len(held) == count:
            break
    return held


def _holder(folder: Path, name: str) -> str:
    return _file(folder, name).read_text().partition("\n")[0] or "?"


def _file(folder: Path, name: str) -> Path:
    return folder / f"gpu-{re.sub(r'[^A-Za-z0-9_-]', '_', name)}.lock"
