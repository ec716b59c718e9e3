"""What is wrong with a query, for the person who wrote it: the place, the line with a caret, and what was meant."""

import json
import re
from dataclasses import dataclass
from difflib import get_close_matches

import duckdb

from rollway.errors import RollwayError
from rollway.store.views import documented

_WITH_A_PLACE = (duckdb.ParserException, duckdb.BinderException, duckdb.CatalogException, duckdb.ConversionException)
_KEYWORDS = "SELECT FROM WHERE GROUP ORDER HAVING LIMIT WITH JOIN QUALIFY UNION DISTINCT DESCRIBE".split()  # noqa: SIM905
_MAX_LINE = 100


@dataclass(frozen=True)
class Place:
    """Where in a query: line and column count from 1, `length` characters from there."""

    line: int
    column: int
    length: int
    text: str

    def shown(self) -> str:
        """The line and carets under the place; a long line is cut around it."""
        start = max(0, self.column - 1 - _MAX_LINE // 2) if len(self.text) > _MAX_LINE else 0
        cut = self.text[start : start + _MAX_LINE].replace("\t", " ")
        before, after = "..." if start else "", "..." if start + _MAX_LINE < len(self.text) else ""
        width = max(1, min(self.length, len(cut) - (self.column - 1 - start)))
        return f"    {before}{cut}{after}\n    {' ' * (len(before) + self.column - 1 - start)}{'^' * width}"


def explained(error: duckdb.Error, connection: duckdb.DuckDBPyConnection, query: str, name: str = "") -> RollwayError:
    """The error of `query` as one for the user; `name` is the file that the query is from.

    DuckDB says a place only when asked for JSON, and not of relations: the failing statement is sent once more for it.
    """
    details = _details(error, connection, query)
    place = _place(details, query)
    message = _message(details, connection, str(error))
    if place is None:
        return RollwayError(f"sql: {f'{name}: ' if name else ''}{message}")
    where = f"{name}:{place.line}:{place.column}" if name else f"line {place.line}, column {place.column}"
    return RollwayError(f"sql: {where}: {message}\n{place.shown()}")


def _details(error: duckdb.Error, connection: duckdb.DuckDBPyConnection, query: str) -> dict[str, str]:
    if not isinstance(error, _WITH_A_PLACE):
        return {}
    connection.execute("SET errors_as_json = true")
    try:
        connection.execute(query)
    except duckdb.Error as again:
        _, brace, rest = str(again).partition("{")
        try:
            return dict(json.loads(brace + rest))
        except ValueError:
            return {}  # a message without a place, or text after the JSON
    finally:
        connection.execute("RESET errors_as_json")
    return {}


def _place(details: dict[str, str], query: str) -> Place | None:
    """Offsets are in bytes. What goes wrong inside a macro has an offset into its text: that is no place here."""
    offset, length = _location(details)
    raw = query.encode()
    if offset is None or offset > len(raw):
        return None
    inside = any(re.search(rf"\b{view.name}\s*\(", query) for view in documented() if view.kind == "macro")
    found = raw[offset : offset + length].decode(errors="replace")
    named = details.get("name", "").lower()
    if inside and details.get("exception_type") != "Parser" and (not named or named not in found.lower()):
        return None
    before = raw[:offset].decode(errors="replace")
    line = before.count("\n")
    start = before.rfind("\n") + 1
    return Place(line + 1, len(before) - start + 1, max(1, len(found.split("\n")[0])), query.split("\n")[line])


def _location(details: dict[str, str]) -> tuple[int | None, int]:
    match = re.fullmatch(r"\[(\d+),\s*(\d+)\]", details.get("location", ""))
    if match:
        return int(match[1]), int(match[2])
    position = details.get("position", "")
    return (int(position), 1) if position.isdigit() else (None, 1)


def _message(details: dict[str, str], connection: duckdb.DuckDBPyConnection, text: str) -> str:
    """One line: what is not there with what was meant, or DuckDB's words."""
    name, missing = details.get("name", ""), details.get("error_subtype", "")
    kind = details.get("type", "")
    given = [c for c in details.get("candidates", "").split(",") if c]
    match missing, kind:
        case "COLUMN_NOT_FOUND", _:
            return f'there is no column "{name}" in what is read here{_columns_meant(name, given, connection)}'
        case "MISSING_ENTRY", "Table":
            return f'there is no view "{name}"{_views_meant(name, connection)}'
        case "MISSING_ENTRY", ("Scalar Function" | "Table Function"):
            return f'there is no function "{name}"{_functions_meant(name, given, kind)}'
        case "SYNTAX_ERROR", _:
            return _syntax(details["exception_message"])
        case _ if match := re.search(r'does not have a column named "(\w+)"', details.get("exception_message", "")):
            return " ".join(details["exception_message"].split()) + _columns_meant(match[1], [], connection)
        case _:
            words = details.get("exception_message") or text
            return " ".join(words.partition("\tCandidate functions:")[0].partition("\nLINE ")[0].split())


def _syntax(message: str) -> str:
    near = re.search(r'at or near "(\w+)"', message)
    meant = get_close_matches(near[1].upper(), _KEYWORDS, n=1) if near else []
    return message + (f"; did you mean {meant[0]}?" if meant and near and meant[0] != near[1].upper() else "")


def _columns_meant(name: str, given: list[str], connection: duckdb.DuckDBPyConnection) -> str:
    homes: dict[str, list[str]] = {}
    for view, column in connection.execute(
        "SELECT table_name, column_name FROM duckdb_columns() WHERE NOT internal ORDER BY ALL"
    ).fetchall():
        homes.setdefault(column, []).append(view)
    near = get_close_matches(name, [c.strip('"').rpartition(".")[2] for c in given], n=1, cutoff=0.6)
    if near:
        return f'; did you mean "{near[0]}"?'
    if name in homes:
        return f"; it is a column of {', '.join(homes[name])}"
    near = get_close_matches(name, homes, n=1, cutoff=0.7)
    if near:
        return f'; "{near[0]}" is a column of {", ".join(homes[near[0]])}'
    return f"; near it are {', '.join(given)}" if given else "; `rollway sql --list` shows all columns"


def _views_meant(name: str, connection: duckdb.DuckDBPyConnection) -> str:
    views = [row[0] for row in connection.execute("SELECT view_name FROM duckdb_views() WHERE NOT internal").fetchall()]
    for view in documented():
        if view.name == name.lower() and view.kind == "macro":
            return f"; it is a macro, for example {view.example}"
    near = get_close_matches(name.lower(), views, n=1)
    return f'; did you mean "{near[0]}"?' if near else f"; there are: {', '.join(sorted(views))}"


def _functions_meant(name: str, given: list[str], kind: str) -> str:
    macros = {view.name: view for view in documented()}
    near = get_close_matches(name.lower(), [*macros, *given], n=1)
    if near and near[0] in macros:
        return f'; did you mean "{near[0]}"? For example {macros[near[0]].example}'
    return f'; did you mean "{(near or given)[0]}"?' if near or given else ""
