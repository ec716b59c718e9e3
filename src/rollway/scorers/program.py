"""Programs that a policy wrote, run against tests or input/output pairs in the sandbox (`rollway.sandbox`).

What a program must not know stays out of its reach: expected outputs never leave this process, and tests run in a
sandboxed process of their own that calls the program's functions through a socket and gets plain data back.
"""

import json
import os
import queue
import signal
import socket
import sysconfig
import threading
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from rollway.config.scorers import ProgramScorer
from rollway.errors import RollwayError
from rollway.runtime.notice import tick
from rollway.sandbox.client import Box, Limits, Outcome, Refused, Unusable, file_of
from rollway.scorers.rows import Row, Verdict

_MOST_REPORT = 1 << 16


@dataclass(frozen=True)
class Tests:
    """Python code that calls the program. entry: what it defines; None where the tests say by themselves."""

    setup: str
    tests: tuple[str, ...]
    check: str | None
    entry: tuple[str, ...] | None


@dataclass(frozen=True)
class Pairs:
    """What a program is given on its standard input, and what it must print."""

    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Question:
    """A program, and what it is judged by."""

    program: str
    by: Tests | Pairs


class Unreadable(Exception):
    """What is wrong with the tests in a row's meta."""


def verdicts(name: str, config: ProgramScorer, rows: list[Row], threads: int) -> list[Verdict]:
    """1 if the program passes all of its tests, else 0 (with `partial`: the share it passes), in the order of rows.

    Each (program, tests) is run once. Components: `passed`, the share of tests passed; and 1 where it was ended by a
    limit of time (`timeout`), printed too much (`output`), was gone before its tests were over (`crash`), or raised an
    exception (`raised`); `unstable` of programs run twice: whether the second run said otherwise.
    Raises RollwayError where this machine cannot isolate programs.
    """
    questions = [_question(config, row) for row in rows]
    todo: queue.SimpleQueue[Question] = queue.SimpleQueue()
    asked = list(dict.fromkeys(q for q in questions if isinstance(q, Question)))
    twice = {q for row, q in zip(rows, questions, strict=True) if isinstance(q, Question) and _drawn(config, row, q)}
    for question in asked:
        todo.put(question)
    known: dict[Question, Verdict] = {}
    failures: list[BaseException] = []

    def serve() -> None:
        try:
            with _Judge(config) as judge:
                while not failures:
                    question = todo.get_nowait()
                    known[question] = _checked_again(judge.judge, question, question in twice)
                    tick(reward=known[question].reward)
        except queue.Empty:
            return
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=serve, daemon=True) for _ in range(min(config.parallel or threads, len(asked)))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    match failures:
        case [Refused() | Unusable() as error, *_]:
            raise RollwayError(f"scorer {name}: {error}") from None
        case [error, *_]:
            raise error
    return [known[q] if isinstance(q, Question) else q for q in questions]


def _drawn(config: ProgramScorer, row: Row, question: Question) -> bool:
    """Whether a row's program is run twice: by the row too, so that another round draws the same program anew."""
    text = f"{row.rollout_id}\n{question.program}"
    return zlib.crc32(text.encode("utf-8", "replace")) < config.recheck * 2**32


def _checked_again(judge: Callable[[Question], Verdict], question: Question, again: bool) -> Verdict:
    """The verdict; the lower one of two where the program is run again and does not say the same."""
    first = judge(question)
    if first.error is not None or not again:
        return first
    second = judge(question)
    if second.error is not None:
        return first
    lower = min(first, second, key=lambda verdict: verdict.reward)
    return Verdict(lower.reward, {**lower.components, "unstable": float(second.reward != first.reward)})


