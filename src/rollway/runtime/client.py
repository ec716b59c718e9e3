"""Client side of the warm worker: `start` and `stop` it; `run` hands it one job (`job_client`)."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections import namedtuple

from rollway.runtime.job_client import MESSAGE, STOP, peer, reach, receive, run

__all__ = ["Request", "bind", "connect", "decode_job", "die_with_parent", "peer", "run", "start", "start_time", "stop"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

Request = namedtuple("Request", "umask folder prefix process argv environment")
"""What a job has of its client: int, bytes, bytes (of the interpreter), pid, list of str, dict of bytes."""

PR_SET_PDEATHSIG = 1


def start(
    socket_path: Path | str,
    parent: int,
    log: Path,
    *,
    idle: float = 1800.0,
    preload: str = "cpu",
    target: str = "rollway.cli:main",
) -> subprocess.Popen[bytes] | None:
    """Starts a worker in its own session and returns at once; jobs sent from now on wait for its imports.

    The worker ends when process `parent` does, or after `idle` seconds without a job. It writes to `log` only.
    Returns None where there is no warm worker (other systems than Linux). Raises RollwayError when the socket belongs
    to somebody else or to a live worker.
    """
    if not sys.platform.startswith("linux"):
        return None
    import subprocess

    path = os.path.abspath(socket_path)
    listener = bind(path)
    # -P: the folder we happen to be in must not be on the import path, as it is not for the `rollway` command.
    command = [sys.executable, "-P", "-m", "rollway.runtime.worker", "--socket", path, "--parent", str(parent)]
    command += ["--idle", str(idle), "--preload", preload, "--target", target, "--listener", str(listener.fileno())]
    with listener, open(log, "wb") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[listener.fileno()],
            start_new_session=True,
        )


def stop(socket_path: Path | str, timeout: float = 10.0) -> bool:
    """Ends the worker and its jobs; waits until it is gone, at most `timeout` seconds, then kills it.

    Returns False when none answered.
    """
    import time

    try:
        with connect(os.path.abspath(socket_path), timeout) as connection:
            if peer(connection)[1] != os.geteuid():
                return False
            connection.sendall(MESSAGE.pack(STOP, 0))
            answer = receive(connection, MESSAGE.size)
            if answer is None:
                return False
            pid = MESSAGE.unpack(answer)[1]
            deadline = time.monotonic() + timeout
            while start_time(pid) is not None:
                if time.monotonic() > deadline:
                    os.kill(pid, signal.SIGKILL)
                    break
                time.sleep(0.01)
    except OSError:
        return False
    return True


def bind(path: str, owner: str = "the warm worker") -> socket.socket:
    """A listening Unix socket at `path`, mode 0600; a dead worker's is replaced. `owner`: who listens, for messages.

    Raises RollwayError when `path` is no socket, another user's, or answered by a live process.
    """
    import fcntl
    import tempfile

    from rollway.errors import RollwayError

    folder = os.path.dirname(path)
    os.makedirs(folder, mode=0o700, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _check_free(path, owner)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # Bound inside a private folder, then renamed: at no time can others connect, and no umask changes.
        with tempfile.TemporaryDirectory(prefix=".bind-", dir=folder) as private:
            descriptor = os.open(private, os.O_RDONLY | os.O_DIRECTORY)
            try:
                listener.bind(f"/proc/self/fd/{descriptor}/s")
            finally:
                os.close(descriptor)
            os.chmod(f"{private}/s", 0o600)
            listener.listen(128)
            os.rename(f"{private}/s", path)
        return listener
    except OSError as error:
        raise RollwayError(f"{path}: the socket of {owner} cannot be made ({error.strerror or error})") from error
    finally:
        os.close(lock)


def _check_free(path: str, owner: str) -> None:
    import stat

    from rollway.errors import RollwayError

    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if found.st_uid != os.geteuid():
        raise RollwayError(f"{path}: belongs to another user; {owner} does not start there")
    if not stat.S_ISSOCK(found.st_mode):
        raise RollwayError(f"{path}: is not a socket; delete it to use {owner}")
    try:
        connect(path, timeout=2.0).close()
    except ConnectionRefusedError:
        return
    except TimeoutError:
        pass
    raise RollwayError(f"{path}: {owner} already runs there; stop that workflow first")


def start_time(pid: int) -> int | None:
    """Clock ticks since boot at which the process started: with the pid, its identity. None when it is dead."""
    try:
        with open(f"/proc/{pid}/stat", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def die_with_parent(number: int) -> None:
    """The kernel sends this process signal `number` when the thread that made it ends."""
    import ctypes

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)


def connect(path: str, timeout: float | None = None) -> socket.socket:
    """Connects to the Unix socket at `path`, however long that is. `timeout` in seconds. Raises OSError."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(timeout)
    try:
        reach(connection, path)
    except OSError:
        connection.close()
        raise
    return connection


def decode_job(body: bytes) -> Request:
    """The inverse of `encode_job`. Raises ValueError."""
    umask, folder, prefix, process, count, *rest = body.split(b"\0")
    argv, variables = [os.fsdecode(a) for a in rest[: int(count)]], rest[int(count) :]
    pairs = (variable.partition(b"=") for variable in variables)
    return Request(int(umask), folder, prefix, int(process), argv, {name: value for name, _, value in pairs})
