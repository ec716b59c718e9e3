"""Jobs that the tests give to a worker instead of `rollway.cli:main`."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def main(argv: list[str]) -> int:
    name, *rest = argv
    return JOBS[name](*rest)


def slow_import_then(argv: list[str]) -> int:
    return main(argv)


def nothing() -> int:
    return 0


def echo(code: str) -> int:
    """Copies stdin to stdout, says something on stderr, returns `code`."""
    print(sys.stdin.read().upper(), end="")
    print("said on stderr", file=sys.stderr)
    return int(code)


def inherited() -> int:
    umask = os.umask(0)
    names = [name for name in sorted(os.environ) if name.startswith("ROLLWAY_")]
    variables = {name: os.environ[name] for name in names}
    print(json.dumps({"cwd": os.getcwd(), "umask": umask, "variables": variables, "argv": sys.argv}))
    return 0


def descriptors() -> int:
    print(json.dumps(sorted(os.readlink(f"/proc/self/fd/{number}") for number in _open_descriptors())))
    return 0


def _open_descriptors() -> list[str]:
    found = []
    for number in os.listdir("/proc/self/fd"):
        try:
            os.fstat(int(number))
        except OSError:
            continue
        found.append(number)
    return found


def fail() -> int:
    raise RuntimeError("the job's own error")


def leave(code: str) -> int:
    sys.exit(code if not code.isdigit() else int(code))


def die(number: str) -> int:
    os.kill(os.getpid(), int(number))
    time.sleep(60)
    return 0


def sleep(pid_file: str) -> int:
    """Sleeps, with a process of its own; both pids in `pid_file`."""
    own = subprocess.Popen(["sleep", "60"])
    Path(f"{pid_file}.tmp").write_text(f"{os.getpid()} {own.pid}")
    os.rename(f"{pid_file}.tmp", pid_file)
    time.sleep(60)
    return 0


def stubborn(pid_file: str) -> int:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return sleep(pid_file)


def catch(pid_file: str) -> int:
    """Ends with 7 when asked to by SIGTERM."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(7))
    return sleep(pid_file)


def leave_behind(pid_file: str) -> int:
    Path(pid_file).write_text(f"{os.getpid()} {subprocess.Popen(['sleep', '60']).pid}")
    return 0


def large(pid_file: str) -> int:
    """Holds a quarter of a gigabyte when it ends."""
    held = bytearray(b"x") * (1 << 28)
    Path(pid_file).write_text(str(os.getpid()))
    print("written" if held else "")
    return 9


def matmul(threads: str) -> int:
    """The digest of a product, a backward pass and a Parquet round trip, on `threads` threads."""
    import duckdb
    import numpy
    import pyarrow
    import torch

    torch.set_num_threads(int(threads))
    generator = torch.Generator().manual_seed(1)
    left = torch.randn(512, 512, generator=generator, requires_grad=True)
    product = torch.softmax(left @ left.T, -1) @ torch.randn(512, 512, generator=generator)
    product.square().sum().backward()
    digest = hashlib.sha256(product.detach().numpy().tobytes())
    assert left.grad is not None
    digest.update(left.grad.numpy().tobytes())
    table = pyarrow.table({"x": numpy.arange(300_000)})
    relation = duckdb.connect(config={"threads": 2})
    relation.register("t", table)
    digest.update(str(relation.execute("select sum(x) from t").fetchall()).encode())
    print(digest.hexdigest(), torch.get_num_threads(), len(os.listdir("/proc/self/task")) > 1)
    return 0


JOBS = {
    f.__name__: f
    for f in (
        nothing,
        echo,
        inherited,
        descriptors,
        fail,
        leave,
        die,
        sleep,
        stubborn,
        catch,
        leave_behind,
        large,
        matmul,
    )
}
