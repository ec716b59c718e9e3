"""Rollouts read and batches written in parts."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rollway.errors import RollwayError
from rollway.store import parquet
from rollway.store.tables import TABLES
from store.synthetic import rollout_rows


@pytest.fixture
def rollouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """60 rows in row groups of 10."""
    monkeypatch.setattr(parquet, "_row_groups", lambda rows: [(at, 10) for at in range(0, rows.num_rows, 10)])
    rows = [row for number in range(5) for row in rollout_rows(f"run{number}", 0)]
    path = tmp_path / "rollouts.parquet"
    parquet.write(path, pa.Table.from_pylist(rows, schema=TABLES["rollouts"].schema()), "rollouts")
    return path


def test_only_row_groups_with_wanted_rows_are_read(rollouts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = parquet.read(rollouts, ["rollout_id", "tokens"])
    wanted = whole.column("rollout_id").take([3, 41, 44])
    read: list[list[str]] = []
    real = pq.ParquetFile.read_row_group

    def spy(file: pq.ParquetFile, number: int, columns: list[str]) -> pa.Table:
        read.append([str(number), *columns])
        return real(file, number, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", spy)
    found = parquet.read_rows(rollouts, ["rollout_id", "tokens"], "rollout_id", wanted)
    assert found.to_pylist() == whole.take([3, 41, 44]).to_pylist()
    assert [number for number, *columns in read if "tokens" in columns] == ["0", "4"]
    none = parquet.read_rows(rollouts, ["rollout_id", "tokens"], "rollout_id", pa.chunked_array([["nobody"]]))
    assert none.num_rows == 0
    assert none.schema.equals(found.schema)


def test_parts_are_the_whole(rollouts: Path) -> None:
    parts = list(parquet.read_in_parts(rollouts, ["rollout_id", "text"]))
    assert [part.num_rows for part in parts] == [10] * 6
    assert pa.concat_tables(parts).equals(parquet.read(rollouts, ["rollout_id", "text"]))
    assert parquet.rows(rollouts) == 60


@pytest.mark.parametrize("size", [1, 3, 10, 100])
@pytest.mark.parametrize("rows", [0, 1, 25])
def test_a_file_written_in_parts_has_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, size: int
) -> None:
    monkeypatch.setattr(parquet, "MOST_ROWS_PER_ROW_GROUP", 10)
    table = pa.table({"rollout_id": [f"r{n}" for n in range(rows)], "slot": pa.array([0] * rows, pa.int32())})
    table = table.cast(pa.schema([("rollout_id", pa.string()), ("slot", pa.int32())]))
    parquet.write_parts(tmp_path / "parts.parquet", (table.slice(at, size) for at in range(0, rows, size)), "batch")
    assert parquet.read(tmp_path / "parts.parquet").num_rows == rows
    groups = pq.read_metadata(tmp_path / "parts.parquet").num_row_groups
    assert groups == max(1, -(-rows // 10))


def test_damage_is_said(tmp_path: Path, rollouts: Path) -> None:
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(rollouts.read_bytes()[:-50])
    for call in (
        lambda: list(parquet.read_in_parts(broken, ["text"])),
        lambda: parquet.read_rows(broken, ["text"], "rollout_id", pa.chunked_array([["a"]])),
        lambda: parquet.rows(broken),
    ):
        with pytest.raises(RollwayError, match=r"broken\.parquet: not a whole Parquet file"):
            call()
    with pytest.raises(RollwayError, match="has no column"):
        parquet.read_rows(rollouts, ["nothing"], "rollout_id", pa.chunked_array([["a"]]))


def test_a_key_of_the_metadata_that_is_no_text_is_damage(tmp_path: Path) -> None:
    """Found by fuzzing: one byte of a key, and the rest of the file as it was."""
    path = tmp_path / "scores.parquet"
    pq.write_table(pa.table({"reward": [1.0]}).replace_schema_metadata({b"\x82ollway.schema": b"1"}), path)
    with pytest.raises(RollwayError, match=r"scores\.parquet: not a whole Parquet file.*run `snakemake"):
        parquet.metadata(path)
