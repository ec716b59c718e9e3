"""Client side of the warm worker: `start` and `stop` it, and `run` one job in it with our streams, signals, exit code.

Imports little at the top, since every warm job pays for it. Messages are a kind byte and a number, both ways.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import sys
from collections import namedtuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

MESSAGE = struct.Struct("!cI")
JOB = b"J"
"""Client: a job of that many bytes follows (`encode_job`); the three standard streams travel with the first byte."""
SIGNAL = b"K"
"""Client: deliver this signal number to the job."""
STOP = b"Q"
"""Client: stop every job and end. Worker: I will, and this is my process id."""
REQUESTS = (JOB, SIGNAL, STOP)
STARTED = b"S"
"""Worker: the job runs as this process (and process group)."""
EXITED = b"X"
"""Worker: the job ended with this exit code, 128 + n when signal n killed it."""
REFUSED = b"R"
"""Worker: the job was not started; that many bytes of reason follow."""

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
Request = namedtuple("Request", "umask folder prefix argv environment")
"""What a job inherits: int, bytes, bytes (of the interpreter), list of str, dict of bytes."""

PR_SET_PDEATHSIG = 1
PATH_LIMIT = 100
"""Bytes; Linux takes 107 in a socket address, and longer paths go through an open folder."""


def run(argv: list[str], socket_path: str) -> int | None:
    """Runs `rollway ARGV` in a child of the warm worker at `socket_path`, here: same folder, environment and streams.

    Returns its exit code (128 + n when signal n ended it), or None when no worker took the job: run it cold. Once the
    job has started, the answer is never None: 1 when the worker died under it.
    """
    if not sys.platform.startswith("linux"):
        return None
    _fill_streams()
    try:
        connection = connect(socket_path)
        if peer(connection)[1] != os.geteuid():
            connection.close()
            _notice(f"{socket_path} belongs to another user")
            return None
    except OSError:
        return None
    received: list[int] = []

    def forward(number: int, _frame: object) -> None:
        received.append(number)
        try:
            connection.send(MESSAGE.pack(SIGNAL, number))
        except OSError:
            pass

    # Blocked while the job is written: a signal's message inside it would garble it.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    heeded = [number for number in FORWARDED if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, forward) for number in heeded}
    try:
        try:
            _send_job(connection, argv)
        except OSError:
            return None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        code = _wait(connection)
        return 128 + received[0] if code is None and received else code
    finally:
        connection.close()
        for number, handler in previous.items():
            signal.signal(number, handler)


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
    folder = -1
    try:
        if len(os.fsencode(path)) > PATH_LIMIT:
            head, tail = os.path.split(path)
            folder = os.open(head or ".", os.O_DIRECTORY | os.O_PATH)
            path = f"/proc/self/fd/{folder}/{tail}"
        connection.connect(path)
    except OSError:
        connection.close()
        raise
    finally:
        if folder >= 0:
            os.close(folder)
    return connection


def peer(connection: socket.socket) -> tuple[int, int]:
    """Process id and user id of the other end, as the kernel knows them."""
    size = struct.calcsize("iII")
    process, user, _group = struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return process, user


def receive(connection: socket.socket, size: int) -> bytes | None:
    """Exactly `size` bytes, or None when the other end went away first."""
    data = b""
    while len(data) < size:
        try:
            part = connection.recv(size - len(data))
        except ConnectionError:
            return None
        if not part:
            return None
        data += part
    return data


def encode_job(argv: list[str]) -> bytes:
    """What the job inherits from this process: umask, folder, interpreter, arguments, environment; NUL-separated."""
    umask = os.umask(0o077)
    os.umask(umask)
    variables = [name + b"=" + value for name, value in os.environb.items()]
    head = [str(umask).encode(), os.getcwdb(), os.fsencode(sys.prefix), str(len(argv)).encode()]
    return b"\0".join(head + [os.fsencode(argument) for argument in argv] + variables)


def decode_job(body: bytes) -> Request:
    """The inverse of `encode_job`. Raises ValueError."""
    umask, folder, prefix, count, *rest = body.split(b"\0")
    argv, variables = rest[: int(count)], rest[int(count) :]
    pairs = (variable.partition(b"=") for variable in variables)
    return Request(
        int(umask), folder, prefix, [os.fsdecode(a) for a in argv], {name: value for name, _, value in pairs}
    )


def _send_job(connection: socket.socket, argv: list[str]) -> None:
    body = encode_job(argv)
    socket.send_fds(connection, [MESSAGE.pack(JOB, len(body))], [0, 1, 2])
    connection.sendall(body)


def _fill_streams() -> None:
    """A closed standard stream becomes /dev/null; else the next thing we open, our socket, would take its number."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _wait(connection: socket.socket) -> int | None:
    process = 0
    while (message := receive(connection, MESSAGE.size)) is not None:
        kind, value = MESSAGE.unpack(message)
        if kind == STARTED:
            process = value
        elif kind == EXITED:
            return value
        elif kind == REFUSED:
            _notice((receive(connection, value) or b"no reason given").decode())
            return None
    if not process:
        _notice("it ended before it started the job")
        return None
    # The kernel kills the job itself with its worker, but not what the job had started.
    try:
        os.killpg(process, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    print("rollway: error: the warm worker died and the job with it; run it again", file=sys.stderr)
    return 1


def _notice(reason: str) -> None:
    print(f"rollway: warm worker not used, starting cold: {reason}", file=sys.stderr)
