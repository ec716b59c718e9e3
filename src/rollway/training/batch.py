"""From a curated batch and the rollouts it points at to training rows. Token ids are taken as they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rollway.errors import RollwayError
from rollway.policies.logprobs import Row
from rollway.store.payload import DERIVED_PAYLOAD


@dataclass(frozen=True)
class Said:
    """What a stored teacher said of a row's T tokens, nats; None where there is none."""

    logprob: NDArray[np.float32] | None = None
    """[T] of the token itself."""
    entropy: NDArray[np.float32] | None = None
    """[T] over the whole vocabulary."""
    topk_ids: NDArray[np.int32] | None = None
    """[T, K] its likeliest tokens."""
    topk_logprobs: NDArray[np.float32] | None = None
    """[T, K] their log-probs under the full softmax."""
    prompt_tokens: NDArray[np.int32] | None = None
    """What a live teacher reads before the completion, in place of the row's prompt."""


@dataclass(frozen=True)
class TrainingRow(Row):
    """One row of the batch: prompt and completion, with the half of the method that curation decided.

    logprobs [T] float32, the behaviour's, nats (NaN where none sampled);
    train_mask [T] bool; token_advantage [T] float32. None where curation gave nothing.
    """

    rollout_id: str
    slot: int
    logprobs: NDArray[np.float32]
    train_mask: NDArray[np.bool_]
    source: str
    advantage: float | None
    token_advantage: NDArray[np.float32] | None
    weight: float
    route: str | None
    group: int
    reward: float | None
    correct: bool | None
    age: int
    said: Said = Said()
    reworded: bool = False
    """Whether the prompt is another than the engine read: log-probs are then NaN, since its own are of that context."""


@dataclass(frozen=True)
class TrainingBatch:
    """All rows of a round, in the order of the batch table; pairs [P] as row numbers of chosen and rejected."""

    rows: list[TrainingRow]
    chosen: NDArray[np.int64]
    rejected: NDArray[np.int64]


def training_batch(batch: pa.Table, rollouts: pa.Table) -> TrainingBatch:
    """Joins the curated batch to the rollouts it draws on (this round's and earlier ones).

    Each (rollout_id, slot) becomes a row of its own. Raises RollwayError that names the rollout when it is missing,
    when its lists disagree in length, or when a pair is incomplete.
    """
    at = _positions(batch, rollouts)
    more = [name for name in DERIVED_PAYLOAD if name in rollouts.column_names]
    taken = rollouts.select([*_LISTS, "source", "group_id", *more]).take(at)
    lists = {name: _arrays(taken[name], dtype) for name, dtype in _LISTS.items()}
    reworded = _reworded(batch, taken, lists)
    columns: dict[str, list[Any]] = {name: batch[name].to_pylist() for name in _SCALARS if name in batch.column_names}
    given = {name: columns.get(name, [None] * len(batch)) for name in _SCALARS}
    token_advantage = _optional_arrays(batch)
    said = _said(batch)
    source = taken["source"].to_pylist()
    own_groups = taken["group_id"].to_pylist()
    groups = _dense([own if g is None else g for g, own in zip(given["group_id"], own_groups, strict=True)])
    rows = [
        TrainingRow(
            rollout_id=given["rollout_id"][n],
            slot=given["slot"][n] or 0,
            prompt_tokens=cast(Sequence[int], lists["prompt_tokens"][n]),
            tokens=cast(Sequence[int], lists["tokens"][n]),
            logprobs=lists["logprobs"][n],
            train_mask=lists["train_mask"][n],
            source=source[n],
            advantage=given["advantage"][n],
            token_advantage=token_advantage[n],
            weight=1.0 if given["weight"][n] is None else given["weight"][n],
            route=given["route"][n],
            group=groups[n],
            reward=given["reward"][n],
            correct=given["correct"][n],
            age=given["age"][n] or 0,
            said=said[n],
            reworded=reworded[n],
        )
        for n in range(len(batch))
    ]
    for row in rows:
        _check(row)
    chosen, rejected = _pairs(given["pair_id"], given["role"])
    return TrainingBatch(rows, chosen, rejected)


