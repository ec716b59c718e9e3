"""Rollouts and scores as rollway's stages write them, read into memory group by group.

Regular files: a score file holds its rollout file's rows in the same order; the rows of a group lie side by side, by
sample; and rollout ids rise with group_id and sample. That no rollout occurs twice and none lacks a score is then
seen by comparing neighbours, without a join, and order needs a sort of the groups alone.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rollway.config.scorers import ScoreConfig
from rollway.curation.group_windows import Groups
from rollway.curation.memory import give_back
from rollway.store.tables import DERIVED, TABLES

MADE = ("reward", "correct", "age")
"""Columns made here of what is read."""

_REPEATING = ["policy", "source", "finish", "engine", "group_id", "prompt_id"]
"""Texts that are kept as numbers into a list of the different ones."""


ROWS_OF_A_BLOCK = 150_000

WHILE_SORTING = 1.6
"""Most memory over that of the rows: columns are laid in order one by one."""
BYTES_OF_A_PLACE = 8
"""Of a row's place and group."""


class Irregular(Exception):
    """The files are not regular: what is wrong with them, if anything, is for SQL to find out."""


class Room:
    """Bytes of memory that all the files' rows may take; threads share it."""

    def __init__(self, most: float) -> None:
        self.left, self.lock = most / WHILE_SORTING, Lock()

    def take(self, size: float) -> None:
        """Raises Irregular where so many are not left."""
        with self.lock:
            self.left -= size
            if self.left < 0:
                raise Irregular


@dataclass
class Regular:
    """Rows by group_id and sample. `columns` [N] each, a scalar where all rows hold one value; group_id is the group's
    number, which rises with its name."""

    columns: dict[str, pa.Array | pa.Scalar]
    groups: Groups
    names: pa.Array
    """[G] group_id by number."""
    ids: list[pa.Array]
    """rollout_id, file by file, in the files' order."""
    places: NDArray[np.int32]
    """[N] where a row's rollout_id is, counted over `ids`."""

    @property
    def rows(self) -> int:
        return int(self.groups.sizes.sum())

    def rollout_ids(self, places: NDArray[np.int32]) -> pa.Array:
        """Of rows by their places in the files."""
        return _take(self.ids, places)


@dataclass
class Part:
    """One file's rows."""

    columns: dict[str, pa.Array | pa.Scalar]
    """A scalar where the whole file holds one value."""
    ids: pa.Array
    sizes: NDArray[np.int64]
    """[B] rows of a block: neighbours of one group."""
    ends: dict[str, pa.Array]
    """[B] of each block the group_id (name), and the rollout_id at its ends (first, last)."""


def read(
    rollouts: list[Path],
    scores: dict[str, list[Path]],
    score: ScoreConfig,
    columns: set[str],
    round: int,
    pool: ThreadPoolExecutor,
    room: Room,
) -> Iterator[Part]:
    """Begins to read `columns` (those of MADE and the scorers among them) of Parquet files, on the pool's threads.

    Raises Irregular, also for files that are missing or broken, or too large for `room`, here or when the parts are
    asked for.
    """
    if any(len(scores.get(name, ())) != len(rollouts) for name in score.scorers):
        raise Irregular
    wanted = {"rollout_id", "group_id", "sample", *(columns - {*MADE, *score.scorers})}
    wanted |= {"round"} if "age" in columns else set()
    if not wanted <= set(TABLES["rollouts"].scalar_names()):
        raise Irregular

    def part(place: int) -> Part:
        judged = {name: scores[name][place] for name in score.scorers}
        try:
            return _part(rollouts[place], judged, score, wanted, columns, round, room)
        except (pa.ArrowException, OSError, KeyError) as error:
            raise Irregular from error
        finally:
            give_back()

    return pool.map(part, range(len(rollouts)))


def rows_in(files: list[Path]) -> int:
    """By their footers. Raises Irregular."""
    try:
        return sum(pq.read_metadata(path).num_rows for path in files)
    except (pa.ArrowException, OSError) as error:
        raise Irregular from error


