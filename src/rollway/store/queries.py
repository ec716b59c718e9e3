"""`rollway sql`: read-only questions to the catalogue, and their answers as text."""

import csv
import io
import json
import math
from typing import Any

import duckdb
import pyarrow as pa

from rollway.errors import RollwayError
from rollway.printable import printable
from rollway.store.query_errors import explained

FORMATS = ("table", "csv", "json", "jsonl", "parquet")
READING = {"SELECT", "EXPLAIN", "RELATION"}
MAX_TABLE_ROWS = 200
MAX_CELL = 60


def ask(connection: duckdb.DuckDBPyConnection, query: str, name: str = "") -> pa.Table:
    """The answer to one reading statement; `name` is the file it is from.

    Raises RollwayError on anything else, and on mistakes, with the place in the query.
    """
    try:
        statements = connection.extract_statements(query)
        if len(statements) != 1:
            raise RollwayError(f"sql: {len(statements)} statements given; ask one question at a time")
        kind = statements[0].type.name
        if kind not in READING:
            raise RollwayError(
                f"sql: {kind} is refused, the catalogue is read-only; ask with SELECT, FROM, DESCRIBE or SUMMARIZE"
            )
        relation = connection.sql(query)
        return pa.table({}) if relation is None else relation.to_arrow_table()
    except duckdb.Error as error:
        raise explained(error, connection, query, name) from error


def rows(connection: duckdb.DuckDBPyConnection, query: str, *values: Any) -> list[tuple[Any, ...]]:
    """All rows of a query of rollway's own. Raises RollwayError where a file behind the views is damaged."""
    try:
        return connection.execute(query, list(values)).fetchall()
    except (duckdb.IOException, duckdb.InvalidInputException) as error:
        raise RollwayError(f"{' '.join(str(error).split())}; delete the damaged file and rerun its stage") from error


def as_text(answer: pa.Table, format: str) -> str:
    """The rows as table, csv, json or jsonl. Control characters are escaped but in csv, which is data as it is: where
    it goes to a terminal, `printable_lines` escapes it."""
    match format:
        case "table":
            return _aligned(answer)
        case "csv":
            buffer = io.StringIO()
            writer = csv.writer(buffer, lineterminator="\n")
            writer.writerow(answer.column_names)
            for row in _rows(answer):
                writer.writerow([json.dumps(plain(v)) if isinstance(v, (list, dict, tuple)) else v for v in row])
            return buffer.getvalue().rstrip("\n")
        case "json":
            return json.dumps(_records(answer), indent=1)
        case _:
            return "\n".join(json.dumps(record) for record in _records(answer))


def _rows(answer: pa.Table) -> list[tuple[Any, ...]]:
    return list(zip(*(map(_value, column.to_pylist()) for column in answer.columns), strict=True))


def _records(answer: pa.Table) -> list[dict[str, Any]]:
    return [dict(zip(answer.column_names, map(plain, row), strict=True)) for row in _rows(answer)]


def _value(value: Any) -> Any:
    """Arrow gives a map as a list of pairs."""
    pairs = isinstance(value, list) and value and all(isinstance(v, tuple) for v in value)
    return dict(value) if pairs else value


def plain(value: Any) -> Any:
    """As JSON can have it, at any depth: it has no NaN and no infinities, so they become null."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case list() | tuple():
            return [plain(v) for v in value]
        case dict():
            return {str(k): plain(v) for k, v in value.items()}
        case None | bool() | int() | str():
            return value
        case _:
            return str(value)


def _aligned(answer: pa.Table) -> str:
    rows = [[_cell(v) for v in row] for row in _rows(answer.slice(0, MAX_TABLE_ROWS))]
    right = [pa.types.is_integer(f.type) or pa.types.is_floating(f.type) for f in answer.schema]
    header = [printable(name) for name in answer.column_names]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in [header, ["-" * w for w in widths], *rows]
    ]
    if answer.num_rows > MAX_TABLE_ROWS:
        lines.append(f"... {answer.num_rows - MAX_TABLE_ROWS} more rows; --format csv gives all")
    else:
        lines.append(f"({answer.num_rows} row{'' if answer.num_rows == 1 else 's'})")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    match value:
        case None:
            return ""
        case bool():
            return str(value).lower()
        case float():
            return f"{value + 0.0:.6g}"  # a sum that is -0.0 on some machines reads 0
        case _:
            text = printable(str(value))
            return text if len(text) <= MAX_CELL else text[: MAX_CELL - 3] + "..."
