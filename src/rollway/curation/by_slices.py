"""Curation of regular files by slices of whole groups: on all threads, and with no sort or join of the rows.

Takes what most methods are: SQL that compares a rollout with its group. `curate` gives None for everything else, and
wherever something is wrong; the general path then does the work, or says what is wrong.
"""

import re
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rollway.config.curation import CurateConfig
from rollway.config.scorers import ScoreConfig
from rollway.curation import prompt_batch, regular, scored
from rollway.curation.group_sql import GroupSql, group_sql
from rollway.curation.group_windows import FUNCTIONS, MOST_ROWS_OF_A_GROUP, NEEDS_FLOATS, Groups, Values
from rollway.curation.memory import frugal, give_back, limit_bytes
from rollway.curation.regular import Irregular, Regular, Room, repeated
from rollway.curation.sql_file import Value
from rollway.curation.steps import Step, result_columns
from rollway.curation.summary import INPUT_COLUMNS, Tally, added, batch_figures, of_batch, of_pool, of_rollouts
from rollway.errors import RollwayError
from rollway.store.tables import SPAN, TABLES

_SPAN = re.compile(rf"\b{SPAN}\b")
"""What derived rollouts alone have."""

ROWS_OF_A_SLICE = 131_072
"""About as many; fixed, so that no bit depends on the number of threads."""

T = TypeVar("T")
Take = Callable[[Iterator[pa.Table]], None]


@dataclass
class Rows:
    """Rows of whole groups. `columns` [N], a scalar where all hold one value; `places` [N] where they lie in
    the files."""

    columns: dict[str, pa.Array | pa.Scalar]
    groups: Groups
    places: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.places)

    def where(self, kept: NDArray[np.bool_], needed: frozenset[str]) -> "Rows":
        """The rows of a mask, and of their columns those that are needed."""
        columns = {name: column for name, column in self.columns.items() if name in needed}
        if kept.all():
            return Rows(columns, self.groups, self.places)
        mask = pa.array(kept)
        columns = {n: c if isinstance(c, pa.Scalar) else c.filter(mask) for n, c in columns.items()}
        sizes = np.add.reduceat(kept.astype(np.int64), self.groups.starts)
        return Rows(columns, Groups(sizes[sizes > 0]), self.places[kept])

    def column(self, name: str) -> pa.Array:
        found = self.columns[name]
        return repeated(found, len(self)) if isinstance(found, pa.Scalar) else found

    def table(self, names: frozenset[str]) -> pa.Table:
        """group_id, and those columns that there are."""
        return pa.table({name: self.column(name) for name in self.columns if name in names or name == "group_id"})


@dataclass(frozen=True)
class _Task:
    """A step that is ready to run: the SELECT in the types of the batch, and what it reads."""

    step: str
    form: GroupSql
    select: str
    values: dict[str, Value | None]
    needed: frozenset[str]
    """Columns that are read after it."""


def curate(
    rollouts: list[Path],
    scores: dict[str, list[Path]],
    score: ScoreConfig,
    config: CurateConfig,
    todo: list[Step],
    *,
    round: int,
    threads: int,
    memory_limit: str | None,
    take: Take,
) -> dict[str, float] | None:
    """The metrics, once `take` has taken the batch; None where SQL or files are not of the kind, or the rows take more
    than `memory_limit`: DuckDB spills them."""
    work = [(step, form) for step in todo if (form := group_sql(step.file)) is not None]
    if len(work) < len(todo) or any(_SPAN.search(step.file.text) for step in todo):
        return None
    columns = {column for _, form in work for column in form.reads()}
    columns |= {*INPUT_COLUMNS, *prompt_batch.COLUMNS, *(name.lower() for name in score.scorers)}
    try:
        with frugal(regular.rows_in(rollouts)), ThreadPoolExecutor(threads) as pool:
            parts = regular.read(rollouts, scores, score, columns, round, pool, Room(limit_bytes(memory_limit)))
            with scored.connection(1, memory_limit) as con:
                scored.close_off(con)
                loaded = regular.in_order(parts)
                if loaded.groups.sizes.max() > MOST_ROWS_OF_A_GROUP:
                    return None
                return _Run(con, pool, loaded, list(score.scorers), take, threads + 2).curate(config, work)
    except (Irregular, duckdb.Error, RollwayError):
        return None


