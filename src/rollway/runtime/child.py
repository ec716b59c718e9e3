"""The warm worker's children: forked ahead of their job, they wait for it, turn into it, and end with it."""

from __future__ import annotations

import array
import contextlib
import importlib
import io
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from rollway.runtime import client, job_client, phases
from rollway.runtime.client import die_with_parent


@dataclass
class Child:
    """A forked process that waits for its job on the other end of `control`, and says there how the job ended."""

    pid: int
    control: socket.socket

    def give(self, body: bytes, streams: list[int]) -> None:
        """Hands it a request (`job_client.encode_job`) and the standard streams. Raises OSError when it is dead."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", streams))]
        self.control.sendmsg([job_client.MESSAGE.pack(job_client.JOB, len(body))], rights)
        self.control.sendall(body)

    def discard(self) -> None:
        self.control.close()
        with contextlib.suppress(OSError):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


def fork(target: str, let_go: Callable[[], None], threads: Callable[[], int | None]) -> Child:
    """Forks. The child calls `let_go`, which closes what is the parent's, and waits for its job.

    threads: what torch would use by itself. Raises OSError.
    """
    ours, theirs = socket.socketpair()
    worker = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    # A signal for the worker must not be answered by the child with the worker's handlers.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = os.fork()
        if pid == 0:
            ours.close()
            _become(theirs, worker, target, let_go, threads, mask)
    except OSError:
        ours.close()
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()
    return Child(pid, ours)


def _become(
    control: socket.socket,
    worker: int,
    target: str,
    let_go: Callable[[], None],
    threads: Callable[[], int | None],
    mask: set[Any],
) -> NoReturn:
    code = 1
    try:
        os.setsid()
        die_with_parent(signal.SIGKILL)
        if os.getppid() != worker:
            os._exit(1)
        signal.set_wakeup_fd(-1)
        let_go()
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        request = _wait(control)
        _open_streams(request.environment)
        os.umask(request.umask)
        os.chdir(request.folder)
        os.environb.clear()
        os.environb.update(request.environment)
        os.environ.pop("ROLLWAY_WORKER", None)
        time.tzset()
        if by_itself := threads():
            wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
            sys.modules["torch"].set_num_threads(int(wanted) if wanted.isdigit() else by_itself)
        sys.argv = ["rollway", *request.argv]
        phases.stands_for(request.process)
        code = run_target(target, request.argv)
        _report(control, code)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _wait(control: socket.socket) -> client.Request:
    """The job, its streams in place. Ends the process when the worker has none for it."""
    head, streams, _, _ = socket.recv_fds(control, job_client.MESSAGE.size, 3, socket.MSG_CMSG_CLOEXEC)
    if len(head) < job_client.MESSAGE.size:
        os._exit(0)
    body = job_client.receive(control, job_client.MESSAGE.unpack(head)[1])
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    return client.decode_job(body or b"")


def _report(control: socket.socket, code: int) -> None:
    """Everything is written: the client need not wait until the kernel has taken the memory back (20 to 50 ms).

    It waits where a GPU was used, whose memory the next job may want.
    """
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return
    with contextlib.suppress(OSError):
        for stream in (1, 2):
            os.close(stream)
        control.sendall(job_client.MESSAGE.pack(job_client.EXITED, code))


def run_target(target: str, argv: list[str]) -> int:
    """Calls module:function with `argv` and ends as the interpreter would: exit code, traceback, atexit, flushes."""
    module, _, name = target.partition(":")
    code = 0
    interrupted = False
    try:
        code = getattr(importlib.import_module(module), name)(argv) or 0
    except SystemExit as end:
        match end.code:
            case None:
                code = 0
            case int():
                code = end.code & 0xFF
            case _:
                print(end.code, file=sys.stderr)
                code = 1
    except BaseException as error:
        traceback.print_exception(error.with_traceback(error.__traceback__ and error.__traceback__.tb_next))
        code, interrupted = 1, isinstance(error, KeyboardInterrupt)
    import atexit

    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            code = code or 120
    if interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    return code


def _open_streams(environment: dict[bytes, bytes]) -> None:
    """New Python streams over descriptors 0, 1, 2: the old ones remember what the worker had there."""
    unbuffered = bool(environment.get(b"PYTHONUNBUFFERED"))
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        old = getattr(sys, name)
        raw = io.FileIO(number, mode, closefd=False)
        binary = io.BufferedReader(raw) if mode == "r" else io.BufferedWriter(raw)
        line = mode == "w" and (number == 2 or os.isatty(number))
        stream = io.TextIOWrapper(
            binary, old.encoding, old.errors, line_buffering=line, write_through=mode == "w" and unbuffered
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
