"""What a round's rollouts and batch look like in numbers."""

import duckdb
import pyarrow as pa

from rollway.curation.scored import one, quoted
from rollway.store.tables import TABLES

INPUT_COLUMNS = ("reward", "correct", "length", "finish", "group_id", "age", "source")
"""Columns of `scored` that the summary reads, where they exist."""

_OF_ROLLOUTS = {
    "rollouts": ("rollout_id", "count(*)"),
    "reward_mean": ("reward", "avg(reward)"),
    "reward_std": ("reward", "stddev_samp(reward)"),
    "correct_share": ("correct", "avg(CAST(correct AS DOUBLE))"),
    "length_mean": ("length", "avg(CAST(length AS DOUBLE))"),
    "truncated_share": ("finish", "avg(CASE WHEN finish = 'length' THEN 1.0::DOUBLE ELSE 0.0 END)"),
    "groups": ("group_id", "count(DISTINCT group_id)"),
}
_OF_SOLVED = {
    "groups_all_correct": "sum(CASE WHEN all_right THEN 1 ELSE 0 END)",
    "groups_none_correct": "sum(CASE WHEN any_right THEN 0 ELSE 1 END)",
    "groups_any_correct": "sum(CASE WHEN any_right THEN 1 ELSE 0 END)",
}
_OF_BATCH = {
    "batch_rows": "count(*)",
    "batch_rollouts": "count(DISTINCT rollout_id)",
    "batch_groups": "count(DISTINCT group_id)",
    "batch_replayed_share": "avg(CASE WHEN age > 0 THEN 1.0::DOUBLE WHEN age = 0 THEN 0.0 END)",
    "batch_reward_mean": "avg(reward)",
    "batch_reward_weighted_mean": "sum(weight * reward) / nullif(sum(weight), 0)",
    "advantage_mean": "avg(advantage)",
    "advantage_std": "stddev_samp(advantage)",
    "advantage_variance": "var_pop(advantage)",
    "advantage_abs_mean": "avg(abs(advantage))",
    "advantage_nonzero_share": "avg(CASE WHEN advantage <> 0 THEN 1.0::DOUBLE WHEN advantage = 0 THEN 0.0 END)",
    "weight_mean": "avg(weight)",
    "pairs": "nullif(count(DISTINCT pair_id), 0)",
}

_AROUND_MEAN = """FROM (
    SELECT advantage, route, reward - avg(reward) OVER g AS gap, max(reward) OVER g > min(reward) OVER g AS differ
    FROM batch WHERE advantage IS NOT NULL AND group_id IS NOT NULL WINDOW g AS (PARTITION BY group_id))"""
_MASKED = {
    "zero_advantage_above_share": "avg((advantage = 0)::INT) FILTER (differ AND gap > 0)",
    "zero_advantage_below_share": "avg((advantage = 0)::INT) FILTER (differ AND gap < 0)",
    "zero_advantage_expert_share": "avg((advantage = 0)::INT) FILTER (route = 'expert')",
}
"""Of the batch's rows whose reward is above their group's mean, or below it, or that are an expert's: how many have no
advantage. 0 for most methods; a mask on the advantage (DaGRPO) shows here."""
_GROUPS = """FROM (
    SELECT max(advantage) = 0 AND min(advantage) = 0 AS silent FROM batch
    WHERE advantage IS NOT NULL AND group_id IS NOT NULL GROUP BY group_id HAVING max(reward) > min(reward))"""
_SILENT = {"zero_advantage_groups_share": "avg(silent::INT)"}
"""Of the batch's groups whose rewards differ: how many have no advantage at all."""


def summary(scored: pa.Table, batch: pa.Table) -> dict[str, float]:
    """Metrics of one round: of the rollouts generated in it (age 0) and of its batch (replayed rows included).

    Experts' solutions count in the batch alone, and as `experts`: nobody sampled them.

    A metric whose column is absent, or that has no rows to be taken over, is left out. Columns of `scored` that rollway
    does not know are scorers.
    """
    known = {*TABLES["rollouts"].names(), *TABLES["batch"].names(), "text_hash", "task", "answer", "meta"}
    scorers = [f.name for f in scored.schema if pa.types.is_floating(f.type) and f.name not in known]
    with duckdb.connect(":memory:", config={"threads": 1}) as con:
        con.register("arrow_input", scored)
        order = ", ".join(name for name in ("group_id", "sample", "rollout_id") if name in scored.column_names)
        con.execute(f"CREATE TABLE scored AS SELECT * FROM arrow_input ORDER BY {order}")
        metrics = rollout_metrics(con, scorers)
        return metrics | batch_metrics(con, batch, metrics["rollouts"])


