"""Dynamic sampling's ledger: groups asked for, groups that the filter left, and those beyond what was asked for."""

import pyarrow as pa
import pyarrow.compute as pc

from rollway.curation.summary import run_starts

COLUMNS = ("pass", "group_id", "age", "source")
"""Columns of `scored` that are read here."""


def groups_asked(scored: pa.Table) -> int:
    """Groups of this round's first pass: the prompt batch. Before any step has run."""
    fresh = _fresh(scored)
    return len(_first_rows(fresh.filter(pc.equal(fresh.column("pass"), 0))))


def last_pass(scored: pa.Table) -> int:
    """The last pass in which this round sampled something, from 0. Before any step has run."""
    return pc.max(_fresh(scored).column("pass")).as_py() or 0


def surplus(scored: pa.Table, asked: int) -> tuple[dict[str, float], pa.Array]:
    """Once any filter has run: how many groups are missing or too many, and the group_id of those too many.

    Where `rollout.refill.oversample` exceeds 1, more groups may survive than were asked for: those of the latest
    passes leave, and within a pass those drawn last (group ids are numbered). Without a filter (a fork of a refilled
    round) that leaves the first pass. Replayed groups do not count.
    """
    groups = _first_rows(_fresh(scored))
    alive = len(groups)
    counts = {"groups_missing": float(max(0, asked - alive)), "groups_surplus": float(max(0, alive - asked))}
    if alive <= asked:
        return counts, pa.array([], groups.column("group_id").type)
    drawn = groups.sort_by([("pass", "ascending"), ("group_id", "ascending")])
    return counts, pa.concat_arrays(drawn.column("group_id").slice(asked).chunks)


def _fresh(scored: pa.Table) -> pa.Table:
    """This round's rows that somebody sampled."""
    mine = pc.and_(pc.equal(scored.column("age"), 0), pc.not_equal(scored.column("source"), "expert"))
    return scored.select(["pass", "group_id"]).filter(mine)


def _first_rows(rows: pa.Table) -> pa.Table:
    """One row for each group, whose rows lie together."""
    names = pa.concat_arrays(rows.column("group_id").chunks) if rows.num_rows else pa.array([], pa.string())
    return rows.take(pa.array(run_starts(names)))
