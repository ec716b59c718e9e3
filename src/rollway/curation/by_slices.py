"""Curation of regular files by slices of whole groups: on all threads, and with no sort or join of the rows.

Takes what most methods are: SQL that compares a rollout with its group. `curate` gives None for everything else, and
wherever something is wrong; the general path then does the work, or says what is wrong.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rollway.config.curation import CurateConfig
from rollway.config.scorers import ScoreConfig
from rollway.curation import prompt_batch, scored
from rollway.curation.group_sql import GroupSql, group_sql
from rollway.curation.group_windows import FUNCTIONS, MOST_ROWS_OF_A_GROUP, NEEDS_FLOATS, Column, Groups
from rollway.curation.regular import Irregular, Regular, load
from rollway.curation.steps import Step, result_columns
from rollway.curation.summary import batch_metrics, pool_metrics, rollout_metrics
from rollway.errors import RollwayError
from rollway.store.tables import TABLES

ROWS_OF_A_SLICE = 131_072
"""About as many; fixed, so that no bit depends on the number of threads."""

BYTES_OF_A_ROW = 150
"""Upper bound of what a rollout takes in memory here, its id included."""


@dataclass
class _Rows:
    """The rows that are left. `columns` [N]; `origin` [N] their rows in what was loaded, None: all of them."""

    columns: dict[str, pa.Array]
    groups: Groups
    origin: NDArray[np.int64] | None

    def __len__(self) -> int:
        return int(self.groups.sizes.sum())

    def where(self, kept: NDArray[np.bool_], needed: set[str]) -> "_Rows":
        """The rows of a mask, and of their columns those that are needed."""
        if kept.all():
            return self
        mask = pa.array(kept)
        columns = {name: array.filter(mask) for name, array in self.columns.items() if name in needed}
        sizes = np.add.reduceat(kept.astype(np.int64), self.groups.starts) if len(kept) else self.groups.sizes
        origin = np.flatnonzero(kept) if self.origin is None else self.origin[kept]
        return _Rows(columns, Groups(sizes[sizes > 0]), origin)

    def table(self) -> pa.Table:
        """As SQL sees it, with a number for rollout_id."""
        origin = np.arange(len(self), dtype=np.int64) if self.origin is None else self.origin
        return pa.table({"rollout_id": pa.array(origin), **self.columns})


def curate(
    rollouts: list[Path],
    scores: dict[str, list[Path]],
    score: ScoreConfig,
    config: CurateConfig,
    todo: list[Step],
    needed: set[str],
    *,
    round: int,
    threads: int,
    memory_limit: str | None,
    on_batch: Callable[[pa.Table], None] | None,
) -> tuple[pa.Table, dict[str, float]] | None:
    """The batch and its metrics; None where SQL or files are not of the kind. `on_batch` gets the batch early."""
    forms = [group_sql(step.file) for step in todo]
    if any(form is None for form in forms):
        return None
    work = list(zip(todo, [form for form in forms if form is not None], strict=True))
    with scored.connection(1, memory_limit) as con, ThreadPoolExecutor(threads) as pool:
        try:
            loaded = load(rollouts, scores, score, needed, round, pool)
            if loaded.groups.sizes.max() > MOST_ROWS_OF_A_GROUP:
                return None
            scored.close_off(con)
            return _Run(con, pool, loaded, list(score.scorers), on_batch).curate(config, work)
        except (Irregular, duckdb.Error, RollwayError):
            import traceback

            traceback.print_exc()
            return None


@dataclass
class _Run:
    con: duckdb.DuckDBPyConnection
    pool: ThreadPoolExecutor
    loaded: Regular
    scorers: list[str]
    on_batch: Callable[[pa.Table], None] | None

    def curate(self, config: CurateConfig, work: list[tuple[Step, GroupSql]]) -> tuple[pa.Table, dict[str, float]]:
        """Metrics are taken beside the steps, and those of the batch while `on_batch` writes it."""
        rows = _Rows(self.loaded.columns, self.loaded.groups, None)
        futures = [self.pool.submit(rollout_metrics, rows.table(), self.scorers)]
        asked, last = prompt_batch.groups_asked(rows.table()), prompt_batch.last_pass(rows.table())
        metrics: dict[str, float] = {"passes": 1.0 + last}
        rows = self._steps(rows, work, ("reward", "filter"))
        if config.filter is not None or last > 0:
            counts, late = prompt_batch.surplus(rows.table(), asked)
            metrics |= counts
            if len(late):
                cut = np.isin(rows.columns["group_id"].to_numpy(), late.to_numpy())
                rows = rows.where(~cut, set(rows.columns))
        rows = self._steps(rows, work, ("advantage", "weight", "route"))
        if config.select is not None:
            futures.append(self.pool.submit(pool_metrics, rows.table()))
            rows = self._steps(rows, work, ("select",))
        batch = self._batch(rows)
        written = None if self.on_batch is None else self.pool.submit(self.on_batch, batch)
        for future in futures:
            metrics |= future.result()
        metrics |= batch_metrics(rows.table(), metrics["rollouts"])
        if written is not None:
            written.result()
        return batch, metrics

    def _on(self, table: pa.Table, work: Callable[[duckdb.DuckDBPyConnection], Any]) -> Any:
        with self.con.cursor() as cursor:
            cursor.register("scored", table)
            return work(cursor)

    def _steps(self, rows: _Rows, work: list[tuple[Step, GroupSql]], names: tuple[str, ...]) -> _Rows:
        for place, (step, form) in enumerate(work):
            if step.file.step in names:
                rest = [form.columns | {w.column for w in form.windows} for _, form in work[place + 1 :]]
                rows = self._step(rows, step, form, _KEPT.union(*rest))
        return rows

    def _step(self, rows: _Rows, step: Step, form: GroupSql, needed: set[str]) -> _Rows:
        """What the step makes of the rows; `needed`: columns that are read later."""
        table = _table_for(rows, form)
        ends = np.cumsum(rows.groups.sizes)
        cuts = np.unique(ends[np.searchsorted(ends, np.arange(ROWS_OF_A_SLICE, len(rows), ROWS_OF_A_SLICE))])
        bounds = [0, *cuts.tolist(), *([len(rows)] if not len(cuts) or cuts[-1] < len(rows) else [])]
        slices = [table.slice(start, stop - start) for start, stop in pairwise(bounds)]
        found = pa.concat_tables(
            self.pool.map(lambda part: self._on(part, lambda con: _result(con, step, form)), slices)
        )
        keys = found.column("rollout_id").to_numpy()
        kept = np.zeros(len(rows), bool)
        kept[keys] = True
        if np.count_nonzero(kept) != len(keys):
            raise Irregular
        values = [name for name in found.column_names if name != "rollout_id"]
        if step.file.step not in ("filter", "select") and len(keys) < len(rows):
            raise Irregular
        if values and not (keys[1:] > keys[:-1]).all():
            found = found.take(pa.array(np.argsort(keys)))
        rows = rows.where(kept, needed)
        made = {name: _checked(found.column(name)) for name in values}
        return _Rows(rows.columns | made, rows.groups, rows.origin)

    def _batch(self, rows: _Rows) -> pa.Table:
        columns = []
        for field in TABLES["batch"].schema():
            match field.name:
                case "rollout_id":
                    array = self.loaded.rollout_ids(rows.origin)
                case "group_id":
                    array = self.loaded.names.take(rows.columns["group_id"])
                case "slot":
                    array = pa.repeat(pa.scalar(0, pa.int32()), len(rows))
                case name if name in rows.columns:
                    array = rows.columns[name].cast(field.type)
                case _:
                    array = pa.nulls(len(rows), field.type)
            columns.append(array)
        return pa.Table.from_arrays(columns, schema=TABLES["batch"].schema())


_KEPT = {*TABLES["batch"].names(), "sample", "source", "pass"}
"""Columns that every row keeps to its end, where it has them."""


def _table_for(rows: _Rows, form: GroupSql) -> pa.Table:
    """What the file's text reads: columns of `scored`, windows, and the row's number as rollout_id."""
    columns: dict[str, pa.Array] = {"rollout_id": pa.array(np.arange(len(rows)))}
    for name in sorted(form.columns):
        if name not in rows.columns:
            raise Irregular
        columns[name] = rows.columns[name]
    of: dict[str | None, Column] = {}
    for number, window in enumerate(form.windows):
        if window.column not in of:
            of[window.column] = Column(_values(rows, window.column), rows.groups)
        column = of[window.column]
        if window.function in NEEDS_FLOATS and column.values.dtype != np.float64:
            raise Irregular
        if window.function.startswith("bool") and column.values.dtype != np.bool_:
            raise Irregular
        with np.errstate(all="ignore"):
            of_groups = FUNCTIONS[window.function](column)
        columns[f"window_{number}"] = pa.array(rows.groups.to_rows(of_groups), from_pandas=True)
    return pa.table(columns)


def _values(rows: _Rows, name: str | None) -> NDArray:
    if name is None:
        return np.zeros(0, np.bool_)
    array = rows.columns.get(name)
    if array is None or array.null_count or not (pa.types.is_primitive(array.type) or pa.types.is_boolean(array.type)):
        raise Irregular
    return array.to_numpy(zero_copy_only=False)


def _result(con: duckdb.DuckDBPyConnection, step: Step, form: GroupSql) -> pa.Table:
    """The file's result on one slice, in the types of the batch."""
    asked = con.sql(form.text, params=step.values)
    types = dict(zip(asked.columns, map(str, asked.types), strict=True))
    values = result_columns(step.file, ["rollout_id"], types)
    casts = "".join(f", CAST({name} AS {kind}) AS {name}" for name, kind in values.items())
    return con.sql(f"SELECT rollout_id{casts} FROM ({form.text}\n)", params=step.values).to_arrow_table()


def _checked(column: pa.ChunkedArray) -> pa.Array:
    """The values in one array, once they are seen to be whole and finite."""
    values = column.combine_chunks()
    flat = values.values if pa.types.is_list(values.type) else values
    if values.null_count or flat.null_count:
        raise Irregular
    if pa.types.is_floating(flat.type) and not np.isfinite(flat.to_numpy()).all():
        raise Irregular
    return values
