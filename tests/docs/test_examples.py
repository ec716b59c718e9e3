"""Example configs plan, and the data that some of them read is what its script makes."""

import importlib.util
import re
from pathlib import Path

import pytest

from rollway.config import load_experiment, load_recipe
from rollway.config.recipes import read_yaml
from rollway.runtime.plan import Plan
from rollway.runtime.plan_checks import check

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "config/examples").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_plans(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    check(Plan(load_experiment(read_yaml(path))))


def test_lessons_are_what_their_script_makes() -> None:
    spec = importlib.util.spec_from_file_location("make_letter_words", ROOT / "data/make_letter_words.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    made = script.files()
    assert len(made) == 5
    for name, text in made.items():
        assert (ROOT / "data" / name).read_text(encoding="utf-8") == text, name


def test_both_phases_of_sd_zero_fit_into_the_papers_pool() -> None:
    """The rounds of the page's example: what both phases ask lies in one epoch of 15,000 prompts, none of it twice."""
    page = (ROOT / "docs/methods/sd-zero.md").read_text(encoding="utf-8")
    rounds = int(re.findall(r"zero: \{recipe: sd-zero, rounds: (\d+)", page)[0])
    first, second = load_recipe("sd-zero-srt").rollout, load_recipe("sd-zero").rollout
    assert second.offset + second.prompts == first.prompts
    assert second.offset + rounds * second.prompts == 14848 <= 15000
