"""Mathematical equality by `math_verify`: string check first, then child processes that a hang cannot outlive."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass

from rollway.config.scorers import MathVerifyScorer
from rollway.runtime.notice import tick
from rollway.scorers.rows import Row, Verdict
from rollway.tasks.extract import SECONDS, Extractor, boxed, extractor

_WORKER = "rollway.scorers.math_verify_worker"


@dataclass(frozen=True)
class Question:
    """Is the completion's final answer equal to the reference?"""

    answer: str
    completion: str


def verdicts(config: MathVerifyScorer, rows: list[Row], threads: int) -> list[Verdict]:
    """1 if equal, else 0. Each (answer, completion) is judged once; the order of rows is kept.

    A comparison that exceeds `timeout` seconds of processor time, or the worker's memory, is wrong (component
    `timeout`, `memory`): a policy can write expressions that nobody can simplify, and that must not stop a run.
    """
    extract = extractor(config.extract)
    known: dict[Question, Verdict] = {}
    hard: list[Question] = []
    questions = [_question(config, row, extract) for row in rows]
    for question in dict.fromkeys(q for q in questions if isinstance(q, Question)):
        if not question.completion.strip():
            known[question] = Verdict(0.0)
        elif _same_text(question):
            known[question] = Verdict(1.0)
        else:
            hard.append(question)
    workers = min(config.processes or threads, len(hard))
    if workers:
        known.update(_ask_workers(hard, workers, config.timeout))
    return [known[q] if isinstance(q, Question) else q for q in questions]


def _question(config: MathVerifyScorer, row: Row, extract: Extractor) -> Question | Verdict:
    """What has to be compared, or the verdict where nothing has."""
    if row.answer is None:
        return Verdict.failed("the prompt has no answer")
    try:
        given = extract(row.completion)
    except TimeoutError:
        return Verdict.failed(f"extract {config.extract} takes longer than {SECONDS:g} s on this text")
    if given is None:
        return Verdict(0.0)
    return Question(row.answer, given if config.extract == "none" else f"\\boxed{{{given.strip()}}}")


def _same_text(question: Question) -> bool:
    answer = question.answer.strip()
    if question.completion.strip() == answer:
        return True
    return question.completion.count("\\boxed") == 1 and boxed(question.completion) == answer


def _ask_workers(questions: list[Question], workers: int, timeout: float) -> dict[Question, Verdict]:
    todo: queue.SimpleQueue[Question] = queue.SimpleQueue()
    for question in questions:
        todo.put(question)
    found: dict[Question, Verdict] = {}
    failures: list[BaseException] = []

    def serve() -> None:
        try:
            with _Worker(timeout) as worker:
                while not failures:
                    question = todo.get_nowait()
                    found[question] = worker.ask(question)
                    tick(reward=found[question].reward)
        except queue.Empty:
            return
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=serve, daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return found


class _Worker:
    """A child process that answers one question per line; the kernel ends it when a question takes too long."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._process = self._start()

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def ask(self, question: Question) -> Verdict:
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
                return Verdict.failed(f"the comparing process ended with status {code}")

    def _exchange(self, question: Question) -> str:
        pipe_in, pipe_out = self._process.stdin, self._process.stdout
        assert pipe_in is not None
        assert pipe_out is not None
        pipe_in.write(json.dumps([question.answer, question.completion]) + "\n")
        pipe_in.flush()
        return pipe_out.readline()

    def _start(self) -> "subprocess.Popen[str]":
        # A new interpreter, not a fork: this process may hold threads, and its main module may not be importable.
        return subprocess.Popen(
            [sys.executable, "-m", _WORKER, str(self._timeout)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "PYTHONHASHSEED": "0"},
        )

    def _stop(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                continue
