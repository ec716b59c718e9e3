"""notebooks/explore.py without marimo: it compiles, its cells fit together, and its SQL runs on a finished folder."""

import ast
import subprocess
from pathlib import Path

import pytest

from rollway.store.catalog import open_catalog

ROOT = Path(__file__).resolve().parents[2]
TREE = ast.parse((ROOT / "notebooks/explore.py").read_text(encoding="utf-8"))
RESULTS = ROOT / "docs/cookbook/results"
VALUES = {"run": "grpo-s0", "round": 5}


def assigned(name: str) -> ast.expr:
    return next(
        node.value
        for node in ast.walk(TREE)
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets)
    )


QUERIES: dict[str, str] = ast.literal_eval(assigned("QUERIES"))
CELLS = [node for node in TREE.body if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("name", QUERIES)
def test_its_queries_answer(name: str) -> None:
    query = QUERIES[name]
    with open_catalog(RESULTS) as catalog:
        values = dict(VALUES)
        if "$group" in query or "$rollout" in query:
            first = catalog.execute(
                "SELECT group_id, rollout_id FROM scored WHERE run = $run AND round = $round LIMIT 1", VALUES
            ).fetchone()
            assert first is not None
            values |= {"group": first[0], "rollout": first[1]}
        named = {key: value for key, value in values.items() if f"${key}" in query}
        assert catalog.execute(query, named or None).fetchall()


def test_cells_ask_for_queries_that_are_there_with_all_their_values() -> None:
    calls = [node for node in ast.walk(TREE) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "table"]
    asked = {ast.literal_eval(call.args[0]): {keyword.arg for keyword in call.keywords} for call in calls}
    assert set(asked) == set(QUERIES)
    for name, given in asked.items():
        assert given == {key for key in ("run", "round", "group", "rollout") if f"${key}" in QUERIES[name]}, name


def test_a_cell_takes_what_another_gives() -> None:
    given = set()
    for cell in CELLS:
        last = cell.body[-1]
        assert isinstance(last, ast.Return)
        names = [node.id for node in ast.walk(last) if isinstance(node, ast.Name)]
        assert not given & set(names), "two cells define the same name"
        given |= set(names)
    taken = {argument.arg for cell in CELLS for argument in cell.args.args}
    assert taken <= given


def test_what_tools_leave_behind_is_not_committed() -> None:
    listing = ["git", "ls-files", "--cached", "--ignored", "--exclude-standard"]
    tracked = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("no git checkout")
    assert tracked.stdout == ""
