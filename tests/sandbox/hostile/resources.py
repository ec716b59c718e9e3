"""Programs that want more of the machine than they are given."""

from sandbox.hostile.cases import printing

RESOURCES = [
    printing(
        "fork_bomb",
        "forks for ever; processes are allowed, at most `processes` of them",
        "timeout",
        """
        import os
        while True:
            try:
                os.fork()
            except OSError:
                pass
        """,
        fork=True,
        processes=8,
        wall=2.0,
    ),
    printing(
        "fork_refused",
        "forks where `fork` is false",
        "",
        """
        import os
        try:
            if os.fork() == 0:
                os._exit(0)
            print("pwned")
        except OSError:
            print("held")
        """,
        outside=True,
    ),
    printing(
        "orphan",
        "a child that outlives its parent goes on and prints",
        "",
        """
        import os, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(0.3)
                print("pwned", flush=True)
        """,
        outside=True,
        fork=True,
    ),
    printing(
        "thread_bomb",
        "starts threads for ever",
        "",
        """
        import threading, time
        count = 0
        try:
            while count < 200:
                threading.Thread(target=time.sleep, args=(0.2,), daemon=True).start()
                count += 1
            print("pwned")
        except RuntimeError:
            print("held")
        """,
        outside=True,
    ),
    printing(
        "memory_bomb",
        "doubles a list for ever",
        "raised",
        """
        x = [0]
        while True:
            x += x
        """,
    ),
    printing(
        "huge_allocation",
        "asks for 100 GB at once",
        "raised",
        """
        x = bytearray(10**11)
        print('pwned')
        """,
    ),
    printing(
        "memory_map",
        "maps anonymous memory without touching it",
        "raised",
        """
        import mmap
        maps = [mmap.mmap(-1, 1 << 28) for _ in range(8)]
        print('pwned')
        """,
        outside=True,
    ),
    printing(
        "memory_by_processes",
        "many processes, each with the memory of one",
        "",
        """
        import os
        count = 0
        try:
            for _ in range(30):
                if os.fork() == 0:
                    x = bytearray(16 << 20)
                    import time
                    time.sleep(0.5)
                    os._exit(0)
                count += 1
        except OSError:
            pass
        print("pwned" if count > 4 else "held")
        """,
        outside=True,
        fork=True,
        processes=4,
        memory=96,
    ),
    printing("endless_loop", "never ends", "timeout", "while True: pass"),
    printing(
        "sleeper",
        "never ends, and uses no processor",
        "timeout",
        """
        import time
        while True: time.sleep(100)
        """,
        wall=1.5,
    ),
    printing("endless_power", "one operation that never returns to Python", "timeout", "print(len(str(7 ** 7 ** 12)))"),
    printing(
        "endless_pattern",
        "a regular expression that backtracks for ever",
        "timeout",
        """
        import re
        re.match('(a|a)*b', 'a' * 60)
        """,
    ),
    printing(
        "deaf",
        "ignores every signal it can, then loops",
        "timeout",
        """
        import signal
        for number in signal.valid_signals():
            try:
                signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError):
                pass
        while True: pass
        """,
    ),
    printing("endless_output", "prints for ever", "output", "while True: print('x' * 1000)"),
    printing(
        "endless_errors",
        "writes to standard error for ever",
        "timeout",
        """
        import sys
        while True: sys.stderr.write('x' * 1000)
        """,
    ),
    printing(
        "full_disk",
        "fills the scratch folder",
        "",
        """
        written = 0
        try:
            for number in range(64):
                with open(f"f{number}", "wb") as file:
                    written += file.write(bytes(1 << 20))
        except OSError:
            pass
        print("pwned" if written > 32 << 20 else "held")
        """,
        outside=True,
    ),
    printing(
        "many_files",
        "makes a hundred thousand files",
        "",
        """
        import os
        try:
            for number in range(5000):
                os.close(os.open(f"f{number}", os.O_CREAT | os.O_WRONLY))
            print("pwned")
        except OSError:
            print("held")
        """,
        outside=True,
    ),
    printing(
        "sparse_file",
        "a file of a terabyte with nothing in it",
        "",
        """
        try:
            with open("big", "wb") as file:
                file.truncate(1 << 40)
            print("pwned")
        except OSError:
            print("held")
        """,
        outside=True,
    ),
    printing(
        "uncounted_memory",
        "files in memory (memfd) and System V segments, which no limit of memory counts",
        "",
        """
        import ctypes, os
        got = 0
        try:
            os.memfd_create("x")
            got += 1
        except OSError:
            pass
        libc = ctypes.CDLL(None)
        number = libc.shmget(0, 4096, 0o1600)
        if number >= 0:
            libc.shmctl(number, 0, None)
            got += 1
        print("pwned" if got else "held")
        """,
        outside=True,
    ),
    printing(
        "raises_limits",
        "raises its own limits",
        "",
        """
        import resource
        for name in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_NPROC, resource.RLIMIT_FSIZE):
            try:
                resource.setrlimit(name, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
                print("pwned")
                break
            except (OSError, ValueError):
                pass
        """,
        outside=True,
    ),
    printing(
        "descriptors",
        "opens files for ever",
        "raised",
        """
        kept = [open('/dev/null') for _ in range(200)]
        print('pwned')
        """,
        outside=True,
    ),
]