def _question(config: ProgramScorer, row: Row) -> Question | Verdict:
    """What has to be run, or the verdict where nothing can be."""
    by: Tests | Pairs
    try:
        match config.format:
            case "humaneval":
                by, prompt = _humaneval(row.meta)
            case "mbpp":
                by, prompt = _mbpp(row.meta), ""
            case "stdio":
                by, prompt = _stdio(row.meta), ""
    except Unreadable as error:
        return Verdict.failed(str(error))
    if config.code == "continuation":
        return Question(prompt + row.completion, by)
    code = row.completion if config.code == "all" else last_block(row.completion)
    if not code.strip():
        return Verdict(0.0, {"passed": 0.0})
    return Question(f"{prompt}\n{code}" if prompt else code, by)


def last_block(text: str) -> str:
    """The last block of code between lines of three backticks (its end may be missing); without one, the whole text."""
    blocks: list[list[str]] = []
    inside = False
    for line in text.split("\n"):
        if line.strip().startswith("```"):
            inside = not inside
            if inside:
                blocks.append([])
        elif inside:
            blocks[-1].append(line)
    return "\n".join(blocks[-1]) + "\n" if blocks else text


def _text(meta: dict[str, Any], key: str) -> str:
    value = meta.get(key)
    if not isinstance(value, str):
        raise Unreadable(f"meta.{key} is {'missing' if value is None else 'no text'}; name it in the task's `meta`")
    return value


def _texts(meta: dict[str, Any], key: str) -> tuple[str, ...]:
    value = meta.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise Unreadable(
            f"meta.{key} is {'missing' if value is None else 'no list of texts'}; name it in the task's `meta`"
        )
    return tuple(value)


def _humaneval(meta: dict[str, Any]) -> tuple[Tests, str]:
    """The set-up is the prompt: its helper functions are the tests' too."""
    prompt = _text(meta, "prompt")
    return Tests(prompt, (_text(meta, "test"),), "check", (_text(meta, "entry_point"),)), prompt


def _mbpp(meta: dict[str, Any]) -> Tests:
    setup = meta.get("test_setup_code") or "\n".join(meta.get("test_imports") or [])
    if not isinstance(setup, str):
        raise Unreadable("meta.test_setup_code is no text")
    entry = meta.get("entry_point")
    if entry is not None:
        entry = _texts(meta, "entry_point") if isinstance(entry, list) else (_text(meta, "entry_point"),)
    return Tests(setup, _texts(meta, "test_list"), None, entry)


def _stdio(meta: dict[str, Any]) -> Pairs:
    """`tests`: a list of {input, output}; or `input_output`: {inputs, outputs}, which may be JSON in a text."""
    found = meta.get("tests")
    if found is None and "input_output" in meta:
        both = meta["input_output"]
        try:
            both = json.loads(both) if isinstance(both, str) else both
            found = [{"input": i, "output": o} for i, o in zip(both["inputs"], both["outputs"], strict=True)]
        except (ValueError, KeyError, TypeError) as error:
            raise Unreadable(f"meta.input_output is not {{inputs, outputs}} of equal length ({error})") from None
    if not isinstance(found, list) or not found:
        raise Unreadable(
            "meta.tests is no list of {input, output}; name `tests` (or `input_output`) in the task's `meta`"
        )
    pairs = []
    for number, pair in enumerate(found):
        match pair:
            case {"input": str(given), "output": str(expected)}:
                pairs.append((given, expected))
            case _:
                raise Unreadable(f"meta.tests: entry {number} is no {{input, output}} of two texts")
    return Pairs(tuple(pairs))


def limits(config: ProgramScorer) -> Limits:
    mib = 1 << 20
    return Limits(
        cpu=config.cpu,
        wall=config.wall,
        memory=config.memory * mib,
        processes=config.processes,
        scratch=config.scratch * mib,
        output=config.output * mib,
        fork=config.fork,
    )


