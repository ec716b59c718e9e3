"""One SQL file of a method: found, parsed, checked, its parameters bound."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import duckdb

from rollway.config.assets import find
from rollway.config.curation import CURATE_STEPS, STEP_FOLDERS, CurateConfig, SqlPart
from rollway.errors import RollwayError

Value = float | int | bool | str

GIVEN = ("round", "seed", "progress")
"""Parameters whose values the workflow knows; a recipe that sets them itself wins."""

_TYPES: dict[str, tuple[type, ...]] = {"double": (float, int), "int": (int,), "bool": (bool,), "string": (str,)}
_PARAM = re.compile(
    r"--\s*param\s+(?P<name>[a-z_][a-z0-9_]*)\s*:\s*(?P<type>[a-z]+)"
    r"(?:\s*=\s*(?P<default>[^\s,\[]+))?"
    r"(?:\s*\[(?P<choices>[^\],]*)\]|\s*(?P<range>[\[(][^\[\](),|]+,[^\[\](),|]+[\])]))?"
    r"(?:\s+when\s+(?P<switch>[a-z_][a-z0-9_]*)\s*=\s*(?P<on>[^\s,]+))?\s*,\s*(?P<meaning>\S.*)"
)
_NEEDS = re.compile(r"--\s*needs:\s*curate\.replay\s*>=\s*(?P<name>[a-z_][a-z0-9_]*)\s*$")
_ALLOWS = re.compile(r"--\s*allows:\s*(?P<what>\S+)\s*$")
_ALLOWABLE = {"repeats": ("weight", "pair", "select"), "drops": ("reward", "advantage", "weight", "route")}


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; an end with a round bracket is left out."""

    low: float
    high: float
    open_low: bool
    open_high: bool

    def __contains__(self, value: float) -> bool:
        above = value > self.low or (value == self.low and not self.open_low)
        return above and (value < self.high or (value == self.high and not self.open_high))

    def __str__(self) -> str:
        return f"{'[('[self.open_low]}{self.low:g}, {self.high:g}{'])'[self.open_high]}"


@dataclass(frozen=True)
class Param:
    """One `-- param NAME: TYPE[=DEFAULT] [A|B] when OTHER=VALUE, meaning` line; `choices` are the values in brackets.

    In place of choices a number may have a `range`. `when`: the parameter, and the value of it, without which this
    one has no effect.
    """

    name: str
    type: str
    default: Value | None
    choices: tuple[Value, ...]
    meaning: str
    range: Range | None = None
    when: tuple[str, Value] | None = None


@dataclass(frozen=True)
class SqlFile:
    """A checked SQL file: exactly one SELECT, every parameter declared and used."""

    path: Path
    step: str
    text: str
    """The file's SQL, without its last semicolon."""
    description: str
    """The first comment lines: what it computes, and the paper."""
    params: dict[str, Param]
    allows: frozenset[str]
    """`repeats` (a rollout may come back more than once), `drops` (rows may be left out)."""
    names: frozenset[str]
    """Every column name in the SQL, lower case."""
    star: bool
    """Whether it reads all columns by `*`."""
    reach: str | None = None
    """The parameter, given by `-- needs: curate.replay >= NAME`, that says how many earlier rounds it draws from."""

    def acts(self, name: str, values: Mapping[str, Value | None]) -> bool:
        """Whether the parameter `name` has an effect beside the others' values."""
        when = self.params[name].when
        return when is None or values[when[0]] == when[1]

    def reads(self, *columns: str) -> bool:
        """Whether it names one of the columns, or all of them by `*`."""
        return self.star or not self.names.isdisjoint(columns)


def read_step(step: str, part: SqlPart) -> SqlFile:
    """The file of `curate.{step}`. Raises RollwayError that names the file, the place in it and the mend."""
    path = find("sql", part.sql, ".sql", STEP_FOLDERS[step])
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RollwayError(f"{path}: cannot be read as text ({error})") from error
    return parse(path, step, text)


