"""The SQL of the catalogue: views over the files of a results folder, by glob."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from rollway.config.assets import folder
from rollway.config.scorers import ScoreConfig
from rollway.errors import RollwayError
from rollway.store.lineage import Inherited, inherited, read_runs
from rollway.store.tables import BATCH, ROLLOUTS, TABLES, Table

METRIC_FILES = ("metrics.json", "curate.json", "evals.json", "lm_eval.json", "teacher-*.json", "discriminator-*.json")
_REWARD_MODELS = "reward_models/*/metrics.json"

_ROUND = "*/r[0-9][0-9][0-9][0-9]"
_GLOBS = {
    "prompts": "tasks/*/*.parquet",
    "rollouts": f"{_ROUND}/p[0-9]*/rollouts-*.parquet",
    "scores": f"{_ROUND}/p[0-9]*/scores/*.parquet",
    "batch": f"{_ROUND}/batch.parquet",
    "evals": f"{_ROUND}/evals.parquet",
    "teacher_checks": f"{_ROUND}/teacher-*.parquet",
}
_DEPTH = {"rollouts": r"/p\d+/[^/]+$", "scores": r"/p\d+/scores/[^/]+$"}
_SEEN = {
    "rollouts": ("'rollout'", "false", ()),
    "scores": ("'score'", "true", ("round", "scorer")),
    "batch": ("'curate'", "false", ()),
    "evals": ("'evaluate'", "true", ("round",)),
    "metrics": ("o.stage", "o.stage = 'evaluate'", ("round", "stage")),
}
"""How forks see a table: its stage, the rows of their own that beat the parent's, and the columns by which they do."""

_SCORER_FILE = re.compile(r"(.+)-\d+\.parquet")
_SHARD = re.compile(r"-\d{3}\.parquet$")


@dataclass(frozen=True)
class View:
    """One view or macro of the catalogue, with the first comment lines of its SQL as documentation."""

    name: str
    kind: str
    meaning: str
    example: str
    sql: str
    after: tuple[str, ...]


def documented() -> list[View]:
    """The documented macros and views of `workflow/sql/views`, in the order in which they are created."""
    found = {view.name: view for view in map(_read_view, sorted((folder("sql") / "views").glob("*.sql")))}
    ordered: dict[str, View] = {name: view for name, view in found.items() if view.kind == "macro" and not view.after}
    while len(ordered) < len(found):
        ready = {n: v for n, v in found.items() if n not in ordered and all(a in ordered for a in v.after)}
        if not ready:
            stuck = sorted(set(found) - set(ordered))
            raise RollwayError(
                f"workflow/sql/views: {stuck} wait for each other or for a view that is not there (-- after:)"
            )
        ordered |= ready
    return list(ordered.values())


def scorers(results: Path, runs: Sequence[str] | None = None) -> list[str]:
    """Names of the scorers that have files in `results`, in the folders of some runs or of all."""
    files = _files(results, _GLOBS["scores"], runs)
    return sorted({match[1] for path in files if (match := _SCORER_FILE.fullmatch(path.name))})


def _files(root: Path, pattern: str, runs: Sequence[str] | None) -> list[Path]:
    """What a pattern finds, sorted; one that begins with a star for the run's folder, in those of `runs` alone."""
    if runs is None or not pattern.startswith("*/"):
        return sorted(root.glob(pattern))
    return sorted(path for run in runs for path in (root / run).glob(pattern.removeprefix("*/")))


def _patterns(pattern: str, runs: Sequence[str] | None) -> list[str]:
    """DuckDB's globs below the root for the same files."""
    if runs is None or not pattern.startswith("*/"):
        return [pattern]
    # DuckDB takes a backslash for a separator of folders.
    return [f"{_escape_glob(run).replace(chr(92), '?')}{pattern.removeprefix('*')}" for run in runs]


def quote(text: str) -> str:
    """A SQL string literal."""
    return "'" + text.replace("'", "''") + "'"


