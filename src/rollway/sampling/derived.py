"""Derived passes (`rollout.derive`): prompts made of scored rollouts of the same round, and the rows of what they gave.

A revision of the policy's own answer, answers under a hint, explanations of a given answer: all are rollouts with a
parent. What the engine read, and what training shall read in its place, are stored beside each other.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from rollway.config.base import as_given
from rollway.config.rollouts import Derive, RolloutConfig, Sampling
from rollway.config.scorers import ScoreConfig
from rollway.curation.parents import Parents
from rollway.errors import RollwayError
from rollway.sampling.prompts import rollout_id
from rollway.scorers.contexts import Private, Siblings, worded_apart
from rollway.scorers.rows import COLUMNS, Row, join
from rollway.store import parquet
from rollway.store.tables import ROLLOUTS
from rollway.tasks.extract import extractor

if TYPE_CHECKING:
    from rollway.engines import Served
    from rollway.engines.base import Completion
    from rollway.policies.causal_lm import Reader

ADDED = ("train_prompt_tokens", "prefix_length")
"""Columns of rollouts that only derived passes have."""
_SIBLING_COLUMNS = ["rollout_id", "group_id", "sample", "text"]


@dataclass(frozen=True)
class Place:
    """A parent's place in its pass, over all shards."""

    index: int
    parent_id: str
    first_sample: int
    """Number within the parent's group of its first derived rollout: they go on after all that were there."""


@dataclass(frozen=True)
class Item:
    """What is read for one parent's rollouts."""

    place: Place
    row: Row
    read: list[int]
    """Ids before the completion, those of the prefix last."""
    prefix: int
    """How many of them stand in the assistant's turn already."""
    trained: list[int] | None
    """Ids that training reads in their place; None: the same; empty: none, it is never trained on."""


def places(parents: Parents, samples: int) -> list[Place]:
    """Every parent's place, in the order of `scored`."""
    groups = dict(zip(parents.scored["rollout_id"].to_pylist(), parents.scored["group_id"].to_pylist(), strict=True))
    last: Counter[str] = Counter()
    for group, sample in zip(groups.values(), parents.scored["sample"].to_pylist(), strict=True):
        last[group] = max(last[group], sample + 1)
    found = []
    for index, name in enumerate(parents.chosen):
        found.append(Place(index, name, last[groups[name]]))
        last[groups[name]] += samples
    return found


def identity(derive: Derive, parents: Parents, sampling: Sampling) -> dict[str, Any]:
    """What decides a derived pass's tokens beside its policy, seed and prompts: the settings, the parents, and all
    verdicts that their contexts may name."""
    verdicts = sha256()
    for column in sorted(parents.scored.column_names):
        verdicts.update(json.dumps([column, parents.scored[column].to_pylist()]).encode())
    return {
        "derive": as_given(derive.model_copy(update={"sampling": None, "attempts": 1})),
        "sampling": sampling.model_dump(mode="json"),
        "chosen": parents.chosen,
        "verdicts": verdicts.hexdigest(),
    }


def items(
    derive: Derive,
    parents: Parents,
    mine: Sequence[Place],
    files: Sequence[Path],
    prompts: pa.Table,
    score: ScoreConfig,
    own: Reader,
    author: Reader,
    longest: int,
) -> tuple[list[Item], dict[str, int]]:
    """What is read for each of the parents `mine`, in order, and how many of them have no derived rollouts, by reason.

    files: the round's earlier rollouts. own: tokenizer and limits of the policy that is trained. author: of the one
    that writes; its tokenizer is the same, its window need not be. longest: most tokens of a completion.
    Raises RollwayError where a template names a field that is null, a context fills the author's window, or what is
    trained may not fit the policy's.
    """
    fields = _verdicts(parents, score)
    siblings = _siblings(derive, files, fields)
    table = _payload(files, [place.parent_id for place in mine])
    rows = dict(zip(table["rollout_id"].to_pylist(), join(table, prompts), strict=True))
    read = dict(zip(table["rollout_id"].to_pylist(), table["prompt_tokens"].to_pylist(), strict=True))
    plain = _Plain(own)
    extract = extractor(derive.extract)
    found: list[Item] = []
    left_out: Counter[str] = Counter()
    for place in mine:
        row = rows[place.parent_id]
        completion = extract(row.completion)
        if completion is None:
            left_out[f"nothing for `extract: {derive.extract}`"] += 1
            continue
        right, scores = fields[place.parent_id]
        private = Private(None if siblings is None else siblings.of(row), None, right, scores)
        try:
            worded = worded_apart(
                derive.context, replace(row, completion=completion), private, own, read[row.rollout_id]
            )
        except RollwayError as error:
            raise RollwayError(f"rollout.derive.{derive.name}: rollout {row.rollout_id}: {error}") from None
        if worded is None:
            left_out["no right sibling"] += 1
            continue
        _, ids, prefix = worded
        trained = {"as_read": None, "plain": plain.of(row), "never": []}[derive.trained]
        item = Item(place, row, ids + prefix, len(prefix), trained)
        if (why := _too_long(item, own.context, author.context, longest)) is not None:
            if derive.overlong == "error":
                raise RollwayError(
                    f"rollout.derive.{derive.name}: rollout {row.rollout_id}: {why}, the completion included: lower "
                    "rollout.sampling.max_tokens, shorten the context, or set `overlong: skip`"
                )
            left_out["longer than the window"] += 1
            continue
        found.append(item)
    return found, dict(left_out)


