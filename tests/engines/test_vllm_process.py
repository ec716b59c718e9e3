"""The vLLM process as the stages see it: protocol, life and faults, with `toy_vllm.py` in the place of vLLM."""

import contextlib
import importlib
import math
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rollway.config.rollouts import Sampling, VllmEngine
from rollway.engines import Request, serving, vllm_engine, vllm_launch
from rollway.engines.vllm_client import Conversation
from rollway.engines.vllm_process import frames
from rollway.errors import RollwayError
from rollway.runtime import client, device_lock, gpu_tenants, notice
from stages.test_expert_rollouts import Here, here

LOOSE = VllmEngine(logprob_tolerance=1e3)
"""The toy's log-probs are those of no model."""
REQUESTS = [Request(f"r{n}", [5, 6, 7][: 1 + n % 3]) for n in range(20)]
SAMPLING = Sampling(max_tokens=6, stop=["1"])


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_launch, "SERVER", Path(__file__).parent / "toy_vllm.py")
    monkeypatch.setenv("ROLLWAY_VLLM_PYTHON", sys.executable)
    monkeypatch.delenv("ROLLWAY_ENGINES", raising=False)
    monkeypatch.delenv("TOY_VLLM", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def workflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a workflow's engines, which end with the test."""
    folder = tmp_path / "results" / ".worker"
    monkeypatch.setenv("ROLLWAY_ENGINES", f"{os.getpid()}:{folder}")
    yield folder
    if folder.exists():
        vllm_launch.stop_all(folder)


@pytest.fixture
def place(tmp_path: Path) -> Here:
    return here(tmp_path)


def other_policy(place: Here, name: str) -> Path:
    """Another policy of the same shape."""
    folder = place.folder / name
    subprocess.run(["cp", "-r", place.policy.parent, folder], check=True)
    text = (folder / "policy.json").read_text()
    (folder / "policy.json").write_text(text.replace('"updates": 0', '"updates": 7'))
    return folder / "policy.json"


def pid_of(folder: Path) -> int:
    running = vllm_launch.running(vllm_launch.Home(folder, os.getpid()))
    assert running is not None
    running.connection.close()
    return running.pid


def log_of(folder: Path) -> str:
    return (folder / "vllm-cpu.log").read_text()


def gone(pid: int, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while client.start_time(pid) is not None and time.monotonic() < deadline:
        time.sleep(0.05)
    return client.start_time(pid) is None


# ---- messages


def test_messages_arrive_as_they_were_sent() -> None:
    ours, theirs = socket.socketpair()
    arrays = {"a": array("i", [1, -2]), "none": array("f"), "c": array("q", [2**60]), "d": array("B", [0, 1])}
    frames.send(ours, {"op": "x", "text": "ü"}, arrays)
    frames.send(ours, {})
    assert frames.receive(theirs) == ({"op": "x", "text": "ü"}, arrays)
    assert frames.receive(theirs) == ({}, {})
    assert not frames.hung_up(theirs)
    ours.close()
    assert frames.hung_up(theirs)
    assert frames.receive(theirs) is None


def test_a_message_of_many_megabytes_arrives() -> None:
    ours, theirs = socket.socketpair()
    sent = array("i", range(5_000_000))
    thread = threading.Thread(target=frames.send, args=(ours, {"n": 1}, {"x": sent}))
    thread.start()
    received = frames.receive(theirs)
    thread.join()
    assert received == ({"n": 1}, {"x": sent})


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack("!4sIQ", b"rwVL", 2**31, 0),
        struct.pack("!4sIQ", b"rwVL", 2, 0) + b"[]",
        struct.pack("!4sIQ", b"rwVL", 9, 0) + b"not JSON!",
        struct.pack("!4sIQ", b"rwVL", 23, 0) + b'{"arrays":[["a","i",9]]',
        struct.pack("!4sIQ", b"rwVL", 24, 4) + b'{"arrays":[["a","u",1]]}' + b"abcd",
        struct.pack("!4sIQ", b"rwVL", 24, 4) + b'{"arrays":[["a","i",9]]}' + b"abcd",
        struct.pack("!4sIQ", b"rwVL", 13, 4) + b'{"arrays":[]}' + b"abcd",
    ],
)
def test_what_is_no_message_is_refused(sent: bytes) -> None:
    ours, theirs = socket.socketpair()
    ours.sendall(sent)
    ours.close()
    with pytest.raises((ValueError, TypeError)):
        frames.receive(theirs)