class _Judge:
    """One worker's boxes: one in which programs run, and a second one for tests that call them."""

    def __init__(self, config: ProgramScorer) -> None:
        self._config, self._limits = config, limits(config)
        places = [sysconfig.get_path(name) for name in ("purelib", "platlib")] if config.packages else []
        self._open: Callable[[], Box] = lambda: Box(self._limits, config.packages, list(dict.fromkeys(places)))
        self._boxes: list[Box] = []

    def __enter__(self) -> "_Judge":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        while self._boxes:
            self._boxes.pop().close()

    def _box(self, number: int) -> Box:
        while len(self._boxes) <= number:
            self._boxes.append(self._open())
        return self._boxes[number]

    def judge(self, question: Question) -> Verdict:
        program = question.program.encode("utf-8", "replace")
        try:
            match question.by:
                case Tests():
                    return self._by_tests(program, question.by)
                case Pairs():
                    return self._by_pairs(program, question.by)
        except RuntimeError as error:
            self._close()
            return Verdict.failed(str(error))

    def _by_pairs(self, program: bytes, by: Pairs) -> Verdict:
        passed, ends = 0, dict[str, float]()
        for given, expected in by.pairs:
            printed, outcome = self._run(program, given.encode("utf-8", "replace"))
            ended = {"output": 1.0} if printed is None else self._ended(outcome)
            right = printed is not None and not ended and same_output(printed.decode("utf-8", "replace"), expected)
            passed += right
            ends = ends or ended
            if not right and not self._config.partial:
                break
        return self._verdict(passed / len(by.pairs), ends)

    def _run(self, program: bytes, given: bytes) -> tuple[bytes | None, Outcome]:
        """What a program prints, or None where it is more than the limit."""
        box = self._box(0)
        reads, writes = os.pipe()
        box.start("script", [file_of(program), file_of(given), writes])
        with os.fdopen(reads, "rb") as output:
            printed = output.read(self._limits.output + 1)
        if len(printed) > self._limits.output:
            box.stop()
            return None, box.outcome()
        return printed, box.outcome()

    def _by_tests(self, program: bytes, by: Tests) -> Verdict:
        box, tester = self._box(0), self._box(1)
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        reads, writes = os.pipe()
        given = json.dumps({"setup": by.setup, "tests": by.tests, "check": by.check, "entry": by.entry})
        with ExitStack() as cleaning:
            report = cleaning.enter_context(os.fdopen(reads, "rb"))
            box.start("program", [file_of(program), near.detach()])
            tester.start("tests", [file_of(given.encode("utf-8", "surrogatepass")), far.detach(), writes])
            said = report.read(_MOST_REPORT)
        try:
            found: dict[str, Any] = json.loads(said)
        except ValueError:
            found = {"gone": "broke off"}
        if found["gone"] != "ended":  # else it is about to end by itself, and how is worth knowing
            box.stop()
        outcome, tested = box.outcome(), tester.outcome()
        if found.get("fault"):
            return Verdict.failed(found["fault"])
        if found["gone"]:
            late = {"timeout": 1.0} in (self._ended(outcome), self._ended(tested))
            return self._verdict(found.get("passed", 0) / len(by.tests), {"timeout" if late else "crash": 1.0})
        raised = found["raised"] and found["passed"] < len(by.tests)
        return self._verdict(found["passed"] / len(by.tests), {"raised": 1.0} if raised else {})

    def _verdict(self, share: float, ends: dict[str, float]) -> Verdict:
        reward = share if self._config.partial else float(share == 1.0)
        return Verdict(reward, {"passed": share, **ends})

    def _ended(self, outcome: Outcome) -> dict[str, float]:
        """The component that says how a program ended before its end; empty where it did not."""
        if outcome.ended == "asked":
            return {}
        out_of_time = -(outcome.code or 0) in (signal.SIGKILL, signal.SIGXCPU) and outcome.cpu > self._limits.cpu - 0.3
        if outcome.ended == "wall" or out_of_time:
            return {"timeout": 1.0}
        if outcome.code is None or outcome.code < 0:
            return {"crash": 1.0}
        return {"raised": 1.0} if outcome.code else {}


def same_output(printed: str, expected: str) -> bool:
    """Equal line by line; white space at the ends of lines and empty lines at the end do not count."""
    return [line.rstrip() for line in printed.rstrip().split("\n")] == [
        line.rstrip() for line in expected.rstrip().split("\n")
    ]
