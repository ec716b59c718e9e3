from pathlib import Path

from sandbox import hostile
from sandbox.table import page


def test_the_page_of_hostile_programs_is_made_from_them():
    text = (Path(__file__).parents[2] / "docs/hostile.md").read_text(encoding="utf-8")
    assert text == page(), "run `make docs`"


def test_names_are_used_once():
    names = [case.name for case in hostile.ALL]
    assert len(names) == len(set(names)) >= 60
