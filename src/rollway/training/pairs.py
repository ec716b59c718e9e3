"""Preference pairs: from a file's entries or a run's rollouts, dealt into training and held out, some swapped."""

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from rollway.config.reward_models import FilePairs
from rollway.errors import RollwayError
from rollway.store.prompt_ids import hash_of, normalised
from rollway.tasks.entries import Entry
from rollway.template import render


@dataclass(frozen=True)
class Pair:
    """Two completions of one prompt, the first better."""

    pair_id: str
    messages: list[dict[str, Any]]
    format: str
    """How the prompt is worded: plain or chat."""
    chosen: str
    rejected: str


def from_entries(entries: Sequence[Entry], config: FilePairs) -> list[Pair]:
    """One pair per entry; its id is a hash of its texts. Raises RollwayError naming the row with a null text."""
    pairs = []
    for entry in entries:
        texts = []
        for name, template in (("prompt", config.prompt), ("chosen", config.chosen), ("rejected", config.rejected)):
            text = render(template, entry.fields, entry.where)
            if text is None:
                raise RollwayError(f"{entry.where}: its {name} is null; mend or delete the row")
            texts.append(text)
        prompt, chosen, rejected = texts
        messages = [{"role": "user", "content": prompt}]
        pairs.append(Pair(hash_of(json.dumps(texts))[:16], messages, config.format, chosen, rejected))
    return pairs


def from_batch(
    batch: pa.Table, rollouts: pa.Table, prompts: pa.Table, *, failed: Collection[str] = (), by_reward: bool = True
) -> tuple[list[Pair], Counter[str]]:
    """The pairs of a curated batch (rollout_id, pair_id, role, reward), and how many are left out, by reason.

    A pair's id is made of its rollouts' ids. Read of rollouts: rollout_id, prompt_id, text; of prompts: prompt_id,
    messages, meta. failed: ids of the rollouts on which a scorer failed; their reward says nothing. by_reward: whether
    the reward ranks the rollouts; equal rewards are then no preference.
    Raises RollwayError where a pair's completions answer different prompts, or a prompt is not among `prompts`.
    """
    columns = ["rollout_id", "prompt_id", "text"]
    written = {r["rollout_id"]: r for r in rollouts.select(columns).to_pylist()}
    asked = {p["prompt_id"]: p for p in prompts.select(["prompt_id", "messages", "meta"]).to_pylist()}
    roles: dict[str, dict[str, dict[str, Any]]] = {}
    for row in batch.select(["rollout_id", "pair_id", "role", "reward"]).to_pylist():
        roles.setdefault(row["pair_id"], {})[row["role"]] = {**written[row["rollout_id"]], "reward": row["reward"]}
    pairs, skipped = [], Counter[str]()
    for pair_id, two in roles.items():
        chosen, rejected = two["chosen"], two["rejected"]
        if chosen["prompt_id"] != rejected["prompt_id"]:
            raise RollwayError(
                f"pair {pair_id}: its rollouts {chosen['rollout_id']} and {rejected['rollout_id']} answer different "
                "prompts; pair rollouts of one group"
            )
        if chosen["rollout_id"] in failed or rejected["rollout_id"] in failed:
            skipped["a scorer failed on chosen or rejected"] += 1
            continue
        if by_reward and chosen["reward"] == rejected["reward"]:
            skipped["chosen and rejected have the same reward"] += 1
            continue
        prompt = asked.get(chosen["prompt_id"])
        if prompt is None:
            raise RollwayError(_unknown_prompt(chosen["rollout_id"], chosen["prompt_id"]))
        name = f"{chosen['rollout_id']}>{rejected['rollout_id']}"
        messages, format = json.loads(prompt["messages"]), json.loads(prompt["meta"])["format"]
        pairs.append(Pair(name, messages, format, chosen["text"], rejected["text"]))
    return pairs, skipped


def against_teacher(rollouts: pa.Table, prompts: pa.Table, told: Mapping[str, str]) -> tuple[list[Pair], Counter[str]]:
    """The teacher's text of a prompt against each of what the policy sampled of it, and how many rollouts are left out,
    by reason.

    Read of rollouts: rollout_id, prompt_id, source, text; of prompts: prompt_id, messages, meta. told: prompt id -> the
    teacher's text. A pair's id is its rollout's. Raises RollwayError where a rollout's prompt is not among `prompts`.
    """
    asked = {p["prompt_id"]: p for p in prompts.select(["prompt_id", "messages", "meta"]).to_pylist()}
    pairs, skipped = [], Counter[str]()
    for row in rollouts.select(["rollout_id", "prompt_id", "source", "text"]).to_pylist():
        if row["source"] != "policy":
            skipped["not the policy's own"] += 1
            continue
        prompt = asked.get(row["prompt_id"])
        if prompt is None:
            raise RollwayError(_unknown_prompt(row["rollout_id"], row["prompt_id"]))
        if row["prompt_id"] not in told:
            skipped["no text of the teacher for its prompt"] += 1
            continue
        messages, format = json.loads(prompt["messages"]), json.loads(prompt["meta"])["format"]
        pairs.append(Pair(row["rollout_id"], messages, format, told[row["prompt_id"]], row["text"]))
    return pairs, skipped


def _unknown_prompt(rollout: str, prompt: str) -> str:
    return (
        f"rollout {rollout}: its prompt {prompt} is not among the task's prompts; "
        "the task was prepared anew since: run the rollout stage again"
    )


def deal(pairs: Sequence[Pair], share: float) -> tuple[list[Pair], list[Pair]]:
    """(training pairs, held-out pairs), each in the order of their ids, whatever the order of the input.

    Of the prompts, ranked by hash, the first `share` (at least one, at most all but one) are held out with all their
    pairs. Prompts that differ only in Unicode form or white space at line ends are one.
    Raises RollwayError when all pairs are of one prompt.
    """
    key = {pair.pair_id: normalised(pair.messages) for pair in pairs}
    ranked = sorted(set(key.values()), key=lambda prompt: hash_of(f"held out\n{prompt}"))
    if len(ranked) < 2:
        raise RollwayError(
            f"{len(pairs)} preference pairs, all of one prompt: none can be held out; give pairs of two prompts or more"
        )
    out = set(ranked[: min(max(round(share * len(ranked)), 1), len(ranked) - 1)])
    ordered = sorted(pairs, key=lambda pair: pair.pair_id)
    return (
        [pair for pair in ordered if key[pair.pair_id] not in out],
        [pair for pair in ordered if key[pair.pair_id] in out],
    )


def swapped(pairs: Sequence[Pair], share: float) -> tuple[list[Pair], int]:
    """The pairs, those whose hash falls below `share` with chosen and rejected exchanged; and the number of those."""
    flips = [int(hash_of(f"flip\n{pair.pair_id}")[:13], 16) / 16**13 < share for pair in pairs]
    changed = [
        replace(pair, chosen=pair.rejected, rejected=pair.chosen) if flip else pair
        for pair, flip in zip(pairs, flips, strict=True)
    ]
    return changed, sum(flips)
