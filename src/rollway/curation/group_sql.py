"""Which SQL files can run on slices of whole groups, and how their aggregates over a group are taken out.

`scored` lies in memory group by group. An aggregate over the whole group (`avg(reward) OVER g`) is therefore a sum over
neighbours, which `group_windows` takes for all groups at once; DuckDB's window operator sorts the rows anew for each.
What is left of the file is DuckDB's to compute. Both give the same bits (tests/curation/test_by_slices.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from rollway.curation.group_windows import FUNCTIONS
from rollway.curation.sql_file import SqlFile, analyst, sql_text, syntax_tree

_STEPS = ("reward", "filter", "advantage", "weight", "route", "select")
_NODES = {
    *("COLUMN_REF", "CONSTANT", "PARAMETER", "CASE", "CAST", "TYPE", "COMPARISON", "CONJUNCTION", "OPERATOR"),
    *("BETWEEN", "FUNCTION", "WINDOW"),
}
"""Expressions that look at one row, and windows; the rest (subqueries, lambdas, stars) may look anywhere."""


@dataclass(frozen=True)
class Window:
    """An aggregate over all rows of a group; `column` is None for count(*)."""

    function: str
    column: str | None


@dataclass(frozen=True)
class GroupSql:
    """A file whose rows depend on nothing outside their group, with rollouts and groups named by any rising numbers."""

    text: str
    """The file's SELECT, with the column `window_N` in the place of windows[N]."""
    windows: tuple[Window, ...]
    columns: frozenset[str]
    """Columns of `scored` that the text still names, rollout_id apart."""

    def reads(self) -> frozenset[str]:
        return self.columns | {window.column for window in self.windows if window.column is not None}


def group_sql(file: SqlFile) -> GroupSql | None:
    """The form of `file` that runs on slices; None where it is not known to give the same rows there."""
    return _analysed(file.step, file.text) if not file.allows and not file.star else None


@cache
def _analysed(step: str, text: str) -> GroupSql | None:
    if step not in _STEPS:
        return None
    tree = syntax_tree(text)
    node = tree["statements"][0]["node"]
    if not _plain_select(node):
        return None
    expressions = [child for part in _parts(node) for child in _walk(part)]
    if any(child["class"] not in _NODES for child in expressions):
        return None
    if any(child["class"] == "FUNCTION" and not _looks_at_one_row(child) for child in expressions):
        return None
    windows = [child for child in expressions if child["class"] == "WINDOW"]
    if any("group_id" not in map(_column, window["partitions"]) for window in windows):
        return None
    if not _names_are_only_compared(node["select_list"], expressions, windows):
        return None
    return _without_windows(tree, windows)


def _plain_select(node: dict[str, Any]) -> bool:
    """SELECT ... FROM scored [WHERE ...] [QUALIFY ...] and nothing else."""
    source = node.get("from_table") or {}
    return (
        node.get("type") == "SELECT_NODE"
        and not node["modifiers"]
        and not node["cte_map"]["map"]
        and not node["group_expressions"]
        and not node["group_sets"]
        and node["aggregate_handling"] == "STANDARD_HANDLING"
        and node["having"] is None
        and node["sample"] is None
        and source.get("type") == "BASE_TABLE"
        and source["qualified_name"]["path"] == ["scored"]
        and source["sample"] is None
        and not source["column_name_alias"]
    )


def _names_are_only_compared(select: list[dict], expressions: list[dict], windows: list[dict]) -> bool:
    """rollout_id is only returned, group_id only partitions: their strings make no difference."""
    ids = [e for e in select if _column(e) == "rollout_id"]
    if len(ids) != 1 or ids[0]["alias"] not in ("", "rollout_id"):
        return False
    partitions = [id(column) for window in windows for column in window["partitions"]]
    for child in expressions:
        name = _column(child)
        if name == "rollout_id" and child is not ids[0]:
            return False
        if name == "group_id" and id(child) not in partitions:
            return False
    return True


def _without_windows(tree: dict[str, Any], windows: list[dict[str, Any]]) -> GroupSql:
    """Changes `tree`: columns in the place of windows, and WHERE where QUALIFY has no window left."""
    node = tree["statements"][0]["node"]
    # What WHERE leaves out is not in the windows either: then they are DuckDB's.
    lifted = [] if node["where_clause"] is not None else [w for w in windows if _over_whole_group(w)]
    found: list[Window] = []
    for window in lifted:
        arguments = [_column(a["expression"]) for a in window["arguments"]]
        what = Window(window["function_name"], arguments[0] if arguments else None)
        if what not in found:
            found.append(what)
        alias = window["alias"]
        window.clear()
        name = f"window_{found.index(what)}"
        window.update({"class": "COLUMN_REF", "type": "COLUMN_REF", "alias": alias, "column_names": [name]})
    if lifted and len(lifted) == len(windows):
        node["where_clause"], node["qualify"] = node["qualify"], None
    text = sql_text(tree)
    named = {_column(child) for part in _parts(node) for child in _walk(part)} - {None, "rollout_id"}
    made = {f"window_{number}" for number in range(len(found))}
    return GroupSql(text, tuple(found), frozenset(str(name) for name in named) - made)


def _parts(node: dict[str, Any]) -> list[dict[str, Any]]:
    """The expressions of a SELECT."""
    return [part for part in (*node["select_list"], node["where_clause"], node["qualify"]) if part is not None]


def _over_whole_group(window: dict[str, Any]) -> bool:
    """One of FUNCTIONS of a column, over all rows of the group, in their order in `scored`."""
    whole = window["end"] == "UNBOUNDED_FOLLOWING" or (window["end"] == "CURRENT_ROW_RANGE" and not window["orders"])
    orders = [(_column(order["expression"]), order["type"]) for order in window["orders"]]
    arguments = [_column(a["expression"]) for a in window["arguments"]]
    return (
        window["type"] == "WINDOW_AGGREGATE"
        and window["function_name"] in FUNCTIONS
        and len(window["partitions"]) == 1
        and window["start"] == "UNBOUNDED_PRECEDING"
        and whole
        and orders in ([], [("sample", "ORDER_DEFAULT")], [("sample", "ASCENDING")])
        and window["filter_expr"] is None
        and window["exclude_clause"] == "NO_OTHER"
        and not window["distinct"]
        and not window["arg_orders"]
        and not window["ignore_nulls"]
        and (arguments == [] if window["function_name"] == "count" else len(arguments) == 1 and None not in arguments)
    )


def _column(node: Any) -> str | None:
    """The name of the column that an expression is, without its table."""
    if isinstance(node, dict) and node.get("class") == "COLUMN_REF":
        return str(node["column_names"][-1]).lower()
    return None


def _walk(tree: Any) -> Iterator[dict[str, Any]]:
    """Every expression of an expression, itself first."""
    if isinstance(tree, dict):
        if "class" in tree:
            yield tree
        for value in tree.values():
            yield from _walk(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _walk(value)


def _looks_at_one_row(call: dict[str, Any]) -> bool:
    plain = call["filter"] is None and not call["distinct"] and not call["order_bys"]["orders"]
    return plain and call["function_name"] in _row_functions()


@cache
def _row_functions() -> frozenset[str]:
    with analyst() as con:
        rows = con.execute(
            "SELECT function_name FROM duckdb_functions() GROUP BY function_name "
            "HAVING bool_and(function_type = 'scalar')"
        ).fetchall()
    return frozenset(row[0] for row in rows) - {"unnest", "nextval", "currval"}