def identifier(name: str) -> str:
    """A SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def create_views(
    connection: duckdb.DuckDBPyConnection,
    results: Path,
    *,
    look_at_all: bool = True,
    of: Collection[str] | None = None,
) -> None:
    """Makes every view and macro. Raises RollwayError when `results` is no folder or a file in it is damaged.

    look_at_all: find files of an older schema wherever they lie; without it a query that meets one between others of
    its run raises duckdb's "schema mismatch". of: only what these runs see, in their own folders and in those of the
    runs that they fork; None: all runs and reward models.
    """
    if not results.is_dir():
        raise RollwayError(f"{results}: no such results folder; run the workflow first, or name another with --results")
    root = results.resolve()
    runs = read_runs(root)
    seen = None if of is None else sorted({*of, *(part.home for part in inherited(runs) if part.run in of)})
    made = {name: _base_view(root, name, look_at_all, seen) for name in _GLOBS} | {"metrics": _metrics_view(root, seen)}
    for name, sql in made.items():
        _execute(connection, sql, name, root)
    # DuckDB binds what a view is made of, and lists and opens the files again for each that is made on top of another:
    # they are made on top of empty ones, where these have the same columns.
    empty = {name: _empty_view(name) for name in made}
    if _columns_of(connection) == _columns_in(empty):
        for name, sql in empty.items():
            _execute(connection, _again(sql), name, root)
        _dependent(connection, root, runs, seen)
        for name, sql in made.items():
            _execute(connection, _again(sql), name, root)
    else:
        _dependent(connection, root, runs, seen)


def _dependent(
    connection: duckdb.DuckDBPyConnection, root: Path, runs: dict[str, dict], seen: Sequence[str] | None
) -> None:
    """The views and macros on top of those of files."""
    lineage = inherited(runs)
    _execute(connection, _lineage_view(lineage), "lineage", root)
    _execute(connection, _reward_weights_view(runs), "reward_weights", root)
    _execute(connection, _correctness_view(runs), "correctness", root)
    for name in _SEEN:
        _execute(connection, _seen_view(name, lineage), f"seen_{name}", root)
    _execute(connection, _scored_view(scorers(root, seen)), "scored", root)
    for view in documented():
        _execute(connection, view.sql, view.name, root)


def _again(sql: str) -> str:
    return sql.replace("CREATE VIEW", "CREATE OR REPLACE VIEW", 1)


def _columns_of(connection: duckdb.DuckDBPyConnection) -> list[tuple[str, str, str]]:
    """(view, column, type) of all views that are there, in order."""
    query = """SELECT table_name, column_name, data_type FROM duckdb_columns() WHERE NOT internal
        ORDER BY table_name, column_index"""
    return connection.execute(query).fetchall()


def _columns_in(views: dict[str, str]) -> list[tuple[str, str, str]]:
    with duckdb.connect() as connection:
        for sql in views.values():
            connection.execute(sql)
        return _columns_of(connection)


def _empty_view(name: str) -> str:
    """A view without rows, with the columns that are declared."""
    if name == "metrics":
        return (
            "CREATE VIEW metrics AS SELECT NULL::VARCHAR AS run, NULL::INTEGER AS round, NULL::VARCHAR AS stage, "
            "NULL::INTEGER AS step, NULL::VARCHAR AS name, NULL::DOUBLE AS value WHERE false"
        )
    table = TABLES[name]
    columns = [f"NULL::{kind} AS {column}" for column, kind in _derived(name).items()]
    columns += [f"NULL::{_sql_type(c.type)} AS {identifier(c.name)}" for c in (*table.columns, *table.optional)]
    return f"CREATE VIEW {name} AS SELECT {', '.join(columns)} WHERE false"


def _derived(name: str) -> dict[str, str]:
    """Columns that are taken from the path."""
    if name == "prompts":
        return {}
    return {"run": "VARCHAR"} if name == "rollouts" else {"run": "VARCHAR", "round": "INTEGER"}


def _execute(connection: duckdb.DuckDBPyConnection, sql: str, name: str, root: Path) -> None:
    try:
        connection.execute(sql)
    except duckdb.Error as error:
        reason = str(error).splitlines()[0]
        raise RollwayError(
            f"{root}: view {name} cannot be made: {reason}; delete the damaged file and rerun its stage"
        ) from error


def _base_view(root: Path, name: str, look_at_all: bool, runs: Sequence[str] | None) -> str:
    table, derived, sql = TABLES[name], _derived(name), _empty_view(name)
    files = _files(root, _GLOBS[name], runs)
    whole = [glob for glob in _patterns(_GLOBS[name], runs) if runs is None or any(root.glob(glob))]
    sources = [(whole, files)] if look_at_all else _alike(root, name, files, whole)
    for globs, some in sources if files else []:
        paths = ", ".join(quote(f"{_escape_glob(str(root))}/{glob}") for glob in globs)
        by_name = str(_differ(some, table)).lower()
        source = f"read_parquet([{paths}], filename = true, union_by_name = {by_name}, hive_partitioning = false)"
        taken = [f"{_from_path(name, column)} AS {column}" for column in derived]
        sql += f" UNION ALL BY NAME SELECT {', '.join([*taken, '* EXCLUDE (filename)'])} FROM {source}"
    return sql


def _alike(root: Path, name: str, files: Sequence[Path], whole: list[str]) -> list[tuple[list[str], list[Path]]]:
    """Globs of files that should have the same columns, with some files of each: those without a teacher's columns, and
    those with. A scorer's files are alike, and the batches of a run; a run with derived passes has rollout files of
    both kinds. whole: globs of all `files`."""
    looked_at = _ends(files, root)
    if not TABLES[name].optional or (name == "scores" and not all(_SHARD.search(path.name) for path in files)):
        return [(whole, looked_at)]
    optional = {column.name for column in TABLES[name].optional}
    by_key: dict[str, list[Path]] = {}
    for path in looked_at:
        key = _SHARD.sub("", path.name) if name == "scores" else path.relative_to(root).parts[0]
        by_key.setdefault(key, []).append(path)
    kinds: dict[bool, list[str]] = {}
    for key, paths in by_key.items():
        kinds.setdefault(any(not optional.isdisjoint(_columns(path)) for path in paths), []).append(key)
    if len(kinds) == 1:
        return [(whole, looked_at)]
    found = []
    for keys in kinds.values():
        some = [path for key in keys for path in by_key[key]]
        if name == "scores":
            folders = [glob.removesuffix("*.parquet") for glob in whole]
            globs = [f"{place}{_escape_glob(key)}-[0-9][0-9][0-9].parquet" for place in folders for key in keys]
            globs = [glob for glob in globs if len(whole) == 1 or any(root.glob(glob))]
        else:
            globs = [f"{_escape_glob(key)}{_GLOBS[name].removeprefix('*')}" for key in keys]
        found.append((globs, some))
    return found


def _columns(path: Path) -> list[str]:
    try:
        return pq.read_schema(path).names
    except (pa.ArrowInvalid, OSError):
        return []  # DuckDB names the damaged file when the view is made or read


def _ends(files: Sequence[Path], root: Path) -> list[Path]:
    """The first and the last file of each run, of each of its scorers."""
    of_run: dict[tuple[str, str], list[Path]] = {}
    for path in files:
        of_run.setdefault((path.relative_to(root).parts[0], path.stem.rpartition("-")[0]), []).append(path)
    return sorted({path for paths in of_run.values() for path in (paths[0], paths[-1])})


def _differ(files: Sequence[Path], table: Table) -> bool:
    """Whether `files` have different columns, or all lack one that the table has, as those of an older rollway version.

    Matching columns by name makes DuckDB open every file for every query: 1 s instead of 10 ms at 1,000 files.
    """
    try:
        found = {tuple(pq.read_schema(path).names) for path in files}
    except (pa.ArrowInvalid, OSError):
        return False  # DuckDB names the damaged file when the view is made or read
    return len(found) > 1 or any(not {*table.names()} <= {*names} for names in found)


def _metrics_view(root: Path, runs: Sequence[str] | None) -> str:
    """`run` is the run's folder, or reward_models/NAME for what was measured when that reward model was trained."""
    globs = [glob for name in METRIC_FILES for glob in _patterns(f"{_ROUND}/{name}", runs)]
    globs += [_REWARD_MODELS] if runs is None else []
    paths = [quote(f"{_escape_glob(str(root))}/{g}") for g in globs if any(root.glob(g))]
    if not paths:
        return _empty_view("metrics")
    return f"""CREATE VIEW metrics AS
        SELECT run, round, stage, m.step AS step, m.name AS name, m.value AS value FROM (
            SELECT coalesce(nullif(regexp_extract(filename, '(reward_models/[^/]+)/metrics.json$', 1), ''),
                {_from_path("metrics", "run")}) AS run, round, stage, unnest(metrics) AS m
            FROM read_json([{", ".join(paths)}], format = 'unstructured', records = true, filename = true,
                hive_partitioning = false, columns = {{round: 'INTEGER', stage: 'VARCHAR',
                metrics: 'STRUCT(step INTEGER, name VARCHAR, value DOUBLE)[]'}}))"""


