"""The warm worker with real processes: what passes through, what is refused, and that nothing outlives its owner."""

import json
import os
import signal
import socket
import stat
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rollway.errors import RollwayError
from rollway.runtime import client, job_client, worker

if not sys.platform.startswith("linux"):
    pytest.skip("the warm worker needs Linux", allow_module_level=True)

HERE = Path(__file__).parent
SOURCE = HERE.parents[1] / "src"
TARGET = "jobs_for_tests:main"
CLIENT = "import sys; from rollway.runtime import client; c = client.run(sys.argv[2:], sys.argv[1]); "
CLIENT += "sys.exit(99 if c is None else c)"
STARTER = """
import os, sys, time
from pathlib import Path
from types import SimpleNamespace
from rollway.runtime import worker
folder = Path(sys.argv[1])
process = worker.start(folder / "socket", os.getpid(), folder / "log", preload="light", target="jobs_for_tests:main")
print(process.pid, flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def import_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{SOURCE}:{HERE}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("ROLLWAY_WORKER", raising=False)


Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start(tmp_path: Path, import_path: None) -> Iterator[Start]:
    started: list[tuple[Path, subprocess.Popen[bytes]]] = []

    def begin(path: Path = tmp_path / "socket", **options: Any) -> "subprocess.Popen[bytes]":
        settings = {"preload": "light", "target": TARGET} | options
        process = worker.start(path, os.getpid(), tmp_path / "log", **settings)
        assert process is not None
        started.append((path, process))
        return process

    yield begin
    for _, process in started:
        process.terminate()
        try:
            process.wait(10)
        finally:
            process.kill()


def job(path: Path, *argv: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", CLIENT, str(path), *argv]
    return subprocess.run(command, text=True, capture_output=True, timeout=60, **options)


def job_in_background(path: Path, *argv: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", CLIENT, str(path), *argv]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return value


def gone(pid: int) -> bool:
    return client.start_time(pid) is None


def pids(path: Path) -> list[int]:
    wait_for(path.exists)
    return [int(word) for word in path.read_text().split()]


def test_streams_and_exit_codes_pass_through(start: Start, tmp_path: Path) -> None:
    start()
    done = job(tmp_path / "socket", "echo", "3", input="text\n")
    assert (done.stdout, done.stderr, done.returncode) == ("TEXT\n", "said on stderr\n", 3)
    assert job(tmp_path / "socket", "nothing").returncode == 0
    assert job(tmp_path / "socket", "leave", "5").returncode == 5
    worded = job(tmp_path / "socket", "leave", "in words")
    assert (worded.returncode, worded.stderr) == (1, "in words\n")
    failed = job(tmp_path / "socket", "fail")
    assert failed.returncode == 1
    assert failed.stderr.startswith("Traceback") and failed.stderr.endswith("RuntimeError: the job's own error\n")
    assert "worker.py" not in failed.stderr


def test_a_closed_stdin_is_an_empty_one(start: Start, tmp_path: Path) -> None:
    start()
    command = f"{sys.executable} -c '{CLIENT}' {tmp_path / 'socket'} echo 0 <&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("", 0)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_death_by_signal_is_128_plus_its_number(start: Start, tmp_path: Path, number: int) -> None:
    start()
    assert job(tmp_path / "socket", "die", str(int(number))).returncode == 128 + number


def test_environment_folder_umask_and_arguments_pass(start: Start, tmp_path: Path) -> None:
    start()
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    environment = os.environ | {"ROLLWAY_TEST": "odd \udcff = value\n", "ROLLWAY_WORKER": "x"}
    done = job(tmp_path / "socket", "inherited", cwd=folder, env=environment, umask=0o027)
    assert json.loads(done.stdout) == {
        "cwd": str(folder),
        "umask": 0o027,
        "variables": {"ROLLWAY_TEST": "odd \udcff = value\n"},
        "argv": ["rollway", "inherited"],
    }


def test_a_job_inherits_no_descriptor_of_the_worker(start: Start, tmp_path: Path) -> None:
    start()
    other = job_in_background(tmp_path / "socket", "sleep", str(tmp_path / "pids"))
    pids(tmp_path / "pids")
    files = json.loads(job(tmp_path / "socket", "descriptors", stdin=subprocess.DEVNULL).stdout)
    assert not [name for name in files if "eventpoll" in name or name.endswith("log")]
    # On this one it says its exit code; what it starts does not get it.
    assert len([name for name in files if name.startswith("socket:")]) == 1
    other.terminate()
    other.communicate()


def test_an_early_job_waits_for_the_imports(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow_module.py").write_text("import time\ntime.sleep(1.5)\nfrom jobs_for_tests import main\n")
    monkeypatch.setenv("PYTHONPATH", f"{SOURCE}:{HERE}:{tmp_path}")
    begin = time.monotonic()
    start(target="slow_module:main")
    assert time.monotonic() - begin < 0.5
    assert job(tmp_path / "socket", "leave", "4").returncode == 4
    assert time.monotonic() - begin > 1.5


def test_ctrl_c_before_the_job_starts_cancels_it(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow_module.py").write_text("import time\ntime.sleep(3)\nfrom jobs_for_tests import main\n")
    monkeypatch.setenv("PYTHONPATH", f"{SOURCE}:{HERE}:{tmp_path}")
    start(target="slow_module:main")
    waiting = job_in_background(tmp_path / "socket", "sleep", str(tmp_path / "pids"))
    time.sleep(1.0)
    waiting.send_signal(signal.SIGINT)
    waiting.communicate(timeout=2)
    assert waiting.returncode == 128 + signal.SIGINT
    assert not (tmp_path / "pids").exists()


def test_the_client_passes_signals_on(start: Start, tmp_path: Path) -> None:
    start()
    for kind, number, code in (
        ("catch", signal.SIGTERM, 7),
        ("sleep", signal.SIGTERM, 128 + signal.SIGTERM),
        ("sleep", signal.SIGINT, 128 + signal.SIGINT),
    ):
        file = tmp_path / f"pids-{kind}-{number}"
        running = job_in_background(tmp_path / "socket", kind, str(file))
        child, grandchild = pids(file)
        running.send_signal(number)
        running.communicate(timeout=20)
        assert running.returncode == code
        wait_for(lambda: gone(child) and gone(grandchild))  # noqa: B023


def test_what_a_job_started_ends_with_it(start: Start, tmp_path: Path) -> None:
    start()
    assert job(tmp_path / "socket", "leave_behind", str(tmp_path / "pids")).returncode == 0
    for pid in pids(tmp_path / "pids"):
        wait_for(lambda: gone(pid))  # noqa: B023


@pytest.mark.parametrize("kind", ["sleep", "stubborn"])
def test_a_killed_client_takes_its_job_with_it(start: Start, tmp_path: Path, kind: str) -> None:
    process = start()
    running = job_in_background(tmp_path / "socket", kind, str(tmp_path / "pids"))
    child, grandchild = pids(tmp_path / "pids")
    running.kill()
    running.communicate()
    wait_for(lambda: gone(child) and gone(grandchild))
    assert process.poll() is None
    assert job(tmp_path / "socket", "nothing").returncode == 0


def test_a_killed_worker_takes_its_jobs_with_it(start: Start, tmp_path: Path) -> None:
    process = start()
    running = job_in_background(tmp_path / "socket", "stubborn", str(tmp_path / "pids"))
    child, grandchild = pids(tmp_path / "pids")
    process.kill()
    process.wait()
    _, errors = running.communicate(timeout=10)
    assert running.returncode == 1
    assert errors == "rollway: error: the warm worker died and the job with it; run it again\n"
    wait_for(lambda: gone(child) and gone(grandchild))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_the_worker_and_its_jobs(start: Start, tmp_path: Path, number: int) -> None:
    process = start()
    running = job_in_background(tmp_path / "socket", "sleep", str(tmp_path / "pids"))
    child, grandchild = pids(tmp_path / "pids")
    process.send_signal(number)
    assert process.wait(10) == 0
    running.communicate(timeout=10)
    assert running.returncode == 128 + signal.SIGTERM
    assert gone(child) and gone(grandchild)
    assert not (tmp_path / "socket").exists()


def test_stop_ends_the_worker_and_its_jobs(start: Start, tmp_path: Path) -> None:
    process = start()
    running = job_in_background(tmp_path / "socket", "stubborn", str(tmp_path / "pids"))
    child, grandchild = pids(tmp_path / "pids")
    assert worker.stop(tmp_path / "socket")
    assert process.wait(1) == 0
    running.communicate(timeout=10)
    assert running.returncode == 128 + signal.SIGKILL
    assert gone(child) and gone(grandchild)
    assert not worker.stop(tmp_path / "socket")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "pids"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_the_parent(tmp_path: Path, number: int) -> None:
    starter = subprocess.Popen([sys.executable, "-c", STARTER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    process = int(starter.stdout.readline())
    running = job_in_background(tmp_path / "socket", "stubborn", str(tmp_path / "pids"))
    child, grandchild = pids(tmp_path / "pids")
    starter.send_signal(number)
    starter.communicate()
    wait_for(lambda: gone(process) and gone(child) and gone(grandchild))
    running.communicate(timeout=10)
    assert running.returncode == 128 + signal.SIGKILL
    assert not (tmp_path / "socket").exists()


def test_an_unreaped_dead_parent_counts_as_dead(tmp_path: Path) -> None:
    """A zombie: its parent, this test, does not wait for it; and it did not make the worker itself."""
    parent = subprocess.Popen(["sleep", "60"])
    process = worker.start(tmp_path / "socket", parent.pid, tmp_path / "log", preload="light", target=TARGET)
    assert process is not None
    assert job(tmp_path / "socket", "nothing").returncode == 0
    parent.kill()
    assert process.wait(10) == 0
    parent.wait()


def test_an_idle_worker_ends(start: Start, tmp_path: Path) -> None:
    process = start(idle=1.0)
    assert job(tmp_path / "socket", "nothing").returncode == 0
    assert process.wait(10) == 0
    assert not (tmp_path / "socket").exists()
    assert job(tmp_path / "socket", "nothing").returncode == 99


def test_a_stale_socket_is_replaced(start: Start, tmp_path: Path) -> None:
    start().kill()
    wait_for(lambda: job(tmp_path / "socket", "nothing").returncode == 99)
    assert (tmp_path / "socket").exists()
    start()
    assert job(tmp_path / "socket", "nothing").returncode == 0


def test_a_live_socket_is_refused(start: Start, tmp_path: Path) -> None:
    start()
    with pytest.raises(RollwayError, match="the warm worker already runs there"):
        worker.start(tmp_path / "socket", os.getpid(), tmp_path / "log2", target=TARGET)
    assert job(tmp_path / "socket", "nothing").returncode == 0
    command = [sys.executable, "-m", "rollway.runtime.worker", "--socket", str(tmp_path / "socket")]
    second = subprocess.run([*command, "--parent", str(os.getpid())], capture_output=True, text=True, timeout=30)
    assert second.returncode == 1
    assert second.stderr.startswith("rollway: error: ") and "already runs" in second.stderr


def test_a_file_or_anothers_socket_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RollwayError, match="is not a socket"):
        client.bind(str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"
    if os.geteuid() != 0:
        pytest.skip("giving a socket to another user needs root")
    with socket.socket(socket.AF_UNIX) as foreign:
        foreign.bind(str(tmp_path / "foreign"))
    os.chown(tmp_path / "foreign", 65534, 65534)
    with pytest.raises(RollwayError, match="belongs to another user"):
        client.bind(str(tmp_path / "foreign"))


def test_another_user_gets_nothing(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ends ask the kernel who the other is; here the client believes itself to be somebody else."""
    start()
    assert job(tmp_path / "socket", "nothing").returncode == 0
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    assert client.run(["nothing"], str(tmp_path / "socket")) is None


