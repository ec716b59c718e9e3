"""Starts and ends the vLLM process, and finds the one that a workflow keeps for all its rounds. Linux only.

Within a workflow (ROLLWAY_ENGINES, set by the Snakefile's `onstart`) an engine outlives the job that started it: a
socket, a log and a note of its process id lie in `results/.worker`. Elsewhere the engine is the job's own, over a pair
of sockets, and ends with it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollway.errors import RollwayError
from rollway.runtime import client, gpu_tenants
from rollway.runtime.device_lock import default_folder
from rollway.runtime.notice import notice

SERVER = Path(__file__).parent / "vllm_process" / "vllm_server.py"
IDLE = 7200.0
"""Seconds without a client after which an engine of a workflow ends: longer than most updates take."""
STOP_SECONDS = 30.0
TAIL_LINES = 12
MISSING = "rollout.engine.kind: vllm needs vLLM's own environment: run `make vllm`, or set ROLLWAY_VLLM_PYTHON"


def find_python() -> Path:
    """The Python of vLLM's environment. Raises RollwayError naming `make vllm` when there is none."""
    named = os.environ.get("ROLLWAY_VLLM_PYTHON")
    places = [Path(named)] if named else [Path(), Path(sys.prefix).parent]
    for place in places:
        python = place if named else place / ".venv-vllm" / "bin" / "python"
        if not os.access(python, os.X_OK):
            continue
        if named or any(python.parent.parent.glob("lib/python*/site-packages/vllm/__init__.py")):
            # Not resolved: what a link points to is another environment.
            return python.absolute()
    if named:
        raise RollwayError(f"ROLLWAY_VLLM_PYTHON: {named} is no program; name the Python of an environment with vLLM")
    raise RollwayError(f"{MISSING} to the Python of an environment that has it")


@dataclass(frozen=True)
class Home:
    """Where a workflow's engines live, and the process that they live for."""

    folder: Path
    parent: int


def home() -> Home | None:
    """None outside a workflow: then the engine is the job's own."""
    text = os.environ.get("ROLLWAY_ENGINES")
    if not text:
        return None
    parent, _, folder = text.partition(":")
    return Home(Path(folder), int(parent))


def device_name() -> str:
    """Names the engine's files: its GPUs, or cpu."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return "gpu-" + re.sub(r"[^A-Za-z0-9]+", "-", visible) if visible else "cpu"


def gpus() -> list[str]:
    """The GPUs that this job holds."""
    return [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]


def say_awake(found: Home | None, awake: bool) -> None:
    """Tells the jobs of this machine whether the engine on this job's GPUs holds their memory."""
    if found is not None and gpus():
        gpu_tenants.say(default_folder(), gpus(), gpu_tenants.Tenant(str(found.folder), awake))


class Server:
    """One vLLM process as this job sees it."""

    def __init__(self, connection: socket.socket, log: Path, process: subprocess.Popen[bytes] | None, pid: int) -> None:
        self.connection, self.log, self.process, self.pid = connection, log, process, pid

    def alive(self) -> bool:
        return (self.process is None or self.process.poll() is None) and client.start_time(self.pid) is not None

    def tail(self) -> str:
        """The end of its log, for messages."""
        try:
            lines = self.log.read_text(errors="replace").splitlines()
        except OSError:
            return f"(its log {self.log} is gone)"
        telling = [line for line in lines if " INFO " not in line and line.strip(" ^")]
        return "\n".join(f"  {line[:300]}" for line in telling[-TAIL_LINES:])

    def end(self) -> None:
        """SIGTERM, then SIGKILL of all that it started; waits."""
        self.connection.close()
        end_process(self.pid)
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)


@contextmanager
def lease(found: Home | None) -> Iterator[None]:
    """The engine of this device serves one job at a time: its weights are one policy's."""
    if found is None:
        yield
        return
    found.folder.mkdir(parents=True, exist_ok=True)
    path = found.folder / f"vllm-{device_name()}.lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode() or "?"
            notice(f"waiting for the vLLM engine, which serves process {holder}")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def running(found: Home) -> Server | None:
    """The engine that lives in this workflow's folder, connected to; None when there is none, or its socket is stale.

    Raises RollwayError when the socket is not ours.
    """
    path = _socket(found)
    note = _note(path)
    if note is None or client.start_time(note["pid"]) != note["born"]:
        return None
    try:
        connection = client.connect(str(path))
    except OSError:
        # It is ending: what it holds must be free before another starts.
        end_process(note["pid"])
        return None
    if client.peer(connection)[1] != os.geteuid():
        connection.close()
        raise RollwayError(f"{path}: belongs to another user; delete it, or use another results folder")
    return Server(connection, Path(note["log"]), None, note["pid"])


