"""The caller's side: boxes that run programs, and what became of them."""

import fcntl
import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rollway.sandbox.box import Limits, Refused

__all__ = ["Box", "Limits", "Outcome", "Refused", "Unusable", "file_of"]

_SOURCE = Path(__file__).parents[2]
_BOOT = (
    "import sys, json; sys.path.insert(0, sys.argv[1]); from rollway.sandbox import box; sys.path.remove(sys.argv[1]);"
    "box.main(int(sys.argv[2]), box.Limits(**json.loads(sys.argv[3])), *map(json.loads, sys.argv[4:]))"
)
_MEND = (
    "it takes user, mount, process and network namespaces and seccomp (Linux 5.14 or later): allow them, by the "
    "settings kernel.unprivileged_userns_clone = 1 and kernel.apparmor_restrict_unprivileged_userns = 0, or in a "
    "container by letting it unshare and mount, or score on another machine; nothing is run without them"
)


class Unusable(Exception):
    """What was asked of the box cannot be had: a package that does not import, too little memory."""


@dataclass(frozen=True)
class Outcome:
    """How a job ended: over (by itself), wall (limit), asked (it was stopped); its exit code, -signal where killed.

    cpu, wall: seconds. memory: bytes resident at most.
    """

    ended: str
    code: int | None
    cpu: float
    wall: float
    memory: int


class Box:
    """A sandbox that runs one job at a time. Used by one thread.

    Raises Refused, in one sentence, where this machine cannot isolate programs, Unusable where a package is missing or
    the limits leave no room, and RuntimeError when the box breaks.
    """

    def __init__(self, limits: Limits, packages: list[str], folders: list[str]) -> None:
        self.limits = limits
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        given = [str(_SOURCE), str(theirs.fileno()), *map(json.dumps, (asdict(limits), packages, folders))]
        # Of this process's environment, folders and descriptors the box gets nothing.
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-s", "-P", "-B", "-X", "utf8", "-c", _BOOT, *given],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
            cwd="/",
            start_new_session=True,
        )
        theirs.close()
        greeting = self._line.recv(4096)
        said = json.loads(greeting) if greeting else {"refused": "the interpreter of the box does not start"}
        if said:
            self.close()
        if "unusable" in said:
            raise Unusable(said["unusable"])
        if "refused" in said:
            raise self._refused(said["refused"])
        self._try()

    def _refused(self, why: object) -> Refused:
        return Refused(f"this machine cannot isolate programs ({why}); {_MEND}")

    def _try(self) -> None:
        """Runs an empty program: what a kernel lacks, and limits that leave no room, come to light before any other."""
        self.start("script", [file_of(b""), file_of(b""), os.open("/dev/null", os.O_WRONLY)])
        try:
            outcome = self.outcome()
        except RuntimeError as error:
            self.close()
            raise self._refused(error) from None
        if outcome.code != 0:
            self.close()
            raise Unusable("an empty program fails under these limits: raise `memory`, `cpu` or `wall`")

    def __enter__(self) -> "Box":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the box and all that runs in it."""
        self._line.close()
        self._process.kill()
        self._process.wait()

    def fileno(self) -> int:
        """Readable when the job has ended."""
        return self._line.fileno()

    def start(self, role: str, files: list[int]) -> None:
        """Starts a job. `files` are closed here. Roles: see `inside`."""
        try:
            socket.send_fds(self._line, [role.encode()], files)
        except OSError as error:
            raise RuntimeError(f"the sandbox is gone ({error})") from None
        finally:
            for file in files:
                os.close(file)

    def stop(self) -> None:
        """Ends the job early; `outcome` has to be asked all the same."""
        try:
            self._line.send(b"stop")
        except OSError as error:
            raise RuntimeError(f"the sandbox is gone ({error})") from None

    def outcome(self) -> Outcome:
        """Waits for the job to end. Then no process of it is left."""
        try:
            reply = self._line.recv(4096)
        except OSError:
            reply = b""
        found: dict[str, Any] = json.loads(reply) if reply else {"ended": "lost"}
        if "fault" in found or found["ended"] == "lost":
            raise RuntimeError(f"the sandbox failed ({found.get('fault', 'its process ended')})")
        return Outcome(
            found["ended"], found.get("code"), found.get("cpu", 0.0), found["wall"], int(found.get("memory", 0))
        )


def file_of(data: bytes) -> int:
    """A descriptor from which `data` can be read, and nothing changed."""
    file = os.memfd_create("rollway", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    with os.fdopen(os.dup(file), "wb") as sink:
        sink.write(data)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    os.lseek(file, 0, os.SEEK_SET)
    return file
