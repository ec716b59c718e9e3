"""What training reads of the rollouts that a batch draws on."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from rollway.store import parquet

PAYLOAD = ("rollout_id", "prompt_tokens", "tokens", "logprobs", "train_mask", "source", "group_id")
DERIVED_PAYLOAD = ("train_prompt_tokens", "prefix_length")
"""Columns that files of derived passes have beside them."""


def drawn(files: Sequence[Path], wanted: pa.ChunkedArray) -> pa.Table:
    """The rollouts whose rollout_id is `wanted`, in those columns; the others are not kept in memory."""
    tables = []
    for path in files:
        more = [name for name in DERIVED_PAYLOAD if name in parquet.names(path)]
        tables.append(parquet.read_rows(path, [*PAYLOAD, *more], "rollout_id", wanted))
    return pa.concat_tables(tables, promote_options="default")
