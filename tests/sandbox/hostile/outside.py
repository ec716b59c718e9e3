"""Programs that want to read, write or reach what lies outside the sandbox."""

from sandbox.hostile.cases import printing

SECRETS = [
    printing(
        "environment",
        "looks for a key in the environment, its own and that of every process",
        "",
        """
        import glob, os
        seen = repr(dict(os.environ))
        for path in glob.glob("/proc/*/environ"):
            try:
                seen += open(path, errors="replace").read()
            except OSError:
                pass
        print("pwned" if "SECRET_TEXT" in seen else "held")
        """,
        outside=True,
    ),
    printing(
        "home",
        "reads a file whose path it knows",
        "",
        """
        try:
            print('pwned' if 'SECRET_TEXT' in open('SECRET_FILE').read() else 'held')
        except OSError:
            print('held')
        """,
        outside=True,
    ),
    printing(
        "accounts",
        "reads /etc/passwd, /etc/hosts, /proc/self/status, /sys",
        "",
        """
        import os
        found = [p for p in ("/etc/passwd", "/etc/hosts", "/proc/self/status", "/sys/kernel") if os.path.exists(p)]
        print("pwned" if found else "held")
        """,
        outside=True,
    ),
    printing(
        "symbolic_link",
        "reads through a symbolic link that it makes in the scratch folder",
        "",
        """
        import os
        os.symlink("SECRET_FILE", "link")
        os.symlink("/", "top")
        for path in ("link", "topSECRET_FILE", "top/proc/1/rootSECRET_FILE"):
            try:
                if "SECRET_TEXT" in open(path).read():
                    print("pwned")
                    break
            except OSError:
                pass
        """,
        outside=True,
    ),
    printing(
        "hard_link",
        "reads through a hard link",
        "",
        """
        import os
        try:
            os.link("SECRET_FILE", "SECRET_FILE.link")
            print("pwned" if "SECRET_TEXT" in open("SECRET_FILE.link").read() else "held")
        except OSError:
            print("held")
        """,
        outside=True,
    ),
    printing(
        "upwards",
        "leaves its root by .., chroot and descriptors of folders",
        "",
        """
        import os
        folder = os.open("/", os.O_RDONLY)
        try:
            os.mkdir("cell")
            os.chroot("cell")
        except OSError:
            pass
        os.fchdir(folder)
        for _ in range(50):
            os.chdir("..")
        try:
            print("pwned" if "SECRET_TEXT" in open("./SECRET_FILE").read() else "held")
        except OSError:
            print("held")
        """,
        outside=True,
    ),
    printing(
        "descriptors_left_open",
        "reads and writes every descriptor that might have been left open",
        "",
        """
        import os
        others = []
        for number in range(3, 64):
            try:
                os.fstat(number)
                others.append(number)
            except OSError:
                pass
        print("pwned" if others else "held")
        """,
    ),
    printing(
        "sources",
        "looks on the whole file system for anything but the standard library and devices",
        "",
        """
        import os, sys
        library = os.path.dirname(os.__file__)
        strange = False
        for folder, _, files in os.walk("/"):
            if files and not folder.startswith((library, "/dev", "/usr/share/zoneinfo", "/scratch")):
                strange = True
                break
        print("pwned" if strange else "held")
        """,
        outside=True,
    ),
]

WRITING = [
    printing(
        "write_outside",
        "writes a file whose path it knows, and beside it",
        "",
        """
        for path in ("VICTIM_FILE", "VICTIM_FILE.new", "/pwned", "/dev/pwned", "/tmp/pwned"):
            try:
                open(path, "w").write("changed")
                print("pwned")
                break
            except OSError:
                pass
        """,
        outside=True,
    ),
    printing(
        "poisoned_library",
        "changes the standard library for the programs after it",
        "",
        """
        import os
        changed = 0
        for folder, folders, files in os.walk(os.path.dirname(os.__file__)):
            folders[:] = []
            for path in [os.path.join(folder, name) for name in files]:
                for act in (lambda p: open(p, "r+").close(), lambda p: os.chmod(p, 0o777), lambda p: os.utime(p)):
                    try:
                        act(path)
                        changed += 1
                    except OSError:
                        pass
        print("pwned" if changed else "held")
        """,
    ),
    printing(
        "locks",
        "signals to a program beside it by locks on files of the standard library, which both see",
        "",
        """
        import fcntl, os, struct
        file = os.open(os.__file__, os.O_RDONLY)
        question = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        for act in (
            lambda: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB),
            lambda: fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB),
            lambda: fcntl.fcntl(file, fcntl.F_GETLK, question),
            lambda: fcntl.fcntl(file, 36, question),
            lambda: fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB),
            lambda: fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK),
            lambda: fcntl.fcntl(os.open("/", os.O_RDONLY), fcntl.F_NOTIFY, fcntl.DN_ACCESS),
        ):
            try:
                act()
                print("pwned")
                break
            except OSError:
                pass
        """,
        outside=True,
    ),
    printing(
        "own_executable",
        "writes an executable file and runs it; runs a shell",
        "",
        """
        import os
        with open("run", "w") as file:
            file.write("#!/bin/sh\\necho pwned\\n")
        os.chmod("run", 0o4755)
        for path, words in (("./run", ["run"]), ("/bin/sh", ["sh", "-c", "echo pwned"])):
            try:
                os.execv(path, words)
            except OSError:
                pass
        print("held")
        """,
        outside=True,
    ),
    printing(
        "device",
        "makes a device file, opens disks, memory and the terminal",
        "",
        """
        import os
        for act in (
            lambda: os.mknod("disk", 0o60600, os.makedev(254, 0)),
            lambda: open("/dev/mem", "rb"),
            lambda: open("/dev/vda", "rb"),
            lambda: open("/dev/tty", "rb"),
            lambda: open("/dev/kmsg", "rb"),
        ):
            try:
                act()
                print("pwned")
                break
            except OSError:
                pass
        """,
    ),
]

NETWORK = [
    printing(
        "tcp",
        "connects to a server on this machine",
        "",
        """
        import socket
        try:
            socket.create_connection(("127.0.0.1", PORT), timeout=2)
            print("pwned")
        except OSError:
            print("held")
        """,
        outside=True,
    ),
    printing(
        "abstract_socket",
        "connects to a Unix socket that has no file",
        "",
        """
        import socket
        try:
            socket.socket(socket.AF_UNIX).connect("\\0ABSTRACT")
            print("pwned")
        except OSError:
            print("held")
        """,
        outside=True,
    ),
    printing(
        "name_server",
        "asks a name server, sends datagrams, listens",
        "",
        """
        import socket
        for act in (
            lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
            lambda: socket.create_server(("127.0.0.1", 0)),
            lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
            lambda: socket.getaddrinfo("localhost", 80, type=socket.SOCK_STREAM),
        ):
            try:
                act()
                print("pwned")
                break
            except OSError:
                pass
        """,
        outside=True,
    ),
]
