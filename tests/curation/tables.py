"""Small scored tables with known answers."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa


def scored_table(groups: Sequence[Sequence[float]], **columns: Sequence[Any]) -> pa.Table:
    """Rewards by group; rollout r03-1 is sample 1 of group g03; `correct` is reward >= 1. Further columns come flat."""
    flat = [(g, s, float(r)) for g, rewards in enumerate(groups) for s, r in enumerate(rewards)]
    made = {
        "rollout_id": pa.array([f"r{g:02d}-{s}" for g, s, _ in flat], pa.string()),
        "group_id": pa.array([f"g{g:02d}" for g, _, _ in flat], pa.string()),
        "sample": pa.array([s for _, s, _ in flat], pa.int32()),
        "reward": pa.array([r for *_, r in flat], pa.float64()),
        "correct": pa.array([r >= 1 for *_, r in flat], pa.bool_()),
    }
    return pa.table(made | {name: pa.array(values) for name, values in columns.items()})


def column(batch: pa.Table, name: str) -> list[Any]:
    return batch.column(name).to_pylist()