_LISTS = {"prompt_tokens": np.int32, "tokens": np.int32, "logprobs": np.float32, "train_mask": np.bool_}
_SCALARS = (
    *("rollout_id", "slot", "advantage", "weight", "route", "pair_id", "role"),
    *("reward", "correct", "group_id", "age"),
)


def _reworded(batch: pa.Table, taken: pa.Table, lists: dict[str, list[NDArray[Any]]]) -> list[bool]:
    """Makes of derived rollouts what is trained of them, in `lists`; says which rows' prompt the engine did not read.

    `train_prompt_tokens` stand in place of the prompt, and NaN in place of the engine's log-probs, which are of another
    context. With `span` turn, the prompt's last `prefix_length` tokens are trained too: their log-probs are NaN, and
    those of the completion hold, since it stands behind the same tokens.
    """
    rows = len(batch)
    spans = batch["span"].to_pylist() if "span" in batch.column_names else [None] * rows
    derived = "train_prompt_tokens" in taken.column_names
    trained = taken["train_prompt_tokens"].to_pylist() if derived else [None] * rows
    prefixes = taken["prefix_length"].to_pylist() if derived else [None] * rows
    for n, (span, other, length) in enumerate(zip(spans, trained, prefixes, strict=True)):
        name = f"batch: rollout {batch['rollout_id'][n].as_py()}"
        if other is not None and not other:
            raise RollwayError(
                f"{name} is of a derived pass with `trained: never`: leave it out with the SQL of curate.filter"
            )
        if span not in (None, "completion", "turn"):
            raise RollwayError(f"{name} has the span {span!r}; SQL returns completion or turn")
        prompt = lists["prompt_tokens"][n]
        prefix = prompt[len(prompt) - (length or 0) :]
        if other is not None:
            lists["prompt_tokens"][n] = np.asarray(other, dtype=np.int32)
            lists["logprobs"][n] = np.full_like(lists["logprobs"][n], np.nan)
        if span != "turn":
            continue
        if not len(prefix):
            raise RollwayError(f"{name} has the span turn, and its turn begins with the completion: use completion")
        if other is None:
            lists["prompt_tokens"][n] = prompt[: len(prompt) - len(prefix)]
        lists["tokens"][n] = np.concatenate([prefix, lists["tokens"][n]])
        unknown = np.full(len(prefix), np.nan, dtype=np.float32)
        lists["logprobs"][n] = np.concatenate([unknown, lists["logprobs"][n]])
        lists["train_mask"][n] = np.concatenate([np.ones(len(prefix), dtype=np.bool_), lists["train_mask"][n]])
    return [other is not None for other in trained]


def _positions(batch: pa.Table, rollouts: pa.Table) -> pa.Array:
    at = pc.index_in(batch["rollout_id"].combine_chunks(), value_set=rollouts["rollout_id"].combine_chunks())
    if at.null_count:
        lost = [i for i, p in zip(batch["rollout_id"].to_pylist(), at.to_pylist(), strict=True) if p is None]
        raise RollwayError(
            f"batch: rollout {lost[0]} ({len(lost)} in all) is not in the rollouts given to the train stage; "
            "run curate again, with the same rounds"
        )
    return at


def _arrays(column: pa.ChunkedArray, dtype: Any) -> list[NDArray[Any]]:
    """Each list of the column as an array, without going through Python numbers."""
    out: list[NDArray[Any]] = []
    for chunk in column.chunks:
        offsets = chunk.offsets.to_numpy()
        values = chunk.values.to_numpy(zero_copy_only=False).astype(dtype, copy=False)
        out.extend(values[a:b] for a, b in pairwise(offsets))
    return out


def _optional_arrays(batch: pa.Table) -> list[NDArray[np.float32] | None]:
    if "token_advantage" not in batch.column_names:
        return [None] * len(batch)
    return [None if v is None else np.asarray(v, dtype=np.float32) for v in batch["token_advantage"].to_pylist()]


