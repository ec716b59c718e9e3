"""Parquet files of the declared tables: written whole, with encodings that suit tokens; read with clear errors."""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rollway.errors import RollwayError, unread
from rollway.store import provenance
from rollway.store.atomic import atomic_path
from rollway.store.tables import SCHEMA_VERSION, TABLES

TOKENS_PER_ROW_GROUP = 2_000_000
MOST_ROWS_PER_ROW_GROUP = 122_880
_LOW_CARDINALITY = [
    *("task", "split", "policy", "source", "finish", "engine", "sampling", "scorer", "route", "role"),
    *("group_id", "prompt_id"),
]

_FEW_IN_BATCH = ["slot", "advantage", "weight", "route", "role", "reward", "age"]


def write(path: Path, rows: pa.Table, table: str, metadata: dict[str, str] | None = None) -> None:
    """Writes `rows` as declared table `table`.

    Tokens are stored plain and log-probs byte-stream-split under zstd: dictionaries only cost where nearly every value
    differs. `metadata` goes into the file's key-value metadata.
    """
    rows = conform(rows, table)
    groups = (rows.slice(start, count) for start, count in _row_groups(rows))
    _write(path, groups, rows.schema, table, metadata or {})


def write_parts(path: Path, parts: Iterable[pa.Table], table: str) -> None:
    """As `write`, of rows that come in parts; holds one row group of them. The bytes do not depend on the parts.

    For tables without tokens: a row group then has a fixed number of rows.
    """
    _write(path, _regrouped((conform(part, table) for part in parts), table), TABLES[table].schema(), table, {})


def write_groups(path: Path, groups: Iterable[pa.Table], table: str, optional: Collection[str]) -> None:
    """As `write`, of rows that come in parts, each of which becomes a row group; one is held at a time.

    optional: those of the table's optional columns that the file has; every part has them.
    """
    schema = TABLES[table].schema(optional)
    _write(path, (conform(group, table) for group in groups), schema, table, {})


def _write(path: Path, groups: Iterable[pa.Table], schema: pa.Schema, table: str, metadata: dict[str, str]) -> None:
    said = {"rollway.table": table, "rollway.schema": str(SCHEMA_VERSION), **provenance.metadata(), **metadata}
    schema = schema.with_metadata(said)
    items = {place: kind for field in schema for place, kind in _list_items(field.name, field.type)}
    encodings = {
        place: "BYTE_STREAM_SPLIT" if pa.types.is_floating(kind) else "PLAIN"
        for place, kind in items.items()
        if not pa.types.is_boolean(kind)
    }
    few = _FEW_IN_BATCH if table == "batch" else _LOW_CARDINALITY
    with (
        atomic_path(path) as temporary,
        pq.ParquetWriter(
            temporary,
            schema,
            compression="zstd",
            use_dictionary=[n for n in few if n in schema.names],
            # Rewards of a judge are all different: then the dictionary is given up early.
            dictionary_pagesize_limit=65_536 if table == "batch" else 1_048_576,
            column_encoding=encodings or None,
            write_page_index=True,
            write_page_checksum=True,
        ) as writer,
    ):
        for group in groups:
            writer.write_table(group.replace_schema_metadata(schema.metadata))


def _list_items(place: str, kind: pa.DataType) -> Iterator[tuple[str, pa.DataType]]:
    """Where Parquet keeps the items of a list, or of a list of lists, and their type; nothing for other columns."""
    depth = 0
    while pa.types.is_list(kind):
        place, kind, depth = f"{place}.list.element", kind.value_type, depth + 1
    if depth and not pa.types.is_nested(kind):
        yield place, kind


def _regrouped(parts: Iterable[pa.Table], table: str) -> Iterator[pa.Table]:
    held = TABLES[table].schema().empty_table()
    empty = True
    for part in parts:
        held = pa.concat_tables([held, part])
        while held.num_rows >= MOST_ROWS_PER_ROW_GROUP:
            yield held.slice(0, MOST_ROWS_PER_ROW_GROUP)
            held, empty = held.slice(MOST_ROWS_PER_ROW_GROUP), False
    if held.num_rows or empty:
        yield held


def conform(rows: pa.Table, table: str) -> pa.Table:
    """The rows in the declared column order and types; absent nullable columns become null, optional ones stay absent.

    Raises RollwayError on missing or unknown columns, or nulls where none may be.
    """
    declared = TABLES[table]
    optional = [column for column in declared.optional if column.name in rows.column_names]
    expected = [*declared.columns, *optional]
    unknown = [n for n in rows.column_names if n not in [column.name for column in expected]]
    if unknown:
        raise RollwayError(f"table {table}: unknown columns {unknown}; declared are {declared.names()}")
    columns = []
    for column in expected:
        if column.name in rows.column_names:
            values = rows.column(column.name).cast(column.type)
        elif column.nullable:
            values = pa.chunked_array([pa.nulls(rows.num_rows, column.type)])
        else:
            raise RollwayError(f"table {table}: column {column.name} is missing")
        if values.null_count and not column.nullable:
            raise RollwayError(f"table {table}: column {column.name} holds {values.null_count} nulls")
        columns.append(values)
    return pa.Table.from_arrays(columns, schema=declared.schema([column.name for column in optional]))