def test_rows_are_packed_and_unpacked() -> None:
    rows = [[1, 2], [], [3]]
    assert frames.unpack(*frames.pack(rows)) == rows
    with pytest.raises(ValueError):
        frames.unpack(array("i", [1, 2]), array("q", [1]))


# ---- one job


def test_without_its_environment_the_message_names_make_vllm(
    place: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ROLLWAY_VLLM_PYTHON")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "env"))
    with pytest.raises(RollwayError, match="make vllm"), serving(LOOSE, place.policy):
        pass
    # An environment whose installation was not finished is none.
    (tmp_path / ".venv-vllm/bin").mkdir(parents=True)
    (tmp_path / ".venv-vllm/bin/python").symlink_to(sys.executable)
    with pytest.raises(RollwayError, match="make vllm"), serving(LOOSE, place.policy):
        pass
    monkeypatch.setenv("ROLLWAY_VLLM_PYTHON", "/nowhere/python")
    with pytest.raises(RollwayError, match="ROLLWAY_VLLM_PYTHON: /nowhere/python"), serving(LOOSE, place.policy):
        pass


def test_a_job_of_its_own_ends_its_engine(place: Here, capfd: pytest.CaptureFixture[str]) -> None:
    with serving(LOOSE, place.policy) as served:
        first = served.draw(REQUESTS, SAMPLING, seed=3)
        opened: Any = served.draw
        server = opened.__self__.talk.server
        assert server.log.exists() and server.alive()
        again = served.draw(REQUESTS[::-1], SAMPLING, seed=3)[::-1]
        other = served.draw(REQUESTS, SAMPLING, seed=4)
    assert first == again and [c.tokens for c in first] != [c.tokens for c in other]
    assert {len(c.tokens) for c in first} == {6} and {c.finish for c in first} == {"stop", "length"}
    assert gone(server.pid) and not server.log.parent.exists()
    assert "differ from the trainer's" in capfd.readouterr().err


def test_the_bar_moves_while_the_engine_samples(place: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[int, int]] = []

    def noted(steps: int, *, tokens: int) -> None:
        said.append((steps, tokens))
        notice.tick(steps, tokens=tokens)

    monkeypatch.setattr(vllm_engine, "tick", noted)
    with notice.progress("rollout", len(REQUESTS)) as bar, serving(LOOSE, place.policy) as served:
        served.draw(REQUESTS, SAMPLING, seed=0)
    # Half of them as the toy says, the rest with the answer; the check of log-probs before them is no progress.
    assert said == [(10, 60), (10, 60)]
    assert (bar.done, bar.tokens) == (20, 120)
    assert bar.said().endswith(" tokens/s")


class Steps:
    """vLLM's engine as `_run` uses it: one of three requests is finished per step."""

    def __init__(self) -> None:
        self.left = ["0", "1", "2"]
        self.aborted: list[str] = []

    def has_unfinished_requests(self) -> bool:
        return bool(self.left)

    def step(self) -> list[Any]:
        output = SimpleNamespace(token_ids=[7, 8, 9])
        return [SimpleNamespace(request_id=self.left.pop(0), finished=True, outputs=[output])]

    def abort_request(self, names: list[str]) -> None:
        self.aborted, self.left = names, []


def test_the_process_tells_how_far_it_is_and_stops_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(vllm_engine.__file__).parent / "vllm_process"))
    server = importlib.import_module("vllm_server")
    monkeypatch.setattr(server, "POLL", -1.0)
    engine = object.__new__(server.Engine)
    engine.engine = Steps()
    here, there = socket.socketpair()
    with here, there:
        assert sorted(engine._run(here, ["0", "1", "2"])) == ["0", "1", "2"]
        told = [frames.receive(there) for _ in range(3)]
    assert told == [({"finished": n, "tokens": 3 * n}, {}) for n in (1, 2, 3)]
    engine.engine = Steps()
    here, there = socket.socketpair()
    there.close()
    with here, pytest.raises(ConnectionError):
        engine._run(here, ["0", "1", "2"])
    assert engine.engine.aborted == ["1", "2"]


