"""The system calls that a program may make, as a seccomp filter: an allow list, checked by the kernel.

What is not listed is answered with ENOSYS, as on a kernel that lacks it: sockets, ptrace, other processes' memory, new
namespaces, mounts, keys, BPF, io_uring, shared memory that no limit counts (memfd, System V), flock, and running a
file.
"""

import errno
import struct
from functools import cache

_ALLOWED = {
    "x86_64": """
    read=0 write=1 readv=19 writev=20 pread64=17 pwrite64=18 preadv=295 pwritev=296 preadv2=327 pwritev2=328
    lseek=8 sendfile=40 copy_file_range=326 splice=275 tee=276 open=2 openat=257 openat2=437 creat=85 close=3
    close_range=436 dup=32 dup2=33 dup3=292 fsync=74 fdatasync=75 sync_file_range=277
    truncate=76 ftruncate=77 fallocate=285 fadvise64=221 stat=4 fstat=5 lstat=6 newfstatat=262 statx=332
    statfs=137 fstatfs=138 access=21 faccessat=269 faccessat2=439 readlink=89 readlinkat=267 getdents=78
    getdents64=217 getcwd=79 chdir=80 fchdir=81 rename=82 renameat=264 renameat2=316 mkdir=83 mkdirat=258 rmdir=84
    link=86 linkat=265 unlink=87 unlinkat=263 symlink=88 symlinkat=266 chmod=90 fchmod=91 fchmodat=268 umask=95
    utime=132 utimes=235 utimensat=280 futimesat=261 getxattr=191 lgetxattr=192 fgetxattr=193 listxattr=194
    llistxattr=195 flistxattr=196 poll=7 ppoll=271 select=23 pselect6=270 epoll_create=213 epoll_create1=291
    epoll_ctl=233 epoll_wait=232 epoll_pwait=281 epoll_pwait2=441 eventfd=284 eventfd2=290 pipe=22 pipe2=293
    timerfd_create=283 timerfd_settime=286 timerfd_gettime=287 sendto=44 recvfrom=45 sendmsg=46 recvmsg=47
    shutdown=48 getsockname=51 getpeername=52 setsockopt=54 getsockopt=55 mmap=9 munmap=11 mprotect=10 mremap=25
    madvise=28 msync=26 mincore=27 brk=12 futex=202 set_robust_list=273 get_robust_list=274 rseq=334
    set_tid_address=218 membarrier=324 sched_yield=24 sched_getaffinity=204 sched_getparam=143
    sched_getscheduler=145 sched_get_priority_max=146 sched_get_priority_min=147 getcpu=309 getpriority=140
    nanosleep=35 clock_nanosleep=230 clock_gettime=228 clock_getres=229 gettimeofday=96 time=201 times=100
    getrusage=98 sysinfo=99 uname=63 getrandom=318 getpid=39 getppid=110 gettid=186 getuid=102 geteuid=107
    getgid=104 getegid=108 getresuid=118 getresgid=120 getgroups=115 getpgid=121 getpgrp=111 getsid=124 setsid=112
    setpgid=109 rt_sigaction=13 rt_sigprocmask=14 rt_sigreturn=15 rt_sigpending=127 rt_sigsuspend=130
    rt_sigtimedwait=128 sigaltstack=131 pause=34 alarm=37 setitimer=38 getitimer=36 timer_create=222
    timer_settime=223 timer_gettime=224 timer_getoverrun=225 timer_delete=226 kill=62 tkill=200 tgkill=234
    wait4=61 waitid=247 exit=60 exit_group=231 restart_syscall=219 arch_prctl=158 getrlimit=97 setrlimit=160
    prlimit64=302
    """,
    "aarch64": """
    read=63 write=64 readv=65 writev=66 pread64=67 pwrite64=68 preadv=69 pwritev=70 preadv2=286 pwritev2=287
    lseek=62 sendfile=71 copy_file_range=285 splice=76 tee=77 openat=56 openat2=437 close=57 close_range=436
    dup=23 dup3=24 fsync=82 fdatasync=83 sync_file_range=84 truncate=45 ftruncate=46
    fallocate=47 fadvise64=223 fstat=80 newfstatat=79 statx=291 statfs=43 fstatfs=44 faccessat=48 faccessat2=439
    readlinkat=78 getdents64=61 getcwd=17 chdir=49 fchdir=50 renameat=38 renameat2=276 mkdirat=34 linkat=37
    unlinkat=35 symlinkat=36 fchmod=52 fchmodat=53 umask=166 utimensat=88 getxattr=8 lgetxattr=9 fgetxattr=10
    listxattr=11 llistxattr=12 flistxattr=13 ppoll=73 pselect6=72 epoll_create1=20 epoll_ctl=21 epoll_pwait=22
    epoll_pwait2=441 eventfd2=19 pipe2=59 timerfd_create=85 timerfd_settime=86 timerfd_gettime=87 sendto=206
    recvfrom=207 sendmsg=211 recvmsg=212 shutdown=210 getsockname=204 getpeername=205 setsockopt=208
    getsockopt=209 mmap=222 munmap=215 mprotect=226 mremap=216 madvise=233 msync=227 mincore=232 brk=214 futex=98
    set_robust_list=99 get_robust_list=100 rseq=293 set_tid_address=96 membarrier=283 sched_yield=124
    sched_getaffinity=123 sched_getparam=121 sched_getscheduler=120 sched_get_priority_max=125
    sched_get_priority_min=126 getcpu=168 getpriority=141 nanosleep=101 clock_nanosleep=115 clock_gettime=113
    clock_getres=114 gettimeofday=169 times=153 getrusage=165 sysinfo=179 uname=160 getrandom=278 getpid=172
    getppid=173 gettid=178 getuid=174 geteuid=175 getgid=176 getegid=177 getresuid=148 getresgid=150 getgroups=158
    getpgid=155 getsid=156 setsid=157 setpgid=154 rt_sigaction=134 rt_sigprocmask=135 rt_sigreturn=139
    rt_sigpending=136 rt_sigsuspend=133 rt_sigtimedwait=137 sigaltstack=132 setitimer=103 getitimer=102
    timer_create=107 timer_settime=110 timer_gettime=108 timer_getoverrun=109 timer_delete=111 kill=129 tkill=130
    tgkill=131 wait4=260 waitid=95 exit=93 exit_group=94 restart_syscall=128 getrlimit=163 setrlimit=164
    prlimit64=261
    """,
}
"""Numbers as in the kernel's asm/unistd_64.h and asm-generic/unistd.h."""

