"""Three rounds of every recipe, against the numbers of earlier versions: what nobody meant to change has not."""

import json

import pytest
import torch

from incidents.trajectory import GOLDEN, trajectory
from rollway.config import recipe_names

ABSOLUTE = 2e-6
"""Losses at ratio 1 are sums of advantages: 0 up to rounding."""


@pytest.mark.parametrize("name", recipe_names())
def test_golden_trajectory(name: str) -> None:
    torch.set_num_threads(1)
    path = GOLDEN / f"{name}.json"
    assert path.exists(), f"no golden file: PYTHONPATH=src:tests python -m incidents.trajectory {name}"
    wanted, found = json.loads(path.read_text(encoding="utf-8")), trajectory(name)
    assert len(found["rounds"]) == len(wanted["rounds"])
    for number, (new, old) in enumerate(zip(found["rounds"], wanted["rounds"], strict=True)):
        assert new.keys() == old.keys()
        for key, value in old.items():
            assert new[key] == pytest.approx(value, rel=1e-4, abs=ABSOLUTE), f"round {number}: {key}"


def test_every_golden_file_is_of_a_recipe_and_shows_learning() -> None:
    """A trajectory without a step would agree with anything."""
    files = sorted(path.stem for path in GOLDEN.glob("*.json"))
    assert files == recipe_names()
    for name in files:
        rounds = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))["rounds"]
        assert sum(len(r["loss"]) for r in rounds) >= 3, name
        assert len({r["parameter_norm"] for r in rounds}) == 3, name
