"""Training state through files: bitwise, without pickle, and with a clear sentence when a file is lost."""

import json
from pathlib import Path

import pytest
import torch

from rollway.errors import RollwayError
from rollway.training.state import TrainState, load_state, save_state
from training.tiny import states_equal

STATE = TrainState(
    seed=5,
    updates=3,
    critic_updates=4,
    shuffles=2,
    optimizer={"w/exp_avg": torch.randn(3, 2), "w/step": torch.tensor(3.0), "w/weight": torch.zeros(2).bfloat16()},
    objective={
        "variance/lam": torch.tensor([0.1], dtype=torch.float64),
        "curvature/ids": torch.zeros(0, dtype=torch.int64),
    },
)


def test_round_trip_is_bitwise_and_repeatable(tmp_path: Path) -> None:
    first = save_state(tmp_path / "one" / "state", STATE)
    assert first == save_state(tmp_path / "two" / "state", STATE)
    assert sorted(first) == ["state/counters.json", "state/objective.safetensors", "state/optimizer.safetensors"]
    loaded = load_state(tmp_path / "one" / "state")
    for name in ("optimizer", "critic", "objective"):
        assert states_equal(dict(getattr(STATE, name)), dict(getattr(loaded, name)))
    assert (loaded.seed, loaded.updates, loaded.critic_updates, loaded.shuffles) == (5, 3, 4, 2)


def test_a_fresh_state_is_counters_alone(tmp_path: Path) -> None:
    assert sorted(save_state(tmp_path / "state", TrainState(seed=1))) == ["state/counters.json"]
    assert load_state(tmp_path / "state") == TrainState(seed=1)


def test_what_a_killed_process_left_is_gone(tmp_path: Path) -> None:
    """safetensors writes to a file of its own naming, beside the one that it was asked for."""
    save_state(tmp_path / "state", STATE)
    (tmp_path / "state" / ".tmpfEOR93").write_bytes(b"half")
    files = save_state(tmp_path / "state", TrainState(seed=1))
    assert sorted(p.name for p in (tmp_path / "state").iterdir()) == sorted(Path(name).name for name in files)


@pytest.mark.parametrize("name", ["counters.json", "optimizer.safetensors"])
def test_missing_and_damaged_files_are_named(name: str, tmp_path: Path) -> None:
    save_state(tmp_path, STATE)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(RollwayError, match=f"{name}: damaged"):
        load_state(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(RollwayError, match=f"{name}: missing"):
        load_state(tmp_path)


def test_counters_of_another_state_are_noticed(tmp_path: Path) -> None:
    save_state(tmp_path, STATE)
    counters = json.loads((tmp_path / "counters.json").read_text())
    counters["tensors"]["optimizer"] = ["v/exp_avg"]
    (tmp_path / "counters.json").write_text(json.dumps(counters))
    with pytest.raises(RollwayError, match="other tensors"):
        load_state(tmp_path)
    (tmp_path / "counters.json").write_text("{}")
    with pytest.raises(RollwayError, match="damaged"):
        load_state(tmp_path)