def _part(
    path: Path, judged: dict[str, Path], score: ScoreConfig, wanted: set[str], columns: set[str], round: int, room: Room
) -> Part:
    read = _read(path, sorted(wanted), room)
    ids, sample, group = (_array(read.pop(name)) for name in ("rollout_id", "sample", "group_id"))
    rewards: dict[str, NDArray[np.float64]] = {}
    for scorer, file in judged.items():
        verdicts = _read(file, ["rollout_id", "reward"], None)
        if not _array(verdicts["rollout_id"]).equals(ids):
            raise Irregular
        rewards[scorer] = _finite(verdicts["reward"], len(ids))
        room.take(rewards[scorer].nbytes)
    made: dict[str, pa.Array | pa.Scalar] = {
        name: pa.array(values) for name, values in rewards.items() if name.lower() in columns
    }
    if "reward" in columns:
        alone = next(iter(score.reward), None) if list(score.reward.values()) == [1.0] else None
        weighted = made.get(alone) if alone is not None else None
        made["reward"] = pa.array(_weighted(score, rewards, len(ids))) if weighted is None else weighted
        _finite(made["reward"], len(ids))
    if "correct" in columns:
        right = rewards[score.correct] >= score.threshold if score.correct else None
        made["correct"] = pa.scalar(None, pa.bool_()) if right is None else pa.array(right)
    if "age" in columns:
        made["age"] = pc.cast(pc.subtract(pa.scalar(round, pa.int32()), read["round"]), pa.int32())
    if "sample" in columns:
        made["sample"] = sample
    names, sizes = _blocks(group, sample, ids)
    after = np.cumsum(sizes)
    ends = {"name": names, "first": ids.take(pa.array(after - sizes)), "last": ids.take(pa.array(after - 1))}
    kept = {name: column for name, column in read.items() if name in columns}
    return Part(kept | made, ids, sizes, ends)


def _weighted(score: ScoreConfig, rewards: dict[str, NDArray[np.float64]], rows: int) -> NDArray[np.float64]:
    terms: Iterable[NDArray[np.float64]] = (weight * rewards[name] for name, weight in score.reward.items())
    total = next(iter(terms), None)
    if total is None:
        return np.zeros(rows)
    for term in terms:
        total = total + term
    return total


def _read(path: Path, columns: list[str], room: Room | None) -> dict[str, pa.Array | pa.Scalar]:
    """The columns, constant ones as scalars; `room` is asked before anything is read."""
    with pq.ParquetFile(path, read_dictionary=[name for name in _REPEATING if name in columns]) as file:
        if DERIVED.encode() in (file.schema_arrow.metadata or {}):
            raise Irregular  # Groups go on from file to file.
        constant = _constants(file, columns)
        if room is not None:
            varying = [name for name in columns if name not in constant]
            room.take(BYTES_OF_A_PLACE * file.metadata.num_rows + _bytes(file, varying))
        table = file.read(columns=[name for name in columns if name not in constant], use_threads=False)
    if len(constant) + table.num_columns < len(columns):
        raise Irregular
    return constant | {name: _whole(table.column(name)) for name in table.column_names}


def _bytes(file: pq.ParquetFile, columns: list[str]) -> int:
    """Of the columns in memory, by the file's footer."""
    metadata, size = file.metadata, 0
    place = {metadata.schema.column(i).path: i for i in range(metadata.num_columns)}
    for name in columns:
        if name not in place:
            continue
        if name in _REPEATING:
            size += 4 * metadata.num_rows
        elif (width := _WIDTHS.get(metadata.schema.column(place[name]).physical_type)) is not None:
            size += width * metadata.num_rows
        else:
            parts = (metadata.row_group(i).column(place[name]) for i in range(metadata.num_row_groups))
            size += sum(part.total_uncompressed_size for part in parts)
    return size


def _constants(file: pq.ParquetFile, columns: list[str]) -> dict[str, pa.Scalar]:
    """Columns of which the statistics say that they hold one value: these need not be read."""
    parts = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    place = {file.metadata.schema.column(i).path: i for i in range(file.metadata.num_columns)}
    found: dict[str, pa.Scalar] = {}
    for name in columns:
        if name in _NEVER_CONSTANT or name not in place:
            continue
        values = set()
        for part in parts:
            held = part.column(place[name]).statistics
            known = held is not None and held.has_min_max and held.has_null_count and held.null_count == 0
            values.add(held.min if known and held.min == held.max and _exact(held.min) else None)
            if None in values or len(values) > 1:
                break
        if len(values) == 1 and None not in values:
            found[name] = pa.scalar(values.pop(), file.schema_arrow.field(name).type)
    return found


def _exact(value: str | float) -> bool:
    """Writers may cut long texts off in statistics."""
    return not isinstance(value, str) or len(value) <= 32


_WIDTHS = {"INT32": 4, "FLOAT": 4, "INT64": 8, "DOUBLE": 8, "BOOLEAN": 1}
_NEVER_CONSTANT = ("rollout_id", "group_id", "sample", "reward")


def _whole(column: pa.ChunkedArray) -> pa.Array:
    """One array."""
    if pa.types.is_dictionary(column.type):
        column = column.unify_dictionaries()
    whole = column.combine_chunks()
    return pa.concat_arrays(whole.chunks) if isinstance(whole, pa.ChunkedArray) else whole


def _array(column: pa.Array | pa.Scalar) -> pa.Array:
    if isinstance(column, pa.Scalar):
        raise Irregular
    return column


def _finite(values: pa.Array | pa.Scalar, rows: int) -> NDArray[np.float64]:
    if isinstance(values, pa.Scalar):
        return np.full(rows, values.as_py())
    found = values.to_numpy(zero_copy_only=False)
    if values.null_count or not np.isfinite(found).all():
        raise Irregular
    return found


