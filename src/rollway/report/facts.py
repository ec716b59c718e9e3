"""One row per rollout without its tokens, in a temporary table: everything else of the report is asked of that."""

from collections.abc import Sequence
from dataclasses import dataclass

import duckdb

from rollway.report.data import Run
from rollway.store.queries import rows as ask
from rollway.store.views import identifier


@dataclass(frozen=True)
class Facts:
    """What the temporary tables hold. `rounds`: run -> its rounds with rollouts, those of a fork's parent included."""

    scorers: list[str]
    rounds: dict[str, list[int]]
    rollouts: int
    """In the folder, each counted once."""


def collect(catalog: duckdb.DuckDBPyConnection, runs: Sequence[Run]) -> Facts:
    """Makes the temporary table `facts` of the catalogue: one row per rollout that a run sees, scored and in a batch or
    not; `text_hash` says which completions are the same."""
    columns = [row[0] for row in ask(catalog, "DESCRIBE scored")]
    scorers = columns[columns.index("slots") + 1 :]
    kept = ["run", "home", "round", '"pass"', "group_id", "prompt_id", "rollout_id", "sample", "source"]
    kept += ["policy_round", "finish", "length", "reward", "advantage", "correct", "slots", *map(identifier, scorers)]
    catalog.execute(f"""CREATE TEMP TABLE facts AS
        SELECT {", ".join(kept)}, hash(text) AS text_hash, length(text) AS characters FROM scored""")
    known = {run.run for run in runs}
    rounds: dict[str, list[int]] = {}
    for run, round in ask(catalog, "SELECT DISTINCT run, round FROM facts ORDER BY ALL"):
        if run in known:
            rounds.setdefault(run, []).append(round)
    own = ask(catalog, "SELECT count(*) FROM facts WHERE run = home")
    return Facts(scorers, rounds, int(own[0][0]))


def tokens_by_round(catalog: duckdb.DuckDBPyConnection) -> dict[tuple[str, int], int]:
    """(run, round) -> tokens of its rollouts; an expert's solutions cost nothing to generate and do not count."""
    query = """SELECT run, round, sum(length)::BIGINT FROM facts WHERE source <> 'expert' AND length IS NOT NULL
        GROUP BY ALL ORDER BY ALL"""
    return {(run, round): int(tokens) for run, round, tokens in ask(catalog, query)}
