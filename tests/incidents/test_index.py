"""Every incident is caught by tests that exist."""

import ast
from functools import cache
from pathlib import Path

import pytest
import yaml

TESTS = Path(__file__).parents[1]
INDEX = yaml.safe_load((Path(__file__).parent / "index.yaml").read_text(encoding="utf-8"))
MAY_WAIT = {5, 20, 21, 23, 25, 29, 30}


@cache
def functions(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)}


def test_every_incident_is_there() -> None:
    assert list(INDEX) == list(range(1, 35))
    for number, entry in INDEX.items():
        assert entry["bug"].endswith("."), number
        assert bool(entry.get("tests")) != bool(entry.get("not_yet")), number
        assert number in MAY_WAIT or "not_yet" not in entry, number


@pytest.mark.parametrize("number", INDEX)
def test_named_tests_exist(number: int) -> None:
    for named in INDEX[number].get("tests", []):
        file, _, function = named.partition("::")
        assert function.startswith("test_"), named
        assert (TESTS / file).is_file(), named
        assert function in functions(TESTS / file), f"{named}: no such test; mend incidents/index.yaml"
