"""What a round's rollouts and batch look like in numbers."""

import duckdb
import pyarrow as pa

from rollway.curation.scored import quoted
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
        con.execute(f"CREATE SCHEMA rollway; CREATE TABLE rollway.input AS SELECT * FROM arrow_input ORDER BY {order}")
        return summarise(con, batch, scorers)


def summarise(con: duckdb.DuckDBPyConnection, batch: pa.Table, scorers: list[str]) -> dict[str, float]:
    """As `summary`, over the table `rollway.input` of a connection with one thread."""
    present = {row[0] for row in con.execute("DESCRIBE rollway.input").fetchall()}
    fresh = "FROM rollway.input" + (" WHERE age = 0" if "age" in present else "")
    metrics: dict[str, float | None] = {}
    wanted = {name: sql for name, (column, sql) in _OF_ROLLOUTS.items() if column in present}
    wanted |= {f"score_{name}_mean": f"avg({quoted(name)})" for name in scorers if name in present}
    metrics |= _row(con, wanted, fresh)
    if {"group_id", "reward"} <= present:
        signal = {"groups_with_signal_share": "avg(CASE WHEN high > low THEN 1.0::DOUBLE ELSE 0.0 END)"}
        groups = f"FROM (SELECT max(reward) AS high, min(reward) AS low {fresh} GROUP BY group_id)"
        metrics |= _row(con, signal, groups)
    con.register("batch", batch)
    metrics |= _row(con, _OF_BATCH, "FROM batch")
    kept = "SELECT count(DISTINCT rollout_id) FROM batch" + (" WHERE age = 0" if "age" in present else "")
    if metrics.get("rollouts"):
        metrics |= _row(con, {"kept_share": f"({kept}) / {metrics['rollouts']!r}::DOUBLE"}, "")
    routes = "SELECT route, count(*) / sum(count(*)) OVER () FROM batch WHERE route IS NOT NULL GROUP BY route ORDER BY route"
    for route, share in con.execute(routes).fetchall():
        metrics[f"route_{route}_share"] = float(share)
    con.unregister("batch")
    return {name: value for name, value in metrics.items() if value is not None}


def _row(con: duckdb.DuckDBPyConnection, wanted: dict[str, str], source: str) -> dict[str, float | None]:
    row = con.execute(f"SELECT {', '.join(wanted.values())} {source}").fetchall()[0]
    return {name: None if value is None else float(value) for name, value in zip(wanted, row, strict=True)}
