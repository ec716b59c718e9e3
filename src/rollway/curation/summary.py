"""What a round's rollouts and batch look like in numbers."""

import duckdb
import pyarrow as pa

from rollway.curation.scored import one, quoted
from rollway.store.tables import TABLES

INPUT_COLUMNS = ("reward", "correct", "length", "finish", "group_id", "age")
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
_OF_BATCH = {
    "batch_rows": "count(*)",
    "batch_rollouts": "count(DISTINCT rollout_id)",
    "batch_groups": "count(DISTINCT group_id)",
    "batch_replayed_share": "avg(CASE WHEN age > 0 THEN 1.0::DOUBLE WHEN age = 0 THEN 0.0 END)",
    "batch_reward_mean": "avg(reward)",
    "advantage_mean": "avg(advantage)",
    "advantage_std": "stddev_samp(advantage)",
    "advantage_abs_mean": "avg(abs(advantage))",
    "advantage_nonzero_share": "avg(CASE WHEN advantage <> 0 THEN 1.0::DOUBLE WHEN advantage = 0 THEN 0.0 END)",
    "weight_mean": "avg(weight)",
    "pairs": "nullif(count(DISTINCT pair_id), 0)",
}


def summary(scored: pa.Table, batch: pa.Table) -> dict[str, float]:
    """Metrics of one round: of the rollouts generated in it (age 0) and of its batch (replayed rows included).

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
    present = {row[0] for row in con.execute("DESCRIBE scored").fetchall()}
    fresh = "FROM scored" + (" WHERE age = 0" if "age" in present else "")
    wanted = {name: sql for name, (column, sql) in _OF_ROLLOUTS.items() if column in present}
    wanted |= {f"score_{name}_mean": f"avg({quoted(name)})" for name in scorers if name in present}
    metrics = _row(con, wanted, fresh)
    if {"group_id", "reward"} <= present:
        signal = {"groups_with_signal_share": "avg(CASE WHEN high > low THEN 1.0::DOUBLE ELSE 0.0 END)"}
        groups = f"FROM (SELECT max(reward) AS high, min(reward) AS low {fresh} GROUP BY group_id)"
        metrics |= _row(con, signal, groups)
    return metrics


def batch_metrics(con: duckdb.DuckDBPyConnection, batch: pa.Table, rollouts: float) -> dict[str, float]:
    """Metrics of a batch; `rollouts` is the number generated in its round."""
    con.register("batch", batch)
    metrics = _row(con, _OF_BATCH, "FROM batch")
    if rollouts:
        fresh = one(con, "SELECT count(DISTINCT rollout_id) FROM batch WHERE age = 0 OR age IS NULL")[0]
        metrics["kept_share"] = fresh / rollouts
    routes = con.execute(
        "SELECT route, count(*) FROM batch WHERE route IS NOT NULL GROUP BY ALL ORDER BY ALL"
    ).fetchall()
    for route, count in routes:
        metrics[f"route_{route}_share"] = count / batch.num_rows
    con.unregister("batch")
    return metrics


def _row(con: duckdb.DuckDBPyConnection, wanted: dict[str, str], source: str) -> dict[str, float]:
    row = one(con, f"SELECT {', '.join(wanted.values())} {source}")
    return {name: float(value) for name, value in zip(wanted, row, strict=True) if value is not None}
