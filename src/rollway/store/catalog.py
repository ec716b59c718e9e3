"""The DuckDB catalogue: every run's tables as views over the files of a results folder.

Views reference files by glob, so they see what a run adds while it goes on. A table whose files do not exist yet is an
empty view with the declared columns. Paths inside the views are absolute, because DuckDB resolves relative ones against
the reader's working folder: after a results folder was moved, `rollway sql` (which makes the views anew, in memory)
works at once, and `rollway.duckdb` after the next `write_database`.
"""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar

import duckdb
import pyarrow.parquet as pq

from rollway.errors import RollwayError, system_error, unwritten
from rollway.store.atomic import atomic_path
from rollway.store.queries import FORMATS, as_text, ask
from rollway.store.views import create_views, documented, quote

T = TypeVar("T")
DATABASE = "rollway.duckdb"
STORAGE_VERSION = "v1.2.0"
"""DuckDB 1.2 and later open it; the default of 2.x would shut out 1.x."""


def open_catalog(
    results: Path, *, look_at_all: bool = True, of: Collection[str] | None = None
) -> duckdb.DuckDBPyConnection:
    """An in-memory DuckDB connection with the views of `results`, for whoever keeps it open for many questions.

    Base views `prompts, rollouts, scores, batch, evals, metrics` hold what lies in each run's own folder, with `run`
    (and `round` where the files do not have it) taken from the path. `seen_rollouts`, `seen_scores`, `seen_batch`,
    `seen_evals` and `seen_metrics` give each run what it sees: a fork also has the rounds of its parent, and `home`
    says whose folder they are in (ranges: `lineage`). `scored`, `groups`, `by_prompt` and `learning` build on those.
    look_at_all: look into every file, so that one of an older schema is found wherever it lies (0.4 s per 1,000 files).
    of: runs whose tables are enough; None: all.
    Raises RollwayError when `results` is not a folder or a file in it is damaged.
    """
    connection = duckdb.connect()
    try:
        create_views(connection, results, look_at_all=look_at_all, of=of)
    except BaseException:
        connection.close()
        raise
    return connection


def with_catalog(
    results: Path, work: Callable[[duckdb.DuckDBPyConnection], T], *, of: Collection[str] | None = None
) -> T:
    """What `work` makes of the catalogue, of some runs or of all: the way in for everything that opens it, asks and is
    done.

    `work` is done once more where DuckDB meets a file of an older schema between others, which is not looked for at
    first: it would cost a look into every file. What such a file lacks is NULL. Raises RollwayError, in one sentence,
    where a file cannot be read.
    """
    try:
        return _done(results, work, look_at_all=False, of=of)
    except RollwayError as error:
        if "schema mismatch" not in f"{error} {error.__cause__}":
            raise
    return _done(results, work, look_at_all=True, of=of)


def _done(
    results: Path,
    work: Callable[[duckdb.DuckDBPyConnection], T],
    *,
    look_at_all: bool,
    of: Collection[str] | None,
) -> T:
    try:
        with open_catalog(results, look_at_all=look_at_all, of=of) as connection:
            return work(connection)
    except duckdb.Error as error:
        raise RollwayError(f"{results}: the tables cannot be read: {_words(error)}") from error


def write_database(results: Path) -> Path:
    """Writes `results/rollway.duckdb`: the same views for any DuckDB client.

    The same views at the same path give the same bytes. Replaced whole: readers keep the file that they have open.
    """
    target = results / DATABASE
    with atomic_path(target) as temporary:
        temporary.unlink(missing_ok=True)
        try:
            with duckdb.connect() as connection:
                connection.execute(f"ATTACH {quote(str(temporary))} AS rollway (STORAGE_VERSION '{STORAGE_VERSION}')")
                connection.execute("USE rollway")
                create_views(connection, results)
                connection.execute("USE memory")
                connection.execute("DETACH rollway")
        except duckdb.Error as error:
            raise unwritten(target, system_error(str(error)) or OSError(_words(error))) from error
    return target


def _words(error: duckdb.Error) -> str:
    return " ".join(str(error).split())


def run_sql(results: Path, query: str, format: str = "table", out: Path | None = None, name: str = "") -> str:
    """Answers one reading query over `results`; `name` is the file it is from, for messages.

    format: table (aligned; at most 200 rows and 60 characters a cell, what is left out is counted), csv, json (a list),
    jsonl, or parquet (needs `out`). With `out` the answer goes into that file, whole or not at all, and the text
    returned says so. Raises RollwayError on a mistake in the query, with its place and near names, and on anything but
    a question.
    """
    if format not in FORMATS:
        raise RollwayError(f"sql: format {format!r} is not one of {', '.join(FORMATS)}")
    if format == "parquet" and out is None:
        raise RollwayError("sql: --format parquet needs --output FILE")
    answer = with_catalog(results, lambda connection: ask(connection, query, name))
    if out is None:
        return as_text(answer, format)
    with atomic_path(out) as temporary:
        if format == "parquet":
            pq.write_table(answer, temporary, compression="zstd")
        else:
            temporary.write_text(as_text(answer, format) + "\n", encoding="utf-8")
    return f"{out}: {answer.num_rows} rows"


def describe(results: Path, word: str = "") -> str:
    """The tables and views of `results` with their columns, and the documented macros and views with an example each.

    word: only those whose name, columns or meaning have it.
    """
    query = """SELECT table_name,
            string_agg(column_name || ' ' || lower(data_type), ', ' ORDER BY column_index) AS columns
        FROM duckdb_columns() WHERE NOT internal GROUP BY table_name ORDER BY table_name"""
    columns = with_catalog(results, lambda connection: ask(connection, query))
    has = {row["table_name"]: row["columns"] for row in columns.to_pylist()}
    made = {view.name: view for view in documented()}
    parts = [f"{name}({has[name]})" for name in has if name not in made]
    for view in made.values():
        listed = f"\n    columns: {has[view.name]}" if view.name in has else ""
        parts.append(f"{view.meaning}{listed}\n    example: {view.example}")
    found = [part for part in parts if word.lower() in part.lower()]
    if not found:
        raise RollwayError(f"sql: no view or macro has the word {word!r}; `rollway sql --list` lists all")
    return "\n\n".join(found)
