"""The warm worker: a process that has imported the heavy libraries and forks one child per stage job. Linux only.

`start` and `stop` are called by the Snakefile's handlers; `client.run` hands it a job. One thread and one event loop;
a second thread only imports, and nothing is forked while it does. It ends, and its jobs with it, on `stop`, SIGTERM,
SIGINT, the death of its parent, or after idling.
"""

import argparse
import contextlib
import importlib
import io
import os
import pkgutil
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from rollway.errors import RollwayError
from rollway.runtime import client
from rollway.runtime.client import bind, die_with_parent, start, start_time, stop

__all__ = ["main", "start", "stop"]

LIGHT = ("numpy", "pyarrow", "pyarrow.compute", "pyarrow.parquet", "duckdb", "pydantic", "yaml")
HEAVY = (
    "torch",
    "torch._dynamo",
    "safetensors.torch",
    "tokenizers",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.qwen3.modeling_qwen3",
)
PRELOAD = {"light": (LIGHT, ()), "cpu": (LIGHT + HEAVY, ("math_verify", "reasoning_gym", "peft"))}
"""What jobs wait for, and what is imported afterwards, when no job waits."""

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
    body: bytes | None = None
    """The complete request, while the job waits to be started."""
    pid: int = 0
    kill_at: float = float("inf")


