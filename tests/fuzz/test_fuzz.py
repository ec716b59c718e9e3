"""A small number of every fuzz target's inputs; `make fuzz` tries thousands."""

import pytest

from fuzz.fuzz import fuzz
from fuzz.targets import TARGETS, Target
from rollway.errors import RollwayError

FEW = {"mathematics": 15, "SQL files": 12, "config trees": 15, "configs": 12, "config files": 12, "recipes": 15}


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_inputs_are_taken_or_refused_in_a_sentence(target: Target) -> None:
    examples = FEW.get(target.name, 30)
    assert fuzz(target, examples, start=1).tried >= examples // 2


def test_the_harness_reports_what_it_is_for() -> None:
    """An exception that is no RollwayError, a hang and an empty message are all failures."""
    from hypothesis import strategies as st

    def crash(value: int) -> bool:
        return bool(1 / (value - 7))

    def mumble(value: int) -> bool:
        raise RollwayError(" ")

    for check, kind in ((crash, ZeroDivisionError), (mumble, AssertionError)):
        with pytest.raises(kind):
            fuzz(Target("t", "", lambda: st.integers(0, 20), check), 200, start=0)
    polite = Target("t", "", lambda: st.integers(0, 20), lambda value: value > 3)
    assert fuzz(polite, 21, start=0).taken < 21
