"""GPUs are shared by file locks; device nodes are simulated by files."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rollway.errors import RollwayError
from rollway.runtime import device, device_lock

HOLD = """
import sys, time
from pathlib import Path
from rollway.runtime import device_lock
with device_lock.hold_devices(Path(sys.argv[1]), count=int(sys.argv[2])) as devices:
    print(",".join(devices), flush=True)
    time.sleep(60)
"""


def holder(folder: Path, visible: str, count: int = 1) -> subprocess.Popen[str]:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": visible}
    command = [sys.executable, "-c", HOLD, str(folder), str(count)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_no_gpu_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with device_lock.hold_devices(tmp_path / "locks", nodes=tmp_path) as devices:
        assert devices == []
        assert "CUDA_VISIBLE_DEVICES" not in os.environ
    assert not (tmp_path / "locks").exists()


@pytest.mark.parametrize(("listed", "expected"), [("", []), ("-1", []), ("2,0", ["2", "0"]), ("1,-1,0", ["1"])])
def test_visible_devices_follow_cuda(listed: str, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    assert device_lock.visible_devices() == expected


def test_devices_are_found_in_numerical_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name in ("nvidia10", "nvidia2", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert device_lock.visible_devices(tmp_path) == ["2", "10"]


def test_two_jobs_get_two_gpus_and_the_third_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = holder(tmp_path, "0,1")
    second = third = None
    try:
        assert first.stdout is not None and first.stdout.readline() == "0\n"
        second = holder(tmp_path, "0,1")
        assert second.stdout is not None and second.stdout.readline() == "1\n"
        third = holder(tmp_path, "0,1")
        assert third.stderr is not None and third.stdout is not None
        line = third.stderr.readline()
        assert f"GPU 0 is held by process {first.pid}; GPU 1 is held by process {second.pid}" in line
        second.send_signal(signal.SIGKILL)
        assert third.stdout.readline() == "1\n"
    finally:
        for process in (first, second, third):
            if process is not None:
                process.kill()
                process.communicate()


def test_whoever_holds_a_gpu_is_named_from_the_first_moment(tmp_path: Path) -> None:
    """Also while it looks whether there are as many as it needs; not the job before, whose number was longer."""
    (tmp_path / "gpu-0.lock").write_text("1234567890\n")
    held = device_lock._try(tmp_path, ["0"], 2)
    assert device_lock._holder(tmp_path, "0") == str(os.getpid())
    assert (tmp_path / "gpu-0.lock").read_text() == f"{os.getpid()}\n"
    os.close(held["0"])


def test_several_gpus_are_taken_all_or_none(tmp_path: Path) -> None:
    first = holder(tmp_path, "0,1")
    second = None
    try:
        assert first.stdout is not None and first.stdout.readline() == "0\n"
        second = holder(tmp_path, "0,1", count=2)
        assert second.stderr is not None and "waiting for 2 GPU" in second.stderr.readline()
        time.sleep(0.2)
        third = holder(tmp_path, "1")
        assert third.stdout is not None and third.stdout.readline() == "1\n"
        third.kill()
        third.communicate()
    finally:
        for process in (first, second):
            if process is not None:
                process.kill()
                process.communicate()


def test_the_variable_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-ab/cd,3")
    monkeypatch.delenv("ROLLWAY_DEVICE", raising=False)
    with device_lock.hold_devices(tmp_path) as devices:
        assert devices == ["GPU-ab/cd"]
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-ab/cd"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-ab/cd,3"


@pytest.mark.parametrize("listed", ["0,1", None])
def test_stages_that_shall_stay_on_the_cpu_see_no_gpu(
    listed: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither do they wait for one, nor does Snakemake count one for them."""
    (tmp_path / "nvidia0").touch()
    monkeypatch.setenv("ROLLWAY_DEVICE", "cpu")
    if listed is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    with device_lock.hold_devices(tmp_path / "locks", nodes=tmp_path) as devices:
        assert devices == []
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == listed
    assert not (tmp_path / "locks").exists()
    assert device_lock.visible_devices(tmp_path) == []
    assert device.gpus_per_job() == 0


def test_too_many_gpus_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with (
        pytest.raises(RollwayError, match="needs 2 GPUs and this machine offers 1: 0"),
        device_lock.hold_devices(tmp_path, count=2),
    ):
        pass
