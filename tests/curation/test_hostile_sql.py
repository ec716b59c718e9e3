"""SQL of a recipe that somebody else wrote: no files, network, extensions, settings or writing, by two defences."""

import json
import threading
import time
from pathlib import Path

import duckdb
import pytest

from curation.tables import scored_table
from rollway.config.curation import CurateConfig
from rollway.config.recipes import load_recipe, parse
from rollway.curation import curate, dry_run, steps
from rollway.curation import scored as relation
from rollway.curation.sql_file import parse as parse_sql
from rollway.errors import RollwayError

SCORED = scored_table([[1, 0], [0, 1]])
STATEMENTS = [
    "COPY (SELECT * FROM scored) TO '{out}'",
    "COPY scored FROM '/etc/passwd'",
    "EXPORT DATABASE '{out}'",
    "IMPORT DATABASE '{out}'",
    "ATTACH '{out}' AS other",
    "INSTALL httpfs",
    "FORCE INSTALL httpfs FROM 'http://localhost:9/'",
    "LOAD httpfs",
    "SET enable_external_access = true",
    "RESET enable_external_access",
    "PRAGMA database_list",
    "PRAGMA enable_profiling",
    "CALL pragma_version()",
    "CREATE SECRET s (TYPE s3, KEY_ID 'x', SECRET 'y')",
    "CREATE MACRO m() AS TABLE SELECT * FROM read_csv('/etc/passwd')",
    "CREATE VIEW scored AS SELECT 1",
    "UPDATE scored SET reward = 1",
    "INSERT INTO scored SELECT * FROM scored",
    "DELETE FROM scored",
    "CHECKPOINT",
    "VACUUM",
    "EXECUTE x",
    "PREPARE x AS SELECT 1",
    "USE memory",
]
READS = [
    "read_csv('/etc/passwd')",
    "read_csv_auto('/etc/passwd')",
    "read_text('/etc/passwd')",
    "read_blob('/etc/passwd')",
    "read_json('/etc/passwd')",
    "read_parquet('/etc/passwd')",
    "parquet_metadata('{secret}')",
    "parquet_scan('{secret}')",
    "sniff_csv('/etc/passwd')",
    "glob('/etc/*')",
    "'/etc/passwd'",
    "'{secret}'",
    '"{secret}"',
    "'https://localhost:9/x.parquet'",
    "'s3://bucket/x.parquet'",
    "query('SELECT 1 AS rollout_id')",
    "query_table('scored')",
    "duckdb_settings()",
    "duckdb_secrets()",
    "duckdb_databases()",
    "duckdb_extensions()",
    "pragma_database_list()",
    "pragma_version()",
    "which_secret('s3://x', 's3')",
    "information_schema.tables",
    "pg_catalog.pg_tables",
    "sqlite_master",
    "duckdb_tables",
    "rollway.source",
    "rollway.result",
    "memory.rollway.result",
    "system.information_schema.tables",
    "SCORED_PYTHON",
]
CALLS = [
    "getenv('HOME')",
    "current_setting('home_directory')",
    "current_setting('secret_directory')",
    "getvariable('x')",
    "uuid()",
    "now()",
    "nextval('x')",
    "version()",
    "CURRENT_TIMESTAMP",
    "current_date",
    "localtime",
    "age(TIMESTAMP '2020-01-01')",
    "reservoir_quantile(length, 0.5)",
    "approx_quantile(length, 0.5)",
]
DRAWS = [
    "SELECT rollout_id FROM scored USING SAMPLE 3 ROWS",
    "SELECT rollout_id FROM scored TABLESAMPLE RESERVOIR(3 ROWS)",
    "SELECT rollout_id FROM scored WHERE rollout_id IN (SELECT rollout_id FROM scored USING SAMPLE 50%)",
    "WITH a AS (SELECT * FROM scored TABLESAMPLE 10%) SELECT rollout_id FROM a",
]


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A Parquet file that SQL could read as rollouts, were it let."""
    path = tmp_path / "secret.parquet"
    duckdb.sql("SELECT 'r00-0' AS rollout_id, 'the secret' AS route").write_parquet(str(path))
    return path


def refused(tmp_path: Path, sql: str, step: str = "filter") -> str:
    """The sentence with which a file is refused, in the same words by the run and by the plan's trial."""
    path = tmp_path / "theirs.sql"
    path.write_text(sql)
    config = parse(CurateConfig, {step: {"sql": str(path)}}, "curate")
    with pytest.raises(RollwayError) as caught:
        curate(SCORED, config)
    assert "\n" not in str(caught.value)
    assert "theirs.sql" in str(caught.value)
    from rollway.config.scorers import ScoreConfig

    with pytest.raises(RollwayError):
        dry_run(config, ScoreConfig())
    return str(caught.value)