@dataclass
class _Run:
    con: duckdb.DuckDBPyConnection
    pool: ThreadPoolExecutor
    loaded: Regular
    scorers: list[str]
    take: Take
    ahead: int
    """Slices that may be under way or wait to be written."""

    def curate(self, config: CurateConfig, work: list[tuple[Step, GroupSql]]) -> dict[str, float]:
        """Slice by slice in up to three stretches: surplus groups, and what a select step chooses from, are known of
        all rows. `take` writes while the last stretch runs."""
        slices = _slices(self.loaded)
        tasks = _tasks(self.con, slices[0], work)
        metrics, slices = self._until_filter(slices, tasks, config.filter is not None)
        self.loaded.columns.clear()  # The slices hold what is left of them.
        give_back()
        last: tuple[str, ...] = _MIDDLE
        if config.select is not None:
            slices = list(self._each(slices, lambda part: self._run(part, tasks, _MIDDLE)))
            metrics |= added(of_pool(part.table(frozenset({"advantage"}))) for part in slices).figures()
            last = ("select",)
        tallies: list[Tally] = []

        def finished(part: Rows) -> tuple[Tally, pa.Table]:
            part = self._run(part, tasks, last)
            give_back()
            return of_batch(part.table(_KEPT)), self._batch(part)

        def parts() -> Iterator[pa.Table]:
            for tally, batch in self._each(slices, finished):
                tallies.append(tally)
                yield batch

        self.take(parts())
        return metrics | batch_figures(added(tallies), metrics["rollouts"])

    def _until_filter(
        self, slices: list[Rows], tasks: list[_Task], filtered: bool
    ) -> tuple[dict[str, float], list[Rows]]:
        def first(part: Rows) -> tuple[pa.Table, Tally, Rows, pa.Table]:
            before = prompt_batch.groups_of(part.table(_COUNTED))
            tally = of_rollouts(part.table(_MEASURED | set(self.scorers)), self.scorers)
            part = self._run(part, tasks, ("reward", "filter"))
            after = prompt_batch.groups_of(part.table(_COUNTED))
            give_back()
            return before, tally, part, after

        before, tallies, parts, after = zip(*self._each(slices, first), strict=True)
        asked, last = prompt_batch.groups_asked(pa.concat_tables(before))
        metrics = added(tallies).figures() | {"passes": 1.0 + last}
        kept = list(parts)
        if filtered or last > 0:
            counts, late = prompt_batch.surplus(pa.concat_tables(after), asked)
            metrics |= counts
            if len(late):
                cut = late.to_numpy()
                kept = [p.where(~np.isin(p.column("group_id").to_numpy(), cut), frozenset(p.columns)) for p in kept]
        return metrics, kept

    def _each(self, slices: list[Rows], work: Callable[[Rows], T]) -> Iterator[T]:
        """Work on slices, which leave the list, in their order; only a few results wait to be taken."""
        waiting: deque[Future[T]] = deque()
        slices.reverse()
        while slices or waiting:
            while slices and len(waiting) < self.ahead:
                waiting.append(self.pool.submit(work, slices.pop()))
            yield waiting.popleft().result()

    def _run(self, rows: Rows, tasks: list[_Task], steps: tuple[str, ...]) -> Rows:
        mine = [task for task in tasks if task.step in steps]
        if not mine or not len(rows):
            return rows
        with self.con.cursor() as cursor:
            for task in mine:
                rows = _after(cursor, task, rows) if len(rows) else rows
        return rows

    def _batch(self, rows: Rows) -> pa.Table:
        columns = []
        for field in TABLES["batch"].schema():
            match field.name:
                case "rollout_id":
                    array = self.loaded.rollout_ids(rows.places)
                case "group_id":
                    array = self.loaded.names.take(rows.column("group_id"))
                case "slot":
                    array = repeated(pa.scalar(0, pa.int32()), len(rows))
                case name if name in rows.columns:
                    array = rows.column(name).cast(field.type)
                case _:
                    array = pa.nulls(len(rows), field.type)
            columns.append(array)
        return pa.Table.from_arrays(columns, schema=TABLES["batch"].schema())


_KEPT = frozenset({*TABLES["batch"].names(), "source", "pass"})
"""Columns that every row keeps to its end, where it has them."""
_COUNTED = frozenset(prompt_batch.COLUMNS)
_MEASURED = frozenset(INPUT_COLUMNS)
_MIDDLE = ("advantage", "weight", "route")