def rollout_metrics(con: duckdb.DuckDBPyConnection, scorers: list[str]) -> dict[str, float]:
    """Metrics of this round's rows of the table `scored`, on a connection with one thread."""
    present = _columns(con)
    age = "age = 0" if "age" in present else "true"
    fresh = f"FROM scored WHERE {age} AND {_sampled(present)}"
    wanted = {name: sql for name, (column, sql) in _OF_ROLLOUTS.items() if column in present}
    wanted |= {f"score_{name}_mean": f"avg({quoted(name)})" for name in scorers if name in present}
    metrics = _row(con, wanted, fresh)
    if {"group_id", "reward"} <= present:
        signal = {"groups_with_signal_share": "avg(CASE WHEN high > low THEN 1.0::DOUBLE ELSE 0.0 END)"}
        groups = f"FROM (SELECT max(reward) AS high, min(reward) AS low {fresh} GROUP BY group_id)"
        metrics |= _row(con, signal, groups)
    if {"group_id", "correct"} <= present:
        solved = "bool_and(correct) AS all_right, bool_or(correct) AS any_right"
        groups = f"FROM (SELECT {solved} {fresh} GROUP BY group_id) WHERE any_right IS NOT NULL"
        metrics |= _row(con, _OF_SOLVED, groups)
    if "source" in present:
        experts = {"experts": "nullif(count(*), 0)"}
        experts |= {"expert_reward_mean": "avg(reward)"} if "reward" in present else {}
        metrics |= _row(con, experts, f"FROM scored WHERE {age} AND source = 'expert'")
    return metrics


def pool_metrics(con: duckdb.DuckDBPyConnection) -> dict[str, float]:
    """Metrics of the rows that a select step chooses from, as they stand before it."""
    present = {row[0] for row in con.execute("DESCRIBE scored").fetchall()}
    wanted = {"select_pool_rows": "count(*)"}
    if "advantage" in present:
        wanted["select_pool_advantage_variance"] = "var_pop(advantage)"
    return _row(con, wanted, "FROM scored")


def batch_metrics(con: duckdb.DuckDBPyConnection, batch: pa.Table, rollouts: float) -> dict[str, float]:
    """Metrics of a batch made of rows of the table `scored`; `rollouts` is the number generated in its round."""
    con.register("batch", batch)
    metrics = _row(con, _OF_BATCH, "FROM batch") | _row(con, _MASKED, _AROUND_MEAN) | _row(con, _SILENT, _GROUPS)
    if rollouts:
        sampled = f"SELECT DISTINCT rollout_id FROM scored WHERE {_sampled(_columns(con))}"
        kept = f"SELECT count(DISTINCT rollout_id) FROM batch SEMI JOIN ({sampled}) USING (rollout_id)"
        metrics["kept_share"] = one(con, f"{kept} WHERE age = 0 OR age IS NULL")[0] / rollouts
    routes = con.execute(
        "SELECT route, count(*) FROM batch WHERE route IS NOT NULL GROUP BY ALL ORDER BY ALL"
    ).fetchall()
    for route, count in routes:
        metrics[f"route_{route}_share"] = count / batch.num_rows
    con.unregister("batch")
    return metrics


def _columns(con: duckdb.DuckDBPyConnection) -> set[str]:
    return {row[0] for row in con.execute("DESCRIBE scored").fetchall()}


def _sampled(present: set[str]) -> str:
    """Condition of the rows that somebody sampled."""
    return "source <> 'expert'" if "source" in present else "true"


def _row(con: duckdb.DuckDBPyConnection, wanted: dict[str, str], source: str) -> dict[str, float]:
    row = one(con, f"SELECT {', '.join(wanted.values())} {source}")
    return {name: float(value) for name, value in zip(wanted, row, strict=True) if value is not None}
