"""Hands one stage job to the warm worker: the whole of a warm `rollway stage` command.

Started for every job, so it imports next to nothing: `socket` and `signal` would bring enum and selectors along (15 ms
of 30), hence the C modules below them. Messages are a kind byte and a number, both ways.
"""

import _signal  # type: ignore[import-not-found]
import _socket
import os
import sys
from _struct import Struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Connection = Any
    """A socket of `socket` or of `_socket`."""

MESSAGE = Struct("!cI")
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

FORWARDED = tuple(
    int(number)
    for number in (_signal.SIGINT, _signal.SIGTERM, _signal.SIGHUP, _signal.SIGQUIT, _signal.SIGUSR1, _signal.SIGUSR2)
)
PATH_LIMIT = 100
"""Bytes; Linux takes 107 in a socket address, and longer paths go through an open folder."""
PEER = Struct("iII")


def main(prefix: str, cold: str) -> None:
    """Runs this process's arguments in the worker that ROLLWAY_WORKER names; where none takes them, becomes `cold`.

    prefix: of the Python environment whose worker it is. cold: path of the `rollway` command.
    """
    argv = sys.argv[1:]
    path = os.environ.get("ROLLWAY_WORKER", "")
    if path and argv[:1] == ["stage"]:
        code = run(argv, path, prefix)
        if code is not None:
            # Nothing is left to be flushed or closed.
            os._exit(code)
    os.environ.pop("ROLLWAY_WORKER", None)
    os.execv(cold, [cold, *argv])


def run(argv: list[str], socket_path: str, prefix: str | None = None) -> int | None:
    """Runs `rollway ARGV` in a child of the warm worker at `socket_path`, here: same folder, environment and streams.

    Returns its exit code (128 + n when signal n ended it), or None when no worker took the job: run it cold. Once the
    job has started, the answer is never None: 1 when the worker died under it.
    """
    if not sys.platform.startswith("linux"):
        return None
    _fill_streams()
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        reach(connection, socket_path)
        if peer(connection)[1] != os.geteuid():
            connection.close()
            _notice(f"{socket_path} belongs to another user")
            return None
    except OSError:
        connection.close()
        return None
    received: list[int] = []

    def forward(number: int, _frame: object) -> None:
        received.append(number)
        try:
            connection.send(MESSAGE.pack(SIGNAL, number))
        except OSError:
            pass

    # Blocked while the job is written: a signal's message inside it would garble it.
    mask = _signal.pthread_sigmask(_signal.SIG_BLOCK, FORWARDED)
    heeded = [number for number in FORWARDED if _signal.getsignal(number) != _signal.SIG_IGN]
    previous = {number: _signal.signal(number, forward) for number in heeded}
    try:
        try:
            _send_job(connection, encode_job(argv, prefix or sys.prefix))
        except OSError:
            return None
        finally:
            _signal.pthread_sigmask(_signal.SIG_SETMASK, mask)
        code = _wait(connection)
        return 128 + received[0] if code is None and received else code
    finally:
        connection.close()
        for number, handler in previous.items():
            _signal.signal(number, handler)


def reach(connection: "Connection", path: str) -> None:
    """Connects to the Unix socket at `path`, however long that is. Raises OSError."""
    folder = -1
    try:
        if len(os.fsencode(path)) > PATH_LIMIT:
            head, tail = os.path.split(path)
            folder = os.open(head or ".", os.O_DIRECTORY | os.O_PATH)
            path = f"/proc/self/fd/{folder}/{tail}"
        connection.connect(path)
    finally:
        if folder >= 0:
            os.close(folder)


def peer(connection: "Connection") -> tuple[int, int]:
    """Process id and user id of the other end, as the kernel knows them."""
    process, user, _group = PEER.unpack(connection.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, PEER.size))
    return process, user


def receive(connection: "Connection", size: int) -> bytes | None:
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


def encode_job(argv: list[str], prefix: str) -> bytes:
    """What the job has of this process: umask, folder, interpreter, pid, arguments, environment; NUL-separated."""
    umask = os.umask(0o077)
    os.umask(umask)
    numbers = [str(number).encode() for number in (umask, os.getpid(), len(argv))]
    head = [numbers[0], os.getcwdb(), os.fsencode(prefix), *numbers[1:]]
    variables = [name + b"=" + value for name, value in os.environb.items()]
    return b"\0".join(head + [os.fsencode(argument) for argument in argv] + variables)


def _send_job(connection: "Connection", body: bytes) -> None:
    streams = Struct("3i").pack(0, 1, 2)
    connection.sendmsg([MESSAGE.pack(JOB, len(body))], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, streams)])
    connection.sendall(body)


def _fill_streams() -> None:
    """A closed standard stream becomes /dev/null; else the next thing we open, our socket, would take its number."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _wait(connection: "Connection") -> int | None:
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
        os.killpg(process, _signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    _say("error: the warm worker died and the job with it; run it again")
    return 1


def _notice(reason: str) -> None:
    _say(f"warm worker not used, starting cold: {reason}")


def _say(words: str) -> None:
    print(f"rollway: {words}", file=sys.stderr, flush=True)
