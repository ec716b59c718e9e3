"""docs/cookbook.md: every query is run, and the page shows what it answers."""

import difflib
from pathlib import Path

import pytest

from rollway.errors import RollwayError
from rollway.store import cookbook
from rollway.store.catalog import open_catalog
from rollway.store.views import documented

ROOT = Path(__file__).resolve().parents[2]
PAGE, RESULTS = ROOT / cookbook.PAGE, ROOT / cookbook.RESULTS
RECIPES = cookbook.read(PAGE)


def test_the_answers_on_the_page_are_those_of_the_queries() -> None:
    page = PAGE.read_text(encoding="utf-8")
    now = cookbook.answered(PAGE, RESULTS)
    changed = "\n".join(difflib.unified_diff(page.split("\n"), now.split("\n"), "page", "answered", lineterm="", n=1))
    assert not changed, f"run `python -m rollway.store.cookbook`\n{changed}"


def test_there_are_twenty_questions_and_none_is_answered_with_nothing() -> None:
    assert len(RECIPES) >= 20
    assert len({recipe.question for recipe in RECIPES}) == len(RECIPES)
    assert "(0 rows)" not in PAGE.read_text(encoding="utf-8")


def test_the_macros_and_views_of_this_kind_are_all_used() -> None:
    queries = " ".join(recipe.query for recipe in RECIPES)
    unused = {view.name for view in documented() if view.name not in queries}
    helpers = {"pass_at_k", "avg_at_k", "perplexity", "normalised", "case_folded", "shared_prefix", "not_evaluated"}
    # The page's runs have no teacher and no scorer in a sandbox; docs/scorers.md and docs/safety.md ask these views.
    elsewhere = {"solved", "judged", "by_prompt", "teachers", "teacher_tokens", "routes", "tampering"}
    assert unused <= helpers | elsewhere


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.question)
def test_queries_work_where_there_is_nothing(recipe: cookbook.Recipe, tmp_path: Path) -> None:
    """On a results folder without any run: no row, or counts of 0; the scorers' columns are all that may be missing."""
    with open_catalog(tmp_path) as catalog:
        query = recipe.query.replace("corr(exact, short)", "NULL").replace("exact", "reward").replace("short", "reward")
        for row in catalog.execute(query).fetchall():
            assert set(row) <= {0, None}


def test_a_question_without_an_answer_is_told(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("### 1. Why?\n\n```sql\nSELECT 1\n```\n\nBecause.\n")
    with pytest.raises(RollwayError, match="of 1 questions"):
        cookbook.read(page)


def test_what_is_kept_of_a_run_is_what_sql_reads(tmp_path: Path) -> None:
    """The folder of the page again from itself: tables and metrics, no weights."""
    (tmp_path / "made/grpo-s0/r0001/weights").mkdir(parents=True)
    (tmp_path / "made/grpo-s0/r0001/weights/model.safetensors").touch()
    (tmp_path / "made/grpo-s0/r0001/policy.json").touch()
    (tmp_path / "made/grpo-s0/r0001/metrics.json").touch()
    (tmp_path / "made/grpo-s0/r0001/p0/scores").mkdir(parents=True)
    (tmp_path / "made/grpo-s0/r0001/p0/scores/exact-000.parquet").touch()
    cookbook.keep(tmp_path / "made", tmp_path / "kept")
    kept = sorted(str(p.relative_to(tmp_path / "kept")) for p in (tmp_path / "kept").rglob("*") if p.is_file())
    assert kept == ["grpo-s0/r0001/metrics.json", "grpo-s0/r0001/p0/scores/exact-000.parquet"]
