"""Programs that go for other processes and for the kernel."""

from sandbox.hostile.cases import printing

KERNEL = [
    printing(
        "kill_parent",
        "kills its parent, the process that judges it, and everybody",
        "",
        """
        import os, signal
        for pid in (os.getppid(), JUDGE, 1, -1):
            if pid > 0 and pid != os.getpid():
                try:
                    os.kill(pid, signal.SIGKILL)
                    print("pwned")
                    break
                except OSError:
                    pass
        """,
    ),
    printing(
        "kill_group",
        "kills its process group, and everybody that it may",
        "raised",
        """
        import os
        os.kill(0, 9)
        os.kill(-1, 9)
        os.kill(1, 9)
        os.kill(os.getpid(), 9)
        """,
    ),
    printing(
        "stops_itself", "stops itself, so that it never ends", "", "import os\nos.kill(os.getpid(), 19)\nos.kill(0, 19)"
    ),
    printing(
        "becomes_root",
        "becomes root, takes groups, changes its root",
        "",
        """
        import os
        for act in (lambda: os.setuid(0), lambda: os.setgroups([0]), lambda: os.chroot("."), lambda: os.setgid(0)):
            try:
                act()
                print("pwned")
                break
            except OSError:
                pass
        """,
    ),
    printing(
        "system_calls",
        "new namespaces, mounts, ptrace, other processes' memory, keys, BPF, io_uring, userfaultfd, by number",
        "",
        """
        import ctypes, os
        libc = ctypes.CDLL(None, use_errno=True)
        x86 = dict(unshare=272, mount=165, ptrace=101, process_vm_readv=310, add_key=248, keyctl=250, bpf=321,
                   io_uring_setup=425, userfaultfd=323, perf_event_open=298, setns=308, pidfd_open=434, kcmp=312,
                   open_by_handle_at=304, personality=135, syslog=103, clone3=435, mq_open=240, seccomp=317,
                   landlock_create_ruleset=444, memfd_secret=447, pidfd_getfd=438, name_to_handle_at=303, quotactl=179)
        arm = dict(unshare=97, mount=40, ptrace=117, process_vm_readv=270, add_key=217, keyctl=219, bpf=280,
                   io_uring_setup=425, userfaultfd=282, perf_event_open=241, setns=268, pidfd_open=434, kcmp=272,
                   open_by_handle_at=265, personality=92, syslog=116, clone3=435, mq_open=180, seccomp=277,
                   landlock_create_ruleset=444, memfd_secret=447, pidfd_getfd=438, name_to_handle_at=264, quotactl=60)
        passed = []
        for name, number in (x86 if os.uname().machine == "x86_64" else arm).items():
            returned = libc.syscall(number, 0, 0, 0, 0, 0, 0)
            if returned != -1 or ctypes.get_errno() != 38:
                passed.append(name)
        print("pwned" if passed else "held")
        """,
    ),
    printing(
        "other_architecture",
        "calls the kernel as a 32-bit program, by machine code of its own (x86_64)",
        "crash",
        """
        import ctypes, mmap
        code = mmap.mmap(-1, 4096, prot=7)
        code.write(bytes.fromhex("b814000000cd80c3"))
        address = ctypes.addressof(ctypes.c_char.from_buffer(code))
        print("pwned" if ctypes.CFUNCTYPE(ctypes.c_int)(address)() > 0 else "held")
        """,
    ),
    printing(
        "namespace_by_clone",
        "a process in a user namespace of its own, by clone with flags",
        "",
        """
        import ctypes, os
        libc = ctypes.CDLL(None, use_errno=True)
        pid = libc.syscall(56 if os.uname().machine == "x86_64" else 220, 0x10000000 | 17, 0, 0, 0, 0)
        if pid == 0:
            os._exit(0)
        print("pwned" if pid > 0 else "held")
        """,
        outside=True,
        fork=True,
    ),
    printing(
        "null_pointer",
        "crashes the interpreter",
        "crash",
        """
        import ctypes
        ctypes.string_at(0)
        """,
    ),
    printing(
        "stack",
        "overflows the stack in C",
        "crash",
        """
        import ctypes
        f = ctypes.CFUNCTYPE(None)(lambda: f())
        import sys
        sys.setrecursionlimit(10**9)
        f()
        """,
    ),
]
