"""Dynamic sampling's ledger: groups asked for, groups that the filter left, and those beyond what was asked for."""

import duckdb

from rollway.curation.scored import one

COLUMNS = ("pass", "group_id", "age", "source")
"""Columns of `scored` that are read here."""

_FRESH = "age = 0 AND source <> 'expert'"


def groups_asked(con: duckdb.DuckDBPyConnection) -> int:
    """Groups of this round's first pass: the prompt batch. Before any step has run."""
    return int(one(con, f"SELECT count(DISTINCT group_id) FROM scored WHERE {_FRESH} AND pass = 0")[0])


def last_pass(con: duckdb.DuckDBPyConnection) -> int:
    """The last pass in which this round sampled something, from 0. Before any step has run."""
    return int(one(con, f"SELECT coalesce(max(pass), 0) FROM scored WHERE {_FRESH}")[0])


def cut_surplus(con: duckdb.DuckDBPyConnection, asked: int) -> dict[str, float]:
    """Takes the groups beyond `asked` out of `scored`, once any filter has run; says how many are missing or were cut.

    Where `rollout.refill.oversample` exceeds 1, more groups may survive than were asked for: those of the latest
    passes leave, and within a pass those drawn last (group ids are numbered). Without a filter (a fork of a refilled
    round) that leaves the first pass. Replayed groups do not count.
    """
    alive = int(one(con, f"SELECT count(DISTINCT group_id) FROM scored WHERE {_FRESH}")[0])
    con.execute(
        f"""
        DELETE FROM scored WHERE age = 0 AND group_id IN (
            SELECT group_id FROM (SELECT DISTINCT group_id, pass FROM scored WHERE {_FRESH})
            QUALIFY row_number() OVER (ORDER BY pass, group_id) > {asked}
        )"""
    )
    return {"groups_missing": float(max(0, asked - alive)), "groups_surplus": float(max(0, alive - asked))}
