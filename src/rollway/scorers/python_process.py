"""The user's own reward function in a process of its own, which is killed when a call takes too long."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rollway.config.scorers import PythonScorer
from rollway.errors import RollwayError
from rollway.scorers.limited import close_pipes
from rollway.scorers.rows import Verdict

_WORKER = "rollway.scorers.python_worker"
IMPORT_SECONDS = 600.0
"""Most time that the import of the function's module may take."""


class Limited:
    """Calls `config.function` row by row in a child; a call of more than `config.timeout` seconds by the clock ends it,
    with all that it started, and the next call gets a new one."""

    def __init__(self, name: str, config: PythonScorer, root: Path) -> None:
        """Raises RollwayError when there is no such function."""
        assert config.timeout is not None
        self._name, self._config, self._root, self._timeout = name, config, root, config.timeout
        self._process, self._read = self._start(), b""
        self._begin()

    def __enter__(self) -> "Limited":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def ask(self, row: dict[str, Any]) -> tuple[Verdict, bool]:
        """The verdict, and whether the call was ended by the limit."""
        if self._process.poll() is not None:
            self._again()
        reply = self._send(row, self._timeout)
        if reply:
            return Verdict(**json.loads(reply)), False
        if reply is None:
            self._stop()
            return Verdict.failed(f"the function took longer than timeout {self._timeout:g} s, and was killed"), True
        return Verdict.failed(f"the function ended its process with status {self._process.wait()}"), False

    def _begin(self) -> None:
        config = self._config
        settings = {
            "name": self._name,
            "function": config.function,
            "root": str(self._root),
            "params": config.params,
            "feedback": config.feedback,
        }
        reply = self._send(settings, IMPORT_SECONDS)
        if not reply:
            self._stop()
            said = "was not imported within 10 minutes" if reply is None else "ends the process that imports it"
            raise RollwayError(f"scorer {self._name}: {config.function} {said}")
        if refused := json.loads(reply).get("refused"):
            self._stop()
            raise RollwayError(refused)

    def _again(self) -> None:
        self._stop()
        self._process, self._read = self._start(), b""
        self._begin()

    def _send(self, value: dict[str, Any], seconds: float) -> bytes | None:
        """The answer's line; empty where the process is gone, None where time is up."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(value).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return b""
        return self._line(time.monotonic() + seconds)

    def _line(self, deadline: float) -> bytes | None:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        waiting = select.poll()
        waiting.register(descriptor, select.POLLIN)
        while b"\n" not in self._read:
            left = deadline - time.monotonic()
            if left <= 0 or not waiting.poll(1000 * left):
                return None
            piece = os.read(descriptor, 65536)
            if not piece:
                return b""
            self._read += piece
        line, _, self._read = self._read.partition(b"\n")
        return line

    def _start(self) -> "subprocess.Popen[bytes]":
        # A new interpreter, not a fork: this process may hold threads. A session of its own, to be killed as a whole.
        return subprocess.Popen(
            [sys.executable, "-m", _WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            start_new_session=True,
        )

    def _stop(self) -> None:
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # It and all that it started are gone.
        self._process.wait()
        close_pipes(self._process)
