"""Runs a method's SQL files one after the other on the relation `scored`."""

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import duckdb

from rollway.curation.scored import one, quoted
from rollway.curation.sql_file import SqlFile, Value, reason
from rollway.errors import RollwayError

_REQUIRED = {
    "reward": {"reward": "DOUBLE"},
    "filter": {},
    "parents": {},
    "advantage": {"advantage": "DOUBLE"},
    "weight": {"weight": "DOUBLE"},
    "route": {"route": "VARCHAR"},
    "pair": {"pair_id": "VARCHAR", "role": "VARCHAR"},
    "select": {},
}
_OPTIONAL = {
    "advantage": {"token_advantage": "FLOAT[]"},
    "weight": {"span": "VARCHAR"},
    "select": {"advantage": "DOUBLE", "weight": "DOUBLE", "route": "VARCHAR", "span": "VARCHAR"},
}
_LOST_COLUMN = re.compile(r'Referenced column "(\w+)" not found')
_MAY_DROP = ("filter", "parents", "pair", "select")
_NUMBERS = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT")


@dataclass(frozen=True)
class Step:
    """A SQL file with the values of its parameters."""

    file: SqlFile
    values: dict[str, Value | None]


SECONDS = "ROLLWAY_SQL_SECONDS"
"""The environment variable that says how many seconds a statement may take. Not the config, nor a job's spec: it
decides nothing of what is written."""
USUAL = 3600.0
NO_ROWS_LIMIT = 20.0
"""Seconds for a statement on no rows: far more than any needs that ends."""


def run_steps(con: duckdb.DuckDBPyConnection, steps: list[Step], *, no_rows: bool = False) -> None:
    """Replaces table `scored` by what the steps make of it; its row order is kept. no_rows: it is empty, for a trial.

    Results become columns: `reward` is replaced, `advantage`, `weight`, `route`, `pair_id` and `role` are added. Where
    rollouts repeat, `slot` numbers the repeats, and the steps that follow return it beside rollout_id.

    Raises RollwayError that names the SQL file and the mend.
    """
    for step in steps:
        _evaluate(con, step, no_rows)
        _merge(con, step.file)


def _evaluate(con: duckdb.DuckDBPyConnection, step: Step, no_rows: bool) -> None:
    """Creates `rollway.result` from the step's SELECT."""
    path = step.file.path
    try:
        with _within(con, step, no_rows):
            con.execute(f"CREATE TABLE rollway.result AS {step.file.text}", step.values)
    except duckdb.PermissionException:
        raise RollwayError(f"{path}: reaches for a file or an extension; curation SQL sees only `scored`") from None
    except (duckdb.BinderException, duckdb.CatalogException) as error:
        columns = ", ".join(_columns(con, "scored"))
        lost = _LOST_COLUMN.search(str(error))
        mend = f"; if {lost[1]} is a scorer, add it to score.scorers" if lost else ""
        raise RollwayError(f"{path}: {reason(error)}; `scored` has the columns {columns}{mend}") from None
    except duckdb.OutOfMemoryException as error:
        raise RollwayError(f"{path}: {reason(error)}; give the curate stage more memory") from None
    except duckdb.Error as error:
        raise RollwayError(f"{path}: {reason(error)}") from None


