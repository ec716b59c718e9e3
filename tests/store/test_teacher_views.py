"""Token-level teacher scores: optional columns of score and batch files, and the views that ask them."""

import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rollway.errors import RollwayError
from rollway.store import parquet
from rollway.store.catalog import open_catalog, write_database
from rollway.store.tables import TABLES
from store.synthetic import PROMPTS, TAUGHT, add_teacher, make_results, teacher_rows


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run a has a teacher in its two rounds, run b none."""
    root = make_results(tmp_path_factory.mktemp("teachers") / "results", {"a-s0": 2, "b-s0": 1})
    add_teacher(root, "a-s0", 2)
    return root


def ask(results: Path, query: str) -> list[tuple]:
    with open_catalog(results) as catalog:
        return catalog.execute(query).fetchall()


def test_files_without_a_teacher_have_the_columns_they_always_had(results: Path) -> None:
    plain = pq.read_schema(results / "a-s0/r0000/p0/scores/exact-000.parquet")
    assert plain.names == TABLES["scores"].names()
    assert pq.read_schema(results / "b-s0/r0000/batch.parquet").names == TABLES["batch"].names()
    taught = pq.read_schema(results / "a-s0/r0000/p0/scores/teacher-000.parquet")
    assert taught.names == [*TABLES["scores"].names(), *TAUGHT]


def test_nested_lists_come_back_as_they_were_written(tmp_path: Path) -> None:
    rows = pa.Table.from_pylist(teacher_rows("a-s0", 0), TABLES["scores"].schema(TAUGHT))
    parts = [rows.slice(start, 5) for start in range(0, len(rows), 5)]
    parquet.write_groups(tmp_path / "f.parquet", iter(parts), "scores", TAUGHT)
    file = pq.ParquetFile(tmp_path / "f.parquet")
    assert file.num_row_groups == len(parts)
    assert file.read().to_pylist() == rows.to_pylist()
    group = file.metadata.row_group(0)
    encodings = {group.column(n).path_in_schema: group.column(n).encodings for n in range(group.num_columns)}
    assert "BYTE_STREAM_SPLIT" in encodings["teacher_topk_logprobs.list.element.list.element"]
    assert "BYTE_STREAM_SPLIT" in encodings["teacher_logprob.list.element"]
    with pytest.raises(RollwayError, match="unknown columns"):
        parquet.conform(pa.table({"rollout_id": ["a"], "teacher": [1.0]}), "scores")


def test_views_over_files_with_and_without_the_columns(results: Path) -> None:
    assert ask(results, "SELECT scorer, count(*), count(teacher_logprob) FROM scores GROUP BY ALL ORDER BY ALL") == [
        ("exact", 36, 0),
        ("format", 36, 0),
        ("teacher", 24, 16),
    ]
    assert ask(results, "SELECT run, count(*), count(teacher_topk_ids) FROM batch GROUP BY ALL ORDER BY ALL") == [
        ("a-s0", 16, 16),
        ("b-s0", 8, 0),
    ]
    with open_catalog(results) as catalog:
        sql = catalog.execute("SELECT sql FROM duckdb_views() WHERE view_name = 'scores'").fetchall()[0][0]
    assert "union_by_name = (CAST('t'" not in sql, "files of one kind are never opened to match columns by name"


def test_the_written_database_has_them_too(results: Path) -> None:
    import duckdb

    with duckdb.connect(str(write_database(results)), read_only=True) as database:
        assert database.execute("SELECT count(*) FROM teacher_tokens").fetchall() == [(2 * 8 * 3,)]
    (results / "rollway.duckdb").unlink()


def test_tokens_of_a_teacher(results: Path) -> None:
    where = "WHERE rollout_id = 'a-s0-0-0-0' ORDER BY position"
    assert ask(results, f"SELECT position, token, trained, topk_ids FROM teacher_tokens {where}") == [
        (0, 5, True, [5, 1]),
        (1, 6, True, [6, 1]),
        (2, 2, False, [2, 1]),
    ]
    gaps = [gap for (gap,) in ask(results, f"SELECT gap FROM teacher_tokens {where}")]
    assert gaps == pytest.approx([-0.1 + 0.5, -2.0 + 1.0, -4.0 + 2.0])
    assert [t for (t,) in ask(results, f"SELECT tail FROM teacher_tokens {where}")] == pytest.approx(
        [1 - math.exp(-0.5) - math.exp(-1.5)] * 3
    )


def test_teachers_and_routes(results: Path) -> None:
    (row,) = ask(results, "SELECT rollouts, gap, right_gap FROM teachers WHERE round = 1")
    assert row[0] == (PROMPTS - 1) * 4
    assert row[1:] == pytest.approx((-0.3, -0.3))
    assert ask(results, "SELECT run, round, route, row_count, share FROM routes ORDER BY ALL") == [
        ("a-s0", round, route, rows, share)
        for round in range(2)
        for route, rows, share in (("distill", 6, 0.75), ("policy", 2, 0.25))
    ]
