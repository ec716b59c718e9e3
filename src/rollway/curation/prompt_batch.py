"""Dynamic sampling's ledger: groups asked for, groups that the filter left, and those beyond what was asked for."""

import pyarrow as pa

from rollway.curation.summary import fresh, holds, run_starts

COLUMNS = ("pass", "group_id", "age", "source")
"""Columns of `scored` that are read here."""


def groups_asked(groups: pa.Table) -> tuple[int, int]:
    """Before any step has run: how many groups are of this round's first pass, which are the prompt batch, and the last
    pass in which the round sampled something, from 0. groups: as `groups_of` gives them."""
    passes = groups.column("pass").to_numpy()
    return int((passes == 0).sum()), int(passes.max(initial=0))


def surplus(groups: pa.Table, asked: int) -> tuple[dict[str, float], pa.Array]:
    """Once any filter has run: how many groups are missing or too many, and the group_id of those too many.

    Where `rollout.refill.oversample` exceeds 1, more groups may survive than were asked for: those of the latest
    passes leave, and within a pass those drawn last (group ids are numbered). Without a filter (a fork of a refilled
    round) that leaves the first pass. Replayed groups do not count.
    """
    alive = len(groups)
    counts = {"groups_missing": float(max(0, asked - alive)), "groups_surplus": float(max(0, alive - asked))}
    if alive <= asked:
        return counts, pa.array([], groups.column("group_id").type)
    drawn = groups.sort_by([("pass", "ascending"), ("group_id", "ascending")])
    return counts, pa.concat_arrays(drawn.column("group_id").slice(asked).chunks)


def groups_of(scored: pa.Table) -> pa.Table:
    """pass and group_id of this round's groups, of the rollouts that somebody sampled."""
    mine = fresh(scored) & ~holds(scored, "source", "expert")
    rows = scored.select(["pass", "group_id"])
    rows = rows if mine.all() else rows.filter(pa.array(mine))
    names = pa.concat_arrays(rows.column("group_id").chunks) if rows.num_rows else pa.array([], pa.string())
    return rows.take(pa.array(run_starts(names)))
