"""What the health page asks of the temporary table `facts` and of the catalogue."""

from collections.abc import Sequence

import duckdb

from rollway.store.queries import rows as ask
from rollway.store.views import identifier

_LAST_QUARTER = """late AS (
    SELECT run, round FROM (
        SELECT run, round, row_number() OVER (PARTITION BY run ORDER BY round DESC) AS back,
            count(*) OVER (PARTITION BY run) AS rounds
        FROM (SELECT DISTINCT run, round FROM facts))
    WHERE back <= greatest(1, rounds // 4))"""
"""The last quarter of each run's rounds, at least one."""


def duplicates(catalog: duckdb.DuckDBPyConnection) -> list[tuple[str, int, float, float | None, float]]:
    """(run, rounds, share, share among the wrong ones or None, tokens per rollout), over the last quarter of rounds.

    A group of n rollouts with d different texts has n - d repeats; so have its wrong ones among themselves.
    """
    query = f"""WITH {_LAST_QUARTER}, each AS (
            SELECT run, round, group_id, count(*) AS n, count(DISTINCT text_hash) AS d, sum(length) AS tokens,
                count(*) FILTER (NOT correct) AS wrong, count(DISTINCT text_hash) FILTER (NOT correct) AS wrong_d
            FROM facts JOIN late USING (run, round) WHERE source <> 'expert' GROUP BY run, round, group_id)
        SELECT run, count(DISTINCT round)::INTEGER, 1 - sum(d) / sum(n), 1 - sum(wrong_d) / nullif(sum(wrong), 0),
            sum(tokens) / sum(n)
        FROM each GROUP BY run ORDER BY run"""
    return ask(catalog, query)


def correlations(
    catalog: duckdb.DuckDBPyConnection, pairs: Sequence[tuple[str, str]]
) -> dict[str, dict[tuple[str, str], float]]:
    """Run -> pair of scorers -> correlation of their rewards within groups, over the last quarter of rounds.

    Each reward is taken less its group's mean, so that easy and hard prompts do not count. Pairs of which one does not
    vary are left out.
    """
    if not pairs:
        return {}
    names = sorted({name for pair in pairs for name in pair})
    centred = ", ".join(f"{_finite(n)} - avg({_finite(n)}) OVER g AS {identifier(n)}" for n in names)
    wanted = ", ".join(f"corr({identifier(one)}, {identifier(other)})" for one, other in pairs)
    query = f"""WITH {_LAST_QUARTER}, c AS (
            SELECT run, {centred} FROM facts JOIN late USING (run, round)
            WINDOW g AS (PARTITION BY run, round, group_id))
        SELECT run, {wanted} FROM c GROUP BY run ORDER BY run"""
    found: dict[str, dict[tuple[str, str], float]] = {}
    for run, *values in ask(catalog, query):
        known = {pair: value for pair, value in zip(pairs, values, strict=True) if value is not None and value == value}
        if known:
            found[run] = known
    return found


def _finite(name: str) -> str:
    return f"CASE WHEN isfinite({identifier(name)}) THEN {identifier(name)} END"


def scorer_errors(
    catalog: duckdb.DuckDBPyConnection, scorers: Sequence[str]
) -> list[tuple[str, int, int, str | None, str | None]]:
    """(run, verdicts, failed ones, a scorer that failed, what it said). Needs the temporary table `said`."""
    if not scorers:
        return []
    verdicts = " + ".join(f"count({identifier(name)})" for name in scorers)
    query = f"""WITH v AS (SELECT run, {verdicts} AS verdicts FROM facts GROUP BY run),
        e AS (SELECT run, count(error) AS failed, min_by(scorer, error) AS scorer, min(error) AS error
            FROM said GROUP BY run)
        SELECT run, verdicts, coalesce(failed, 0), scorer, error FROM v LEFT JOIN e USING (run)
        WHERE verdicts > 0 ORDER BY run"""
    return ask(catalog, query)


def leaks(catalog: duckdb.DuckDBPyConnection) -> list[tuple[str, int, int, int, int]]:
    """(task, held-out prompts, those also in train, train prompts, those that repeat another), case and white space
    aside."""
    query = """WITH p AS (
            SELECT task, split, lower(regexp_replace(messages, '\\s+', ' ', 'g')) AS wording FROM prompts),
        t AS (SELECT task, wording, count(*) AS n FROM p WHERE split = 'train' GROUP BY ALL)
        SELECT task, count(*) FILTER (split = 'heldout'), count(t.n) FILTER (split = 'heldout'),
            count(*) FILTER (split = 'train'), (SELECT coalesce(sum(n - 1), 0) FROM t AS u WHERE u.task = p.task)
        FROM p LEFT JOIN t USING (task, wording) GROUP BY task ORDER BY task"""
    return [(task, *map(int, counts)) for task, *counts in ask(catalog, query)]