def test_entropies_are_the_trainers(place: Here) -> None:
    with serving(LOOSE, place.policy) as served:
        (done,) = served.draw(REQUESTS[:1], SAMPLING, seed=0, entropy=True)
    assert done.entropy is not None and len(done.entropy) == len(done.tokens)
    # An untrained policy is nearly uniform.
    most = math.log(served.reader.vocabulary)
    assert all(0.9 * most < value <= most for value in done.entropy)


def test_log_probs_above_the_tolerance_are_refused(place: Here) -> None:
    strict = VllmEngine(logprob_tolerance=0.25)
    pattern = r"differ from the trainer's by up to [12]\.\d+ nats.*logprob_tolerance allows 0.25.*kind: transformers"
    with pytest.raises(RollwayError, match=pattern), serving(strict, place.policy) as served:
        served.draw(REQUESTS, SAMPLING, seed=0)


@pytest.mark.parametrize(
    ("prompt", "message"), [([], "has no token"), ([5] * 40, "has 40 tokens, vLLM has room for 40.*max_model_len")]
)
def test_a_prompt_without_room_is_refused(prompt: list[int], message: str, place: Here) -> None:
    with serving(LOOSE, place.policy) as served:
        with pytest.raises(RollwayError, match=f"rollout long: its prompt {message}"):
            served.draw([Request("long", prompt)], SAMPLING, seed=0)
        with pytest.raises(RollwayError, match="share a rollout_id"):
            served.draw([Request("a", [5]), Request("a", [5])], SAMPLING, seed=0)
        (done,) = served.draw([Request("fits", [5] * 38)], SAMPLING, seed=0)
        assert len(done.tokens) == 2


def test_a_start_that_fails_shows_the_cause(place: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_VLLM", "start")
    pattern = r"did not start: ValueError: weights of another planet\nthe end of its log (?s:.*)Traceback"
    with pytest.raises(RollwayError, match=pattern), serving(LOOSE, place.policy):
        pass


def test_what_is_no_engine_is_one_sentence(place: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_VLLM", "garbage")
    with pytest.raises(RollwayError, match="is no such engine"), serving(LOOSE, place.policy):
        pass


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (
            "(EngineCore pid=9) ValueError: To serve at least one request with the models's max seq len (40960), (5.6 "
            "GiB KV cache is needed, which is larger than the available KV cache memory (1.0 GiB)\n"
            "RuntimeError: Engine core initialization failed. See root cause above.",
            "KV cache is smaller than one sequence.*40960.*lower rollout.engine.max_model_len",
        ),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB", "ran out of memory .*max_num_seqs"),
        ("RuntimeError: Engine core initialization failed. See root cause above.", "killed, or crashed without a word"),
    ],
)
def test_the_cause_is_read_from_the_log(log: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "log").write_text(log)
    ours, _ = socket.socketpair()
    talk = Conversation(vllm_launch.Server(ours, tmp_path / "log", None, os.getpid()))
    assert re.search(message, str(talk.fault("start")), re.DOTALL)


# ---- memory, and an engine that dies