@contextmanager
def _within(con: duckdb.DuckDBPyConnection, step: Step, no_rows: bool) -> Iterator[None]:
    """Interrupts what runs longer than it may. Raises RollwayError then."""
    given = _seconds()
    limit = NO_ROWS_LIMIT if no_rows else given
    over = threading.Event()

    def end() -> None:
        over.set()
        con.interrupt()

    timer = threading.Timer(limit, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    except duckdb.InterruptException:
        if not over.is_set():
            raise
        begin = f"{step.file.path}: did not end within {limit:g} s"
        if no_rows:
            raise RollwayError(f"{begin}, on no rows: does it recurse without end?") from None
        raise RollwayError(
            f"{begin}; does it recurse without end? If it is only slow, set {SECONDS} in the environment to more"
        ) from None
    finally:
        timer.cancel()
        # An interrupt that has begun must not meet the next statement.
        timer.join()


def _seconds() -> float:
    given = os.environ.get(SECONDS, "")
    try:
        seconds = float(given) if given else USUAL
    except ValueError:
        seconds = 0.0
    if not 0.0 < seconds <= threading.TIMEOUT_MAX:
        raise RollwayError(f"{SECONDS}={given}: is no number of seconds above 0; correct it, or unset it")
    return seconds


def _merge(con: duckdb.DuckDBPyConnection, file: SqlFile) -> None:
    """Checks `rollway.result` and joins it to `scored`."""
    before = _columns(con, "scored")
    keys = ["rollout_id"] + (["slot"] if "slot" in before else [])
    values = result_columns(file, keys, _columns(con, "rollway.result"))
    _check_values(con, file, values)
    key = ", ".join(keys)
    repeats = "repeats" in file.allows
    old = one(con, "SELECT count(*) FROM scored")[0]
    rows = one(con, "SELECT count(*) FROM rollway.result")[0]
    distinct = one(con, f"SELECT count(*) FROM (SELECT DISTINCT {key} FROM rollway.result)")[0]
    if rows != distinct and not repeats:
        _refuse_repeats(con, file, key)
    kept = ", ".join(f"s.{name}" for name in map(quoted, before) if name.strip('"') not in (*values, "slot"))
    added = "".join(f", CAST(r.{name} AS {kind}) AS {name}" for name, kind in values.items())
    previous = "s.slot, " if "slot" in before else ""
    slot = (
        ", CAST(row_number() OVER (PARTITION BY s.rollout_id ORDER BY "
        + previous
        + ", ".join([f"r.{name}" for name in values] or ["s.rollout_id"])
        + ") - 1 AS INTEGER) AS slot"
        if repeats or previous
        else ""
    )
    con.execute(
        f"CREATE TABLE scored_next AS SELECT {kept}{added}{slot} FROM scored s JOIN rollway.result r USING ({key}) "
        f"ORDER BY s.rowid{', slot' if slot else ''}"
    )
    joined = one(con, "SELECT count(*) FROM scored_next")[0]
    if joined != rows:
        _refuse_unknown(con, file, keys)
    if distinct != old and file.step not in _MAY_DROP and "drops" not in file.allows:
        raise RollwayError(
            f"{file.path}: returns {distinct} of {old} rows; a {file.step} file returns every row "
            "(say `-- allows: drops` in its header if the others shall leave the batch)"
        )
    con.execute("DROP TABLE scored; DROP TABLE rollway.result; ALTER TABLE scored_next RENAME TO scored")
    if file.step == "pair":
        _check_pairs(con, file)


def result_columns(file: SqlFile, keys: list[str], found: dict[str, str]) -> dict[str, str]:
    """The result's value columns and the types they are stored with. Raises RollwayError where columns do not fit."""
    required, optional = _REQUIRED[file.step], _OPTIONAL.get(file.step, {})
    for name in (*keys, *required):
        if name not in found:
            raise RollwayError(
                f"{file.path}: its result lacks the column {name}; a {file.step} file returns "
                f"{', '.join((*keys, *required))}, this one {', '.join(found)}"
            )
    known = required | optional
    extra = [name for name in found if name not in known and name not in keys]
    if extra:
        raise RollwayError(
            f"{file.path}: returns {', '.join(extra)}, which nothing reads after a {file.step} step; "
            f"return only {', '.join((*keys, *known))}"
        )
    for name, kind in found.items():
        number = kind in (*_NUMBERS, "FLOAT", "DOUBLE") or kind.startswith("DECIMAL")
        if known.get(name) == "DOUBLE" and not number:
            raise RollwayError(f"{file.path}: {name} is of type {kind}, not a number; CAST({name} AS DOUBLE)")
    return {name: kind for name, kind in known.items() if name in found}


def _check_values(con: duckdb.DuckDBPyConnection, file: SqlFile, values: dict[str, str]) -> None:
    for name, kind in values.items():
        match kind:
            case "DOUBLE":
                bad = f"{name} IS NULL OR NOT isfinite(CAST({name} AS DOUBLE))"
            case "FLOAT[]":
                bad = f"len(list_filter({name}, lambda x: x IS NULL OR NOT isfinite(x))) > 0"
            case _:
                bad = f"{name} IS NULL"
        count, example, value = one(
            con,
            f"SELECT count(*), min(rollout_id), arg_min(CAST({name} AS VARCHAR), rollout_id) "
            f"FROM rollway.result WHERE {bad}",
        )
        if count:
            raise RollwayError(
                f"{file.path}: {name} is {value or 'NULL'} for rollout {example} ({count} rows); "
                "give every returned row a finite value"
                if kind != "VARCHAR"
                else f"{file.path}: {name} is NULL for rollout {example} ({count} rows); give every row a value"
            )


def _refuse_repeats(con: duckdb.DuckDBPyConnection, file: SqlFile, key: str) -> None:
    example, count = one(
        con, f"SELECT rollout_id, count(*) AS n FROM rollway.result GROUP BY {key} HAVING n > 1 ORDER BY {key} LIMIT 1"
    )
    mend = "say `-- allows: repeats` in its header if that is meant, else look for a join that multiplies rows"
    if file.step not in ("weight", "pair", "select"):
        mend = "look for a join that multiplies rows"
    raise RollwayError(f"{file.path}: returns rollout {example} {count} times; {mend}")


def _refuse_unknown(con: duckdb.DuckDBPyConnection, file: SqlFile, keys: list[str]) -> None:
    same = " AND ".join(f"s.{key} = r.{key}" for key in keys)
    count, example = one(
        con,
        "SELECT count(*), min(r.rollout_id) FROM rollway.result r "
        f"WHERE NOT EXISTS (SELECT 1 FROM scored s WHERE {same})",
    )
    raise RollwayError(
        f"{file.path}: returns {count} rows that are not in `scored` (the first: rollout_id {example}); "
        "return rollout_id as `scored` has it"
    )


def _check_pairs(con: duckdb.DuckDBPyConnection, file: SqlFile) -> None:
    bad = con.execute(
        "SELECT pair_id, string_agg(role, ', ' ORDER BY role) FROM scored GROUP BY pair_id "
        "HAVING count(*) <> 2 OR min(role) <> 'chosen' OR max(role) <> 'rejected' OR min(rollout_id) = max(rollout_id) "
        "ORDER BY pair_id LIMIT 1"
    ).fetchall()
    if bad:
        pair, roles = bad[0]
        raise RollwayError(
            f"{file.path}: pair {pair} holds the roles {roles}; a pair is one chosen and another rejected rollout"
        )


def _columns(con: duckdb.DuckDBPyConnection, table: str) -> dict[str, str]:
    return {name: kind for name, kind, *_ in con.execute(f"DESCRIBE {table}").fetchall()}
