"""The relation `scored`: rollouts, the verdicts on them, and the reward that they make."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

import duckdb
import pyarrow as pa

from rollway.config.scorers import ScoreConfig
from rollway.errors import RollwayError, unwritten
from rollway.store.atomic import remove_leftovers
from rollway.store.parquet import metadata
from rollway.store.tables import DERIVED, TABLES

ORDER = ("group_id", "sample", "rollout_id")
"""Row order of `scored` and of the batch, whatever the order of the input."""

CARRIED = ("rollout_id", "group_id", "sample", "reward", "correct", "age")
"""Columns that go into the batch or order it, where they exist."""

FROM_PROMPTS = ("task", "answer", "meta")
"""Columns that `scored` has only where the SQL names them: they lie in the prompts."""

_SQL_TYPES = {
    "rollout_id": "VARCHAR",
    "group_id": "VARCHAR",
    "prompt_id": "VARCHAR",
    "text": "VARCHAR",
    "source": "VARCHAR",
    "finish": "VARCHAR",
    "sample": "INTEGER",
    "round": "INTEGER",
    "length": "INTEGER",
    "age": "INTEGER",
    "mean_logprob": "DOUBLE",
    "reward": "DOUBLE",
    "correct": "BOOLEAN",
    "has_teacher": "BOOLEAN",
}
_MADE = (
    "reward",
    "correct",
    "has_teacher",
    "age",
    "text_hash",
    "mean_logprob",
    "reward_parts",
    "slot",
    "advantage",
    "weight",
    "route",
    "pair_id",
    "role",
)

_MEAN_LOGPROB = (
    "list_avg(list_transform(range(1, len(rollouts.logprobs) + 1), "
    "lambda i: CASE WHEN rollouts.train_mask[i] THEN rollouts.logprobs[i]::DOUBLE END))"
)


@contextmanager
def connection(
    threads: int, memory_limit: str | None, spill_in: Path | None = None
) -> Iterator[duckdb.DuckDBPyConnection]:
    """An in-memory DuckDB that spills to a temporary folder, with a schema `rollway` for what users' SQL does not read.

    threads: for reading, sorting and joining. memory_limit: DuckDB's notation, for example "2GB". spill_in: where the
    folder is made; None: among the system's temporary files.

    Raises RollwayError where memory or the disk is too small.
    """
    with _spill_folder(spill_in) as spill, _said(spill):
        config: dict[str, str | bool | int | float | list[str]] = {
            "threads": threads,
            "temp_directory": spill,
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            "python_enable_replacements": False,
        }
        if memory_limit is not None:
            config["memory_limit"] = memory_limit
        with duckdb.connect(":memory:", config=config) as con:
            con.execute("CREATE SCHEMA rollway")
            yield con


def _spill_folder(inside: Path | None) -> "TemporaryDirectory[str]":
    """Empty; what killed processes left there is deleted. Raises RollwayError where it cannot be made."""
    try:
        if inside is not None:
            inside.mkdir(parents=True, exist_ok=True)
            remove_leftovers(inside, "curate")
        return TemporaryDirectory(prefix=f".tmp-curate-{os.getpid()}-", dir=inside, ignore_cleanup_errors=True)
    except OSError as error:
        raise unwritten(inside or Path(gettempdir()), error) from error


@contextmanager
def _said(spill: str) -> Iterator[None]:
    try:
        yield
    except duckdb.OutOfMemoryException as error:
        place = f" (what does not fit is spilled to {spill})" if "directory" in str(error) else ""
        raise RollwayError(
            f"curate: {str(error).splitlines()[0]}{place}; give the stage more, for example "
            "`--set-resources curate:mem_mb=8000`"
        ) from None
    except duckdb.IOException as error:
        if "No space left" not in str(error):
            raise
        raise RollwayError(
            f"curate: the disk of {spill} is full; free some of it, or give curate more memory"
        ) from None


def close_off(con: duckdb.DuckDBPyConnection) -> None:
    """Before a method's SQL runs: no files, no extensions, no settings; one thread, so that every sum has one order."""
    con.execute("SET threads = 1; SET enable_external_access = false; SET lock_configuration = true")