def steps(curate: CurateConfig) -> list[tuple[str, SqlPart]]:
    """The configured steps in the order in which they run."""
    parts = [(step, getattr(curate, step)) for step in CURATE_STEPS]
    return [(step, part) for step, part in parts if part is not None]


def sql_paths(curate: CurateConfig) -> list[Path]:
    """The SQL files that curation reads: declared inputs of the stage."""
    return [find("sql", part.sql, ".sql", STEP_FOLDERS[step]) for step, part in steps(curate)]


@cache
def parse(path: Path, step: str, text: str) -> SqlFile:
    """Header and statement of one file. Raises RollwayError."""
    description, params, allows, reach = _header(path, step, text)
    with analyst() as con:
        statement = _only_select(con, path, text)
    names, star = _names(path, text)
    used = set(statement.named_parameters)
    for name in sorted(used - set(params)):
        raise RollwayError(f"{path}: uses ${name}, which no `-- param {name}: TYPE, meaning` line declares")
    for name in sorted(set(params) - used):
        raise RollwayError(f"{path}: declares `-- param {name}` but never uses ${name}; remove the line")
    return SqlFile(path, step, text.strip().rstrip(";"), description, params, allows, names, star, reach)


def bind(file: SqlFile, part: SqlPart, given: Mapping[str, Value]) -> dict[str, Value | None]:
    """The values of the file's parameters: the recipe's, else what the workflow knows, else the default.

    None for a parameter without default that has no effect beside the others' values.
    Raises RollwayError for parameters that are unknown, missing, of a wrong type or value, or without effect.
    """
    key = "rollout.derive.parents" if file.step == "parents" else f"curate.{file.step}"
    for name in part.params:
        if name not in file.params:
            near = get_close_matches(name, file.params, n=1) or sorted(file.params)
            hint = f"did you mean {' or '.join(near)}?" if near else "the file declares none; remove it"
            raise RollwayError(f"{key}.{name}: {file.path} declares no such parameter; {hint}")
    values: dict[str, Value | None] = {}
    for name, param in sorted(file.params.items(), key=lambda item: item[1].when is not None):
        if param.when is not None and not file.acts(name, values):
            if name in part.params:
                raise RollwayError(
                    f"{key}.{name}: has no effect unless {param.when[0]} is {_shown(param.when[1])} ({file.path}: "
                    f"{param.meaning}); remove it, or set it to null where the recipe gives it"
                )
            values[name] = param.default
        elif name in part.params:
            values[name] = _typed(f"{key}.{name}", file.path, param, part.params[name])
        elif name in given:
            values[name] = _typed(f"{name} (given by the workflow)", file.path, param, given[name])
        elif param.default is not None:
            values[name] = param.default
        else:
            raise RollwayError(f"{key}.{name}: is missing; {file.path} needs it ({param.type}: {param.meaning})")
    return values


def _header(path: Path, step: str, text: str) -> tuple[str, dict[str, Param], frozenset[str], str | None]:
    params: dict[str, Param] = {}
    reach: str | None = None
    allows: set[str] = set()
    description: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line.startswith("--"):
            break
        if re.match(r"--\s*param\b", line):
            param = _param(path, number, line)
            if param.name in params:
                raise RollwayError(f"{path}, line {number}: parameter {param.name} is declared twice")
            params[param.name] = param
        elif re.match(r"--\s*allows\b", line):
            match = _ALLOWS.match(line)
            if match is None or step not in _ALLOWABLE.get(match["what"], ()):
                possible = [what for what, where in _ALLOWABLE.items() if step in where]
                raise RollwayError(
                    f"{path}, line {number}: {line!r} is not possible in a {step} file"
                    + (f"; write `-- allows: {possible[0]}`" if possible else "; remove the line")
                )
            allows.add(match["what"])
        elif re.match(r"--\s*needs\b", line):
            needs = _NEEDS.match(line)
            if needs is None:
                raise RollwayError(
                    f"{path}, line {number}: cannot read {line!r}; write `-- needs: curate.replay >= NAME`"
                )
            reach = needs["name"]
        elif not params and not allows:
            description.append(line.lstrip("- ").rstrip())
    if reach is not None and (reach not in params or params[reach].type != "int"):
        raise RollwayError(f"{path}: needs curate.replay >= {reach}, and declares no `-- param {reach}: int, meaning`")
    params = {name: _with_switch(path, param, params) for name, param in params.items()}
    return " ".join(description), params, frozenset(allows), reach


