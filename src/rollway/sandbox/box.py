"""The process that enters namespaces of its own and forks one child per program.

Three rings. `_enter` leaves the machine: a root folder that holds the standard library alone, no network, no processes,
an own user. In it the server, which sees neither programs nor tests (they pass by as file descriptors), forks a keeper
per job, who enters a second ring (own user, mounts and processes, a fresh scratch folder) and forks what runs the job,
which gives up what it could do (`inside.confine`). When a job is over, every process but the server is killed.
"""

import contextlib
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import sys
import sysconfig
import time
from dataclasses import dataclass

from rollway.sandbox import inside, kernel, seccomp

SCRATCH = "/scratch"
PRELOADED = """
    abc array ast base64 binascii bisect calendar cmath collections contextlib copy dataclasses datetime decimal enum
    fractions functools hashlib heapq io itertools json math numbers operator os queue random re statistics string
    struct sys textwrap threading time traceback types typing unicodedata uuid zlib
"""
"""Modules that programs find imported: an import costs a program more than its start."""
_WITH_LIBRARIES = ("bz2", "lzma", "sqlite3")
"""Modules that need libraries of the system, which programs cannot see; a build of Python may lack them."""
_FIRST_OWN_USER = 1_800_000_000
"""Users of no account: the programs of a scorer that root runs belong to one of them."""
_DEVICES = ("null", "zero", "full", "random", "urandom")


@dataclass(frozen=True)
class Limits:
    """What a program may use. Sizes in bytes, times in seconds."""

    cpu: int
    wall: float
    memory: int
    processes: int
    scratch: int
    output: int
    fork: bool


class Refused(Exception):
    """This machine cannot isolate programs, and why."""


def main(control: int, limits: Limits, packages: list[str], folders: list[str]) -> None:
    """Serves jobs that come over the socket `control` until its other end is closed.

    packages: modules that programs find imported, from `folders`, which they can then read.
    """
    line = socket.socket(fileno=control)
    sys.path += folders
    for module in _WITH_LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    try:
        for module in [*PRELOADED.split(), *packages]:
            importlib.import_module(module)
    except Exception as error:
        line.send(json.dumps({"unusable": f"packages: {type(error).__name__}: {error}"}).encode())
        return
    try:
        procfs = _enter(folders)
    except (OSError, Refused) as error:
        said = error.strerror if isinstance(error, OSError) and error.filename is None else None
        line.send(json.dumps({"refused": said or str(error)}).encode())
        return
    server = os.fork()
    if server:
        line.close()
        os.waitpid(server, 0)
        os._exit(0)
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    if not _processes_are_limited(procfs):
        line.send(json.dumps({"refused": "no limit of processes holds for the kernel's own root"}).encode())
        return
    line.send(b"{}")
    _serve(line, procfs, limits)


def _enter(folders: list[str]) -> int:
    """Leaves the machine; children are in a process namespace of their own. Returns an open /proc of outside.

    Root builds the new root folder as root and then becomes a user without an account; others need user namespaces.
    """
    if kernel.machine() not in seccomp.machines():
        raise Refused(f"no list of system calls for {kernel.machine()} (there is one for {seccomp.machines()})")
    procfs = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    rest = kernel.NEWPID | kernel.NEWNET | kernel.NEWIPC | kernel.NEWUTS | kernel.NEWCGROUP
    user, group = os.geteuid(), os.getegid()
    own = _FIRST_OWN_USER + os.getpid()
    if user == 0 and _is_mapped(procfs, own) and _unshared(kernel.NEWNS):
        _new_root(folders)
        os.setgroups([])
        os.setresgid(own, own, own)
        os.setresuid(own, own, own)
        kernel.prctl(kernel.PR_SET_DUMPABLE, 1)  # else /proc/self/uid_map stays root's
        kernel.unshare(kernel.NEWUSER | rest)
        _map_user(procfs, 0, own, own)
    else:
        kernel.unshare(kernel.NEWUSER | kernel.NEWNS | rest)
        _map_user(procfs, 0, user, group)
        _new_root(folders)
    socket.sethostname("box")
    return procfs


def _is_mapped(procfs: int, user: int) -> bool:
    """Whether there is such a user here: root of a container is root of few users."""
    with os.fdopen(os.open("self/uid_map", os.O_RDONLY, dir_fd=procfs)) as lines:
        ranges = [[int(number) for number in line.split()] for line in lines]
    return any(first <= user < first + count for first, _, count in ranges)


def _unshared(flags: int) -> bool:
    try:
        kernel.unshare(flags)
    except PermissionError:
        return False
    return True


def _map_user(procfs: int, inner: int, user: int, group: int) -> None:
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{inner} {user} 1"),
        ("gid_map", f"{inner} {group} 1"),
    ):
        file = os.open(f"self/{name}", os.O_WRONLY, dir_fd=procfs)
        try:
            os.write(file, text.encode())
        finally:
            os.close(file)


