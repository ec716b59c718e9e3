"""What the warm worker imports, when jobs may start, and what their clients import."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rollway.runtime import job_client
from rollway.runtime.preload import Imports, log, thread_names


def test_light_jobs_need_not_wait_for_torch() -> None:
    imports = Imports("cpu", "rollway.cli:main", 0)
    assert not imports.may_start(["stage", "score"])
    imports.ready_for_light = True
    assert imports.may_start(["stage", "score", "--spec", "{}"])
    assert not imports.may_start(["stage", "rollout"]) and not imports.may_start(["stage"])
    imports.ready = True
    assert imports.may_start(["stage", "rollout"])


def test_threads_that_end_while_they_are_counted_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that was joined may be listed a moment longer: one time in a thousand here."""
    listed = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: [*listed(path), "999999999"])
    assert len(thread_names()) == len(listed("/proc/self/task"))


def test_what_a_warm_job_starts_is_thin() -> None:
    """Every warm job pays for what its client imports."""
    folder = Path(job_client.__file__).parent
    code = f"import sys; sys.path.append({str(folder)!r}); import job_client; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    modules = set(done.stdout.split())
    assert "job_client" in modules and len(modules) < 40
    assert not modules & {"site", "socket", "selectors", "enum", "signal", "re", "functools", "collections", "typing"}


def test_a_log_that_cannot_be_written_ends_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    with os.fdopen(os.open("/dev/full", os.O_WRONLY), "wb", buffering=0) as full:
        monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(full, write_through=True))
        with pytest.raises(OSError, match="No space left"):
            print("nothing of this can be written", file=sys.stderr, flush=True)
        log("nor of this")
        monkeypatch.undo()