def test_the_socket_is_private(start: Start, tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        start(path=tmp_path / "new folder" / "socket")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "new folder" / "socket").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "new folder").stat().st_mode) == 0o700


def test_a_long_socket_path_works(start: Start, tmp_path: Path) -> None:
    path = tmp_path / ("d" * 120) / ("e" * 120) / "socket"
    start(path=path)
    assert job(path, "leave", "6").returncode == 6
    assert worker.stop(path)
    assert not path.exists()


def test_garbage_does_not_harm_the_worker(start: Start, tmp_path: Path) -> None:
    start()
    for data in (b"GET / HTTP/1.1\r\n", job_client.MESSAGE.pack(job_client.JOB, 3) + b"abc", b"J", b""):
        with client.connect(str(tmp_path / "socket"), 5.0) as connection:
            connection.sendall(data)
    assert job(tmp_path / "socket", "nothing").returncode == 0


def test_other_import_time_settings_run_cold(start: Start, tmp_path: Path) -> None:
    start()
    done = job(tmp_path / "socket", "nothing", env=os.environ | {"HF_HOME": "/elsewhere"})
    assert done.returncode == 99
    assert done.stderr == "rollway: warm worker not used, starting cold: HF_HOME differs from the worker's\n"


def test_changed_source_runs_cold(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "edited_module.py"
    module.write_text("from jobs_for_tests import main\n")
    monkeypatch.setenv("PYTHONPATH", f"{SOURCE}:{HERE}:{tmp_path}")
    start(target="edited_module:main")
    assert job(tmp_path / "socket", "nothing").returncode == 0
    os.utime(module, (1, 1))
    done = job(tmp_path / "socket", "nothing")
    assert done.returncode == 99 and "edited_module.py changed since it started" in done.stderr


def test_no_fork_once_cuda_is_in_use(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cuda_module.py").write_text(
        "import sys, types\n"
        "from jobs_for_tests import main\n"
        "torch = sys.modules['torch'] = types.ModuleType('torch')\n"
        "torch.cuda = types.SimpleNamespace(is_initialized=lambda: True)\n"
        "torch.get_num_threads = lambda: 1\n"
        "torch.set_num_threads = lambda count: None\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{SOURCE}:{HERE}:{tmp_path}")
    start(target="cuda_module:main")
    done = job(tmp_path / "socket", "nothing")
    assert done.returncode == 99 and "CUDA is already in use inside the worker" in done.stderr


def test_no_socket_is_silently_cold(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert client.run(["nothing"], str(tmp_path / "absent" / "socket")) is None
    assert capfd.readouterr() == ("", "")


def test_the_client_imports_nothing_heavy() -> None:
    code = "import sys; from rollway.runtime import client; print(len(sys.modules)); print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = set(done.stdout.splitlines()[1].split())
    assert not modules & {"json", "subprocess", "argparse", "dataclasses", "pydantic", "inspect", "asyncio", "typing"}


def test_forty_jobs_at_once(start: Start, tmp_path: Path) -> None:
    start()
    running = [job_in_background(tmp_path / "socket", "leave", str(code)) for code in range(40)]
    for process in running:
        process.communicate(timeout=60)
    assert [process.returncode for process in running] == list(range(40))


def test_threaded_torch_in_a_child_gives_the_bytes_of_a_cold_process(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    start(preload="cpu")
    code = "import sys, jobs_for_tests; sys.exit(jobs_for_tests.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "matmul", "2"]
    cold = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    warm = [job(tmp_path / "socket", "matmul", "2").stdout for _ in range(2)]
    assert warm == [cold, cold]
    assert cold.split()[1:] == ["2", "True"]

    times = []
    for _ in range(15):
        begin = time.perf_counter()
        assert client.run(["nothing"], str(tmp_path / "socket")) == 0
        times.append(time.perf_counter() - begin)
    with capsys.disabled():
        print(f"\nwarm job that does nothing, heavy libraries imported: median {statistics.median(times):.3f} s")
    assert min(times) < 1.0

    # The one that serves and the one that imports: a fork beside a third might copy a lock that it holds.
    named = [line.partition("threads: ")[2].split(", ") for line in (tmp_path / "log").read_text().splitlines()]
    assert {len(names) for names in named if names != [""]} == {2}


def test_a_lost_spare_is_no_lost_job(start: Start, tmp_path: Path) -> None:
    """The child that waits for the next job may be killed, by the system for want of memory for example."""
    process = start()
    assert job(tmp_path / "socket", "nothing").returncode == 0
    log = tmp_path / "log"
    # The job itself may not be gone yet.
    [spare] = wait_for(lambda: [pid for pid in children(process.pid) if f"job {pid}:" not in log.read_text()])
    os.kill(spare, signal.SIGKILL)
    assert job(tmp_path / "socket", "leave", "3").returncode == 3
    wait_for(lambda: "children are forked when a job comes" in log.read_text())
    assert job(tmp_path / "socket", "leave", "4").returncode == 4


def test_a_client_does_not_wait_for_memory_to_be_freed(start: Start, tmp_path: Path) -> None:
    """The kernel takes back a gigabyte after the client has its exit code; what the job wrote is all there."""
    process = start()
    assert job(tmp_path / "socket", "nothing").returncode == 0
    done = job(tmp_path / "socket", "large", str(tmp_path / "pids"))
    [child] = pids(tmp_path / "pids")
    assert (done.stdout, done.returncode) == ("written\n", 9)
    wait_for(lambda: gone(child))
    wait_for(lambda: child not in children(process.pid))
    assert job(tmp_path / "socket", "nothing").returncode == 0


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_jobs_run_cold_where_the_importing_thread_has_ended(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would wait for it for ever."""
    (tmp_path / "breaks.py").write_text(
        "from rollway.runtime.preload import Imports\n"
        "def fail(self): raise FileNotFoundError('/proc/self/task/7/comm\\udce9')\n"
        "Imports._note_sources = fail\n"
        "def main(argv): return 0\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{SOURCE}:{HERE}:{tmp_path}")
    start(target="breaks:main")
    for _ in range(2):
        done = job(tmp_path / "socket", "nothing")
        assert done.returncode == 99
        assert "starting cold: it could not import what this job needs (FileNotFoundError: /proc/self/task/7/comm" in (
            done.stderr
        )
    assert "the importing thread ended: FileNotFoundError" in (tmp_path / "log").read_text()