def _said(batch: pa.Table) -> list[Said]:
    """The teacher's columns `teacher_{field}` of the batch, as far as it has them."""
    shapes = {"logprob": np.float32, "entropy": np.float32, "topk_ids": np.int32, "topk_logprobs": np.float32}
    shapes |= {"prompt_tokens": np.int32}
    found: dict[str, list[NDArray[Any] | None]] = {}
    for name, dtype in shapes.items():
        if f"teacher_{name}" not in batch.column_names:
            continue
        column = batch[f"teacher_{name}"]
        nested = pa.types.is_list(column.type) and pa.types.is_list(column.type.value_type)
        arrays = _matrices(column, dtype) if nested else _arrays(column, dtype)
        known = column.is_valid().to_pylist()
        found[name] = [array if is_known else None for array, is_known in zip(arrays, known, strict=True)]
    return [Said(**{name: values[n] for name, values in found.items()}) for n in range(len(batch))]


def _matrices(column: pa.ChunkedArray, dtype: Any) -> list[NDArray[Any]]:
    """Each list of equally long lists as an array [T, K]; of unequal ones K is 0, which no one takes for data."""
    out: list[NDArray[Any]] = []
    for chunk in column.chunks:
        inner = chunk.values
        ends, values = inner.offsets.to_numpy(), inner.values.to_numpy(zero_copy_only=False).astype(dtype, copy=False)
        for a, b in pairwise(chunk.offsets.to_numpy()):
            widths = np.diff(ends[a : b + 1])
            same = b > a and bool((widths == widths[0]).all())
            width = int(widths[0]) if same else 0
            rows = values[ends[a] : ends[a] + (b - a) * width]
            out.append(rows.reshape(b - a, width))
    return out


def _dense(ids: list[str]) -> list[int]:
    numbers: dict[str, int] = {}
    return [numbers.setdefault(i, len(numbers)) for i in ids]


def _check(row: TrainingRow) -> None:
    name = f"batch row ({row.rollout_id}, slot {row.slot})"
    for field, values in (("logprobs", row.logprobs), ("train_mask", row.train_mask)):
        if len(values) != len(row.tokens):
            raise RollwayError(
                f"{name}: {len(row.tokens)} tokens but {len(values)} {field}; generate or import it again"
            )
    if row.token_advantage is not None and len(row.token_advantage) != len(row.tokens):
        raise RollwayError(
            f"{name}: {len(row.tokens)} tokens but {len(row.token_advantage)} token advantages; fix the SQL"
        )
    for column, said in vars(row.said).items():
        if said is None or column == "prompt_tokens":
            continue
        if len(said) != len(row.tokens) or (said.ndim == 2 and len(said) and said.shape[1] == 0):
            raise RollwayError(
                f"{name}: teacher_{column} does not hold one entry (of equal width) for each of the {len(row.tokens)} "
                "tokens; score it again with the teacher"
            )
        if said.dtype.kind == "f" and bool(np.isnan(said).any()):
            raise RollwayError(f"{name}: teacher_{column} holds NaN; score it again with the teacher")
    if len(row.prompt_tokens) == 0:
        raise RollwayError(
            f"{name}: no prompt token, so its first token has no log-prob; give the prompt a start token"
        )
    if not np.isfinite(row.weight):
        raise RollwayError(f"{name}: weight {row.weight}; fix the SQL of curate.weight")
    parts = [v for v in (row.advantage, row.token_advantage) if v is not None]
    if not all(np.isfinite(v).all() for v in parts):
        raise RollwayError(f"{name}: its advantage is not finite; fix the SQL of curate.advantage")
    if row.reward is not None and not np.isfinite(row.reward):
        raise RollwayError(f"{name}: reward {row.reward}; fix the scorer or the SQL of curate.reward")


def _pairs(pair_ids: list[str | None], roles: list[str | None]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    sides: dict[str, dict[str, int]] = {}
    for n, (pair, role) in enumerate(zip(pair_ids, roles, strict=True)):
        if pair is None:
            continue
        if role not in ("chosen", "rejected") or role in sides.setdefault(pair, {}):
            raise RollwayError(
                f"batch: pair {pair} has role {role!r} twice or an unknown one; fix the SQL of curate.pair"
            )
        sides[pair][role] = n
    for pair, members in sides.items():
        if len(members) < 2:
            raise RollwayError(
                f"batch: pair {pair} has only {next(iter(members))}; fix the SQL of curate.pair or select"
            )
    chosen = np.array([m["chosen"] for m in sides.values()], dtype=np.int64)
    rejected = np.array([m["rejected"] for m in sides.values()], dtype=np.int64)
    return chosen, rejected
