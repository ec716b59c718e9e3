"""Starts and ends the warm worker with the workflow: not on clusters, nor with ROLLWAY_WORKER=off."""

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from rollway.errors import RollwayError, unwritten
from rollway.runtime import client, job_client
from rollway.runtime.notice import notice

LAUNCHER = """#!/bin/sh
# What this workflow's jobs call: hands a stage to the warm worker, and loads less for it than the command itself.
exec {python} -I -S -c {code} "$@"
"""


def start(socket: str, workflow: Any, results: str) -> None:
    """Called by the Snakefile's `onstart`. Sets ROLLWAY_WORKER, which the jobs' `rollway` commands follow."""
    # What was inherited is another workflow's: these jobs are none of its.
    inherited = os.environ.pop("ROLLWAY_WORKER", None)
    os.environ.pop("ROLLWAY_ENGINES", None)
    if inherited == "off" or not workflow.local_exec:
        return
    path = Path(socket)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        started = client.start(path, os.getpid(), path.parent / "worker.log")
        if started is not None:
            os.environ["ROLLWAY_WORKER"] = str(path.absolute())
            _put_launcher(_launcher(socket))
    except RollwayError as error:
        notice(f"no warm worker, stages start cold: {error}")
        return
    except OSError as error:
        # The jobs need the same disk: theirs are the errors that stop the workflow.
        notice(f"{unwritten(Path(error.filename or path.parent), error)}; stages start cold")
        return
    if started is not None:
        # An engine that a job starts serves the later ones too, and ends with this process.
        os.environ["ROLLWAY_ENGINES"] = f"{os.getpid()}:{path.parent.absolute()}"


def stop(socket: str) -> None:
    """Called by `onsuccess` and `onerror`."""
    if os.environ.pop("ROLLWAY_WORKER", "off") == "off":
        return
    from rollway.engines.vllm_launch import stop_all

    os.environ.pop("ROLLWAY_ENGINES", None)
    os.environ["PATH"] = os.environ["PATH"].removeprefix(f"{_launcher(socket).parent}:")
    client.stop(Path(socket))
    stop_all(Path(socket).parent)


def _launcher(socket: str) -> Path:
    return Path(socket).absolute().parent / "bin" / "rollway"


def _put_launcher(launcher: Path) -> None:
    """First on the PATH of the jobs, unless the `rollway` there is another environment's."""
    command = shutil.which("rollway")
    if command is None or not os.path.samefile(Path(command).parent, Path(sys.executable).parent):
        return
    module = Path(job_client.__file__)
    code = f"import sys; sys.path.append({str(module.parent)!r}); import {module.stem} as c; "
    code += f"c.main({sys.prefix!r}, {os.path.abspath(command)!r})"
    launcher.parent.mkdir(exist_ok=True)
    launcher.write_text(LAUNCHER.format(python=shlex.quote(sys.executable), code=shlex.quote(code)))
    launcher.chmod(0o700)
    os.environ["PATH"] = f"{launcher.parent}:{os.environ['PATH']}"
