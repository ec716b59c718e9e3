"""SQL as input: of recipes, with its headers and parameters, and of those who ask."""

from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from curation.tables import scored_table
from fuzz.scratch import ROOT, scratch, written
from fuzz.values import SCALARS, injured_text, joined
from rollway.config.curation import CurateConfig
from rollway.config.recipes import parse
from rollway.curation import curate
from rollway.curation.sql_file import bind, read_step
from rollway.curation.sql_file import parse as parse_sql
from rollway.store.catalog import open_catalog
from rollway.store.queries import as_text, ask
from store.synthetic import make_results

SCORED = scored_table([[1, 0, 0, 1], [1, 1, 0, 0]])


@cache
def sql_files() -> list[tuple[str, str]]:
    folders = {"reward": "rewards", "filter": "filters", "advantage": "advantages", "weight": "weights"}
    folders |= {"route": "routes", "pair": "pairs", "select": "selects"}
    return [
        (step, path.read_text())
        for step, folder in folders.items()
        for path in sorted((ROOT / "workflow/sql" / folder).glob("*.sql"))
    ]


WORDS = [
    *("SELECT", "FROM scored", "WHERE", ",", "(", ")", "*", "$k", "$seed", "'", '"', "--", ";", "NULL", "rollout_id"),
    *("reward", "group_id", "OVER (PARTITION BY group_id)", "avg(", "::DOUBLE", "/ 0", "'NaN'::DOUBLE", "-- param k:"),
    *("COPY", "read_csv('/etc/passwd')", "duckdb_settings()", "JOIN scored USING (rollout_id)", "UNION ALL", "[", "]"),
]


@st.composite
def sql_texts(draw: st.DrawFn) -> tuple[str, str, dict[str, Any]]:
    step, text = draw(st.sampled_from(sql_files()))
    params: dict[str, Any] = {}
    if draw(st.integers(0, 3)) == 0:
        names = ["k", "seed", "delta", "share", "limit", "cache", "alpha", "x"]
        params = draw(st.dictionaries(st.sampled_from(names), SCALARS | st.sampled_from([0.5, 1, 2]), max_size=2))
    if draw(st.integers(0, 2)):
        text = draw(injured_text(text, WORDS))
    return step, text, params


def sql_curates(given: tuple[str, str, dict[str, Any]]) -> bool:
    step, text, params = given
    path = written("mine.sql", text)
    config = parse(CurateConfig, {step: {"sql": str(path), **params}}, "curate")
    batch = curate(SCORED, config, given={"round": 0, "seed": 0})
    assert set(batch.column("rollout_id").to_pylist()) <= set(SCORED.column("rollout_id").to_pylist())
    return True


HEADERS = [
    *("-- param ", "k", ": ", "double", "int", "bool", "string", "=", "1", "0.5", "true", " [", "a|b", "]", " [0, 1)"),
    *(
        " (0, 1]",
        " when ",
        "mode=fast",
        ", meaning",
        "\n",
        "-- needs: curate.replay >= ",
        "-- allows: repeats",
        "1e999",
    ),
]


WHOLE_HEADERS = [
    "-- Something.\n-- param k: double=0.5 [0, 1), a share",
    "-- param mode: string=fast [fast|slow], how\n-- param k: double=1 when mode=fast, what",
    "-- param k: int, a number",
    "-- param k: bool=true, whether",
]


@st.composite
def sql_headers(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    header = draw(
        st.sampled_from(WHOLE_HEADERS).flatmap(lambda text: injured_text(text, HEADERS)) | joined(HEADERS, 16)
    )
    values = SCALARS | st.sampled_from([0.5, 1, "fast", True])
    params = draw(st.dictionaries(st.sampled_from(["k", "mode", "x"]), values, max_size=2))
    return f"{header}\nSELECT rollout_id, $k AS advantage FROM scored\n", params


def a_header_is_read(given: tuple[str, dict[str, Any]]) -> bool:
    text, params = given
    path = written("header.sql", text)
    config = parse(CurateConfig, {"advantage": {"sql": str(path), **params}}, "curate")
    assert config.advantage is not None
    bind(read_step("advantage", config.advantage), config.advantage, {"round": 0})
    return True


INERT = """-- param word: string, anything
SELECT rollout_id, length($word)::DOUBLE AS advantage FROM scored
"""


def a_text_stays_a_text(word: str) -> bool:
    """A parameter is a value, whatever it says."""
    path = written("inert.sql", INERT)
    batch = curate(SCORED, parse(CurateConfig, {"advantage": {"sql": str(path), "word": word}}, "curate"))
    assert set(batch.column("advantage").to_pylist()) == {float(len(word))}
    return True


@cache
def catalogue() -> Any:
    return open_catalog(make_results(scratch() / "asked", {"grpo-s0": 1}))


QUERIES = [
    "SELECT run, round, pass_1 FROM learning ORDER BY ALL",
    "SELECT text, reward FROM scored WHERE correct AND round = 0",
    "SELECT * FROM flips('grpo-s0', 0, 'grpo-s0', 1)",
    "WITH a AS (SELECT unnest(tokens) AS t FROM rollouts) SELECT t, count(*) FROM a GROUP BY t",
    "SELECT components, NULL, [1, 2], {'x': 'NaN'::DOUBLE}, 'é' FROM scores",
]


def a_question_is_answered(given: tuple[str, str]) -> bool:
    query, form = given
    as_text(ask(catalogue(), query), form).encode("utf-8", "surrogatepass")
    return True


def sql_text_is_read(text: str) -> bool:
    return bool(parse_sql(Path("x.sql"), "filter", text))
