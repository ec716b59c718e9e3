"""The filter, run by an interpreter of its own, allows what the lists name and nothing else."""

import errno
import fcntl
import struct
from pathlib import Path

import pytest

from rollway.sandbox import seccomp

ALLOW, KILL = 0x7FFF0000, 0x80000000
ARCHES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
SIGCHLD, THREAD, NEWUSER = 17, 0x00010000, 0x10000000
PTHREAD = 0x003D0F00  # what the C library gives clone for a thread


def decided(program, arch, number, *arguments):
    """The filter's answer, as the kernel's seccomp(2) defines it."""
    data = struct.pack("=IIQ6Q", number, arch, 0, *(*arguments, *[0] * 6)[:6])
    code = list(struct.iter_unpack("=HBBI", program))
    place = accumulator = 0
    while True:
        what, yes, no, operand = code[place]
        place += 1
        match what:
            case 0x20:
                (accumulator,) = struct.unpack_from("=I", data, operand)
            case 0x15:
                place += yes if accumulator == operand else no
            case 0x25:
                place += yes if accumulator > operand else no
            case 0x35:
                place += yes if accumulator >= operand else no
            case 0x45:
                place += yes if accumulator & operand else no
            case 0x06:
                return operand
            case _:
                raise AssertionError(f"instruction {what:#x}")


def refused(error):
    return 0x00050000 | error


def listed(machine):
    return {int(entry.partition("=")[2]): entry.partition("=")[0] for entry in seccomp._ALLOWED[machine].split()}


@pytest.mark.parametrize("fork", [False, True])
@pytest.mark.parametrize("machine", seccomp.machines())
def test_every_number_is_allowed_where_it_is_listed_and_answered_with_enosys_elsewhere(machine, fork):
    program, names, special = seccomp.program(machine, fork=fork), listed(machine), seccomp._SPECIAL[machine]
    for number in [*range(700), 0x40000000, 0x40000000 + 59, 2**32 - 1]:
        if number not in special.values():
            expected = ALLOW if number in names else refused(errno.ENOSYS)
            assert decided(program, ARCHES[machine], number) == expected, number


@pytest.mark.parametrize("machine", seccomp.machines())
def test_another_architecture_kills(machine):
    program = seccomp.program(machine, fork=True)
    for arch in {0x40000003, 0x40000028, 0, *ARCHES.values()} - {ARCHES[machine]}:
        assert decided(program, arch, 0) == KILL


@pytest.mark.parametrize("machine", seccomp.machines())
def test_threads_always_processes_by_option_namespaces_never(machine):
    special = seccomp._SPECIAL[machine]
    for fork in (False, True):
        program = seccomp.program(machine, fork=fork)
        answers = [
            decided(program, ARCHES[machine], special["clone"], f) for f in (PTHREAD, SIGCHLD, NEWUSER | SIGCHLD)
        ]
        assert answers == [ALLOW, ALLOW if fork else refused(errno.EPERM), refused(errno.EPERM)]
        assert decided(program, ARCHES[machine], special["clone"], THREAD | NEWUSER) == refused(errno.EPERM)
        assert decided(program, ARCHES[machine], special["clone3"]) == refused(errno.ENOSYS)
        for name in ("fork", "vfork"):
            if name in special:
                assert decided(program, ARCHES[machine], special[name]) == (ALLOW if fork else refused(errno.EPERM))


@pytest.mark.parametrize("machine", seccomp.machines())
def test_arguments(machine):
    program, special, arch = seccomp.program(machine, fork=False), seccomp._SPECIAL[machine], ARCHES[machine]
    tiocsti, tcgets, set_name, set_seccomp, unix, inet = 0x5412, 0x5401, 15, 22, 1, 2
    assert decided(program, arch, special["ioctl"], 0, tcgets) == ALLOW
    assert decided(program, arch, special["ioctl"], 0, tiocsti) == refused(errno.ENOTTY)
    assert decided(program, arch, special["prctl"], set_name) == ALLOW
    assert decided(program, arch, special["prctl"], set_seccomp) == refused(errno.EPERM)
    for allowed in (fcntl.F_DUPFD_CLOEXEC, fcntl.F_SETFL, fcntl.F_SETLK):
        assert decided(program, arch, special["fcntl"], 3, allowed) == ALLOW
    ofd = (36, 37, 38)
    for command in (fcntl.F_GETLK, fcntl.F_SETLEASE, fcntl.F_NOTIFY, fcntl.F_SETOWN, fcntl.F_SETSIG, *ofd):
        assert decided(program, arch, special["fcntl"], 3, command) == refused(errno.EINVAL)
    assert decided(program, arch, special["socketpair"], unix) == ALLOW
    assert decided(program, arch, special["socketpair"], inet) == refused(errno.EPERM)


@pytest.mark.parametrize("machine", seccomp.machines())
def test_dangerous_calls_are_on_no_list(machine):
    never = "socket connect bind listen accept accept4 ptrace process_vm_readv process_vm_writev unshare setns mount"
    never += " umount2 pivot_root chroot bpf perf_event_open userfaultfd keyctl add_key request_key io_uring_setup"
    never += " memfd_create memfd_secret shmget msgget semget mq_open execve execveat init_module kexec_load"
    never += " open_by_handle_at setuid setgid setresuid setgroups capset seccomp landlock_create_ruleset"
    never += " personality mknod mknodat pidfd_open pidfd_getfd pidfd_send_signal kcmp"
    never += " sched_setaffinity sethostname reboot swapon syslog flock inotify_init1 fanotify_init"
    assert not set(never.split()) & set(listed(machine).values())


@pytest.mark.parametrize(
    ("machine", "header"),
    [("x86_64", "x86_64-linux-gnu/asm/unistd_64.h"), ("aarch64", "asm-generic/unistd.h")],
)
def test_numbers_are_those_of_the_kernels_headers(machine, header):
    path = Path("/usr/include") / header
    if not path.is_file():
        pytest.skip(f"{path} is not installed")
    numbers = {}
    for line in path.read_text().splitlines():
        match line.split():
            case ["#define", name, number] if name.startswith(("__NR_", "__NR3264_")) and number.isdigit():
                numbers[name.partition("_")[2].split("_", 2)[2]] = int(number)
    same = {"newfstatat": "fstatat"} if machine == "aarch64" else {}
    found = {**{name: number for number, name in listed(machine).items()}, **seccomp._SPECIAL[machine]}
    assert {name: numbers[same.get(name, name)] for name in found} == found
