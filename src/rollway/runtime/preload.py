"""What the warm worker imports and does before it forks, in a second thread, and from when on it may fork."""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import os
import pkgutil
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rollway.runtime import rehearsal

LIGHT_STAGES = ("prepare", "describe", "score", "curate", "catalog", "report", "track")
"""Stages that need neither torch nor transformers: their jobs start before those are there."""
LIGHT = ("numpy", "pyarrow", "pyarrow.compute", "pyarrow.parquet", "duckdb", "pydantic", "yaml")
HEAVY = (
    # Arrow looks for pandas by itself when it makes a column of a Python list.
    "pandas",
    "torch",
    "torch._dynamo",
    "safetensors.torch",
    "tokenizers",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.qwen3.modeling_qwen3",
)
PRELOAD = {"light": (LIGHT, (), ()), "cpu": (LIGHT, HEAVY, ("math_verify", "reasoning_gym", "peft"))}
"""What every job waits for, what all but jobs of the light stages wait for, and what is imported when no job waits."""


class Imports:
    """Imports the libraries in a second thread. `lock` is held while it does: nobody may fork then."""

    def __init__(self, preload: str, target: str, wake: int) -> None:
        self.light, self.heavy, self.optional = PRELOAD[preload]
        self.target, self.wake = target.partition(":")[0], wake
        self.package = self.target.partition(".")[0]
        self.ready_for_light = self.ready = self.done = False
        self.failed: str | None = None
        """What ended the thread before it was done. Whatever waits for it would wait for ever: jobs are refused."""
        self.lock = threading.Lock()
        self.no_job_waits = threading.Event()
        """No job waits that could be started: whatever is still to be done gives way to it."""
        self.no_job_waits.set()
        self.sources: dict[str, int] = {}
        self.threads: int | None = None
        """What torch would use by itself, and what a cold process would have had."""

    def run(self) -> None:
        """The thread."""
        try:
            self._import()
        except BaseException as error:
            self.failed = f"{type(error).__name__}: {error}"
            log(f"the importing thread ended: {self.failed}")
        self._tell()
        # A thread that ends frees what libraries keep for it, under their locks; forked in the middle of that, a child
        # would find those locked. So it never ends.
        threading.Event().wait()

    def _import(self) -> None:
        begin = time.monotonic()
        with self.lock:
            for name in (*self.light, self.target):
                self._load(name)
            if self.heavy:
                for stage in LIGHT_STAGES:
                    self._load(f"{self.package}.stages.{stage}")
            self._note_sources()
            self.ready_for_light = True
        self._tell()
        for name in self.heavy:
            self._step(lambda: self._load(name))  # noqa: B023
        with self.lock:
            if self.heavy:
                self._load_package()
            self._note_sources()
            self._calm()
            # Nothing is written outside the lock: a fork in the middle of it would copy a stream that is held.
            log(f"ready after {time.monotonic() - begin:.1f} s; threads: {', '.join(thread_names())}")
            self.ready = True
        self._tell()
        for part in rehearsal.PARTS.values() if self.heavy else ():
            self._step(lambda: self._rehearse(part), calm=True)  # noqa: B023
        for name in self.optional:
            self._step(lambda: self._load(name), calm=True)  # noqa: B023
        with self.lock:
            log(f"done after {time.monotonic() - begin:.1f} s; threads: {', '.join(thread_names())}")
            self.done = True

    def may_start(self, argv: list[str]) -> bool:
        """Whether what a job needs is there."""
        light = argv[:1] == ["stage"] and argv[1:2] != [] and argv[1] in LIGHT_STAGES
        return self.ready or (self.ready_for_light and light)

    def stale(self) -> str | None:
        """A source file of the package that changed since it was imported."""
        return next((path for path, when in self.sources.items() if _modified(path) != when), None)

    def _step(self, work: Callable[[], None], *, calm: bool = False) -> None:
        self.no_job_waits.wait()
        with self.lock:
            work()
            if calm:
                self._calm()
        self._tell()

    def _tell(self) -> None:
        os.write(self.wake, b"\0")

    def _load(self, name: str) -> None:
        try:
            importlib.import_module(name)
        except BaseException as error:  # a library that exits while imported must not stop this thread
            log(f"not preloaded: {name} ({type(error).__name__}: {error})")

    def _rehearse(self, part: Callable[[], None]) -> None:
        begin = time.monotonic()
        try:
            part()
        except Exception as error:  # jobs then do it themselves
            log(f"not rehearsed: {part.__name__} ({type(error).__name__}: {error})")
        log(f"rehearsed {part.__name__} in {time.monotonic() - begin:.1f} s; threads: {', '.join(thread_names())}")

    def _load_package(self) -> None:
        package = sys.modules.get(self.package)
        if package is not None and package.__spec__ and package.__spec__.submodule_search_locations:
            for part in pkgutil.walk_packages(package.__path__, f"{self.package}.", onerror=lambda name: None):
                if not part.name.endswith("__main__"):
                    self._load(part.name)

    def _note_sources(self) -> None:
        for name, module in list(sys.modules.items()):
            own = name == self.package or name.startswith(f"{self.package}.")
            if own and module.__spec__ and module.__spec__.origin:
                self.sources.setdefault(module.__spec__.origin, _modified(module.__spec__.origin))

    def _calm(self) -> None:
        """One torch thread, so that no thread pool exists to be lost in a fork; and when a child ends, nothing that was
        imported here is swept, finalised or summed up (0.2 s per job)."""
        torch: Any = sys.modules.get("torch")
        if torch is not None:
            self.threads = self.threads or torch.get_num_threads()
            torch.set_num_threads(1)
        dynamo: Any = sys.modules.get("torch._dynamo.utils")
        if dynamo is not None:
            atexit.unregister(dynamo.dump_compile_times)
        for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
            finalizer.atexit = False
        gc.collect()
        gc.freeze()


def _modified(path: str) -> int:
    return os.stat(path).st_mtime_ns if os.path.exists(path) else 0


def thread_names() -> list[str]:
    """Of those that do not end while they are counted: a thread may be listed a moment longer than it lives."""
    names = []
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            names.append(Path(f"/proc/self/task/{task}/comm").read_text().strip())
    return sorted(names)


def log(message: str) -> None:
    """To the worker's log: its stderr. A log that cannot be written stops no job."""
    with contextlib.suppress(OSError, ValueError):
        print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)
