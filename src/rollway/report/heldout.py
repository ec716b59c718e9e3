"""Held-out prompts: how many samples of each were right in every evaluation, and some of those samples in full."""

from collections.abc import Sequence
from typing import Any

import duckdb

from rollway.report.data import Run
from rollway.report.pack import numbers
from rollway.report.rollouts import CHARACTERS, HEAD, TAIL, TEXT_HEAD, TEXT_TAIL, Shown, spread, token_columns
from rollway.store.queries import rows as ask
from rollway.store.views import quote

MAX_PROMPTS = 2000
MAX_COUNTS = 400_000
"""Counts of right samples, over all runs, rounds and prompts."""
MAX_ROUNDS = 8
MAX_SAMPLES = 8_000
MAX_TOKENS = 150_000


def collect(catalog: duckdb.DuckDBPyConnection) -> None:
    """Makes the temporary table `counted` (run, round, prompt_id, n, c): n samples, c of them right."""
    catalog.execute("CREATE TEMP TABLE counted AS SELECT run, round, prompt_id, n, c FROM by_prompt")


def counts(catalog: duckdb.DuckDBPyConnection, runs: Sequence[Run]) -> dict[str, Any]:
    """{prompts: [id], points: {run: {round: {n, c}}}, asked: prompts in the folder}; n is one number where every prompt
    has as many samples, -1 in `c` where a run was not asked a prompt.

    Prompts beyond the limits are left out by the hash of their id, the same for every run.
    """
    known = {run.run for run in runs}
    points = [(run, r) for run, r in ask(catalog, "SELECT DISTINCT run, round FROM counted ORDER BY ALL")]
    points = [point for point in points if point[0] in known]
    asked = int(ask(catalog, "SELECT count(DISTINCT prompt_id) FROM counted")[0][0])
    most = max(1, min(MAX_PROMPTS, MAX_COUNTS // max(1, len(points))))
    catalog.execute(f"""CREATE TEMP TABLE heldout AS
        SELECT prompt_id, row_number() OVER (ORDER BY md5(prompt_id), prompt_id) - 1 AS place
        FROM (SELECT DISTINCT prompt_id FROM counted) QUALIFY place < {most}""")
    prompts = [row[0] for row in ask(catalog, "SELECT prompt_id FROM heldout ORDER BY place")]
    empty = [-1] * len(prompts)
    found: dict[str, dict[int, dict[str, Any]]] = {}
    query = "SELECT run, round, place, n, c FROM counted JOIN heldout USING (prompt_id) ORDER BY run, round, place"
    for run, round, place, n, c in ask(catalog, query):
        if run in known:
            point = found.setdefault(run, {}).setdefault(round, {"n": empty.copy(), "c": empty.copy()})
            point["n"][place], point["c"][place] = n, c
    for rounds in found.values():
        for point in rounds.values():
            sizes = {n for n in point["n"] if n >= 0}
            point["n"] = sizes.pop() if len(sizes) == 1 else point["n"]
    return {"prompts": prompts, "points": found, "asked": asked}


def samples(catalog: duckdb.DuckDBPyConnection, runs: Sequence[str], points: dict[str, Any]) -> dict[str, Shown]:
    """Run -> held-out samples of some prompts in its first, its last and evenly spread evaluations, own ones only."""
    wanted = [(run, round) for run in runs for round in spread(sorted(points.get(run, {})), MAX_ROUNDS)]
    if not wanted:
        return {}
    pairs = ", ".join(f"({quote(run)}, {round})" for run, round in wanted)
    rows_each, tokens_each = (limit // len(wanted) for limit in (MAX_SAMPLES, MAX_TOKENS))

    def cut(column: str) -> str:
        both = f"list_concat({column}[1:{HEAD}], {column}[-{TAIL}:])"
        return f"CASE WHEN len({column}) > {HEAD + TAIL} THEN {both} ELSE {column} END"

    table = catalog.sql(f"""
        WITH each AS (
            SELECT run, round, place, count(*) AS n,
                sum(least(greatest(length, length(text) // {CHARACTERS}), {HEAD + TAIL})) AS tokens
            FROM seen_evals JOIN heldout USING (prompt_id) WHERE (run, round) IN (VALUES {pairs}) GROUP BY ALL),
        ranked AS (
            SELECT run, round, place, sum(n) OVER w AS n, sum(tokens) OVER w AS tokens FROM each
            WINDOW w AS (PARTITION BY run, round ORDER BY place ROWS UNBOUNDED PRECEDING))
        SELECT e.run, e.round, e.prompt_id, e.sample, e.finish, e.length, e.reward, e.correct,
            CASE WHEN length(e.text) > {TEXT_HEAD + TEXT_TAIL}
                THEN left(e.text, {TEXT_HEAD}) || '\n[...]\n' || right(e.text, {TEXT_TAIL}) ELSE e.text END AS text,
            {cut("e.tokens")} AS tokens, {cut("e.logprobs")} AS logprobs
        FROM seen_evals AS e JOIN heldout AS h USING (prompt_id)
        JOIN ranked AS k ON k.run = e.run AND k.round = e.round AND k.place = h.place
        WHERE h.place = 0 OR (k.n <= {rows_each} AND k.tokens <= {tokens_each})
        ORDER BY e.run, e.round, h.place, e.sample""").to_arrow_table()
    of_run = table.column("run").to_pylist()
    found, start = {}, 0
    for end in range(1, len(of_run) + 1):
        if end == len(of_run) or of_run[end] != of_run[start]:
            found[of_run[start]] = _shown(table.slice(start, end - start))
            start = end
    return found


def _shown(rows: Any) -> Shown:
    names = ("round", "sample", "finish", "length", "correct", "text")
    columns: dict[str, Any] = {name: rows.column(name).to_pylist() for name in names}
    prompts = rows.column("prompt_id").to_pylist()
    columns |= {"prompt": prompts, "reward": numbers(rows.column("reward").to_pylist())}
    columns |= token_columns(rows)
    return Shown(columns, set(prompts), set(columns["tokens"]))