def _blocks(group: pa.DictionaryArray, sample: pa.Array, ids: pa.Array) -> tuple[pa.Array, NDArray[np.int64]]:
    """Names and sizes of the blocks of neighbours of one group, once samples and ids are seen to rise in them."""
    if group.null_count or sample.null_count or ids.null_count:
        raise Irregular
    if not pa.types.is_dictionary(group.type):
        raise Irregular
    code, place = group.indices.to_numpy(), sample.to_numpy()
    if not len(code):
        return pa.array([], pa.string()), np.zeros(0, np.int64)
    new = code[1:] != code[:-1]
    rising = pc.less(ids[:-1], ids[1:]).to_numpy(zero_copy_only=False)
    if not (new | (rising & (place[1:] > place[:-1]))).all():
        raise Irregular
    starts = np.concatenate([[0], np.flatnonzero(new) + 1])
    return group.dictionary.take(pa.array(code[starts])), np.diff(starts, append=len(code))


def in_order(read: Iterable[Part]) -> Regular:
    """Lays the parts together. Raises Irregular, also where there is no row."""
    parts = [part for part in read if len(part.ids)]
    if not parts:
        raise Irregular
    if sum(len(part.ids) for part in parts) >= 2**31:
        raise Irregular
    sizes = np.concatenate([part.sizes for part in parts])
    names = pa.concat_arrays([part.ends.pop("name") for part in parts])
    order = None
    if not _rises(names[:-1], names[1:]):
        order = pc.sort_indices(names)
        names = names.take(order)
        if not _rises(names[:-1], names[1:]):  # A group in two blocks.
            raise Irregular
    first, last = (pa.concat_arrays([part.ends.pop(end) for part in parts]) for end in ("first", "last"))
    if order is not None:
        first, last = first.take(order), last.take(order)
    if not _rises(last[:-1], first[1:]):
        raise Irregular
    del first, last
    give_back()
    rows = None
    if order is not None:
        blocks = order.to_numpy()
        starts = (np.cumsum(sizes) - sizes)[blocks]
        sizes = sizes[blocks]
        rows = np.repeat((starts - (np.cumsum(sizes) - sizes)).astype(np.int32), sizes)
        rows += np.arange(len(rows), dtype=np.int32)
    columns: dict[str, pa.Array | pa.Scalar] = {}
    laid: dict[tuple[int, ...], pa.Array] = {}
    for name in list(parts[0].columns):
        pieces = [part.columns.pop(name) for part in parts]
        if all(isinstance(piece, pa.Scalar) and piece.equals(pieces[0]) for piece in pieces):
            columns[name] = pieces[0]
            continue
        same = tuple(map(id, pieces))  # A reward that is one scorer's verdict is the same column.
        if same not in laid:
            arrays = [
                repeated(piece, len(part.ids)) if isinstance(piece, pa.Scalar) else piece
                for piece, part in zip(pieces, parts, strict=True)
            ]
            column = _whole(pa.chunked_array(arrays))
            laid[same] = column if rows is None else column.take(pa.array(rows))
        columns[name] = laid[same]
        give_back()
    groups = Groups(sizes)
    columns["group_id"] = pa.array(groups.to_rows(np.arange(len(sizes), dtype=np.int32)))
    places = np.arange(int(sizes.sum()), dtype=np.int32) if rows is None else rows
    return Regular(columns, groups, names, [part.ids for part in parts], places)


def _rises(before: pa.Array, after: pa.Array) -> bool:
    return len(before) == 0 or bool(pc.all(pc.less(before, after)).as_py())


def repeated(value: pa.Scalar, rows: int) -> pa.Array:
    """[N] of one value. Calls with the same value share memory where N is small."""
    return _block(value).slice(0, rows) if rows <= ROWS_OF_A_BLOCK else _filled(value, rows)


def _filled(value: pa.Scalar, rows: int) -> pa.Array:
    if value.type == pa.string():
        texts = pa.array([value.as_py()], pa.string())
        return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), texts)
    return pa.repeat(value, rows)


@lru_cache(maxsize=64)
def _block(value: pa.Scalar) -> pa.Array:
    return _filled(value, ROWS_OF_A_BLOCK)


def _take(chunks: list[pa.Array], places: NDArray[np.int32]) -> pa.Array:
    """Rows of arrays that lie one after the other. Of each only the stretch with such rows is copied."""
    if not len(places):
        return pa.array([], pa.string())
    ends = np.cumsum([len(chunk) for chunk in chunks])
    owner = np.searchsorted(ends, places, side="right")
    stretches, shift, before = [], np.zeros(len(chunks), np.int64), 0
    for chunk in np.flatnonzero(np.bincount(owner)):
        mine = places[owner == chunk]
        low, high = int(mine.min()), int(mine.max()) + 1
        stretches.append(chunks[chunk].slice(low - (ends[chunk] - len(chunks[chunk])), high - low))
        shift[chunk] = before - low
        before += high - low
    return pa.concat_arrays(stretches).take(pa.array(places + shift[owner]))
