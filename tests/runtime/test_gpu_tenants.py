"""Engines that stay on a GPU between jobs: who goes where. Device nodes are simulated by CUDA_VISIBLE_DEVICES."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from rollway.runtime import device_lock, gpu_tenants
from rollway.runtime.gpu_tenants import Tenant, in_order, move_in, say, tenant

MINE, THEIRS = "/mine/.worker", "/theirs/.worker"


@pytest.fixture
def marks() -> Iterator[list[int]]:
    """Descriptors held open, as an engine's process holds them."""
    held: list[int] = []
    yield held
    for descriptor in held:
        os.close(descriptor)


def test_a_mark_lives_as_long_as_its_holder(tmp_path: Path) -> None:
    assert tenant(tmp_path, "0") is None
    (mark,) = move_in(tmp_path, ["0"], MINE)
    assert tenant(tmp_path, "0") == Tenant(MINE, True)
    say(tmp_path, ["0"], Tenant(MINE, False))
    assert tenant(tmp_path, "0") == Tenant(MINE, False)
    os.close(mark)
    assert tenant(tmp_path, "0") is None


def test_one_gpu_is_shared_with_training_asleep_or_awake(tmp_path: Path, marks: list[int]) -> None:
    marks += move_in(tmp_path, ["0"], MINE)
    for awake in (True, False):
        say(tmp_path, ["0"], Tenant(MINE, awake))
        assert in_order(tmp_path, ["0"], None) == ["0"] == in_order(tmp_path, ["0"], MINE)


def test_training_keeps_away_from_an_engine_that_is_awake(tmp_path: Path, marks: list[int]) -> None:
    marks += move_in(tmp_path, ["0"], MINE)
    assert in_order(tmp_path, ["0", "1"], None) == ["1"]
    assert in_order(tmp_path, ["0", "1"], THEIRS) == ["1"]
    assert in_order(tmp_path, ["0", "1"], MINE) == ["0", "1"]
    say(tmp_path, ["0"], Tenant(MINE, False))
    assert in_order(tmp_path, ["0", "1"], None) == ["1", "0"]


def test_a_job_with_an_engine_goes_where_its_engine_is(
    tmp_path: Path, marks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    monkeypatch.delenv("ROLLWAY_DEVICE", raising=False)
    marks += move_in(tmp_path, ["2"], MINE)
    say(tmp_path, ["2"], Tenant(MINE, False))
    with device_lock.hold_devices(tmp_path, engine=MINE) as held:
        assert held == ["2"]
    with device_lock.hold_devices(tmp_path) as held:
        assert held == ["0"]


def test_an_engine_over_several_gpus_gets_them_all(
    tmp_path: Path, marks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.delenv("ROLLWAY_DEVICE", raising=False)
    marks += move_in(tmp_path, ["1", "3"], MINE)
    with device_lock.hold_devices(tmp_path, count=2, engine=MINE) as held:
        assert held == ["1", "3"]


def test_what_is_awake_is_taken_where_nothing_else_is_left(
    tmp_path: Path, marks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.delenv("ROLLWAY_DEVICE", raising=False)
    marks += move_in(tmp_path, ["0"], THEIRS)
    with device_lock.hold_devices(tmp_path, count=2) as held:
        assert sorted(held) == ["0", "1"]


def test_a_mark_that_is_being_written_counts_as_awake(tmp_path: Path, marks: list[int]) -> None:
    marks += move_in(tmp_path, ["0"], MINE)
    gpu_tenants._file(tmp_path, "0").write_text("")
    assert tenant(tmp_path, "0") == Tenant("", True)