def _lineage_view(lineage: Sequence[Inherited]) -> str:
    rows = [(i.run, i.stage, i.home, i.first_round, i.last_round) for i in lineage]
    columns = {
        "run": "VARCHAR",
        "stage": "VARCHAR",
        "home": "VARCHAR",
        "first_round": "INTEGER",
        "last_round": "INTEGER",
    }
    return _constant_view("lineage", columns, rows)


def _reward_weights_view(runs: dict[str, dict]) -> str:
    weights = {run: (info.get("config") or {}).get("score", {}).get("reward") for run, info in runs.items()}
    rows = [(run, s, float(w)) for run, given in weights.items() for s, w in (given or ScoreConfig().reward).items()]
    return _constant_view("reward_weights", {"run": "VARCHAR", "scorer": "VARCHAR", "weight": "DOUBLE"}, rows)


def _correctness_view(runs: dict[str, dict]) -> str:
    """Which scorer of a run says what is right, and from which reward on."""
    given = {run: (info.get("config") or {}).get("score", {}) for run, info in runs.items()}
    usual = ScoreConfig()
    rows = [
        (run, str(score.get("correct", usual.correct)), float(score.get("threshold", usual.threshold)))
        for run, score in given.items()
    ]
    return _constant_view("correctness", {"run": "VARCHAR", "scorer": "VARCHAR", "threshold": "DOUBLE"}, rows)