def launch(found: Home | None, settings: dict[str, Any], model: Path, *, max_num_seqs: int | None = None) -> Server:
    """Starts an engine and returns at once; its first message comes when it is ready (half a minute, or minutes)."""
    python = find_python()
    command = [str(python), str(SERVER), "--settings", json.dumps(settings, sort_keys=True)]
    command += ["--model", str(model.absolute())]
    if max_num_seqs is not None:
        command += ["--max-num-seqs", str(max_num_seqs)]
    if found is None:
        ours, theirs = socket.socketpair()
        folder = Path(tempfile.mkdtemp(prefix="rollway-vllm-"))
        command += ["--parent", str(os.getpid()), "--connection", str(theirs.fileno())]
        with theirs:
            process = _spawn(command, folder / "vllm.log", [theirs.fileno()], settings)
        return Server(ours, folder / "vllm.log", process, process.pid)
    path = _socket(found)
    log = path.with_suffix(".log")
    command += ["--parent", str(found.parent), "--idle", str(IDLE)]
    marks = gpu_tenants.move_in(default_folder(), gpus(), str(found.folder))
    try:
        with client.bind(str(path), "the vLLM engine") as listener:
            command += ["--listener", str(listener.fileno())]
            process = _spawn(command, log, [listener.fileno(), *marks], settings)
    finally:
        for mark in marks:
            os.close(mark)
    note = {"pid": process.pid, "born": client.start_time(process.pid), "log": str(log.absolute())}
    path.with_suffix(".json").write_text(json.dumps(note))
    try:
        return Server(client.connect(str(path)), log, process, process.pid)
    except OSError:
        # It ended before anybody connected: its log says why.
        ours, theirs = socket.socketpair()
        theirs.close()
        return Server(ours, log, process, process.pid)


def _spawn(command: list[str], log: Path, descriptors: list[int], settings: dict[str, Any]) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=descriptors,
            # Its own session: neither the end of this job nor a Ctrl-C in the terminal ends an engine half-way.
            start_new_session=True,
            env=_environment(settings),
        )


def _environment(settings: dict[str, Any]) -> dict[str, str]:
    foreign = (
        *("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "VIRTUAL_ENV"),
        *("ROLLWAY_WORKER", "ROLLWAY_ENGINES", "VLLM_ENABLE_V1_MULTIPROCESSING"),
    )
    kept = {name: value for name, value in os.environ.items() if name not in foreign}
    threads = {"OMP_NUM_THREADS": str(settings["threads"]), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    # The weights are on this machine already; nothing is asked of, or told to, any other.
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false"}
    return kept | quiet | threads | {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}


def stop_all(folder: Path) -> None:
    """Ends every engine of a workflow; called by the Snakefile's `onsuccess` and `onerror`."""
    for path in sorted(folder.glob("vllm-*.socket")):
        note = _note(path)
        if note is not None and client.start_time(note["pid"]) == note["born"]:
            end_process(note["pid"])
        for left in (path, path.with_suffix(".json"), path.with_suffix(".lock")):
            left.unlink(missing_ok=True)


def end_process(pid: int, seconds: float = STOP_SECONDS) -> None:
    """SIGTERM to an engine, SIGKILL to its whole group after `seconds`; returns when it is gone."""
    born = client.start_time(pid)
    deadline = time.monotonic() + seconds
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
        while born is not None and (client.start_time(pid) == born or _threads(pid) > 1):
            if time.monotonic() > deadline:
                os.killpg(pid, signal.SIGKILL)
            time.sleep(0.05)


def _threads(pid: int) -> int:
    """Threads of a process: of one that has ended too, while the last of them still hold its sockets."""
    try:
        return len(os.listdir(f"/proc/{pid}/task"))
    except OSError:
        return 0


def _socket(found: Home) -> Path:
    return found.folder / f"vllm-{device_name()}.socket"


def _note(path: Path) -> dict[str, Any] | None:
    try:
        note = json.loads(path.with_suffix(".json").read_text())
        return {"pid": int(note["pid"]), "born": note["born"], "log": str(note["log"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None
