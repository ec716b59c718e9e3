"""What a job's process does: it gives up what it could do, then runs a program, or a program's tests.

Roles, with the descriptors they are given:
- script: program, standard input, standard output. The program runs as `__main__`.
- program: program, socket. The program is executed, then its functions answer the calls of its tests.
- tests: tests, socket, report. Runs trusted tests against a program that another process runs.
"""

import atexit
import builtins
import gc
import json
import os
import random
import resource
import sys
import threading
from contextlib import suppress
from types import ModuleType
from typing import TYPE_CHECKING

from rollway.sandbox import calls, kernel, seccomp

if TYPE_CHECKING:
    from rollway.sandbox.box import Limits

USER = 1000
"""The user and group that a program sees itself as."""
RAISED = 1
"""Exit code of a program that raised an exception."""
SEALED = b"sealed"
MOST_BLOCKS = 1_000_000
"""Blocks of Python's memory up to which a program's objects are let go of one by one when it has ended."""


def run(role: str, files: list[int], sealed: int, limits: "Limits") -> None:
    """Ends the process. `sealed` is told SEALED, or what failed, before any line of the program runs."""
    source = _read(files[0])
    match role:
        case "script":
            _arrange([files[1], files[2], None, sealed])
        case "program":
            _arrange([None, None, None, sealed, files[1]])
        case _:
            _arrange([None, None, None, sealed, files[1], files[2]])
    try:
        confine(limits)
    except (OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) else None
        os.write(3, (said or str(error)).encode()[:1000])
        return
    os.write(3, SEALED)
    os.close(3)
    random.seed(0)
    match role:
        case "script":
            code = _script(source)
        case "program":
            code = calls.answer(4, source, limits.output)
        case _:
            text = json.dumps(calls.run_tests(4, json.loads(source), limits.output)).encode()
            os.write(5, text)
            code = 0
    os._exit(code)


def _read(file: int) -> bytes:
    with os.fdopen(file, "rb") as source:
        return source.read()


def _arrange(wanted: list[int | None]) -> None:
    """Makes `wanted` the descriptors 0, 1, ... (None: /dev/null), and closes all others."""
    first_free = 50
    null = os.open("/dev/null", os.O_RDWR)
    lifted = []
    for number, file in enumerate(wanted):
        os.dup2(null if file is None else file, first_free + number)
        lifted.append(first_free + number)
    for number, file in enumerate(lifted):
        os.dup2(file, number)
    os.closerange(len(wanted), os.sysconf("SC_OPEN_MAX"))


def confine(limits: "Limits") -> None:
    """Limits, no capabilities, no way to new privileges, and the listed system calls only."""
    os.setsid()
    os.chdir("/scratch")
    os.environ.clear()
    os.environ.update(HOME="/scratch", TMPDIR="/scratch", PATH="/nowhere", LANG="C.UTF-8")
    for name, most in (
        (resource.RLIMIT_AS, limits.memory),
        (resource.RLIMIT_CPU, limits.cpu),
        (resource.RLIMIT_NPROC, limits.processes + 1),  # the keeper counts
        (resource.RLIMIT_FSIZE, limits.scratch),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_SIGPENDING, 64),
    ):
        resource.setrlimit(name, (most, most))
    kernel.drop_capabilities()
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    kernel.set_seccomp(seccomp.program(kernel.machine(), fork=limits.fork))


def _script(source: bytes) -> int:
    """Runs a program as the interpreter would run a file. Returns its exit code."""
    sys.argv = ["program.py"]
    # What this process brought with it is none of the program's: neither to be called at its end nor to be collected.
    atexit._clear()
    gc.freeze()
    code = _execute(source)
    _finish()
    return code & 0xFF


def _execute(source: bytes) -> int:
    main = ModuleType("__main__")
    vars(main)["__builtins__"] = builtins
    sys.modules["__main__"] = main
    try:
        exec(compile(source, "program.py", "exec"), vars(main))
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        return RAISED
    return 0


def _finish() -> None:
    """What the interpreter does at its end: waits for threads (those of a pool are told to end), calls what was
    registered for it, lets go of the program's objects (a file that was left open writes what it holds), and flushes.
    None of it changes the exit code."""
    _flush()
    with suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]
    with suppress(BaseException):
        atexit._run_exitfuncs()
    _flush()
    with suppress(BaseException):
        # Of very many objects that would take time which the program's limit counts.
        if sys.getallocatedblocks() < MOST_BLOCKS:
            del sys.modules["__main__"]
            gc.collect()
    _flush()


def _flush() -> None:
    for stream in (sys.stdout, sys.__stdout__):
        with suppress(BaseException):
            stream.flush()  # type: ignore[union-attr]
