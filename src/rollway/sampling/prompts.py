"""Which prompts a round takes, and the names of its groups and rollouts: pure functions."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b, sha256
from typing import Any


@dataclass(frozen=True)
class Group:
    """The samples of one prompt in one pass of a round."""

    group_id: str
    prompt_id: str
    index: int
    """Place among the groups of its pass, over all shards."""


def epoch_block(prompt_ids: Sequence[str], *, seed: int, round: int, prompts: int, offset: int = 0) -> list[str]:
    """The `prompts` prompt ids of a round's pass 0: block `round`, after `offset` prompts, of an endless stream of
    shuffled epochs.

    An epoch holds every prompt once, ordered by hash(seed, epoch, prompt_id), whatever the order of `prompt_ids`.
    A block that crosses into the next epoch may hold a prompt twice; each is then a group of its own.
    """
    size = len(prompt_ids)
    start, stop = offset + round * prompts, offset + (round + 1) * prompts
    chosen: list[str] = []
    for epoch in range(start // size, -(-stop // size)):
        order = _shuffled(prompt_ids, f"epoch/{seed}/{epoch}")
        chosen += order[max(start - epoch * size, 0) : stop - epoch * size]
    return chosen


def refill(prompt_ids: Sequence[str], used: set[str], *, seed: int, round: int, need: int) -> list[str]:
    """Prompts of a later pass: the first `need` by hash(seed, round, prompt_id) that the round has not used yet.

    Fewer than `need` when the task has no more prompts.
    """
    return _shuffled([p for p in prompt_ids if p not in used], f"refill/{seed}/{round}")[:need]


def rollout_key(policy: str, prompts: str, spec: Any) -> str:
    """12 hex digits that name one pass of rollouts: of the digests of policy and prompts, and of the JSON-able `spec`.

    `spec` holds all that changes the tokens: sampling, group size, seed, round, pass; not shards, batch or paths.
    """
    text = json.dumps([policy, prompts, spec], sort_keys=True, separators=(",", ":"), allow_nan=False)
    return sha256(text.encode()).hexdigest()[:12]


def groups(key: str, prompt_ids: Sequence[str]) -> list[Group]:
    """One group per entry of `prompt_ids`, in order."""
    return [Group(f"{key}-{index:05d}", prompt_id, index) for index, prompt_id in enumerate(prompt_ids)]


def rollout_id(group_id: str, sample: int) -> str:
    return f"{group_id}-{sample:04d}"


def shard_slice(n_groups: int, shard: int, shards: int) -> slice:
    """The contiguous groups of one shard; sizes differ by at most one."""
    return slice(n_groups * shard // shards, n_groups * (shard + 1) // shards)


def _shuffled(prompt_ids: Sequence[str], salt: str) -> list[str]:
    return sorted(prompt_ids, key=lambda p: (blake2b(f"{salt}/{p}".encode(), digest_size=16).digest(), p))