class Imports:
    """Imports the libraries in a second thread. `lock` is held while it does: nobody may fork then."""

    def __init__(self, preload: str, target: str, wake: int) -> None:
        self.required, self.optional = PRELOAD[preload]
        self.target, self.wake, self.heavy = target.partition(":")[0], wake, preload == "cpu"
        self.package = self.target.partition(".")[0]
        self.ready = False
        self.lock = threading.Lock()
        self.no_job_waits = threading.Event()
        """Optional imports give way to jobs."""
        self.no_job_waits.set()
        self.sources: dict[str, int] = {}
        self.threads: int | None = None
        """What torch would use by itself, and what a cold process would have had."""

    def run(self) -> None:
        begin = time.monotonic()
        with self.lock:
            for name in self.required:
                self._load(name)
            self._load_package()
            self._calm()
            self.ready = True
        log(f"ready after {time.monotonic() - begin:.1f} s; threads: {', '.join(thread_names())}")
        os.write(self.wake, b"\0")
        for name in self.optional:
            self.no_job_waits.wait()
            with self.lock:
                self._load(name)
                self._calm()
            os.write(self.wake, b"\0")

    def stale(self) -> str | None:
        """A source file of the package that changed since it was imported."""
        return next((path for path, when in self.sources.items() if _modified(path) != when), None)

    def _load(self, name: str) -> None:
        try:
            importlib.import_module(name)
        except BaseException as error:  # a library that exits while imported must not stop this thread
            log(f"not preloaded: {name} ({type(error).__name__}: {error})")

    def _load_package(self) -> None:
        self._load(self.target)
        package = sys.modules.get(self.package)
        if self.heavy and package is not None and package.__spec__ and package.__spec__.submodule_search_locations:
            for part in pkgutil.walk_packages(package.__path__, f"{self.package}.", onerror=lambda name: None):
                if not part.name.endswith("__main__"):
                    self._load(part.name)
        prefix = f"{self.package}."
        for name, module in list(sys.modules.items()):
            if (name == self.package or name.startswith(prefix)) and module.__spec__ and module.__spec__.origin:
                self.sources[module.__spec__.origin] = _modified(module.__spec__.origin)

    def _calm(self) -> None:
        """One torch thread, so that no thread pool exists to be lost in a fork; nothing imported is swept or finalised
        when a child ends (0.1 s per job)."""
        import gc
        import weakref

        torch: Any = sys.modules.get("torch")
        if torch is not None:
            self.threads = self.threads or torch.get_num_threads()
            torch.set_num_threads(1)
        for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
            finalizer.atexit = False
        gc.collect()
        gc.freeze()


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
        # OpenBLAS starts its threads while being imported.
        os.environ["OPENBLAS_NUM_THREADS"] = "1"
        log(f"worker {os.getpid()} listens on {self.path}, for process {self.parent}")
        threading.Thread(target=self.imports.run, daemon=True).start()
        while not (self.ending and not self.jobs):
            for key, _ in self.selector.select(self._timeout()):
                if key.fileobj is self.listener:
                    self._accept()
                elif key.fd == self.wake_read:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self.wake_read, 4096)
                elif isinstance(key.data, Job):
                    self._read(key.data)
            self._reap()
            self._watch()
            self._start_waiting()
        with contextlib.suppress(FileNotFoundError):
            if os.lstat(self.path).st_ino == self.inode:
                os.unlink(self.path)
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
        while len(job.buffer) >= client.MESSAGE.size:
            kind, value = client.MESSAGE.unpack_from(job.buffer)
            end = client.MESSAGE.size + (value if kind == client.JOB else 0)
            wrong_job = kind == client.JOB and (job.body is not None or job.pid or len(job.streams) != 3)
            if kind not in client.REQUESTS or value > JOB_LIMIT or wrong_job:
                return self._disconnected(job)
            if len(job.buffer) < end:
                return None
            body = bytes(job.buffer[client.MESSAGE.size : end])
            del job.buffer[:end]
            if kind == client.JOB:
                job.body = body
            elif kind == client.SIGNAL and job.pid:
                # Ctrl-C reaches a whole foreground group; other signals reach the process that they were sent to.
                _kill(job.pid, value, group=value == signal.SIGINT)
            elif kind == client.SIGNAL:
                return self._finish(job, client.EXITED, 128 + value)
            elif kind == client.STOP:
                self._send(job, client.STOP, os.getpid())
                self._end("stop")

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
            job.connection.sendall(client.MESSAGE.pack(kind, value) + text)

    def _finish(self, job: Job, kind: bytes | None = None, value: int = 0, text: bytes = b"") -> None:
        if kind is not None:
            self._send(job, kind, value, text)
        with contextlib.suppress(KeyError):
            self.selector.unregister(job.connection)
        job.connection.close()
        for stream in job.streams:
            os.close(stream)
        self.jobs.remove(job)

    def _refuse(self, job: Job, reason: str) -> None:
        log(f"refused a job: {reason}")
        self._finish(job, client.REFUSED, len(reason.encode()), reason.encode())

    def _start_waiting(self) -> None:
        waiting = [job for job in self.jobs if job.body is not None]
        if not waiting:
            self.imports.no_job_waits.set()
            return
        self.imports.no_job_waits.clear()
        if not self.imports.ready or not self.imports.lock.acquire(blocking=False):
            return
        try:
            for job in waiting:
                self._start(job)
        finally:
            self.imports.lock.release()

    def _start(self, job: Job) -> None:
        try:
            request = client.decode_job(job.body or b"")
        except ValueError:
            self._refuse(job, "the request is damaged")
            return
        if reason := self._unfit(request):
            self._refuse(job, reason)
            return
        sys.stdout.flush()
        sys.stderr.flush()
        # A signal for the worker must not be answered by the child with the worker's handlers.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            pid = os.fork()
            if pid == 0:
                self._become(job, request, mask)
        except OSError as error:
            self._refuse(job, f"cannot fork ({error.strerror})")
            return
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        job.pid, job.body = pid, None
        for stream in job.streams:
            os.close(stream)
        job.streams = []
        log(f"job {pid}: {' '.join(request.argv)[:200]}")
        self._send(job, client.STARTED, pid)

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

    def _become(self, job: Job, request: client.Request, mask: set[Any]) -> NoReturn:
        """In the child: turns into the job and ends with it."""
        code = 1
        try:
            worker = os.getppid()
            os.setsid()
            die_with_parent(signal.SIGKILL)
            if os.getppid() != worker:
                os._exit(1)
            for number, stream in enumerate(job.streams):
                os.dup2(stream, number)
            signal.set_wakeup_fd(-1)
            self.selector.close()
            for other in self.jobs:
                other.connection.close()
                for stream in other.streams:
                    os.close(stream)
            self.listener.close()
            os.close(self.wake_read)
            os.close(self.wake_write)
            for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            _open_streams(request.environment)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            os.umask(request.umask)
            os.chdir(request.folder)
            os.environb.clear()
            os.environb.update(request.environment)
            os.environ.pop("ROLLWAY_WORKER", None)
            time.tzset()
            if self.imports.threads:
                wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
                sys.modules["torch"].set_num_threads(int(wanted) if wanted.isdigit() else self.imports.threads)
            sys.argv = ["rollway", *request.argv]
            code = run_target(self.target, request.argv)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def _reap(self) -> None:
        for job in [job for job in self.jobs if job.pid]:
            if job.kill_at <= time.monotonic():
                _kill(job.pid, signal.SIGKILL, group=True)
            if os.waitid(os.P_PID, job.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                continue
            # While it is not reaped its group's number cannot be anybody else's: nothing it started outlives it.
            _kill(job.pid, signal.SIGKILL, group=True)
            code = os.waitstatus_to_exitcode(os.waitpid(job.pid, 0)[1])
            log(f"job {job.pid} ended with {code}")
            self.last_used = time.monotonic()
            self._finish(job, client.EXITED, code if code >= 0 else 128 - code)

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
                elif job.body is not None:
                    self._finish(job, client.EXITED, 128 + signal.SIGTERM)
                else:
                    self._finish(job)

    def _end(self, reason: str) -> None:
        self.ending = self.ending or reason


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


def _kill(pid: int, number: int, *, group: bool) -> None:
    """Signals a child that is not reaped yet, or its group once it has made one."""
    with contextlib.suppress(OSError):
        if group:
            with contextlib.suppress(ProcessLookupError):
                return os.killpg(pid, number)
        os.kill(pid, number)


def _modified(path: str) -> int:
    return os.stat(path).st_mtime_ns if os.path.exists(path) else 0


def thread_names() -> list[str]:
    return sorted(Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in os.listdir("/proc/self/task"))


def log(message: str) -> None:
    """To the worker's log: its stderr."""
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


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