def scored_relation(
    con: duckdb.DuckDBPyConnection,
    rollouts: list[Path],
    scores: dict[str, list[Path]],
    score: ScoreConfig,
    round: int,
    prompts: list[Path] | None = None,
    teacher: str | None = None,
) -> bool:
    """Creates the view `rollway.source` over Parquet files; token columns are not in it.

    Columns: the narrow ones of rollouts; `mean_logprob` over the tokens that the policy wrote, nats (read where SQL
    names it); one double per scorer; `reward`, the weighted sum in the order of
    `score.reward`; `reward_parts`, its terms as a list of {weight, reward}; `correct`; `age` in rounds before `round`;
    `text_hash`; those of FROM_PROMPTS where `prompts` are given; and `has_teacher` where `teacher`, a scorer, is:
    whether it has something to say of the rollout (its component `given`).

    Returns whether derived rollouts are among the rows; the view then has their `prefix_length` too.
    Raises RollwayError for files that are missing or broken, and for scorer names that clash with a column.
    """
    core = TABLES["rollouts"].scalar_names()
    taken = {*core, *_MADE, *FROM_PROMPTS}
    for scorer in score.scorers:
        if scorer.lower() in taken:
            raise RollwayError(
                f"score.scorers.{scorer}: `scored` has a column of that name already; call it {scorer}_score, say"
            )
        if not scores.get(scorer):
            raise RollwayError(f"scorer {scorer}: no score files were given; run its score jobs")
    derived = any(DERIVED in metadata(path) for path in rollouts)
    for path in [*(path for name in score.scorers for path in scores[name]), *(prompts or [])]:
        metadata(path)
    core += ["prefix_length"] if derived else []
    terms = [f"{weight!r}::DOUBLE * {quoted(name)}.reward" for name, weight in score.reward.items()]
    correct = f"{quoted(score.correct)}.reward >= {score.threshold!r}" if score.correct else "NULL::BOOLEAN"
    columns = [f"rollouts.{quoted(name)}" for name in core]
    columns += [f"{quoted(name)}.reward AS {quoted(name)}" for name in score.scorers]
    columns += [f"{' + '.join(terms) or '0.0::DOUBLE'} AS reward", f"{correct} AS correct"]
    parts = [
        f"{{'weight': {weight!r}::DOUBLE, 'reward': {quoted(name)}.reward}}" for name, weight in score.reward.items()
    ]
    columns.append(f"[{', '.join(parts)}] AS reward_parts")
    columns += [f'{round} - rollouts."round" AS age', "md5(rollouts.text) AS text_hash"]
    columns.append(f"{_MEAN_LOGPROB} AS mean_logprob")
    if teacher is not None:
        given = f"map_extract({quoted(teacher)}.components, 'given')"
        columns.append(f"coalesce(list_sum({given}), 0.0) > 0.0 AS has_teacher")
    joins = [f"LEFT JOIN {_files(scores[name])} AS {quoted(name)} USING (rollout_id)" for name in score.scorers]
    if prompts:
        columns += [f"prompts.{name}" for name in FROM_PROMPTS]
        joins.append(f"LEFT JOIN {_files(prompts)} AS prompts USING (prompt_id)")
    source = f"{_files(rollouts, derived)} AS rollouts {' '.join(joins)}"
    con.execute(f"CREATE VIEW rollway.source AS SELECT {', '.join(columns)} FROM {source}")
    return derived


def _check_scores(con: duckdb.DuckDBPyConnection, score: ScoreConfig) -> None:
    """Every row of `scored` has exactly one finite score of every scorer. Raises RollwayError."""
    for scorer in score.scorers:
        name = quoted(scorer)
        missing, bad, example = one(
            con,
            f"SELECT count(*) FILTER ({name} IS NULL), count(*) FILTER (NOT isfinite({name})), "
            f"min(rollout_id) FILTER ({name} IS NULL OR NOT isfinite({name})) FROM scored",
        )
        if missing:
            raise RollwayError(
                f"scorer {scorer}: {missing} rollouts have no score (the first: {example}); run its score jobs again"
            )
        if bad:
            raise RollwayError(
                f"scorer {scorer}: {bad} scores are NaN or infinite (the first: rollout {example}); mend the scorer"
            )