def _too_long(item: Item, own: int | None, author: int | None, longest: int) -> str | None:
    """Why an item does not fit, in words: the author must have room for a token, and the policy for all that may be
    trained on. own, author: their windows in tokens, None without limit."""
    size = len(item.read)
    if author is not None and size >= author:
        return f"what is read has {size} tokens, its author's context holds {author}"
    if own is None or item.trained == []:
        return None
    prompt = size if item.trained is None else len(item.trained)
    completion = longest if author is None else min(longest, author - size)
    if prompt + completion > own:
        return (
            f"a prompt of {prompt} tokens and a completion of up to {completion} are trained, the policy's context "
            f"holds {own}"
        )
    return None


class Writer:
    """Samples parts of a derived pass and turns them into rows."""

    def __init__(
        self,
        rollout: RolloutConfig,
        derive: Derive,
        served: Served,
        *,
        key: str,
        digest: str,
        seed: int,
        round: int,
        pass_number: int,
        policy_round: int,
    ) -> None:
        self.rollout, self.derive, self.served, self.key, self.seed = rollout, derive, served, key, seed
        self.sampling = sampling_of(rollout, derive)
        self.fixed = {
            "round": round,
            "pass": pass_number,
            "policy": digest,
            "policy_round": policy_round,
            "source": derive.name,
            "engine": rollout.engine.kind,
            "sampling": json.dumps(self.sampling.model_dump(), sort_keys=True),
        }

    def generate(self, part: list[tuple[Item, int]]) -> pa.Table:
        from rollway.engines.base import Request

        requests = [Request(rollout_id(f"{self.key}-{i.place.index:05d}", sample), i.read) for i, sample in part]
        done = self.served.draw(requests, self.sampling, seed=self.seed, entropy=self.rollout.entropy)
        rows = [
            self._row(item, sample, request.rollout_id, completion)
            for (item, sample), request, completion in zip(part, requests, done, strict=True)
        ]
        return pa.Table.from_pylist(rows, schema=ROLLOUTS.schema(ADDED))

    def _row(self, item: Item, sample: int, name: str, done: Completion) -> dict[str, Any]:
        from rollway.policies.causal_lm import decode

        count = len(done.tokens)
        author = "policy" if self.derive.author is None else _author(self.derive)
        return {
            **self.fixed,
            "rollout_id": name,
            "group_id": item.row.group_id,
            "prompt_id": item.row.prompt_id,
            "sample": item.place.first_sample + sample,
            "finish": done.finish,
            "length": count,
            "parent_id": item.place.parent_id,
            "prompt_tokens": item.read,
            "tokens": done.tokens,
            "logprobs": done.logprobs,
            "train_mask": [self.derive.trained != "never"] * count,
            "segments": [{"start": 0, "end": count, "author": author, "turn": 0}],
            "text": decode(self.served.reader, done.tokens),
            "entropy": done.entropy,
            "train_prompt_tokens": item.trained,
            "prefix_length": item.prefix or None,
        }


def sampling_of(rollout: RolloutConfig, derive: Derive) -> Sampling:
    return rollout.sampling if derive.sampling is None else derive.sampling


def _author(derive: Derive) -> str:
    author = derive.author
    return author.name if author is not None and author.kind == "warmup" else "policy"


def _verdicts(parents: Parents, score: ScoreConfig) -> dict[str, tuple[bool | None, dict[str, float]]]:
    """By rollout_id whether it is right, and the scorers' rewards."""
    names = list(score.scorers)
    columns = [parents.scored[name].to_pylist() for name in ("rollout_id", "correct", *names)]
    return {
        name: (right, dict(zip(names, rewards, strict=True))) for name, right, *rewards in zip(*columns, strict=True)
    }


def _siblings(
    derive: Derive, files: Sequence[Path], verdicts: dict[str, tuple[bool | None, dict[str, float]]]
) -> Siblings | None:
    if not any(context.names("sibling") for context in derive.context):
        return None
    right = {name: bool(verdict) for name, (verdict, _) in verdicts.items()}
    return Siblings((part for file in files for part in parquet.read_in_parts(file, _SIBLING_COLUMNS)), right)


def _payload(files: Sequence[Path], wanted: Sequence[str]) -> pa.Table:
    names = pa.chunked_array([pa.array(sorted(wanted), pa.string())])
    columns = [*COLUMNS, "prompt_tokens"]
    return pa.concat_tables([parquet.read_rows(file, columns, "rollout_id", names) for file in files])


class _Plain:
    """Ids of the task's own prompts, as pass 0 fed them."""

    def __init__(self, reader: Reader) -> None:
        self.reader, self.known = reader, dict[str, list[int]]()

    def of(self, row: Row) -> list[int]:
        from rollway.policies.causal_lm import encode_prompt

        if row.prompt_id not in self.known:
            self.known[row.prompt_id] = encode_prompt(self.reader, row.messages, row.meta["format"])
        return self.known[row.prompt_id]
