"""Rollouts and scores as rollway's stages write them, read into memory group by group.

Regular files: a score file holds its rollout file's rows in the same order; the rows of a group lie side by side, by
sample; and rollout ids rise with group_id and sample. That no rollout occurs twice and none lacks a score is then
seen by comparing neighbours, without a join, and order needs a sort of the groups alone.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rollway.config.scorers import ScoreConfig
from rollway.curation.group_windows import Groups
from rollway.store.tables import TABLES

MADE = ("reward", "correct", "age")
"""Columns made here of what is read."""

_REPEATING = ["policy", "source", "finish", "engine", "group_id", "prompt_id"]
"""Texts that are kept as numbers into a list of the different ones."""


class Irregular(Exception):
    """The files are not regular: what is wrong with them, if anything, is for SQL to find out."""


@dataclass
class Regular:
    """Rows by group_id and sample. `columns` [N] each; group_id is the group's number, which rises with its name."""

    columns: dict[str, pa.Array]
    groups: Groups
    names: pa.Array
    """[G] group_id by number."""
    ids: list[pa.Array]
    """rollout_id, file by file, in the files' order."""
    row_in_files: NDArray[np.int64] | None
    """[N] where a row's rollout_id is, counted over `ids`; None: in the same place."""

    @property
    def rows(self) -> int:
        return int(self.groups.sizes.sum())

    def rollout_ids(self, rows: NDArray[np.int64] | None) -> pa.Array:
        """Their ids; rows: None for all."""
        places = self.row_in_files
        if rows is not None:
            places = rows if places is None else places[rows]
        if places is None:
            return pa.concat_arrays(self.ids) if self.ids else pa.array([], pa.string())
        return _take(self.ids, places)


@dataclass
class _Part:
    """One file's rows."""

    columns: dict[str, pa.Array]
    ids: pa.Array
    names: pa.Array
    """[B] group_id by block of neighbours of one group."""
    sizes: NDArray[np.int64]
    first: pa.Array
    last: pa.Array
    """[B] rollout_id at a block's ends."""


def load(
    rollouts: list[Path],
    scores: dict[str, list[Path]],
    score: ScoreConfig,
    columns: set[str],
    round: int,
    pool: ThreadPoolExecutor,
) -> Regular:
    """Reads `columns` (those of MADE and the scorers among them) of Parquet files.

    Raises Irregular, also for files that are missing or broken.
    """
    if any(len(scores.get(name, ())) != len(rollouts) for name in score.scorers):
        raise Irregular
    wanted = {"rollout_id", "group_id", "sample", *(columns - {*MADE, *score.scorers})}
    wanted |= {"round"} if "age" in columns else set()
    if not wanted <= set(TABLES["rollouts"].scalar_names()):
        raise Irregular
    per_file = [(path, {name: scores[name][i] for name in score.scorers}) for i, path in enumerate(rollouts)]
    try:
        parts = list(pool.map(lambda job: _part(*job, score, wanted, columns, round), per_file))
    except (pa.ArrowException, OSError, KeyError) as error:
        raise Irregular from error
    return _in_order([part for part in parts if len(part.ids)])


def _part(
    path: Path, judged: dict[str, Path], score: ScoreConfig, wanted: set[str], columns: set[str], round: int
) -> _Part:
    read = _read(path, sorted(wanted))
    ids = read.pop("rollout_id")
    rewards: dict[str, NDArray[np.float64]] = {}
    for scorer, file in judged.items():
        verdicts = _read(file, ["rollout_id", "reward"])
        if not verdicts["rollout_id"].equals(ids):
            raise Irregular
        rewards[scorer] = _finite(verdicts["reward"])
    made = {name: pa.array(values) for name, values in rewards.items() if name.lower() in columns}
    if "reward" in columns:
        made["reward"] = pa.array(_finite(pa.array(_weighted(score, rewards, len(ids)))))
    if "correct" in columns:
        right = rewards[score.correct] >= score.threshold if score.correct else None
        made["correct"] = pa.nulls(len(ids), pa.bool_()) if right is None else pa.array(right)
    if "age" in columns:
        made["age"] = pa.array(np.int32(round) - read["round"].to_numpy())
    names, sizes = _blocks(read.pop("group_id"), read["sample"], ids)
    ends = np.cumsum(sizes)
    kept = {name: array for name, array in read.items() if name in columns or name == "sample"}
    return _Part(kept | made, ids, names, sizes, ids.take(pa.array(ends - sizes)), ids.take(pa.array(ends - 1)))