def _new_root(folders: list[str]) -> None:
    """A root folder in memory: the standard library, `folders`, time zones, five devices, a place to mount SCRATCH."""
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    # Over /proc, which is there, is not needed by path any more, and holds nothing that has to be shown.
    root = "/proc"
    kernel.mount("tmpfs", root, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=0755,size=1m,nr_inodes=400")
    library = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
    for folder in sorted(os.path.realpath(place) for place in [*library, *folders, "/usr/share/zoneinfo"]):
        if os.path.isdir(folder) and not os.path.isdir(root + folder):
            os.makedirs(root + folder)
            kernel.mount(folder, root + folder, None, kernel.MS_BIND)
            kernel.restrict_mount(root + folder, kernel.MS_RDONLY | kernel.MS_NOSUID | kernel.MS_NODEV)
    for place in (f"{root}{folder}/{name}" for folder in library for name in ("site-packages", "dist-packages")):
        if os.path.isdir(place) and not folders:
            kernel.mount("tmpfs", place, "tmpfs", kernel.MS_RDONLY, "size=4k")
    os.mkdir(root + "/dev")
    for device in _DEVICES:
        with open(f"{root}/dev/{device}", "wb"):
            pass
        kernel.mount(f"/dev/{device}", f"{root}/dev/{device}", None, kernel.MS_BIND)
    os.mkdir(root + SCRATCH)
    kernel.change_root(root)
    kernel.restrict_mount("/", kernel.MS_RDONLY | kernel.MS_NOSUID)


def _processes_are_limited(procfs: int) -> bool:
    """Whether a program at its limit of processes can start no other: the kernel exempts its root, by whatever name."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        return status == 0
    try:
        kernel.unshare(kernel.NEWUSER)
        _map_user(procfs, inside.USER, 0, 0)
        resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
        kernel.drop_capabilities()
        os.fork()
    except BlockingIOError:
        os._exit(0)
    finally:
        os._exit(1)


def _serve(line: socket.socket, procfs: int, limits: Limits) -> None:
    seccomp.program(kernel.machine(), fork=limits.fork)  # made once: it is kept
    gc.freeze()  # a collection in a child would copy every page of this process
    while True:
        message, files, _, _ = socket.recv_fds(line, 1024, 8)
        if not message:
            os._exit(0)
        if message == b"stop":  # for a job that has ended by itself meanwhile
            continue
        outcome = _job(line, message.decode(), files, procfs, limits)
        try:
            line.send(json.dumps(outcome).encode())
        except BrokenPipeError:
            os._exit(0)


def _job(line: socket.socket, role: str, files: list[int], procfs: int, limits: Limits) -> dict[str, object]:
    """Runs one job to its end, the wall limit, or the word of the other side; then nothing of it is left."""
    started = time.monotonic()
    hear, tell = os.pipe()
    keeper = os.fork()
    if keeper == 0:
        os.close(hear)
        line.close()
        _keep(role, files, tell, procfs, limits)
    os.close(tell)
    for file in files:
        os.close(file)
    watched = select.poll()
    watched.register(hear, select.POLLIN | select.POLLHUP)
    watched.register(line, select.POLLIN | select.POLLHUP)
    ready = {file for file, _ in watched.poll(limits.wall * 1000)}
    report = json.loads(os.read(hear, 4096) or b"{}") if hear in ready else {}
    os.close(hear)
    _kill_all()
    ended = "over" if report else "asked" if line.fileno() in ready else "wall" if not ready else "lost"
    return {"ended": ended, "wall": time.monotonic() - started, **report}


def _kill_all() -> None:
    """Kills every process of this namespace but the first, which is this one, and waits until they are gone."""
    try:
        os.kill(-1, signal.SIGKILL)
    except ProcessLookupError:
        pass
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _keep(role: str, files: list[int], tell: int, procfs: int, limits: Limits) -> None:
    """The keeper: enters the second ring, forks the program, and says how it ended."""
    try:
        kernel.unshare(kernel.NEWUSER | kernel.NEWNS | kernel.NEWPID)
        _map_user(procfs, inside.USER, 0, 0)
        flags = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
        kernel.mount("tmpfs", SCRATCH, "tmpfs", flags, f"mode=0700,size={limits.scratch},nr_inodes=1000")
        hear, sealed = os.pipe()
        program = os.fork()
        if program == 0:
            try:
                inside.run(role, files, sealed, limits)
            finally:
                os._exit(inside.RAISED)
        for file in [*files, sealed]:
            os.close(file)
        # What a program's process says before it is sealed off is this module's word; its exit code is the program's.
        word = os.read(hear, 1000)
        _, status, usage = os.wait4(program, 0)
        report: dict[str, object] = {
            "code": os.waitstatus_to_exitcode(status),
            "cpu": usage.ru_utime + usage.ru_stime,
            "memory": usage.ru_maxrss * 1024,
        }
        if word != inside.SEALED:
            report["fault"] = word.decode() or "the process ended before it was sealed off"
    except OSError as error:
        report = {"fault": error.strerror or str(error)}
    os.write(tell, json.dumps(report).encode())
    os._exit(0)
