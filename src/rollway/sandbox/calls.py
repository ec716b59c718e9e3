"""A program's functions, called from its tests in another process.

The process of the program never holds the tests, nor what they expect: it is sent calls, and answers with plain data.
What it may tamper with is only its own answers. Messages: a length of four bytes, then JSON.
"""

import builtins
import socket
import struct
import traceback
from types import CodeType, ModuleType
from typing import Any

from rollway.sandbox import values
from rollway.sandbox.names import Ambiguous, Names

_NAMELESS = "<tests>"


class Gone(BaseException):
    """The program has ended, or said what is no answer. Not an Exception: tests must not catch it."""


class ProgramError(Exception):
    """The program raised an exception that is none of Python's own."""


class Uncarried(Exception):
    """The tests hand the program what cannot pass."""


def _send(line: socket.socket, message: bytes) -> None:
    line.sendall(struct.pack("!I", len(message)) + message)


def _receive(line: socket.socket, most: int) -> bytes:
    """Raises EOFError where the other side is gone, ValueError where its message is too long."""
    (length,) = struct.unpack("!I", _exactly(line, 4))
    if length > most:
        raise ValueError(f"a message of {length} bytes, more than {most}")
    return _exactly(line, length)


def _exactly(line: socket.socket, length: int) -> bytes:
    parts = []
    while length:
        part = line.recv(min(length, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def answer(file: int, source: bytes, most: int) -> int:
    """The program's side: executes it, then answers calls until the tests are over. Returns the exit code."""
    line = socket.socket(fileno=file)
    module = ModuleType("program")
    kept: list[object] = []

    def refer(value: object) -> int:
        kept.append(value)
        return len(kept) - 1

    def serve(message: bytes) -> object:
        request = values.loads(message, kept.__getitem__)
        if request["what"] == "load":
            exec(compile(source, "program.py", "exec"), vars(module))
            return None
        if "name" in request:
            if request["name"] not in vars(module):
                raise NameError(f"name {request['name']!r} is not defined")
            target = vars(module)[request["name"]]
        else:
            target = request["target"]
        if request["what"] == "get":
            return getattr(target, request["attribute"])
        if request["what"] == "set":
            setattr(target, request["attribute"], request["value"])
            return None
        return target(*request["args"], **request["kwargs"])

    while True:
        try:
            message = _receive(line, most)
        except EOFError:
            return 0
        try:
            reply = values.dumps({"value": serve(message)}, refer)
            if len(reply) > most:
                raise ValueError(f"an answer of {len(reply)} bytes, more than {most}")
        except BaseException as error:
            known = [kind.__name__ for kind in type(error).__mro__ if vars(builtins).get(kind.__name__) is kind]
            raised = [type(error).__name__, known[0], str(error)[:500]]
            reply = values.dumps({"raised": raised}, refer)
        _send(line, reply)


class Program:
    """The tests' side: a program in another process."""

    def __init__(self, file: int, most: int) -> None:
        self._line = socket.socket(fileno=file)
        self._most = most
        self.asked = 0
        """What the tests asked of the program so far, beside loading it."""
        self.gone = ""
        """How the program ended before its tests did."""
        self.raised = ""
        """The last exception of the program's own."""
        self.ends: tuple[type[Exception], ...] = _ENDS_LOOPS
        """Exceptions that do not reach the tests as what they are."""

    def load(self) -> None:
        self._ask({"what": "load"})

    def call(self, **request: Any) -> Any:
        return self._ask({"what": "call", **request})

    def get(self, **request: Any) -> Any:
        return self._ask({"what": "get", **request})

    def set(self, **request: Any) -> None:
        self._ask({"what": "set", **request})

    def _ask(self, request: dict[str, Any]) -> Any:
        if self.gone:
            raise Gone(self.gone)
        message = values.dumps(request, _number_of)
        self.asked += request["what"] != "load"
        try:
            _send(self._line, message)
            reply = values.loads(_receive(self._line, self._most), lambda number: Remote(self, number))
            if "raised" not in reply:
                return reply["value"]
            name, known, text = reply["raised"]
            raised = _exception(name, known, text, self.ends)
        except EOFError:
            self.gone = "ended"
        except ConnectionError:
            self.gone = "ended"
        except (ValueError, TypeError, KeyError) as error:
            # Python quotes what it cannot read, at any length, and the report of the tests has an end.
            self.gone = f"broke off ({error})"[:300]
        if self.gone:
            raise Gone(self.gone)
        self.raised = _said(raised)
        raise raised


_ENDS_LOOPS = (StopIteration, StopAsyncIteration)
"""What a program raises in the midst of the tests' map, zip or all would end those as if all had been asked."""


def _exception(name: str, known: str, text: str, ends: tuple[type[Exception], ...]) -> Exception:
    """The exception of Python's own, where a program raised one that ends no loop of the tests; else ProgramError."""
    kind = vars(builtins).get(known)
    if isinstance(kind, type) and issubclass(kind, Exception) and kind is not Exception and not issubclass(kind, ends):
        try:
            return kind(str(text))
        except TypeError:
            pass
    return ProgramError(f"{name}: {text}")


class Function:
    """A name of the program, as its tests see it."""

    def __init__(self, program: Program, name: str) -> None:
        self._program, self._name = program, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._program.call(name=self._name, args=args, kwargs=kwargs)

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("_"):
            raise AttributeError(attribute)
        return self._program.get(name=self._name, attribute=attribute)


class Remote:
    """An object of the program that is no plain data. Tests may call it, read and set its attributes, and hand it back.

    It equals nothing but itself, and has no operators: what the object's class says of that stays in the program.
    """

    __slots__ = ("_number", "_program")

    _program: Program
    _number: int

    def __init__(self, program: Program, number: int) -> None:
        object.__setattr__(self, "_program", program)
        object.__setattr__(self, "_number", number)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._program.call(target=self, args=args, kwargs=kwargs)

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("_"):
            raise AttributeError(attribute)
        return self._program.get(target=self, attribute=attribute)

    def __setattr__(self, attribute: str, value: object) -> None:
        if attribute.startswith("_"):
            raise AttributeError(attribute)
        self._program.set(target=self, attribute=attribute, value=value)


def _number_of(value: object) -> int:
    if isinstance(value, Remote):
        return value._number
    if value is Remote:
        raise TypeError("the type of an object of the program")
    # Only tests can hold such a value: what a program answers is plain data or a Remote.
    raise Uncarried(f"a {type(value).__name__}, which is no plain data")


def run_tests(file: int, given: dict[str, Any], most: int) -> dict[str, Any]:
    """Runs the tests in order. given: setup, tests (texts), check (a function that takes the program's entry), entry
    (what the program defines: a list of names, or None where the tests say it).

    Returns passed, total, gone (how the program ended before its tests did), raised (the program's last exception), and
    fault: what is wrong with the tests themselves, or None.
    """
    program = Program(file, most)
    verdict: dict[str, Any] = {"passed": 0, "total": len(given["tests"]), "gone": "", "fault": None, "raised": ""}
    names: dict[str, Any] = {"__name__": "tests"}
    try:
        parts = [compile(given["setup"], _NAMELESS, "exec"), *(compile(t, _NAMELESS, "exec") for t in given["tests"])]
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return {**verdict, "fault": f"the tests are no Python: {error}"}
    try:
        known = Names(given["setup"], given["tests"])
        entries = given["entry"] or known.entries()
    except Ambiguous as error:
        return {**verdict, "fault": str(error)}
    if known.indexed():
        program.ends = (*_ENDS_LOOPS, IndexError)
    names.update(known.modules() | known.standard(entries))
    theirs = {name: Function(program, name) for name in entries}
    stops: dict[str, Any] | None
    if given["check"]:
        stops = _set_up(parts[0], names, program) or _load(program)
    else:  # the set-up may build what the tests need of the program's classes
        names.update(theirs)
        stops = _load(program) or _set_up(parts[0], names, program)
    if stops:
        return verdict | stops
    names.update(theirs)
    candidate = Function(program, entries[0] if entries else "")
    for part in parts[1:]:
        failure = _failure(part, names, given["check"], candidate)
        if isinstance(failure, Uncarried) and not program.asked:
            return {**verdict, "fault": f"the tests hand the program {failure}"}
        if failure is not None and not isinstance(failure, AssertionError) and not program.asked:
            return {**verdict, "fault": f"the tests fail before they call the program: {_said(failure)}"}
        verdict |= {"gone": program.gone, "raised": program.raised}
        if program.gone:
            return verdict
        verdict["passed"] += failure is None
    return verdict


def _load(program: Program) -> dict[str, Any] | None:
    """What becomes of the verdict where the program does not get as far as its last line."""
    try:
        program.load()
    except (Exception, Gone) as error:
        return {"gone": program.gone, "raised": _said(error)}
    return None


def _set_up(part: CodeType, names: dict[str, Any], program: Program) -> dict[str, Any] | None:
    """What becomes of the verdict where the set-up fails: the program's failure where it was asked, else a fault."""
    try:
        exec(part, names)
    except BaseException as error:
        if program.asked:
            return {"gone": program.gone, "raised": _said(error)}
        return {"fault": f"the set-up of the tests fails: {_said(error)}"}
    return None


def _failure(part: CodeType, names: dict[str, Any], check: str | None, candidate: Function) -> BaseException | None:
    """What a test raises; None where it passes."""
    try:
        exec(part, names)
        if check is not None:
            names[check](candidate)
    except BaseException as error:
        return error
    return None


def _said(error: BaseException) -> str:
    return traceback.format_exception_only(error)[-1].strip()[:300]