def _slices(loaded: Regular) -> list[Rows]:
    """About ROWS_OF_A_SLICE rows each, cut between groups."""
    ends = np.cumsum(loaded.groups.sizes)
    wanted = np.searchsorted(ends, np.arange(ROWS_OF_A_SLICE, ends[-1], ROWS_OF_A_SLICE)) + 1
    groups = np.unique([0, *wanted, len(ends)])
    slices = []
    for first, stop in pairwise(groups.tolist()):
        start, length = int(ends[first] - loaded.groups.sizes[first]), int(loaded.groups.sizes[first:stop].sum())
        columns = {n: c if isinstance(c, pa.Scalar) else c.slice(start, length) for n, c in loaded.columns.items()}
        slices.append(Rows(columns, Groups(loaded.groups.sizes[first:stop]), loaded.places[start : start + length]))
    return slices


def _tasks(con: duckdb.DuckDBPyConnection, rows: Rows, work: list[tuple[Step, GroupSql]]) -> list[_Task]:
    """The steps, tried on no rows. Raises RollwayError where a result has other columns or types than its step's."""
    tasks = []
    none = {name: c if isinstance(c, pa.Scalar) else c.slice(0, 0) for name, c in rows.columns.items()}
    for place, (step, form) in enumerate(work):
        con.register("scored", _read_by(form, Rows(none, Groups(np.zeros(0, np.int64)), np.zeros(0, np.int32))))
        asked = con.sql(form.text, params=step.values)
        values = result_columns(step.file, ["rollout_id"], dict(zip(asked.columns, map(str, asked.types), strict=True)))
        casts = "".join(f", CAST({name} AS {kind}) AS {name}" for name, kind in values.items())
        select = f"SELECT rollout_id{casts} FROM ({form.text})"
        needed = _KEPT.union(*(later.reads() for _, later in work[place + 1 :]))
        tasks.append(_Task(step.file.step, form, select, step.values, needed))
        made = con.sql(select, params=step.values).to_arrow_table()
        none |= {name: made.column(name).combine_chunks() for name in values}
        con.unregister("scored")
    return tasks


def _after(con: duckdb.DuckDBPyConnection, task: _Task, rows: Rows) -> Rows:
    """What the step makes of the rows."""
    con.register("scored", _read_by(task.form, rows))
    found = con.sql(task.select, params=task.values).to_arrow_table()
    keys = found.column("rollout_id").to_numpy()
    kept = np.zeros(len(rows), bool)
    kept[keys] = True
    if np.count_nonzero(kept) != len(keys):
        raise Irregular
    if task.step not in ("filter", "select") and len(keys) < len(rows):
        raise Irregular
    values = [name for name in found.column_names if name != "rollout_id"]
    if values and not (keys[1:] > keys[:-1]).all():
        found = found.take(pa.array(np.argsort(keys)))
    rows = rows.where(kept, task.needed)
    made = {name: _checked(found.column(name)) for name in values}
    return Rows(rows.columns | made, rows.groups, rows.places)


def _read_by(form: GroupSql, rows: Rows) -> pa.Table:
    """What the file's text reads: columns of `scored`, windows, and the row's number as rollout_id."""
    if not form.columns <= set(rows.columns):
        raise Irregular
    columns: dict[str, pa.Array] = {"rollout_id": pa.array(np.arange(len(rows)))}
    columns |= {name: rows.column(name) for name in sorted(form.columns)}
    of: dict[str | None, Values] = {}
    for number, window in enumerate(form.windows):
        if window.column not in of:
            of[window.column] = Values(_numbers(rows, window.column), rows.groups)
        values = of[window.column]
        if window.function in NEEDS_FLOATS and values.values.dtype != np.float64:
            raise Irregular
        if window.function.startswith("bool") and values.values.dtype != np.bool_:
            raise Irregular
        with np.errstate(all="ignore"):
            of_groups = FUNCTIONS[window.function](values)
        columns[f"window_{number}"] = pa.array(rows.groups.to_rows(of_groups), from_pandas=True)
    return pa.table(columns)


def _numbers(rows: Rows, name: str | None) -> NDArray:
    if name is None:
        return np.zeros(0, np.bool_)
    if name not in rows.columns:
        raise Irregular
    array = rows.column(name)
    if array.null_count or not (pa.types.is_primitive(array.type) or pa.types.is_boolean(array.type)):
        raise Irregular
    return array.to_numpy(zero_copy_only=False)


def _checked(column: pa.ChunkedArray) -> pa.Array:
    """The values in one array, once they are seen to be whole and finite."""
    values = column.combine_chunks()
    flat = values.values if pa.types.is_list(values.type) else values
    if values.null_count or flat.null_count:
        raise Irregular
    if pa.types.is_floating(flat.type) and not np.isfinite(flat.to_numpy()).all():
        raise Irregular
    return values