def test_out_of_memory_is_tried_once_more_with_half(
    place: Here, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TOY_VLLM", "oom")
    engine = LOOSE.model_copy(update={"max_num_seqs": 16})
    with serving(engine, place.policy) as served:
        assert len(served.draw(REQUESTS, SAMPLING, seed=0)) == len(REQUESTS)
        assert len(served.draw(REQUESTS, SAMPLING, seed=0)) == len(REQUESTS)
    assert "ran out of memory with 16 rollouts at once; once more with 8" in capfd.readouterr().err


def test_out_of_memory_twice_is_an_error(place: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_VLLM", "oom_always")
    with (
        pytest.raises(RollwayError, match=r"out of memory with 128 rollouts at once too; lower rollout.engine"),
        serving(LOOSE, place.policy) as served,
    ):
        served.draw(REQUESTS, SAMPLING, seed=0)


def test_finished_parts_outlive_an_engine_that_dies(
    place: Here, workflow: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"part": 4, "experts": 0, "engine": LOOSE.model_dump()}
    whole = place.rows("whole", **given)
    vllm_launch.stop_all(workflow)
    monkeypatch.setenv("TOY_VLLM", "die")
    with pytest.raises(RollwayError, match=r"died in the middle of `generate`.*finished parts are kept, run again"):
        place.rows("killed", **given)
    assert len(list(place.folder.glob(".partial-*/part-*.parquet"))) == 1
    monkeypatch.delenv("TOY_VLLM")
    assert place.rows("killed", **given) == whole
    # The check, and three parts of the four: what was finished was not made again.
    assert log_of(workflow).count("generate") == 1 + 3
    assert {row["engine"] for row in whole} == {"vllm"}


# ---- one engine for all rounds


def test_one_engine_serves_all_jobs_of_a_workflow(place: Here, workflow: Path) -> None:
    pids = []
    for policy in (place.policy, place.policy, other_policy(place, "next"), place.policy):
        with serving(LOOSE, policy) as served:
            served.draw(REQUESTS, SAMPLING, seed=0)
        pids.append(pid_of(workflow))
    assert len(set(pids)) == 1
    lines = [line.partition(": ")[2] for line in log_of(workflow).splitlines()]
    loads = [line for line in lines if line.startswith("load")]
    assert loads == ["load policy start", "load next reload", "load policy reload"]
    # Checked once after each update of the weights, not once per job.
    assert sum(line.startswith("generate 8 ") for line in lines) == 3
    socket_file = workflow / "vllm-cpu.socket"
    assert os.stat(socket_file).st_mode & 0o777 == 0o600
    vllm_launch.stop_all(workflow)
    assert gone(pids[0]) and not socket_file.exists()


def test_a_narrower_tolerance_is_checked_again(place: Here, workflow: Path) -> None:
    with serving(LOOSE, place.policy) as served:
        served.draw(REQUESTS, SAMPLING, seed=0)
    strict = LOOSE.model_copy(update={"logprob_tolerance": 0.1})
    with pytest.raises(RollwayError, match=r"logprob_tolerance allows 0\.1"), serving(strict, place.policy) as served:
        served.draw(REQUESTS, SAMPLING, seed=0)


def test_other_settings_are_another_engine(place: Here, workflow: Path) -> None:
    pids = []
    for engine in (LOOSE, LOOSE.model_copy(update={"max_num_seqs": 7}), LOOSE.model_copy(update={"max_num_seqs": 7})):
        with serving(engine, place.policy) as served:
            served.draw(REQUESTS[:1], SAMPLING, seed=0)
        pids.append(pid_of(workflow))
    assert pids[0] != pids[1] == pids[2] and gone(pids[0])


def test_an_engine_of_another_version_is_replaced(place: Here, workflow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_VLLM", "version")
    with serving(LOOSE, place.policy):
        old = pid_of(workflow)
    monkeypatch.delenv("TOY_VLLM")
    with serving(LOOSE, place.policy):
        pass
    assert pid_of(workflow) != old


def test_an_update_that_does_not_hold_starts_the_engine_anew(
    place: Here, workflow: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with serving(LOOSE, place.policy) as served:
        served.draw(REQUESTS, SAMPLING, seed=0)
    old = pid_of(workflow)
    gaps = iter([(0.4, 0.2, 9), (1e-6, 1e-7, 9)])
    monkeypatch.setattr(vllm_engine.VllmSession, "_gap", lambda *args: next(gaps))
    with serving(VllmEngine(), other_policy(place, "next")) as served:
        served.draw(REQUESTS, SAMPLING, seed=0)
    assert pid_of(workflow) != old and "did not hold; the engine is started anew" in capfd.readouterr().err


def test_an_engine_never_answers_for_another_policy(place: Here, workflow: Path) -> None:
    with serving(LOOSE, place.policy) as served:
        opened: Any = served.draw
        opened.__self__.weights = vllm_engine.weights_of(other_policy(place, "next"), "main")
        with pytest.raises(RollwayError, match="does not hold the policy that was asked for"):
            served.draw(REQUESTS, SAMPLING, seed=0)


def test_on_a_gpu_it_sleeps_between_jobs_and_says_so(
    place: Here, workflow: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    locks = device_lock.default_folder()
    locks.mkdir(mode=0o700)
    engine = LOOSE.model_copy(update={"sleep": True})
    for _ in range(2):
        with serving(engine, place.policy) as served:
            served.draw(REQUESTS, SAMPLING, seed=0)
            assert gpu_tenants.tenant(locks, "5") == gpu_tenants.Tenant(str(workflow), True)
        assert gpu_tenants.tenant(locks, "3") == gpu_tenants.Tenant(str(workflow), False)
    log = (workflow / "vllm-gpu-3-5.log").read_text()
    lines = [line.partition(": ")[2].split()[0] for line in log.splitlines() if "generate" not in line]
    assert lines[1:6] == ["ready", "load", "sleep", "load", "sleep"]
    vllm_launch.stop_all(workflow)
    assert gpu_tenants.tenant(locks, "3") is None


@pytest.mark.parametrize(
    ("option", "message"),
    [({"sleep": True}, "sleep: true needs a GPU"), ({"gpu_memory": 0.5}, "gpu_memory: has no effect without a GPU")],
)
def test_without_a_gpu_its_options_are_refused(option: dict[str, Any], message: str, place: Here) -> None:
    with pytest.raises(RollwayError, match=message), serving(VllmEngine(**option), place.policy):
        pass


def test_two_sizes_of_the_cache_are_refused() -> None:
    with pytest.raises(ValueError, match="keep one"):
        VllmEngine(kv_cache=2.0, gpu_memory=0.5)


def test_it_serves_one_job_at_a_time(
    place: Here, workflow: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TOY_VLLM", "slow")
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom rollway.engines import vllm_launch\n"
        "with vllm_launch.lease(vllm_launch.home()):\n    print('held', flush=True)\n    time.sleep(1.5)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with serving(LOOSE, place.policy):
        assert holder.wait(5) == 0
    assert f"waiting for the vLLM engine, which serves process {holder.pid}" in capfd.readouterr().err


def test_a_stale_socket_is_replaced_and_a_foreign_file_is_not(place: Here, workflow: Path) -> None:
    with serving(LOOSE, place.policy):
        old = pid_of(workflow)
    os.kill(old, signal.SIGKILL)
    assert gone(old) and (workflow / "vllm-cpu.socket").exists()
    with serving(LOOSE, place.policy):
        new = pid_of(workflow)
    assert new != old
    vllm_launch.stop_all(workflow)
    (workflow / "vllm-cpu.socket").write_text("mine")
    pattern = r"vllm-cpu.socket: is not a socket; delete it to use the vLLM engine"
    with pytest.raises(RollwayError, match=pattern), serving(LOOSE, place.policy):
        pass


# ---- its end


def test_it_ends_with_its_workflow(place: Here, tmp_path: Path) -> None:
    folder = tmp_path / "results" / ".worker"
    script = (
        "import os, sys, time\nfrom pathlib import Path\n"
        "from rollway.config.rollouts import VllmEngine\nfrom rollway.engines import serving, vllm_launch\n"
        "vllm_launch.SERVER = Path(sys.argv[1])\n"
        "with serving(VllmEngine(), Path(sys.argv[2])):\n    pass\nprint('served', flush=True)\ntime.sleep(60)\n"
    )
    parent = subprocess.Popen(["sleep", "60"])
    environment = os.environ | {"ROLLWAY_ENGINES": f"{parent.pid}:{folder}"}
    job = subprocess.Popen(
        [sys.executable, "-c", script, str(vllm_launch.SERVER), str(place.policy)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert job.stdout is not None and job.stdout.readline() == "served\n"
        job.kill()
        job.wait()
        pid = pid_of(folder)
        time.sleep(0.7)
        assert client.start_time(pid) is not None, "an engine outlives its job"
        parent.kill()
        parent.wait()
        assert gone(pid), "an engine ends with its workflow"
    finally:
        for process in (job, parent):
            with contextlib.suppress(OSError):
                process.kill()


def test_it_ends_after_idling(place: Here, workflow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_launch, "IDLE", 1.0)
    with serving(LOOSE, place.policy):
        pid = pid_of(workflow)
        time.sleep(2.0)
        assert client.start_time(pid) is not None, "a client that asks nothing keeps it alive"
    assert gone(pid)
