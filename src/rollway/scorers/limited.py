"""Child processes that judge what a policy wrote and that a hang, or a need for memory, cannot outlive.

The other side is `limited_worker.serve`.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from rollway.runtime.notice import tick
from rollway.scorers.rows import Verdict


def ask_all(module: str, questions: Sequence[Any], workers: int, timeout: float) -> list[Verdict]:
    """The verdicts on `questions`, values that JSON holds, in their order; no more than `workers` processes at a time.

    module: run as a program, serves one question per line. A question that takes more than `timeout` seconds of
    processor time is worth 0 (component `timeout`), and so is one that needs too much memory (`memory`): a policy can
    write expressions that nobody can simplify, and that must not stop a run.
    """
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(len(questions)):
        todo.put(number)
    found: dict[int, Verdict] = {}
    failures: list[BaseException] = []

    def serve() -> None:
        try:
            with _Worker(module, timeout) as worker:
                while not failures:
                    number = todo.get_nowait()
                    found[number] = worker.ask(questions[number])
                    tick(reward=found[number].reward)
        except queue.Empty:
            return
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=serve, daemon=True) for _ in range(min(workers, len(questions)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return [found[number] for number in range(len(questions))]


class _Worker:
    """A child process that answers one question per line; the kernel ends it when a question takes too long."""

    def __init__(self, module: str, timeout: float) -> None:
        self._module, self._timeout = module, timeout
        self._process = self._start()

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def ask(self, question: Any) -> Verdict:
        try:
            reply = self._exchange(question)
        except BrokenPipeError:
            reply = ""
        if reply:
            return Verdict(**json.loads(reply))
        code = self._process.wait()
        self._stop()
        self._process = self._start()
        match -code:
            case signal.SIGPROF | signal.SIGALRM:
                return Verdict(0.0, {"timeout": 1.0})
            case signal.SIGKILL | signal.SIGSEGV | signal.SIGABRT:
                return Verdict(0.0, {"memory": 1.0})
            case _:
                return Verdict.failed(f"the judging process ended with status {code}")

    def _exchange(self, question: Any) -> str:
        pipe_in, pipe_out = self._process.stdin, self._process.stdout
        assert pipe_in is not None
        assert pipe_out is not None
        pipe_in.write(json.dumps(question) + "\n")
        pipe_in.flush()
        return pipe_out.readline()

    def _start(self) -> "subprocess.Popen[str]":
        # A new interpreter, not a fork: this process may hold threads, and its main module may not be importable.
        return subprocess.Popen(
            [sys.executable, "-m", self._module, str(self._timeout)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "PYTHONHASHSEED": "0"},
        )

    def _stop(self) -> None:
        self._process.kill()
        self._process.wait()
        close_pipes(self._process)


def close_pipes(process: "subprocess.Popen[Any]") -> None:
    """Of a process that has ended, perhaps in the midst of what it was told."""
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with suppress(BrokenPipeError):
            pipe.close()
