"""What the health page asks of the temporary table `facts` and of the catalogue."""

from collections.abc import Sequence

import duckdb

from rollway.store.queries import rows as ask
from rollway.store.views import identifier, quote

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


def part_correlations(
    catalog: duckdb.DuckDBPyConnection, no_reward: Sequence[tuple[str, str]] = ()
) -> dict[str, dict[tuple[str, str], float]]:
    """Run -> pair of components of one scorer, as `scorer: component` -> their correlation, as in `correlations`.

    no_reward: (run, scorer) whose components are left out, because they are no parts of a reward.
    """
    left_out = ", ".join(f"({quote(run)}, {quote(scorer)})" for run, scorer in no_reward) or "('', '')"
    query = f"""WITH {_LAST_QUARTER}, said_parts AS (
            SELECT f.run, f.round, f.group_id, f.rollout_id, s.scorer, unnest(map_entries(s.components)) AS part
            FROM facts AS f JOIN late USING (run, round) JOIN seen_scores AS s
                ON s.run = f.run AND s.round = f.round AND s.rollout_id = f.rollout_id
            WHERE cardinality(s.components) > 1 AND (f.run, s.scorer) NOT IN (VALUES {left_out})),
        c AS (
            SELECT run, round, rollout_id, scorer, part.key AS name,
                part.value - avg(part.value) OVER (PARTITION BY run, round, group_id, scorer, part.key) AS value
            FROM said_parts WHERE isfinite(part.value))
        SELECT a.run, a.scorer, a.name, b.name, corr(a.value, b.value)
        FROM c AS a JOIN c AS b USING (run, round, rollout_id, scorer) WHERE a.name < b.name
        GROUP BY ALL HAVING least(stddev_pop(a.value), stddev_pop(b.value)) > 1e-9 ORDER BY ALL"""
    found: dict[str, dict[tuple[str, str], float]] = {}
    for run, scorer, one, other, value in ask(catalog, query):
        found.setdefault(run, {})[f"{scorer}: {one}", f"{scorer}: {other}"] = value
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


_WORDINGS = """wordings AS (
    SELECT task, split, prompt_id, trim(lower(regexp_replace(
        array_to_string(json_extract_string(messages, '$[*].content'), ' '), '\\s+', ' ', 'g'))) AS wording
    FROM prompts)"""
"""What every prompt says, without roles, case and white space."""


def leaks(catalog: duckdb.DuckDBPyConnection) -> list[tuple[str, int, int, int, int, dict[str, int]]]:
    """(task, held-out prompts, those also in its train split, train prompts, those that repeat another, other task ->
    held-out prompts that are in its train split) of every task that has held-out prompts; told apart by wording."""
    query = f"""WITH {_WORDINGS},
        train AS (SELECT task, wording, count(*) AS n FROM wordings WHERE split = 'train' GROUP BY ALL)
        SELECT h.task, count(DISTINCT h.prompt_id), count(DISTINCT h.prompt_id) FILTER (t.task = h.task),
            (SELECT coalesce(sum(n), 0) FROM train AS u WHERE u.task = h.task),
            (SELECT coalesce(sum(n - 1), 0) FROM train AS u WHERE u.task = h.task)
        FROM wordings AS h LEFT JOIN train AS t USING (wording) WHERE h.split = 'heldout'
        GROUP BY h.task ORDER BY h.task"""
    elsewhere: dict[str, dict[str, int]] = {}
    other = f"""WITH {_WORDINGS} SELECT h.task, t.task, count(DISTINCT h.prompt_id) FROM wordings AS h
        JOIN wordings AS t ON t.wording = h.wording AND t.task <> h.task AND t.split = 'train' AND h.split = 'heldout'
        GROUP BY ALL ORDER BY ALL"""
    for task, theirs, count in ask(catalog, other):
        elsewhere.setdefault(task, {})[theirs] = int(count)
    return [
        (task, int(heldout), int(leaked), int(train), int(repeated), elsewhere.get(task, {}))
        for task, heldout, leaked, train, repeated in ask(catalog, query)
    ]


def trained_on_heldout(catalog: duckdb.DuckDBPyConnection) -> list[tuple[str, int, int]]:
    """(run, prompts it is evaluated on, those whose wording is among the prompts of its rollouts) of runs with both.

    Needs the temporary table `counted`. Prompts that are in no file of tasks are told apart by their id.
    """
    query = f"""WITH {_WORDINGS},
        known AS (SELECT prompt_id, min(wording) AS wording FROM wordings GROUP BY prompt_id),
        asked AS (SELECT DISTINCT run, prompt_id, coalesce(wording, prompt_id) AS what
            FROM counted LEFT JOIN known USING (prompt_id)),
        sampled AS (SELECT DISTINCT run, coalesce(wording, prompt_id) AS what
            FROM (SELECT DISTINCT run, prompt_id FROM facts) LEFT JOIN known USING (prompt_id))
        SELECT a.run, count(*), count(s.what)
        FROM asked AS a LEFT JOIN sampled AS s ON s.run = a.run AND s.what = a.what
        WHERE a.run IN (SELECT run FROM sampled) GROUP BY a.run ORDER BY a.run"""
    return [(run, int(asked), int(leaked)) for run, asked, leaked in ask(catalog, query)]