def load_view(con: duckdb.DuckDBPyConnection, columns: set[str], score: ScoreConfig) -> None:
    """Creates the table `scored` from those columns of the view `rollway.source`, in ORDER."""
    present = [row[0] for row in con.execute("DESCRIBE rollway.source").fetchall()]
    chosen = ", ".join(quoted(name) for name in present if name.lower() in columns)
    con.execute(f"CREATE TABLE scored AS SELECT {chosen} FROM rollway.source ORDER BY {', '.join(ORDER)}")
    _check_scores(con, score)
    _check_rows(con)


def load_arrow(con: duckdb.DuckDBPyConnection, scored: pa.Table, columns: set[str] | None) -> None:
    """Creates the table `scored` from an Arrow table, in ORDER. columns: None for all.

    Raises RollwayError where rollout_id is missing, null or repeated, or a reward is not finite.
    """
    if "rollout_id" not in scored.column_names:
        raise RollwayError(f"the scored rows have no column rollout_id; they have {', '.join(scored.column_names)}")
    wanted = [name for name in scored.column_names if columns is None or name.lower() in columns]
    chosen = [
        f"CAST({quoted(name)} AS {_SQL_TYPES[name]}) AS {quoted(name)}" if name in _SQL_TYPES else quoted(name)
        for name in wanted
    ]
    if columns is not None and "text_hash" in columns and "text_hash" not in wanted and "text" in scored.column_names:
        chosen.append("md5(text) AS text_hash")
    order = ", ".join(name for name in ORDER if name in wanted)
    con.register("arrow_input", scored)
    try:
        con.execute(f"CREATE TABLE scored AS SELECT {', '.join(chosen)} FROM arrow_input ORDER BY {order}")
    except duckdb.ConversionException as error:
        raise RollwayError(f"the scored rows hold a value of the wrong type: {str(error).splitlines()[0]}") from None
    con.unregister("arrow_input")
    _check_rows(con)


def _check_rows(con: duckdb.DuckDBPyConnection) -> None:
    """Rollouts of `scored` are named, unique, and their rewards finite."""
    rows, names, distinct = one(con, "SELECT count(*), count(rollout_id), count(DISTINCT rollout_id) FROM scored")
    if rows != names:
        raise RollwayError(f"{rows - names} scored rows have no rollout_id")
    if names != distinct:
        example, count = one(
            con, "SELECT rollout_id, count(*) AS n FROM scored GROUP BY ALL HAVING n > 1 ORDER BY ALL LIMIT 1"
        )
        raise RollwayError(f"rollout {example} occurs {count} times in the scored rows; give each row and score once")
    columns = {row[0] for row in con.execute("DESCRIBE scored").fetchall()}
    if "reward" in columns:
        bad, example = one(
            con, "SELECT count(*), min(rollout_id) FROM scored WHERE reward IS NULL OR NOT isfinite(reward)"
        )
        if bad:
            raise RollwayError(f"the reward of rollout {example} is not a finite number ({bad} rows); mend its scorer")
    if "group_id" in columns:
        bad, example = one(con, "SELECT count(*), min(rollout_id) FROM scored WHERE group_id IS NULL")
        if bad:
            raise RollwayError(f"rollout {example} has no group_id ({bad} rows); groups are never guessed")


def one(con: duckdb.DuckDBPyConnection, query: str) -> tuple:
    """The one row of a query."""
    return con.execute(query).fetchall()[0]


def _files(paths: list[Path], differ: bool = False) -> str:
    """differ: whether some have columns that others lack."""
    listed = ", ".join("'" + str(path).replace("'", "''") + "'" for path in paths)
    return f"read_parquet([{listed}]{', union_by_name = true' if differ else ''})"


def quoted(name: str) -> str:
    """A column name as SQL writes it."""
    return '"' + name.replace('"', '""') + '"'