def read(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Reads one file. Raises RollwayError when missing, truncated, of another schema version, or without a column."""
    with _opened(path, columns) as file:
        return file.read(columns=columns)


def names(path: Path) -> list[str]:
    """Its columns. Raises as `read` does."""
    with _opened(path, None) as file:
        return list(file.schema_arrow.names)


def rows(path: Path) -> int:
    """How many the file holds. Raises as `read` does."""
    with _opened(path, None) as file:
        return file.metadata.num_rows


def read_in_parts(path: Path, columns: list[str]) -> Iterator[pa.Table]:
    """Reads one file row group by row group, about TOKENS_PER_ROW_GROUP tokens each. Raises as `read` does."""
    with _opened(path, columns) as file:
        for part in range(file.num_row_groups):
            yield file.read_row_group(part, columns=columns)


def read_rows(path: Path, columns: list[str], key: str, values: pa.ChunkedArray) -> pa.Table:
    """The rows whose `key` is among `values`. Only row groups with such rows are read, and one is in memory at a time
    beside the rows kept. Raises as `read` does."""
    with _opened(path, [*columns, key]) as file:
        kept = [file.schema_arrow.empty_table().select(columns)]
        for part in range(file.num_row_groups):
            found = pc.is_in(file.read_row_group(part, columns=[key]).column(key), values)
            if pc.any(found).as_py():
                kept.append(file.read_row_group(part, columns=columns).filter(found))
        return pa.concat_tables(kept).replace_schema_metadata(None)


@contextmanager
def _opened(path: Path, columns: list[str] | None) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(path) as file:
            _check_version(path, file.schema_arrow.metadata or {})
            missing = [c for c in columns or [] if c not in file.schema_arrow.names]
            if missing:
                raise RollwayError(f"{path}: has no column {missing}; it holds {file.schema_arrow.names}")
            yield file
    except FileNotFoundError:
        raise RollwayError(f"{path}: missing; run `snakemake --force {path}`") from None
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise unread(path, error) from error
        raise RollwayError(
            f"{path}: not a whole Parquet file ({_first_line(error)}); delete it and run `snakemake {path}` again"
        ) from error


def check(path: Path, table: str) -> None:
    """Reads the whole file, each page against its checksum. Raises as `read` does, and where it is no such table."""
    with _opened(path, None):
        pass
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            found = file.schema_arrow
            optional = [column.name for column in TABLES[table].optional if column.name in found.names]
            if not found.remove_metadata().equals(TABLES[table].schema(optional)):
                raise RollwayError(f"{path}: its columns are not those of the table {table} (docs/tables.md)")
            for group in range(file.num_row_groups):
                file.read_row_group(group)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise unread(path, error) from error
        raise RollwayError(
            f"{path}: its content was changed after it was written ({_first_line(error)}); "
            f"delete it and run `snakemake {path}` again"
        ) from error


def read_many(paths: list[Path], columns: list[str] | None = None) -> pa.Table:
    """Reads files of one table one after the other."""
    return pa.concat_tables([read(path, columns) for path in paths])


def metadata(path: Path) -> dict[str, str]:
    """The file's key-value metadata."""
    try:
        raw = pq.read_schema(path).metadata or {}
        return {k.decode(): v.decode() for k, v in raw.items() if not k.startswith(b"ARROW:")}
    except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno:
            raise unread(path, error) from error
        raise RollwayError(
            f"{path}: not a whole Parquet file ({_first_line(error)}); delete it and run `snakemake {path}` again"
        ) from error


def _check_version(path: Path, raw: dict[bytes, bytes]) -> None:
    version = raw.get(b"rollway.schema", str(SCHEMA_VERSION).encode())
    if version != str(SCHEMA_VERSION).encode():
        raise RollwayError(
            f"{path}: schema version {version.decode(errors='replace')}, this rollway reads {SCHEMA_VERSION}; "
            f"rerun the stage that wrote it: `snakemake --force {path}`, or use the rollway version that did"
        )


def _row_groups(rows: pa.Table) -> list[tuple[int, int]]:
    if rows.num_rows == 0:
        return [(0, 0)]
    tokens = int(pc.sum(rows.column("length")).as_py() or 0) if "length" in rows.column_names else 0
    per_row = max(1.0, tokens / rows.num_rows)
    size = int(min(max(TOKENS_PER_ROW_GROUP / per_row, 1_000), MOST_ROWS_PER_ROW_GROUP))
    return [(start, min(size, rows.num_rows - start)) for start in range(0, rows.num_rows, size)]


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
