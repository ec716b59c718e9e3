"""What a teacher says of each token goes into the batch beside the rows that SQL chose; SQL itself reads no tokens."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rollway.errors import RollwayError
from rollway.store import parquet
from rollway.store.tables import TEACHER_COLUMNS

NUMBERS_AT_ONCE = 2**24
"""Values of teacher columns in memory at once, 64 MiB; a row group of the batch has about as many."""
TAUGHT_ROUTES = ("distill", "both")
"""Routes whose rows get a loss that needs the teacher."""

Take = Callable[[Iterator[pa.Table]], None]


@dataclass
class Teacher:
    """Score files of the scorer `name`, and the columns of them that the batch gets."""

    name: str
    files: list[Path]
    columns: list[str]

    @staticmethod
    def of(name: str, files: list[Path], wanted: Collection[str] | None) -> "Teacher":
        """wanted: None for all columns that the files have. Raises RollwayError where a file lacks one."""
        held = [parquet.names(path) for path in files]
        columns = [c for c in TEACHER_COLUMNS if (c in wanted if wanted is not None else held and c in held[0])]
        for path, names in zip(files, held, strict=True):
            if lost := [c for c in columns if c not in names] or ([] if columns else list(TEACHER_COLUMNS)):
                raise RollwayError(
                    f"{path}: has no column {', '.join(lost)}, which curate.teacher: {name} takes from every round "
                    "that is read; make it a scorer of kind teacher that stores this, and run "
                    f"`snakemake --force {path}`"
                )
        return Teacher(name, files, columns)

    def beside(self, take: Take, counts: dict[str, float]) -> Take:
        """`take` of batches with the teacher's columns; `counts` then holds what there is to say of them."""

        def taken(parts: Iterator[pa.Table]) -> None:
            counts.clear()
            take(self._attached(parts, counts))

        return taken

    def _attached(self, parts: Iterator[pa.Table], counts: dict[str, float]) -> Iterator[pa.Table]:
        """Batches in pieces of a bounded number of values. Raises RollwayError where a row that is to be distilled has
        no teacher."""
        held = _Held(self.files, self.columns)
        rows = given = 0
        for part in parts:
            for start in range(0, max(1, part.num_rows), held.rows_at_once):
                piece = part.slice(start, held.rows_at_once)
                said = held.rows(piece.column("rollout_id"))
                _check(self.name, piece, said)
                rows, given = rows + piece.num_rows, given + piece.num_rows - said.column(0).null_count
                for name in said.column_names:
                    piece = piece.append_column(said.schema.field(name), said.column(name))
                yield piece
        if rows:
            counts["teacher_share"] = given / rows


class _Held:
    """Rows of score files by rollout, read row group by row group, the last of which is kept."""

    def __init__(self, files: list[Path], columns: list[str]) -> None:
        self.columns = columns
        ids: list[pa.ChunkedArray] = []
        self._places: list[tuple[Path, int, int]] = []
        """Of each row group: the file, its number in it, and the number of rows before it."""
        rows = values = 0
        for path in files:
            with pq.ParquetFile(path) as file:
                for number in range(file.num_row_groups):
                    group = file.metadata.row_group(number)
                    chunks = (group.column(n) for n in range(group.num_columns))
                    values += sum(c.num_values for c in chunks if c.path_in_schema.split(".")[0] in columns)
                    self._places.append((path, number, rows))
                    rows += group.num_rows
                ids.append(file.read(columns=["rollout_id"]).column("rollout_id"))
        self._ids = pa.concat_arrays([chunk for column in ids for chunk in column.chunks])
        self._starts = np.array([before for _, _, before in self._places], dtype=np.int64)
        self.rows_at_once = max(1, NUMBERS_AT_ONCE * max(1, rows) // max(1, values))
        self._last: tuple[int, pa.Table] | None = None

    def rows(self, rollout_ids: pa.ChunkedArray) -> pa.Table:
        """The columns of these rollouts, in order. That each has a row was seen when `scored` was made."""
        at = pc.index_in(rollout_ids, self._ids).to_numpy()
        group_of = np.searchsorted(self._starts, at, side="right") - 1
        read, places = [], np.empty(len(at), dtype=np.int64)
        before = 0
        for group in np.unique(group_of):
            chosen = np.flatnonzero(group_of == group)
            read.append(self._group(int(group)).take(pa.array(at[chosen] - self._starts[group])))
            places[chosen] = before + np.arange(len(chosen))
            before += len(chosen)
        if not read:
            return self._group(0).slice(0, 0)
        return pa.concat_tables(read).take(pa.array(places)).combine_chunks()

    def _group(self, group: int) -> pa.Table:
        if self._last is None or self._last[0] != group:
            path, number, _ = self._places[group]
            with pq.ParquetFile(path) as file:
                table = file.read_row_group(number, columns=self.columns).replace_schema_metadata(None)
            self._last = (group, table.select(self.columns))
        return self._last[1]


def _check(name: str, batch: pa.Table, said: pa.Table) -> None:
    if not batch.num_rows:
        return
    taught = pc.is_in(batch.column("route"), pa.array(TAUGHT_ROUTES))
    lost = batch.filter(pc.and_(taught, pc.is_null(said.column(0))))
    if lost.num_rows:
        row = lost.slice(0, 1).to_pylist()[0]
        raise RollwayError(
            f"curate.route: sends rollout {row['rollout_id']} to {row['route']}, and scorer {name} has no teacher for "
            f"it ({lost.num_rows} rows): route only rollouts whose context there is (a wrong one with a right sibling, "
            f"say), or give score.scorers.{name} a last context without {{sibling}}"
        )