@pytest.mark.parametrize("sql", STATEMENTS)
def test_statements_that_do_more_than_read(sql: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = refused(tmp_path, sql.format(out=out))
    assert "exactly one SELECT" in said or "theirs.sql: " in said
    assert not out.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs.sql"]


@pytest.mark.parametrize("place", READS)
@pytest.mark.parametrize(
    "form",
    [
        "SELECT rollout_id FROM {0}",
        "SELECT rollout_id FROM scored WHERE EXISTS (SELECT 1 FROM {0})",
        "WITH a AS (SELECT * FROM {0}) SELECT rollout_id FROM scored, a",
        "SELECT rollout_id FROM scored UNION ALL SELECT rollout_id FROM {0}",
        "SELECT rollout_id FROM scored JOIN (FROM {0}) ON true",
    ],
)
def test_nothing_but_scored_can_be_read(place: str, form: str, tmp_path: Path, secret: Path) -> None:
    said = refused(tmp_path, form.format(place.format(secret=secret)))
    assert "sees only `scored`" in said
    assert "the secret" not in said


@pytest.mark.parametrize("call", CALLS)
def test_functions_that_tell_of_the_machine_or_the_moment(call: str, tmp_path: Path) -> None:
    said = refused(tmp_path, f"SELECT rollout_id, CAST({call} AS VARCHAR) AS route FROM scored", "route")
    assert "which tells of this machine" in said or "changes from run to run" in said


@pytest.mark.parametrize("sql", DRAWS)
def test_rows_drawn_by_chance(sql: str, tmp_path: Path) -> None:
    assert "holds USING SAMPLE or TABLESAMPLE, whose rows change from run to run" in refused(tmp_path, sql)


def test_every_function_of_the_clock_or_of_chance_is_refused(tmp_path: Path) -> None:
    """By the names of those that DuckDB has here, whatever it says of their stability."""
    named = "SELECT DISTINCT function_name FROM duckdb_functions() WHERE regexp_full_match(function_name, ?)"
    pattern = (
        r"current_(date|time|local|setting).*|.*local_?time.*|now|today|.*random.*|.*uuid.*|get_current_.*|.*sample.*"
    )
    found = [name for (name,) in duckdb.execute(named, [pattern]).fetchall()]
    plain = {"uuid_extract_timestamp", "uuid_extract_version"}
    assert {"now", "random"} <= set(found)
    for name in set(found) - plain:
        refused(tmp_path, f"SELECT rollout_id FROM scored ORDER BY {name}()")


def test_what_only_resembles_them_is_read(tmp_path: Path) -> None:
    """An age between two given times, a quantile of all rows, a column of that name that the statement makes itself."""
    path = tmp_path / "theirs.sql"
    path.write_text(
        "WITH a AS (SELECT rollout_id, quantile_cont(reward, 0.5) OVER () AS half,"
        " age(TIMESTAMP '2020-01-02', TIMESTAMP '2020-01-01') AS version FROM scored)"
        " SELECT rollout_id FROM a WHERE a.version IS NOT NULL AND half >= 0"
    )
    found = curate(SCORED, parse(CurateConfig, {"filter": {"sql": str(path)}}, "curate"))
    assert found.num_rows == SCORED.num_rows


def test_a_name_given_by_with_hides_nothing(tmp_path: Path, secret: Path) -> None:
    """A part called like a file or a system table is that part; it does not open the door to the other."""
    good = 'WITH "sqlite_master" AS (SELECT * FROM scored) SELECT rollout_id FROM sqlite_master'
    assert parse_sql(tmp_path / "good.sql", "filter", good).names >= {"rollout_id"}
    refused(tmp_path, "WITH tables AS (SELECT 1) SELECT rollout_id FROM information_schema.tables")


SCOPES = [
    "SELECT rollout_id, (WITH {0} AS (SELECT 1 x) SELECT 1.0) + (SELECT count(*) FROM {0}) AS advantage FROM scored",
    "SELECT rollout_id, (SELECT count(*) FROM {0}) + (WITH {0} AS (SELECT 1 x) SELECT 1.0) AS advantage FROM scored",
    "SELECT rollout_id, 1.0 AS advantage FROM scored, (WITH {0} AS (SELECT 1 x) SELECT * FROM {0}), (FROM {0})",
    "WITH {0} AS (SELECT * FROM {0}) SELECT rollout_id, 1.0 AS advantage FROM scored, {0}",
    "WITH a AS (SELECT * FROM {0}), {0} AS (SELECT 1 x) SELECT rollout_id, 1.0 AS advantage FROM scored, a",
    "WITH {0} AS (SELECT 1 x) SELECT rollout_id, 1.0 AS advantage FROM scored, main.{0}",
    "WITH a AS (WITH {0} AS (SELECT 1 x) SELECT * FROM {0}) SELECT rollout_id, 1.0 AS advantage FROM scored, a, {0}",
    "WITH RECURSIVE {0} AS (SELECT * FROM {0}) SELECT rollout_id, 1.0 AS advantage FROM scored, {0}",
    "WITH RECURSIVE {0} AS (FROM {0} UNION ALL FROM {0} WHERE false) "
    "SELECT rollout_id, 1.0 AS advantage FROM scored, {0}",
    "WITH RECURSIVE {0} AS (FROM {0} UNION FROM {0} WHERE false) SELECT rollout_id, 1.0 AS advantage FROM scored, {0}",
    "WITH RECURSIVE {0} AS (SELECT (SELECT count(*) FROM {0}) x UNION ALL SELECT x FROM {0} WHERE false) "
    "SELECT rollout_id, 1.0 AS advantage FROM scored, {0}",
    "WITH RECURSIVE {0} AS (SELECT 1 UNION ALL FROM (FROM {0}) UNION ALL FROM {0} WHERE false) "
    "SELECT rollout_id, 1.0 AS advantage FROM scored, {0}",
    "WITH RECURSIVE {0} AS (WITH b AS (FROM {0}) FROM b UNION ALL FROM {0} WHERE false) "
    "SELECT rollout_id, 1.0 AS advantage FROM scored, {0}",
    "WITH RECURSIVE {0} USING KEY (name) AS (FROM {0} UNION FROM {0} WHERE false) "
    "SELECT rollout_id, 1.0 AS advantage FROM scored",
    "WITH RECURSIVE {0} AS (SELECT 1 x UNION ALL SELECT x + 1 FROM {0} WHERE x < 3), b AS (FROM main.{0}) "
    "SELECT rollout_id, 1.0 AS advantage FROM scored, b",
    "SELECT rollout_id, 1.0 AS advantage FROM scored, {0} "
    "WHERE (WITH RECURSIVE {0} AS (SELECT 1 x UNION ALL SELECT x + 1 FROM {0} WHERE x < 3) SELECT true)",
]


@pytest.mark.parametrize("form", SCOPES)
@pytest.mark.parametrize("name", ["pg_settings", "duckdb_databases", "pragma_database_list", '"{secret}"'])
def test_a_name_given_by_with_holds_in_its_query_alone(name: str, form: str, tmp_path: Path, secret: Path) -> None:
    """DuckDB's views and files stay what they are outside the query that has the WITH."""
    assert "sees only `scored`" in refused(tmp_path, form.format(name.format(secret=secret)), "advantage")


def test_parts_are_known_where_they_hold(tmp_path: Path) -> None:
    for sql in [
        "WITH a AS (SELECT * FROM scored), B AS (SELECT * FROM A) SELECT rollout_id, 1.0 AS advantage FROM b",
        "WITH a AS (SELECT 1 x) SELECT rollout_id, (SELECT max(x) FROM a) AS advantage FROM scored",
        "WITH RECURSIVE a AS (SELECT 1 x UNION ALL SELECT x + 1 FROM a WHERE x < 3) "
        "SELECT rollout_id, (SELECT max(x) FROM a) AS advantage FROM main.scored",
        "WITH RECURSIVE A AS (SELECT 1 x UNION SELECT x + 1 FROM (FROM a) WHERE x < (SELECT 3 FROM a LIMIT 1)), "
        "b AS (FROM a) SELECT rollout_id, (SELECT max(x) FROM b) AS advantage FROM scored",
        "WITH a AS (SELECT 1 x), b AS (WITH RECURSIVE a AS (FROM a UNION ALL SELECT x + 1 FROM a WHERE x < 3) FROM a) "
        "SELECT rollout_id, (SELECT max(x) FROM b) AS advantage FROM scored",
    ]:
        parse_sql(tmp_path / "good.sql", "advantage", sql)


@pytest.mark.parametrize("show", ["SHOW DATABASES", "SHOW ALL TABLES", "SHOW TABLES", "DESCRIBE SELECT 1", "{file}"])
def test_show_describe_and_summarize(show: str, tmp_path: Path, secret: Path) -> None:
    show = show.format(file=f"SUMMARIZE SELECT * FROM '{secret}'")
    said = refused(tmp_path, f"SELECT rollout_id, 1.0 AS advantage FROM scored, ({show})", "advantage")
    assert "sees only `scored`" in said
    assert "exactly one SELECT" in refused(tmp_path, show) or "sees only `scored`" in refused(tmp_path, show)


def test_what_the_parser_lets_through_the_database_refuses_itself(tmp_path: Path, secret: Path) -> None:
    """The second line: DuckDB as `close_off` leaves it, whatever SQL reached it."""
    out = tmp_path / "out.csv"
    attempts = [
        f"SELECT * FROM read_parquet('{secret}')",
        "SELECT * FROM read_csv('/etc/passwd')",
        "SELECT * FROM read_text('/etc/passwd')",
        "SELECT * FROM glob('/etc/*')",
        f"COPY (SELECT 1) TO '{out}'",
        f"ATTACH '{tmp_path / 'other.duckdb'}'",
        f"EXPORT DATABASE '{tmp_path / 'all'}'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SET enable_external_access = true",
        "SET lock_configuration = false",
        "SET allowed_directories = ['/']",
        "SELECT * FROM 'https://localhost:9/x.parquet'",
    ]
    with relation.connection(1, None) as con:
        relation.load_arrow(con, SCORED, None)
        relation.close_off(con)
        for sql in attempts:
            with pytest.raises(duckdb.Error):
                con.execute(sql)
        assert con.execute("SELECT count(*) FROM scored").fetchall() == [(4,)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secret.parquet"]


def test_a_parameter_is_a_value_and_never_sql(tmp_path: Path) -> None:
    path = tmp_path / "mine.sql"
    path.write_text("-- param word: string, any text\nSELECT rollout_id, $word AS route FROM scored")
    word = "x'; COPY scored TO '/tmp/x'; --"
    config = parse(CurateConfig, {"route": {"sql": str(path), "word": word}}, "curate")
    assert set(curate(SCORED, config).column("route").to_pylist()) == {word}
    assert json.dumps(word)


@pytest.mark.parametrize("part", ["filter", "advantage"])
def test_a_statement_that_recurses_without_end_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    endless = "WITH RECURSIVE r AS (SELECT 1 AS n UNION ALL SELECT 1 - n FROM r) "
    value = {"filter": "", "advantage": ", 1.0 AS advantage"}[part]
    own = tmp_path / "endless.sql"
    own.write_text(f"{endless}SELECT rollout_id{value} FROM scored WHERE (SELECT count(*) FROM r) > 0\n")
    config = parse(CurateConfig, {part: {"sql": str(own)}}, "curate")
    monkeypatch.setenv(steps.SECONDS, "0.3")
    begin = time.monotonic()
    with pytest.raises(RollwayError, match=r"endless\.sql: did not end within 0\.3 s.*set ROLLWAY_SQL_SECONDS"):
        curate(SCORED, config)
    assert time.monotonic() - begin < 10


def test_endless_recursion_is_seen_before_any_job_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "NO_ROWS_LIMIT", 0.3)
    own = tmp_path / "endless.sql"
    own.write_text(
        "WITH RECURSIVE r AS (SELECT 1 AS n UNION ALL SELECT 1 - n FROM r)\n"
        "SELECT rollout_id, (SELECT count(*) FROM r)::DOUBLE AS advantage FROM scored\n"
    )
    config = parse(CurateConfig, {"advantage": {"sql": str(own)}}, "curate")
    with pytest.raises(RollwayError, match=r"endless\.sql: did not end within 0\.3 s, on no rows"):
        dry_run(config, load_recipe("grpo").score)


GRPO = parse(CurateConfig, {"advantage": {"sql": "grpo"}}, "curate")


@pytest.mark.parametrize("given", ["0", "-1", "soon", "nan", "1e30"])
def test_seconds_that_are_none_are_refused(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv(steps.SECONDS, given)
    with pytest.raises(RollwayError, match=f"ROLLWAY_SQL_SECONDS={given}: is no number of seconds"):
        curate(SCORED, GRPO)


def test_a_limit_that_is_over_as_a_statement_ends_meets_no_later_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interrupt is held back until the statement is done: what follows it must wait for the interrupt."""
    step = steps.Step(parse_sql(Path("mine.sql"), "filter", "SELECT rollout_id FROM scored"), {})
    monkeypatch.setenv(steps.SECONDS, "0.05")

    class Late:
        def __init__(self, con: duckdb.DuckDBPyConnection) -> None:
            self.con, self.interrupted = con, False

        def interrupt(self) -> None:
            time.sleep(0.2)
            self.interrupted = True
            self.con.interrupt()

    with duckdb.connect(":memory:") as con:
        late = Late(con)
        with steps._within(late, step, False):  # type: ignore[arg-type]
            time.sleep(0.1)
        assert late.interrupted
        assert con.execute("SELECT count(*) FROM range(3000000)").fetchone() == (3000000,)
    assert not [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
