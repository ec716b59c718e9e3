"""The warm worker: a process that has imported the heavy libraries and forks one child per stage job. Linux only.

`start` and `stop` are called by the Snakefile's handlers; `client.run` hands it a job. One thread and one event loop;
a second thread only imports, and nothing is forked while it does. It ends, and its jobs with it, on `stop`, SIGTERM,
SIGINT, the death of its parent, or after idling.
"""

import argparse
import contextlib
import os
import selectors
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from rollway.errors import RollwayError
from rollway.runtime import child, client, job_client, openmp
from rollway.runtime.child import Child
from rollway.runtime.client import bind, die_with_parent, start, start_time, stop
from rollway.runtime.preload import PRELOAD, Imports, log

__all__ = ["main", "start", "stop"]

IMPORT_TIME = tuple(
    b"HF_ TRANSFORMERS_ TORCH PYTORCH_ LD_ MKL_CBWR PYTHONPATH PYTHONHOME PYTHONHASHSEED PYTHONOPTIMIZE "
    b"PYTHONUTF8 PYTHONIOENCODING".split()
)
"""Variables (prefixes) that the libraries read while importing: a job that differs in one is refused and runs cold."""

GRACE = 3.0
"""Seconds between SIGTERM and SIGKILL."""
POLL = 0.5
"""Seconds between looks at the parent."""
JOB_LIMIT = 1 << 26
"""Bytes of a request: arguments and environment."""


@dataclass(eq=False)
class Job:
    connection: socket.socket
    buffer: bytearray = field(default_factory=bytearray)
    streams: list[int] = field(default_factory=list)
    body: bytes = b""
    request: client.Request | None = None
    """The complete request, while the job waits to be started; and `body`, what it was read from."""
    pid: int = 0
    control: socket.socket | None = None
    """On which its process says how it ended."""
    kill_at: float = float("inf")