def _with_switch(path: Path, param: Param, params: dict[str, Param]) -> Param:
    """The parameter with the value that it depends on in its type, so far a text."""
    if param.when is None:
        return param
    name, text = param.when
    if name not in params or params[name].when is not None:
        lacks = "which depends on another itself" if name in params else "which no `-- param` line declares"
        raise RollwayError(f"{path}: parameter {param.name} depends on {name}, {lacks}")
    switch = params[name]
    try:
        value = _from_text(switch.type, str(text))
    except ValueError as error:
        raise RollwayError(f"{path}: parameter {param.name} depends on {name}: {error}") from None
    if switch.choices and value not in switch.choices:
        raise RollwayError(f"{path}: parameter {param.name} depends on {name}={value}, which is none of its values")
    return replace(param, when=(name, value))


def _param(path: Path, number: int, line: str) -> Param:
    match = _PARAM.fullmatch(line)
    if match is None or match["type"] not in _TYPES:
        raise RollwayError(
            f"{path}, line {number}: cannot read {line!r}; write `-- param NAME: TYPE[=DEFAULT], meaning` "
            f"with TYPE one of {', '.join(_TYPES)}; values [A|B] or a range [LOW, HIGH), and `when OTHER=VALUE`, may "
            "stand before the comma"
        )
    kind = match["type"]
    try:
        default = None if match["default"] is None else _from_text(kind, match["default"])
        choices = tuple(_from_text(kind, c.strip()) for c in (match["choices"] or "").split("|") if c.strip())
        allowed = None if match["range"] is None else _range(match["range"])
    except ValueError as error:
        raise RollwayError(f"{path}, line {number}: {error}") from None
    if allowed is not None and kind not in ("double", "int"):
        raise RollwayError(f"{path}, line {number}: a {kind} has no range; give its values as [A|B]")
    if allowed is not None and isinstance(default, float | int) and default not in allowed:
        raise RollwayError(f"{path}, line {number}: the default {default} is not in {allowed}")
    if choices and default is not None and default not in choices:
        raise RollwayError(f"{path}, line {number}: the default {default} is none of the choices {list(choices)}")
    when = None if match["switch"] is None else (match["switch"], match["on"])
    return Param(match["name"], kind, default, choices, match["meaning"], allowed, when)


def _range(text: str) -> Range:
    low, high = (float(end) for end in text[1:-1].split(","))
    if not low < high:
        raise ValueError(f"the range {text} is empty")
    return Range(low, high, open_low=text[0] == "(", open_high=text[-1] == ")")