_SPECIAL = {
    "x86_64": {
        **{"clone": 56, "clone3": 435, "fork": 57, "vfork": 58},
        **{"ioctl": 16, "prctl": 157, "socketpair": 53, "fcntl": 72},
    },
    "aarch64": {"clone": 220, "clone3": 435, "ioctl": 29, "prctl": 167, "socketpair": 199, "fcntl": 25},
}
"""Calls whose answer depends on their arguments or on `fork`."""

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

_IOCTLS = [0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451]  # TCGETS TIOCGWINSZ FIONREAD FIONBIO FIONCLEX FIOCLEX
_PRCTLS = [15, 16]  # PR_SET_NAME, PR_GET_NAME
_FCNTLS = [0, 1, 2, 3, 4, 6, 7, 9, 1030, 1031, 1032]
"""F_DUPFD F_GETFD F_SETFD F_GETFL F_SETFL F_SETLK F_SETLKW F_GETOWN F_DUPFD_CLOEXEC F_SETPIPE_SZ F_GETPIPE_SZ.

The standard library's files are the same ones in every box, so what one program does to them another must not see: no
flock, no leases, no signals, and no question for another's lock (F_GETLK). What is left, a lock that SQLite sets on its
own files, needs a file open for writing to keep anybody else from anything.
"""
_AF_UNIX = 1
_CLONE_THREAD = 0x00010000
_CLONE_NEW = 0x7E020000 | 0x00000080  # every namespace, and the time namespace

_LOAD, _EQUAL, _GREATER, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x25, 0x35, 0x45, 0x06
_ALLOW, _KILL, _REFUSE = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16

Instruction = tuple[int, int, int, int]
"""Code, jump if true, jump if false, operand: jumps count instructions from the next one."""


def machines() -> list[str]:
    return list(_ALLOWED)


@cache
def program(machine: str, *, fork: bool) -> bytes:
    """The filter. fork: whether new processes are allowed; threads always are."""
    special = _SPECIAL[machine]
    fork_error = _REFUSE | errno.EPERM
    code: list[Instruction] = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, _AUDIT_ARCH[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
    ]
    for low, high in _ranges([int(entry.partition("=")[2]) for entry in _ALLOWED[machine].split()]):
        code += [(_AT_LEAST, 0, 2, low), (_GREATER, 1, 0, high), (_RETURN, 0, 0, _ALLOW)]
    for name in ("fork", "vfork"):
        if name in special:
            code += [(_EQUAL, 0, 1, special[name]), (_RETURN, 0, 0, _ALLOW if fork else fork_error)]
    code += _when(special["ioctl"], _one_of(1, _IOCTLS, errno.ENOTTY))
    code += _when(special["fcntl"], _one_of(1, _FCNTLS, errno.EINVAL))
    code += _when(special["prctl"], _one_of(0, _PRCTLS, errno.EPERM))
    code += _when(special["socketpair"], _one_of(0, [_AF_UNIX], errno.EPERM))
    clone: list[Instruction] = [(_LOAD, 0, 0, _ARGUMENTS), (_ANY_BIT, 0, 1, _CLONE_NEW), (_RETURN, 0, 0, fork_error)]
    if not fork:
        clone += [(_ANY_BIT, 1, 0, _CLONE_THREAD), (_RETURN, 0, 0, fork_error)]
    code += _when(special["clone"], [*clone, (_RETURN, 0, 0, _ALLOW)])
    # clone3 hides its flags in memory that a filter cannot read; the C library falls back to clone.
    code.append((_RETURN, 0, 0, _REFUSE | errno.ENOSYS))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def _ranges(numbers: list[int]) -> list[tuple[int, int]]:
    """Runs of consecutive numbers, first and last."""
    found: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if found and found[-1][1] == number - 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found


def _when(number: int, body: list[Instruction]) -> list[Instruction]:
    """The body where the call's number (in the accumulator) is this one. The body returns on every path."""
    return [(_EQUAL, 0, len(body), number), *body]


def _one_of(argument: int, values: list[int], error: int) -> list[Instruction]:
    """Allows the call where the low half of an argument is one of `values`."""
    checks: list[Instruction] = []
    for value in values:
        checks += [(_EQUAL, 0, 1, value), (_RETURN, 0, 0, _ALLOW)]
    return [(_LOAD, 0, 0, _ARGUMENTS + 8 * argument), *checks, (_RETURN, 0, 0, _REFUSE | error)]