def _constant_view(name: str, columns: dict[str, str], rows: Sequence[tuple]) -> str:
    if not rows:
        empty = ", ".join(f"NULL::{kind} AS {column}" for column, kind in columns.items())
        return f"CREATE VIEW {name} AS SELECT {empty} WHERE false"
    values = ", ".join("(" + ", ".join(quote(v) if isinstance(v, str) else str(v) for v in row) + ")" for row in rows)
    casts = ", ".join(f"{column}::{kind} AS {column}" for column, kind in columns.items())
    return f"CREATE VIEW {name} AS SELECT {casts} FROM (VALUES {values}) AS t({', '.join(columns)})"


def _seen_view(name: str, lineage: Sequence[Inherited]) -> str:
    """A fork's view of a table: its own rounds, and the parent's where lineage says so.

    A fork with other scorers or another evaluation than its parent has made its own scores or evaluations of the
    parent's rollouts and policies: those come first. Without forks nothing has to be compared.
    """
    stage, own_first, key = _SEEN[name]
    taken = [part for part in lineage if name == "metrics" or quote(part.stage) == stage]
    if not taken:
        return f"CREATE VIEW seen_{name} AS SELECT run AS home, * FROM {name}"
    # Names spelled out: DuckDB then opens the files of these runs alone.
    forks = ", ".join(sorted({quote(part.run) for part in taken}))
    homes = ", ".join(sorted({quote(part.home) for part in taken}))
    within = f"i.stage = {stage} AND o.round BETWEEN i.first_round AND i.last_round"
    # Anti joins: what EXISTS becomes would hide the filters of a query from the scan.
    dropped = f"ANTI JOIN (SELECT * FROM lineage WHERE run IN ({forks})) AS i ON i.run = o.run AND {within}"
    own = f"SELECT o.run AS home, o.* FROM {name} AS o"
    if own_first == "false":
        own += f" {dropped}"
    elif own_first != "true":
        own = f"{own} WHERE {own_first} UNION ALL {own} {dropped} WHERE NOT ({own_first})"
    mine = ""
    if key:
        columns = "".join(f", {column}" for column in key)
        theirs = "".join(f" AND o.{column} = m.{column}" for column in key)
        only = "" if own_first == "true" else f"AND {own_first.removeprefix('o.')}"
        mine = f"""ANTI JOIN (SELECT DISTINCT run{columns} FROM {name} WHERE run IN ({forks}) {only}) AS m
            ON m.run = i.run{theirs}"""
    return f"""CREATE VIEW seen_{name} AS
        {own}
        UNION ALL
        SELECT i.home, o.* REPLACE (i.run AS run) FROM {name} AS o JOIN lineage AS i ON o.run = i.home AND {within}
        {mine} WHERE o.run IN ({homes})"""