class Server:
    """Accepts jobs on `listener`, forks and reaps them. See `main` for the arguments."""

    def __init__(self, listener: socket.socket, path: str, parent: int, idle: float, preload: str, target: str) -> None:
        self.listener, self.path, self.parent, self.idle, self.target = listener, path, parent, idle, target
        self.inode = os.lstat(path).st_ino
        self.birth = start_time(parent)
        self.jobs: list[Job] = []
        self.selector = selectors.DefaultSelector()
        self.wake_read, self.wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.imports = Imports(preload, target, self.wake_write)
        self.environment = dict(os.environb)
        self.leaving: set[int] = set()
        """Processes that have said how they ended, and are not gone yet."""
        self.spare: Child | None = None
        self.spares = True
        self.last_used = time.monotonic()
        self.last_look = 0.0
        self.ending: str | None = None

    def serve(self) -> None:
        """Until told to end; then stops the jobs and removes the socket."""
        self.listener.setblocking(False)
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.selector.register(self.wake_read, selectors.EVENT_READ)
        signal.set_wakeup_fd(self.wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.signal(signal.SIGUSR1, lambda number, frame: None)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda number, frame: self._end(signal.Signals(number).name))
        die_with_parent(signal.SIGUSR1)
        # Asking whether a GPU exists would otherwise open CUDA here, and spoil it for every child.
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
        openmp.spin_briefly()
        # OpenBLAS starts its threads while being imported.
        os.environ["OPENBLAS_NUM_THREADS"] = "1"
        # So does Arrow's second allocator, and nothing here is forked beside a thread that may hold a lock.
        os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"
        log(f"worker {os.getpid()} listens on {os.path.basename(self.path)}, for process {self.parent}")
        threading.Thread(target=self.imports.run, daemon=True).start()
        while not (self.ending and not self.jobs):
            for key, _ in self.selector.select(self._timeout()):
                if key.fileobj is self.listener:
                    self._accept()
                elif key.fd == self.wake_read:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self.wake_read, 4096)
                elif key.data in self.jobs:
                    # Otherwise it ended with an earlier event of this turn.
                    self._hear(key.data) if key.fileobj is key.data.control else self._read(key.data)
            self._reap()
            self._watch()
            self._start_waiting()
        with contextlib.suppress(FileNotFoundError):
            if os.lstat(self.path).st_ino == self.inode:
                os.unlink(self.path)
        if self.spare is not None:
            self.spare.discard()
        log(f"worker {os.getpid()} ends: {self.ending}")
        # Not through the interpreter's own end: the importing thread may be in the middle of a library.
        sys.stderr.flush()
        os._exit(0)

    def _timeout(self) -> float:
        soonest = min((job.kill_at for job in self.jobs), default=float("inf"))
        return max(0.0, min(POLL, soonest - time.monotonic()))

    def _accept(self) -> None:
        try:
            connection, _ = self.listener.accept()
        except OSError:
            return
        connection.setblocking(False)
        if client.peer(connection)[1] != os.geteuid():
            log("refused a connection of another user")
            connection.close()
            return
        job = Job(connection)
        self.jobs.append(job)
        self.selector.register(connection, selectors.EVENT_READ, job)

    def _read(self, job: Job) -> None:
        try:
            data, streams, _, _ = socket.recv_fds(job.connection, 1 << 16, 3, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return None
        except OSError:
            data, streams = b"", []
        job.streams += streams
        if not data:
            return self._disconnected(job)
        job.buffer += data
        while len(job.buffer) >= job_client.MESSAGE.size:
            kind, value = job_client.MESSAGE.unpack_from(job.buffer)
            end = job_client.MESSAGE.size + (value if kind == job_client.JOB else 0)
            wrong_job = kind == job_client.JOB and (job.request is not None or job.pid or len(job.streams) != 3)
            if kind not in job_client.REQUESTS or value > JOB_LIMIT or wrong_job:
                return self._disconnected(job)
            if len(job.buffer) < end:
                return None
            body = bytes(job.buffer[job_client.MESSAGE.size : end])
            del job.buffer[:end]
            if kind == job_client.JOB:
                try:
                    job.body, job.request = body, client.decode_job(body)
                except ValueError:
                    return self._refuse(job, "the request is damaged")
            elif kind == job_client.SIGNAL and job.pid:
                # Ctrl-C reaches a whole foreground group; other signals reach the process that they were sent to.
                _kill(job.pid, value, group=value == signal.SIGINT)
            elif kind == job_client.SIGNAL:
                return self._finish(job, job_client.EXITED, 128 + value)
            elif kind == job_client.STOP:
                self._send(job, job_client.STOP, os.getpid())
                self._end("stop")

    def _hear(self, job: Job) -> None:
        """The exit code; or, without a word, the end of a process that `_reap` will see."""
        assert job.control is not None
        try:
            said = job.control.recv(job_client.MESSAGE.size)
        except OSError:
            said = b""
        if len(said) == job_client.MESSAGE.size:
            # It has nothing left to do, and what it started must not outlive it.
            _kill(job.pid, signal.SIGKILL, group=True)
            self.leaving.add(job.pid)
            self._ended(job, job_client.MESSAGE.unpack(said)[1])
        else:
            self._forget(job.control)
            job.control = None

    def _ended(self, job: Job, code: int) -> None:
        log(f"job {job.pid} ended with {code}")
        self.last_used = time.monotonic()
        self._finish(job, job_client.EXITED, code if code >= 0 else 128 - code)

    def _forget(self, connection: socket.socket) -> None:
        with contextlib.suppress(KeyError):
            self.selector.unregister(connection)
        connection.close()

    def _disconnected(self, job: Job) -> None:
        if not job.pid:
            return self._finish(job)
        with contextlib.suppress(KeyError):
            self.selector.unregister(job.connection)
        log(f"client of job {job.pid} is gone")
        self._terminate(job)

    def _terminate(self, job: Job) -> None:
        if job.kill_at == float("inf"):
            _kill(job.pid, signal.SIGTERM, group=True)
            job.kill_at = time.monotonic() + GRACE

    def _send(self, job: Job, kind: bytes, value: int, text: bytes = b"") -> None:
        with contextlib.suppress(OSError):
            job.connection.sendall(job_client.MESSAGE.pack(kind, value) + text)

    def _finish(self, job: Job, kind: bytes | None = None, value: int = 0, text: bytes = b"") -> None:
        if kind is not None:
            self._send(job, kind, value, text)
        self._forget(job.connection)
        if job.control is not None:
            self._forget(job.control)
        for stream in job.streams:
            os.close(stream)
        self.jobs.remove(job)

    def _refuse(self, job: Job, reason: str) -> None:
        log(f"refused a job: {reason}")
        # An error's text may hold a file name that is none of any encoding.
        said = reason.encode(errors="backslashreplace")
        self._finish(job, job_client.REFUSED, len(said), said)

    def _start_waiting(self) -> None:
        waiting = [job for job in self.jobs if job.request is not None and self.imports.may_start(job.request.argv)]
        if self.imports.failed is not None:
            for job in [job for job in self.jobs if job.request is not None and job not in waiting]:
                self._refuse(job, f"it could not import what this job needs ({self.imports.failed[:300]})")
        if not waiting:
            self.imports.no_job_waits.set()
            self._make_spare()
            return
        self.imports.no_job_waits.clear()
        if not self.imports.lock.acquire(blocking=False):
            return
        try:
            for job in waiting:
                self._start(job)
        finally:
            self.imports.lock.release()

    def _make_spare(self) -> None:
        """A child that waits for the next job: to fork is the slowest part of starting one."""
        if self.spares and self.spare is None and self.imports.done and not self.ending:
            with contextlib.suppress(OSError):
                self.spare = self._fork()

    def _fork(self) -> Child:
        return child.fork(self.target, self._let_go, lambda: self.imports.threads)

    def _start(self, job: Job) -> None:
        assert job.request is not None
        if reason := self._unfit(job.request):
            self._refuse(job, reason)
            return
        taken, self.spare = self.spare, None
        try:
            taken = taken or self._fork()
            taken.give(job.body, job.streams)
        except OSError as error:
            if taken is not None:
                taken.discard()
            self._refuse(job, f"cannot fork ({error.strerror})")
            return
        log(f"job {taken.pid}: {' '.join(job.request.argv)[:200]}")
        job.pid, job.request, job.body = taken.pid, None, b""
        for stream in job.streams:
            os.close(stream)
        job.streams = []
        job.control = taken.control
        self.selector.register(job.control, selectors.EVENT_READ, job)
        self._send(job, job_client.STARTED, job.pid)

    def _unfit(self, request: client.Request) -> str | None:
        """Why this job would not run here as it would run cold."""
        torch: Any = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            return "CUDA is already in use inside the worker, where a fork would break it"
        if request.prefix != os.fsencode(sys.prefix):
            return f"it runs another Python environment ({sys.prefix})"
        if changed := self.imports.stale():
            return f"{changed} changed since it started"
        for name in sorted(request.environment.keys() | self.environment.keys()):
            if name.startswith(IMPORT_TIME) and request.environment.get(name) != self.environment.get(name):
                return f"{os.fsdecode(name)} differs from the worker's"
        return None

    def _let_go(self) -> None:
        """In a child: closes what is the worker's."""
        self.selector.close()
        for other in self.jobs:
            other.connection.close()
            if other.control is not None:
                other.control.close()
            for stream in other.streams:
                os.close(stream)
        self.listener.close()
        os.close(self.wake_read)
        os.close(self.wake_write)

    def _reap(self) -> None:
        if self.spare is not None and os.waitid(os.P_PID, self.spare.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            log(f"process {self.spare.pid}, which waited for a job, is gone: children are forked when a job comes")
            self.spare.discard()
            self.spare, self.spares = None, False
        self.leaving = {pid for pid in self.leaving if os.waitpid(pid, os.WNOHANG) == (0, 0)}
        for job in [job for job in self.jobs if job.pid]:
            if job.kill_at <= time.monotonic():
                _kill(job.pid, signal.SIGKILL, group=True)
            if os.waitid(os.P_PID, job.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                continue
            # While it is not reaped its group's number cannot be anybody else's: nothing it started outlives it.
            _kill(job.pid, signal.SIGKILL, group=True)
            self._ended(job, os.waitstatus_to_exitcode(os.waitpid(job.pid, 0)[1]))

    def _watch(self) -> None:
        now = time.monotonic()
        if not self.ending and now - self.last_look >= POLL / 2:
            self.last_look = now
            if self.birth is None or start_time(self.parent) != self.birth:
                self._end(f"process {self.parent} is gone")
            elif not self.jobs and now - self.last_used > self.idle:
                self._end(f"no job for {self.idle:g} s")
        if self.ending:
            for job in list(self.jobs):
                if job.pid:
                    self._terminate(job)
                elif job.request is not None:
                    self._finish(job, job_client.EXITED, 128 + signal.SIGTERM)
                else:
                    self._finish(job)

    def _end(self, reason: str) -> None:
        self.ending = self.ending or reason


def _kill(pid: int, number: int, *, group: bool) -> None:
    """Signals a child that is not reaped yet, or its group once it has made one."""
    with contextlib.suppress(OSError):
        if group:
            with contextlib.suppress(ProcessLookupError):
                return os.killpg(pid, number)
        os.kill(pid, number)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rollway.runtime.worker", description=__doc__)
    parser.add_argument("--socket", required=True, help="Unix socket to listen on")
    parser.add_argument("--parent", type=int, required=True, help="process whose end ends the worker")
    parser.add_argument("--idle", type=float, default=1800.0, help="seconds without a job after which to end")
    parser.add_argument("--preload", choices=sorted(PRELOAD), default="cpu", help="which libraries to import")
    parser.add_argument("--target", default="rollway.cli:main", help="module:function that runs a job's arguments")
    parser.add_argument("--listener", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    path = os.path.abspath(args.socket)
    try:
        listener = bind(path) if args.listener is None else socket.socket(fileno=args.listener)
        Server(listener, path, args.parent, args.idle, args.preload, args.target).serve()
    except RollwayError as error:
        print(f"rollway: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
