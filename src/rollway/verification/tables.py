"""Checks of one round's tables from what stands in them: whole, complete, finite, and about each other's rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rollway.store import parquet, provenance
from rollway.verification.findings import some

PAYLOAD = ("rollout_id", "prompt_tokens", "tokens", "logprobs", "source", "policy_round")
SLACK = 1e-4
"""Nats above 0 that rounding may give a log-prob."""


def rollouts(table: pa.Table, prompts: set[str] | None, policies: dict[int, str]) -> Iterator[str]:
    """What is wrong with a rollout table. prompts: ids of the task's; policies: round -> digest, where it is known."""
    ids = table.column("rollout_id")
    if twice := _twice(ids):
        yield f"the same rollout_id stands in several rows ({some(twice)})"
    length = table.column("length").to_numpy()
    for name in ("tokens", "logprobs", "train_mask"):
        found = pc.list_value_length(table.column(name)).to_numpy(zero_copy_only=False)
        if (wrong := np.flatnonzero(found != length)).size:
            yield f"{name} is not as long as `length` says in {wrong.size} rows ({_named(ids, wrong)})"
    sampled = pc.equal(table.column("source"), "policy").to_numpy(zero_copy_only=False)
    impossible = _rows_where(table.column("logprobs"), lambda x: ~np.isfinite(x) | (x > SLACK)) & sampled
    if (wrong := np.flatnonzero(impossible)).size:
        yield f"log-probs are not finite, or above 0, in {wrong.size} rows of the policy ({_named(ids, wrong)})"
    if prompts is not None and (strange := sorted(set(table.column("prompt_id").to_pylist()) - prompts)):
        yield f"prompts that the task does not have ({some(strange)})"
    pairs = zip(table.column("policy_round").to_pylist(), table.column("policy").to_pylist(), strict=True)
    for round, policy in sorted({pair for pair, own in zip(pairs, sampled, strict=True) if own}):
        if round in policies and policies[round] != policy:
            yield f"written by policy {policy}, but policy.json of round {round} is {policies[round]}"


def groups(table: pa.Table, size: int, prompts: int | None) -> Iterator[str]:
    """What is wrong with the groups of one pass. size: completions per group; prompts: groups, where that is known."""
    own = table.filter(pc.equal(table.column("source"), "policy"))
    samples: dict[str, list[int]] = {}
    for group, sample in zip(own.column("group_id").to_pylist(), own.column("sample").to_pylist(), strict=True):
        samples.setdefault(group, []).append(sample)
    if broken := [group for group, found in samples.items() if sorted(found) != list(range(size))]:
        yield f"{len(broken)} groups do not have samples 0 to {size - 1}, once each ({some(broken)})"
    if prompts is not None and len(samples) != prompts:
        yield f"{len(samples)} groups, and rollout.prompts is {prompts}"


def scores(table: pa.Table, scored: pa.ChunkedArray, scorer: str) -> Iterator[str]:
    """What is wrong with a scorer's file of the rollouts `scored`."""
    ids = table.column("rollout_id")
    if twice := _twice(ids):
        yield f"the same rollout is scored several times ({some(twice)})"
    missing, strange = (sorted(set(a.to_pylist()) - set(b.to_pylist())) for a, b in ((scored, ids), (ids, scored)))
    if missing:
        yield f"{len(missing)} rollouts have no score ({some(missing)})"
    if strange:
        yield f"scores of {len(strange)} rollouts that are not in the file beside it ({some(strange)})"
    if (wrong := np.flatnonzero(~np.isfinite(table.column("reward").to_numpy()))).size:
        yield f"rewards that are not finite in {wrong.size} rows ({_named(ids, wrong)})"
    if others := sorted(set(table.column("scorer").to_pylist()) - {scorer}):
        yield f"rows of another scorer ({some(others)})"


def batch(table: pa.Table, known: set[str]) -> Iterator[str]:
    """What is wrong with a batch whose rows may be any of the rollouts `known`."""
    ids = table.column("rollout_id").to_pylist()
    if strange := sorted(set(ids) - known):
        yield f"{len(strange)} rows are of rollouts that the round does not have ({some(strange)})"
    if len(set(zip(ids, table.column("slot").to_pylist(), strict=True))) != table.num_rows:
        yield "the same rollout stands twice in the same slot"
    for name in ("advantage", "weight"):
        values = table.column(name).drop_null().to_numpy()
        if not np.isfinite(values).all():
            yield f"{name} is not finite in {int((~np.isfinite(values)).sum())} rows"


def evals(table: pa.Table, asked: list[str], samples: int) -> Iterator[str]:
    """What is wrong with an evaluation's rows. asked: ids of its held-out prompts; samples: completions of each."""
    found, due = Counter(table.column("prompt_id").to_pylist()), Counter(asked)
    if wrong := sorted(name for name in {*due, *found} if found[name] != samples * due[name]):
        yield f"{len(wrong)} prompts do not have {samples} samples, or are none of the held-out ones ({some(wrong)})"


def differing(stored: pa.Table, made: pa.Table) -> Iterator[str]:
    """How a stored batch differs from the same batch made again: rows, or values beyond rounding."""
    keys = [
        [*zip(t.column("rollout_id").to_pylist(), t.column("slot").to_pylist(), strict=True)] for t in (stored, made)
    ]
    if sorted(keys[0]) != sorted(keys[1]):
        yield f"{stored.num_rows} rows, and its scores and SQL give {made.num_rows}, or others"
        return
    place = {key: n for n, key in enumerate(keys[1])}
    made = made.take([place[key] for key in keys[0]])
    for name in stored.column_names:
        if name in made.column_names and (wrong := _unequal(stored.column(name), made.column(name))).size:
            yield f"{name} is not what scores and SQL give in {wrong.size} rows ({_named(stored['rollout_id'], wrong)})"


def whole(path: Path, table: str) -> Iterator[str]:
    """Reads every page and compares it with its checksum. Raises RollwayError, also where the columns are others."""
    parquet.check(path, table)
    if not provenance.is_account(json.loads(parquet.metadata(path).get(provenance.KEY, "{}"))):
        yield "damaged: what it says that it was made from is no digests by role"


def _unequal(a: pa.ChunkedArray, b: pa.ChunkedArray) -> np.ndarray:
    if pa.types.is_floating(a.type):
        x, y = (v.to_numpy(zero_copy_only=False).astype(np.float64) for v in (a, b))
        return np.flatnonzero(~np.isclose(x, y, rtol=1e-9, atol=1e-12, equal_nan=True))
    return np.array([n for n, (x, y) in enumerate(zip(a.to_pylist(), b.to_pylist(), strict=True)) if x != y])


def _rows_where(lists: pa.ChunkedArray, wrong: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """[N] bool: rows of a list column that hold a value for which `wrong`."""
    flags = np.zeros(len(lists), dtype=bool)
    at = 0
    for chunk in lists.chunks:
        values = chunk.flatten().to_numpy(zero_copy_only=False)
        rows = np.repeat(np.arange(at, at + len(chunk)), pc.list_value_length(chunk).fill_null(0).to_numpy())
        flags[rows[wrong(values)]] = True
        at += len(chunk)
    return flags


def _twice(ids: pa.ChunkedArray) -> list[str]:
    counts = pc.value_counts(ids)
    return sorted(row["values"] for row in counts.to_pylist() if row["counts"] > 1)


def _named(ids: pa.ChunkedArray, rows: np.ndarray) -> str:
    return some(ids.take(rows).to_pylist())