def _shown(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _from_text(kind: str, text: str) -> Value:
    match kind:
        case "double":
            return float(text)
        case "int":
            return int(text)
        case "bool":
            if text not in ("true", "false"):
                raise ValueError(f"{text!r} is neither true nor false")
            return text == "true"
        case _:
            return text


def _typed(key: str, path: Path, param: Param, value: Any) -> Value:
    right = isinstance(value, _TYPES[param.type]) and (param.type == "bool" or not isinstance(value, bool))
    if not right:
        raise RollwayError(f"{key}: {value!r} is not of type {param.type}, which {path} declares ({param.meaning})")
    if param.choices and value not in param.choices:
        allowed = ", ".join(str(choice) for choice in param.choices)
        raise RollwayError(f"{key}: {value!r} is not one of {allowed} ({path}: {param.meaning})")
    if param.range is not None and value not in param.range:
        raise RollwayError(f"{key}: {value!r} is not in {param.range} ({path}: {param.meaning})")
    return float(value) if param.type == "double" else value


def _only_select(con: duckdb.DuckDBPyConnection, path: Path, text: str) -> Any:
    try:
        statements = con.extract_statements(text)
    except duckdb.Error as error:
        raise RollwayError(f"{path}: {reason(error)}") from None
    if len(statements) != 1:
        raise RollwayError(f"{path}: holds {len(statements)} statements; a step is exactly one SELECT")
    if statements[0].type != duckdb.StatementType.SELECT:
        kind = statements[0].type.name
        raise RollwayError(f"{path}: holds a {kind} statement; a step is exactly one SELECT")
    return statements[0]


def _names(path: Path, text: str) -> tuple[frozenset[str], bool]:
    """Column names in the statement and whether it holds a `*`. Refuses what makes two runs differ, or writes."""
    tree = syntax_tree(text)
    if tree["error"]:
        raise RollwayError(f"{path}: cannot be analysed ({tree.get('error_message')}); write it as a plain SELECT")
    names: set[str] = set()
    star = False
    for node, parts in _scoped(tree["statements"], frozenset()):
        kind = str(node.get("type", ""))
        _check_source(path, kind, node, parts)
        if kind.endswith("_QUERY_NODE"):
            verb = kind.removesuffix("_QUERY_NODE")
            raise RollwayError(f"{path}: holds {verb}; curation SQL only reads: write one plain SELECT")
        if (changes := _changes(kind, node)) is not None:
            raise RollwayError(
                f"{path}: {changes} from run to run; derive numbers from md5_number_lower(rollout_id) instead"
            )
        names.update(str(part).lower() for part in node.get("column_names", []) if isinstance(part, str))
        names.update(str(part).lower() for part in node.get("using_columns", []))
        star = star or kind == "STAR"
    return frozenset(names), star


def _changes(kind: str, node: dict[str, Any]) -> str | None:
    """What of a node is not the same in every run; None where nothing is."""
    if node.get("sample") is not None:
        return "holds USING SAMPLE or TABLESAMPLE, whose rows change"
    name = str(node.get("function_name")).lower()
    # DuckDB 1 calls them children.
    given = node.get("arguments", node.get("children", []))
    if name in _unrepeatable() or name in _BY_CHANCE or (name == "age" and len(given) == 1):
        return f"calls {node['function_name']}(), whose value changes"
    words = node.get("column_names", [])
    if kind == "COLUMN_REF" and len(words) == 1 and str(words[0]).lower() in _OF_THE_CLOCK:
        return f"reads {words[0]}, whose value changes"
    return None


_BY_CHANCE = ("approx_quantile", "approx_top_k", "reservoir_quantile", "current_localtime", "current_localtimestamp")
"""Aggregates whose value depends on the order in which threads meet the rows, or on a draw; and functions of the clock
that DuckDB lists as constant."""
_OF_THE_CLOCK = ("current_date", "current_time", "current_timestamp", "localtime", "localtimestamp")
"""Words of SQL that are no functions, and that DuckDB parses as columns."""
_GENERATORS = ("range", "generate_series", "unnest")
"""Table functions that read nothing."""
_OF_THE_MACHINE = ("current_setting", "getenv", "getvariable", "version")


def _scoped(tree: Any, parts: frozenset[str]) -> Iterator[tuple[dict[str, Any], frozenset[str]]]:
    """Every node with the names, lower case, that WITH gives to parts of the statement and that hold at this node.

    A part is known to those after it in its WITH, to its own step (right of UNION) where it is recursive, and to the
    query that has the WITH with all inside it; nowhere else, where the name may be one of DuckDB's own tables.
    """
    if isinstance(tree, dict):
        for part in tree.get("cte_map", {}).get("map", []):
            yield from _scoped(part["value"], parts)
            parts |= {str(part["key"]).lower()}
        yield tree, parts
        # Left of UNION, where a recursive part starts, there is no such part yet.
        step = {str(tree["cte_name"]).lower()} if tree.get("type") == "RECURSIVE_CTE_NODE" else set()
        for key, value in tree.items():
            if key != "cte_map":
                yield from _scoped(value, parts | step if key == "right" else parts)
    elif isinstance(tree, list):
        for value in tree:
            yield from _scoped(value, parts)


def _check_source(path: Path, kind: str, node: dict[str, Any], parts: frozenset[str]) -> None:
    """Raises RollwayError where a node reads anything but `scored` and the parts in scope, or looks at this machine.

    DuckDB is shut off besides; but tables about itself and its settings, which name folders, stay open in it.
    """
    if kind == "BASE_TABLE":
        place = [node.get("catalog_name"), node.get("schema_name")]
        name = ".".join(str(part) for part in (*place, node["table_name"]) if part)
        table, plain = str(node["table_name"]).lower(), place == ["", ""]
        if not (plain and table in parts) and not (table == "scored" and (plain or place == ["", "main"])):
            raise RollwayError(f"{path}: {name} does not exist here; curation SQL sees only `scored`")
    if kind == "SHOW_REF":
        raise RollwayError(f"{path}: holds DESCRIBE, SHOW or SUMMARIZE; curation SQL sees only `scored`, by SELECT")
    if kind == "TABLE_FUNCTION" and (function := str(node["function"]["function_name"]).lower()) not in _GENERATORS:
        raise RollwayError(f"{path}: reads {function}(); curation SQL sees only `scored`")
    if (function := str(node.get("function_name")).lower()) in _OF_THE_MACHINE:
        raise RollwayError(f"{path}: calls {function}(), which tells of this machine; curation SQL sees only `scored`")


def syntax_tree(text: str) -> dict[str, Any]:
    """DuckDB's parse: {"error": ..., "statements": [{"node": ...}]}."""
    with analyst() as con:
        return json.loads(con.execute("SELECT json_serialize_sql(?)", [text]).fetchall()[0][0])


def sql_text(tree: dict[str, Any]) -> str:
    """The statement that such a tree stands for."""
    with analyst() as con:
        return con.execute("SELECT json_deserialize_sql(?::JSON)", [json.dumps(tree)]).fetchall()[0][0]


def analyst() -> duckdb.DuckDBPyConnection:
    """A connection for questions about SQL, to a database without data; close it after use."""
    return _engine().cursor()


@cache
def _engine() -> duckdb.DuckDBPyConnection:
    # No thread beside ours: the warm worker's forks go on with this engine. DuckDB 2 starts some for reading files.
    alone = {"async_threads": 0} if int(duckdb.__version__.partition(".")[0]) >= 2 else {}
    return duckdb.connect(config={"threads": 1, **alone})


@cache
def _unrepeatable() -> frozenset[str]:
    with analyst() as con:
        rows = con.execute(
            "SELECT DISTINCT function_name FROM duckdb_functions() "
            "WHERE stability IN ('VOLATILE', 'CONSISTENT_WITHIN_QUERY') AND function_name <> 'error'"
        ).fetchall()
    return frozenset(row[0] for row in rows)


def reason(error: duckdb.Error) -> str:
    """DuckDB's message on one line, with its line number and without its suggestions of other tables."""
    lines = [line for line in str(error).splitlines() if line.strip() and set(line.strip()) != {"^"}]
    place = next((line for line in lines if line.startswith("LINE ")), "")
    text = lines[0] if lines else type(error).__name__
    number, _, code = place.removeprefix("LINE ").partition(":")
    return f"{text} (line {number}: {code.strip()})" if place else text