def _scored_view(names: list[str]) -> str:
    """Rollouts without their tokens, one column per scorer, and what the batch of the same round says of them.

    `reward` is the one the method saw; for rows that curation dropped it is the weighted sum of the scorers before
    shaping (weights from run.json; with a single scorer its reward). A scorer named like a core column gets the prefix
    `score_`.
    """
    core = ", ".join(f"r.{identifier(n)}" for n in ROLLOUTS.scalar_names())
    taken = {*ROLLOUTS.scalar_names(), *BATCH.names(), "run", "home", "slots"}
    columns = {n: f"score_{n}" if n in taken else n for n in names}
    each = list(enumerate(names))
    # A join per scorer and one for the repeats of the batch: at 1 M rollouts half the time of grouping either table.
    same = "r.run = {0}.run AND r.round = {0}.round AND r.rollout_id = {0}.rollout_id"
    scores = "".join(
        f" LEFT JOIN (SELECT run, round, rollout_id, reward FROM seen_scores WHERE scorer = {quote(n)}) AS s{i} ON "
        + same.format(f"s{i}")
        for i, n in each
    )
    weights = "".join(f", max(weight) FILTER (scorer = {quote(n)}) AS w{i}" for i, n in each)
    verdicts = " ".join(f"WHEN {quote(n)} THEN s{i}.reward >= c.threshold" for i, n in each)
    rewards = ", ".join(f"s{i}.reward" for i, _ in each)
    weighted = ", ".join(f"s{i}.reward * w.w{i}" for i, _ in each)
    alone = f"CASE WHEN list_count([{rewards}]) = 1 THEN coalesce({rewards}) END"
    reward = (
        f"coalesce(b.reward, m.reward, list_sum([{weighted}]), {alone})" if names else "coalesce(b.reward, m.reward)"
    )
    verdict = f", CASE c.scorer {verdicts} END" if names else ""
    return f"""CREATE VIEW scored AS
        SELECT r.run, r.home, {core}, r.text, {reward} AS reward, coalesce(b.correct, m.correct{verdict}) AS correct,
            coalesce(b.advantage, m.advantage) AS advantage, coalesce(b.weight, m.weight) AS weight,
            coalesce(b.route, m.route) AS route, (b.run IS NOT NULL)::BIGINT + coalesce(m.slots, 0) AS slots
            {"".join(f", s{i}.reward AS {identifier(columns[n])}" for i, n in each)}
        FROM seen_rollouts AS r {scores}
        LEFT JOIN (SELECT * FROM seen_batch WHERE slot = 0) AS b ON {same.format("b")}
        LEFT JOIN (
            SELECT run, round, rollout_id, count(*) AS slots, min_by(advantage, slot) AS advantage,
                min_by(weight, slot) AS weight, min_by(route, slot) AS route, min_by(reward, slot) AS reward,
                bool_or(correct) AS correct
            FROM seen_batch WHERE slot > 0 GROUP BY run, round, rollout_id) AS m ON {same.format("m")}
        LEFT JOIN (SELECT run {weights} FROM reward_weights GROUP BY run) AS w ON r.run = w.run
        LEFT JOIN correctness AS c ON r.run = c.run"""


def _from_path(name: str, column: str) -> str:
    below = _DEPTH.get(name, r"/[^/]+$")
    pattern = rf"([^/]+)/r(\d+){below}"
    text = f"regexp_extract(filename, {quote(pattern)}, {1 if column == 'run' else 2})"
    return text if column == "run" else f"{text}::INTEGER"


def _escape_glob(path: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in path)


def _sql_type(kind: pa.DataType) -> str:
    if pa.types.is_list(kind):
        return f"{_sql_type(kind.value_type)}[]"
    if pa.types.is_map(kind):
        return f"MAP({_sql_type(kind.key_type)}, {_sql_type(kind.item_type)})"
    if pa.types.is_struct(kind):
        return "STRUCT(" + ", ".join(f"{identifier(f.name)} {_sql_type(f.type)}" for f in kind) + ")"
    return {"string": "VARCHAR", "int32": "INTEGER", "float": "FLOAT", "double": "DOUBLE", "bool": "BOOLEAN"}[str(kind)]


def _read_view(path: Path) -> View:
    """Reads one documented file: comments, `-- example:`, `-- after: NAMES`, then one CREATE MACRO or CREATE VIEW."""
    text = path.read_text(encoding="utf-8")
    header = [line[2:].strip() for line in text.splitlines() if line.startswith("--")]
    created = re.search(r"^CREATE (MACRO|VIEW) (\w+)", text, re.MULTILINE)
    if created is None or created[2] != path.stem:
        raise RollwayError(f"{path}: must hold `CREATE MACRO {path.stem}` or `CREATE VIEW {path.stem}`")
    example = " ".join(line.removeprefix("example: ") for line in header if line.startswith("example: "))
    after = [name.strip() for line in header if line.startswith("after: ") for name in line[7:].split(",")]
    meaning = " ".join(line for line in header if not line.startswith(("example: ", "after: ")))
    return View(path.stem, created[1].lower(), meaning, example, text, tuple(after))