def _weighted(score: ScoreConfig, rewards: dict[str, NDArray[np.float64]], rows: int) -> NDArray[np.float64]:
    terms: Iterable[NDArray[np.float64]] = (weight * rewards[name] for name, weight in score.reward.items())
    total = next(iter(terms), None)
    if total is None:
        return np.zeros(rows)
    for term in terms:
        total = total + term
    return total


def _read(path: Path, columns: list[str]) -> dict[str, pa.Array]:
    with pq.ParquetFile(path, read_dictionary=[name for name in _REPEATING if name in columns]) as file:
        table = file.read(columns=columns, use_threads=False)
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise Irregular
    return {name: _whole(table.column(name)) for name in columns}


def _whole(column: pa.ChunkedArray) -> pa.Array:
    """One array; nulls only where a rollout may have none."""
    if pa.types.is_dictionary(column.type):
        column = column.unify_dictionaries()
    whole = column.combine_chunks()
    return pa.concat_arrays(whole.chunks) if isinstance(whole, pa.ChunkedArray) else whole


def _finite(values: pa.Array) -> NDArray[np.float64]:
    if values.null_count:
        raise Irregular
    found = values.to_numpy()
    if not np.isfinite(found).all():
        raise Irregular
    return found


def _blocks(group: pa.DictionaryArray, sample: pa.Array, ids: pa.Array) -> tuple[pa.Array, NDArray[np.int64]]:
    """Names and sizes of the blocks of neighbours of one group, once samples and ids are seen to rise in them."""
    if group.null_count or sample.null_count or ids.null_count:
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


def _in_order(parts: list[_Part]) -> Regular:
    if not parts:
        raise Irregular
    names = pa.concat_arrays([part.names for part in parts])
    sizes = np.concatenate([part.sizes for part in parts])
    first, last = (pa.concat_arrays([getattr(p, end) for p in parts]) for end in ("first", "last"))
    order = None
    if not _rises(names[:-1], names[1:]):
        order = pc.sort_indices(names)
        names, first, last = names.take(order), first.take(order), last.take(order)
        if not _rises(names[:-1], names[1:]):  # A group in two blocks.
            raise Irregular
    if not _rises(last[:-1], first[1:]):
        raise Irregular
    rows = None
    if order is not None:
        blocks = order.to_numpy()
        starts = (np.cumsum(sizes) - sizes)[blocks]
        sizes = sizes[blocks]
        rows = np.arange(sizes.sum()) + np.repeat(starts - (np.cumsum(sizes) - sizes), sizes)
    columns: dict[str, pa.Array] = {}
    for name in list(parts[0].columns):
        column = _whole(pa.chunked_array([part.columns.pop(name) for part in parts]))
        columns[name] = column if rows is None else column.take(pa.array(rows))
    groups = Groups(sizes)
    columns["group_id"] = pa.array(groups.to_rows(np.arange(len(sizes), dtype=np.int32)))
    return Regular(columns, groups, names, [part.ids for part in parts], rows)


def _rises(before: pa.Array, after: pa.Array) -> bool:
    return len(before) == 0 or bool(pc.all(pc.less(before, after)).as_py())


def _take(chunks: list[pa.Array], places: NDArray[np.int64]) -> pa.Array:
    """Rows of arrays that lie one after the other, without laying them together first."""
    taken: list[pa.Array] = []
    ends = np.cumsum([len(chunk) for chunk in chunks])
    owner = np.searchsorted(ends, places, side="right")
    cuts = np.flatnonzero(owner[1:] != owner[:-1]) + 1
    if len(cuts) > 16 * len(chunks):
        return pa.concat_arrays(chunks).take(pa.array(places))
    for start, stop in zip([0, *cuts], [*cuts, len(places)], strict=True):
        if stop > start:
            chunk = owner[start]
            taken.append(chunks[chunk].take(pa.array(places[start:stop] - (ends[chunk] - len(chunks[chunk])))))
    return pa.concat_arrays(taken) if taken else pa.array([], pa.string())
