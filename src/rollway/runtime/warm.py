"""Starts and ends the warm worker with the workflow: not on clusters, nor with ROLLWAY_WORKER=off."""

import os
from pathlib import Path
from typing import Any

from rollway.errors import RollwayError
from rollway.runtime import client
from rollway.runtime.notice import notice


def start(socket: str, workflow: Any, results: str) -> None:
    """Called by the Snakefile's `onstart`. Sets ROLLWAY_WORKER, which the jobs' `rollway` commands follow."""
    if os.environ.get("ROLLWAY_WORKER") == "off" or not workflow.local_exec:
        os.environ.pop("ROLLWAY_WORKER", None)
        os.environ.pop("ROLLWAY_ENGINES", None)
        return
    path = Path(socket)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        started = client.start(path, os.getpid(), path.parent / "worker.log")
    except RollwayError as error:
        notice(f"no warm worker, stages start cold: {error}")
        return
    if started is not None:
        os.environ["ROLLWAY_WORKER"] = str(path.absolute())
        # An engine that a job starts serves the later ones too, and ends with this process.
        os.environ["ROLLWAY_ENGINES"] = f"{os.getpid()}:{path.parent.absolute()}"


def stop(socket: str) -> None:
    """Called by `onsuccess` and `onerror`."""
    if os.environ.pop("ROLLWAY_WORKER", "off") == "off":
        return
    from rollway.engines.vllm_launch import stop_all

    os.environ.pop("ROLLWAY_ENGINES", None)
    client.stop(Path(socket))
    stop_all(Path(socket).parent)
