"""What the tests do to a finished project."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from rollway.store import parquet, provenance

RUN = "grpo-s0"


def change(path: Path, table: str, edit: Callable[[list[dict]], list[dict]]) -> None:
    """Writes a table again, as a stage would, after `edit` of its rows."""
    rows = parquet.read(path)
    parquet.write(path, pa.Table.from_pylist(edit(rows.to_pylist()), schema=rows.schema), table)


def keep_inputs(path: Path, table: str, edit: Callable[[list[dict]], list[dict]]) -> None:
    """As `change`, by somebody who leaves the file's own account of itself in place."""
    said = parquet.metadata(path)[provenance.KEY]
    rows = parquet.read(path)
    parquet.write(path, pa.Table.from_pylist(edit(rows.to_pylist()), schema=rows.schema), table, {provenance.KEY: said})


def changed(rows: list[dict], column: str, value: object, at: int = 0) -> list[dict]:
    return [row | {column: value} if n == at else row for n, row in enumerate(rows)]
