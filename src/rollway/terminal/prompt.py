"""`rollway sql` at a terminal without a query: a prompt with completion and a history, read-only like the command."""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import duckdb

from rollway.errors import RollwayError
from rollway.printable import printable_lines
from rollway.store.catalog import describe, open_catalog
from rollway.store.lineage import read_runs
from rollway.store.queries import as_text, ask
from rollway.store.views import documented

KEYWORDS = (
    "SELECT FROM WHERE GROUP BY ORDER HAVING QUALIFY LIMIT JOIN LEFT USING ON AS AND OR NOT IN IS NULL CASE WHEN THEN "
    "ELSE END DISTINCT OVER PARTITION WITH UNION ALL DESC ASC FILTER BETWEEN LIKE DESCRIBE SUMMARIZE"
)
COMMANDS = {".list": "views, macros and examples", ".reload": "open the folder anew", ".quit": "leave (or Ctrl-D)"}
WELCOME = (
    "{results}: {runs}. A query ends with ; or an empty line. Tab completes; "
    + "; ".join(f"{name}: {meaning}" for name, meaning in COMMANDS.items())
    + "."
)


class Completer:
    """What may stand at the cursor: columns of the views that the query names before all others."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, runs: list[str]) -> None:
        self.columns: dict[str, list[str]] = {}
        for view, column in connection.execute(
            "SELECT table_name, column_name FROM duckdb_columns() WHERE NOT internal ORDER BY table_name, column_index"
        ).fetchall():
            self.columns.setdefault(view, []).append(column)
        self.macros = [f"{view.name}(" for view in documented() if view.kind == "macro"]
        self.runs = runs

    def options(self, before: str, word: str) -> list[str]:
        """Completions of `word`, which ends the text `before` (the lines typed so far), the likeliest first."""
        if word.startswith("."):
            return [name for name in COMMANDS if name.startswith(word)]
        if (before.count("'") - word.count("'")) % 2:
            return [run for run in self.runs if run.startswith(word)]
        alias, dot, part = word.rpartition(".")
        if dot:
            views = self._aliases(before).get(alias.lower(), [alias.lower()])
            found = [f"{alias}.{column}" for view in views for column in self.columns.get(view, [])]
            return [name for name in dict.fromkeys(found) if name.startswith(f"{alias}.{part}")]
        lowered, last = word.lower(), re.findall(r"\w+", before[: len(before) - len(word)].upper())[-1:]
        views = [*self.columns, *(name for name in self.macros)]
        if last and last[0] in ("FROM", "JOIN"):
            return [name for name in views if name.startswith(lowered)]
        named = [view for view in self.columns if re.search(rf"\b{view}\b", before.lower())] or list(self.columns)
        columns = dict.fromkeys(column for view in named for column in self.columns[view])
        found = [name for name in [*columns, *views] if name.lower().startswith(lowered)] if word else list(columns)
        return found + [name for name in KEYWORDS.split() if word and name.startswith(word.upper())]

    def _aliases(self, text: str) -> dict[str, list[str]]:
        pairs = re.findall(r"\b(?:from|join)\s+(\w+)(?:\s+as)?\s+(\w+)", text.lower())
        found: dict[str, list[str]] = {}
        for view, alias in pairs:
            found.setdefault(alias, []).append(view)
        return found


def run(results: Path, read: Callable[[str], str] = input) -> None:
    """Reads queries until the end of input and prints their answers; a mistake is printed, and the prompt goes on.

    read: what gives a line for a prompt. Raises RollwayError when the folder cannot be opened at all.
    """
    session = _Session(results)
    forget = _complete_with(session) if read is input else None
    try:
        print(session.welcome())
        while (text := _statement(session, read)) is not None:
            session.answer(text)
    finally:
        session.close()
        if forget is not None:
            forget()


class _Session:
    """An open catalogue and the lines of the statement that is being typed."""

    def __init__(self, results: Path) -> None:
        self.results, self.lines = results, list[str]()
        self.open()

    def open(self) -> None:
        self.connection = open_catalog(self.results)
        self.runs = [row[0] for row in self.connection.execute("SELECT DISTINCT run FROM rollouts").fetchall()]
        self.runs = sorted({*self.runs, *read_runs(self.results)})
        self.completer = Completer(self.connection, self.runs)

    def close(self) -> None:
        self.connection.close()

    def welcome(self) -> str:
        return WELCOME.format(results=self.results, runs=", ".join(self.runs[:8]) or "no run yet")

    def answer(self, text: str) -> None:
        try:
            match text:
                case ".list":
                    print(describe(self.results))
                case ".reload":
                    self.close()
                    self.open()
                    print(self.welcome())
                case _ if text.startswith("."):
                    raise RollwayError(f"{text}: is no command; there are {', '.join(COMMANDS)}")
                case _:
                    print(as_text(ask(self.connection, text), "table"))
        except RollwayError as error:
            print(printable_lines(str(error)), file=sys.stderr)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)


def _statement(session: _Session, read: Callable[[str], str]) -> str | None:
    """The next statement; None at the end of input. Ctrl-C forgets what was typed of it."""
    session.lines = []
    while True:
        try:
            line = read("rollway> " if not session.lines else "     ... ")
        except EOFError:
            print()
            return "\n".join(session.lines) if session.lines else None
        except KeyboardInterrupt:
            session.lines = []
            print()
            continue
        if not session.lines and not line.strip():
            continue
        if not session.lines and line.strip().startswith("."):
            return None if line.strip() == ".quit" else line.strip()
        session.lines.append(line)
        if not line.strip() or line.rstrip().endswith(";"):
            return "\n".join(session.lines).strip()


def _complete_with(session: _Session) -> Callable[[], None] | None:
    """Binds Tab and the history file, where Python has readline; returns what writes the history."""
    try:
        import readline
    except ImportError:
        return None

    found: list[str] = []

    def complete(word: str, number: int) -> str | None:
        nonlocal found
        if number == 0:
            typed = readline.get_line_buffer()[: readline.get_endidx()]
            found = session.completer.options("\n".join([*session.lines, typed]), word)
        return found[number] if number < len(found) else None

    readline.set_completer(complete)
    readline.set_completer_delims(" \t\n,()=<>'+-*/;[]{}:")
    libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")
    history = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "rollway" / "sql_history"
    try:
        history.parent.mkdir(parents=True, exist_ok=True)
        if history.exists():
            readline.read_history_file(history)
    except OSError:
        return None  # no home to keep it in
    readline.set_history_length(1000)
    return lambda: readline.write_history_file(history)
