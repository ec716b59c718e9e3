"""Stored completions in place of sampled ones (`rollout.engine: {kind: stored}`): which a group takes, and its rows."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from rollway.errors import RollwayError
from rollway.policies.tokenizers import encode_completions, encode_prompt
from rollway.sampling.experts import solution
from rollway.sampling.prompts import Group, rollout_id
from rollway.store import parquet
from rollway.store.tables import ROLLOUTS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rollway.policies.causal_lm import Reader

LENGTH = "length"
"""The finish of a completion that a limit cut off: it did not write its end."""


@dataclass(frozen=True)
class Shelf:
    """What files of rollouts hold, by prompt."""

    files: list[Path]
    completions: dict[str, list[list[str]]]
    """Prompt id -> for each file, the ids of its completions of that prompt."""


def shelve(files: Sequence[Path]) -> Shelf:
    """Raises RollwayError for a file that is damaged or no table of rollouts, and for a rollout that occurs twice."""
    completions: dict[str, list[list[str]]] = defaultdict(lambda: [[] for _ in files])
    home: dict[str, Path] = {}
    for place, file in enumerate(files):
        _check_table(file)
        held = parquet.read(file, ["rollout_id", "prompt_id"])
        for name, prompt in zip(held["rollout_id"].to_pylist(), held["prompt_id"].to_pylist(), strict=True):
            if name in home:
                raise RollwayError(f"{file}: rollout {name} stands in {home[name]} already; name one of the files")
            home[name] = file
            completions[prompt][place].append(name)
    return Shelf(list(files), dict(completions))


def with_enough(shelf: Shelf, prompt_ids: Sequence[str], group: int) -> list[str]:
    """The prompts that have at least `group` stored completions. Raises RollwayError when there is none."""
    files = ", ".join(map(str, shelf.files))
    matched = [p for p in prompt_ids if p in shelf.completions]
    if not matched:
        raise RollwayError(
            f"rollout.engine.files ({files}): none of the {len(shelf.completions)} prompts in them is a train prompt "
            "of the task; prompts are matched by prompt_id, a hash of the messages (or the task's `id`): import the "
            "prompts as the task words them, or map prompt_id"
        )
    enough = [p for p in matched if sum(map(len, shelf.completions[p])) >= group]
    if not enough:
        raise RollwayError(
            f"rollout.engine.files ({files}): {len(matched)} prompts of the task are in them, none with {group} "
            "completions; lower rollout.group, or give more files"
        )
    return enough


def lopsided(shelf: Shelf, prompt_ids: Sequence[str], group: int) -> int:
    """How many of the prompts have a file that holds too few completions for its share of the group."""
    share = group // len(shelf.files)
    return sum(min(map(len, shelf.completions[p])) < share for p in prompt_ids)


def take(shelf: Shelf, group: Group, count: int, *, seed: int, round: int) -> list[str]:
    """Ids of the `count` stored completions of one group, none twice: one of each file in turn, while they last.

    With two files and a group of two that is one of each: two different behaviours, CoPG's setting (arXiv 2406.19185).
    Which file begins (and so has one more, where `count` is no multiple of their number) and which completions of a
    file are taken is a hash of seed, round and the group's place in the round.
    """
    salt = f"stored/{seed}/{round}/{group.index}"
    piles = [
        sorted(pile, key=lambda name: (_hash(f"{salt}/{name}"), name)) for pile in shelf.completions[group.prompt_id]
    ]
    first = int.from_bytes(_hash(f"{salt}/first"), "big") % len(piles)
    layers = zip_longest(*piles[first:], *piles[:first])
    return [name for layer in layers for name in layer if name is not None][:count]


class StoredRows:
    """Turns parts of a shard into rows: stored completions under this round's ids, and experts beside them."""

    def __init__(
        self,
        shelf: Shelf,
        reader: Reader,
        asked: pa.Table,
        taken: dict[str, list[str]],
        *,
        round: int,
        pass_number: int,
    ) -> None:
        """asked: the groups' prompts, with messages and meta. taken: group id -> the completions of its samples."""
        self.reader, self.taken, self.round, self.pass_number = reader, taken, round, pass_number
        wanted = pa.array(sorted({name for names in taken.values() for name in names}), pa.string())
        self.stored: dict[str, dict[str, Any]] = {}
        for file in shelf.files:
            rows = _read(file, wanted)
            _complete(file, rows, reader)
            self.stored |= {row["rollout_id"]: row for row in rows}
        self.asked = {row["prompt_id"]: row for row in asked.to_pylist()}
        self.prompt_tokens = {name: _encoded(reader, row) for name, row in self.asked.items()}

    def generate(self, part: list[tuple[Group, int]]) -> pa.Table:
        """The rows of these samples, in order. Raises RollwayError where a row cannot be one of this policy's."""
        rows = []
        for group, sample in part:
            names = self.taken[group.group_id]
            row = self._completion(group, names[sample]) if sample < len(names) else self._expert(group)
            own = {"rollout_id": rollout_id(group.group_id, sample), "group_id": group.group_id, "sample": sample}
            rows.append({**row, **own, "round": self.round, "pass": self.pass_number, "prompt_id": group.prompt_id})
        return pa.Table.from_pylist(rows, schema=ROLLOUTS.schema())

    def _completion(self, group: Group, name: str) -> dict[str, Any]:
        row = self.stored[name]
        prompt_tokens = self.prompt_tokens[group.prompt_id]
        self._check(row, prompt_tokens)
        # What another policy wrote is not this run's own, whatever it is there.
        source = "offline" if row["source"] == "policy" else row["source"]
        return {**row, "source": source, "parent_id": name, "branch_at": None, "prompt_tokens": prompt_tokens}

    def _expert(self, group: Group) -> dict[str, Any]:
        prompt_tokens = self.prompt_tokens[group.prompt_id]
        row = solution(self.asked[group.prompt_id], prompt_tokens, self.reader.tokenizer, self.reader.context)
        return {**row, "policy_round": 0}

    def _check(self, row: dict[str, Any], prompt_tokens: list[int]) -> None:
        name = f"stored rollout {row['rollout_id']}"
        if row["prompt_tokens"] and row["prompt_tokens"] != prompt_tokens:
            raise RollwayError(
                f"{name}: its prompt {row['prompt_id']} has {len(row['prompt_tokens'])} stored token ids that are not "
                f"the {len(prompt_tokens)} of the task's prompt under this policy: another tokenizer, chat template or "
                "wording; use the policy's own, or import the completions as text alone"
            )
        if max(row["tokens"]) >= self.reader.vocabulary:
            raise RollwayError(
                f"{name}: token {max(row['tokens'])} is beyond the policy's vocabulary of {self.reader.vocabulary}; "
                "import the completions as text alone"
            )
        whole = len(prompt_tokens) + len(row["tokens"])
        if self.reader.context is not None and whole > self.reader.context:
            raise RollwayError(
                f"{name}: prompt and completion have {whole} tokens, the policy's context is {self.reader.context}; "
                "leave it out of the file, or take a policy with a longer context"
            )


def _check_table(file: Path) -> None:
    if not file.exists():
        raise RollwayError(f"{file}: no such file (rollout.engine.files)")
    try:
        kind = parquet.metadata(file).get("rollway.table")
    except RollwayError as error:
        raise RollwayError(f"{error}; import it again, or make the run that wrote it anew") from None
    if kind != "rollouts":
        what = f"the table {kind!r}" if kind else "no table of rollway"
        raise RollwayError(
            f"{file}: holds {what}, not rollouts (rollout.engine.files); `rollway import` makes rollouts of other "
            "frameworks' files"
        )


def _read(file: Path, wanted: pa.Array) -> list[dict[str, Any]]:
    table = parquet.read(file)
    return table.filter(pc.is_in(table["rollout_id"], wanted)).to_pylist()


def _complete(file: Path, rows: list[dict[str, Any]], reader: Reader) -> None:
    """Gives rows of text alone their tokens; checks that the others' tokens are of this tokenizer."""
    _check_decoding(file, [row for row in rows if row["tokens"]], reader.tokenizer)
    texts = [row for row in rows if not row["tokens"]]
    for row, tokens in zip(texts, _tokenised(reader.tokenizer, texts), strict=True):
        count = len(tokens)
        row.update(
            tokens=tokens,
            length=count,
            logprobs=[float("nan")] * count,
            train_mask=[True] * count,
            segments=[{"start": 0, "end": count, "author": "offline", "turn": 0}],
        )


def _tokenised(tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]) -> list[list[int]]:
    """Completion and end token, but no end where a limit cut the completion off.

    The only place where stored text becomes tokens: rows that bring token ids keep them.
    """
    if not rows:
        return []
    made = []
    for row, ids in zip(rows, encode_completions(tokenizer, [row["text"] for row in rows]), strict=True):
        tokens = ids[:-1] if row["finish"] == LENGTH else ids
        if not tokens:
            raise RollwayError(f"stored rollout {row['rollout_id']}: its text is empty and cut off; leave it out")
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in tokens:
            raise RollwayError(
                f"stored rollout {row['rollout_id']}: the policy's tokenizer does not know all of its text "
                f"{row['text'][:60]!r}; leave it out of the file"
            )
        made.append(tokens)
    return made


def _check_decoding(file: Path, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises RollwayError where most rows' ids do not spell their text: they are of another tokenizer."""
    other = []
    for row in rows:
        ids = [t for t in row["tokens"] if t < len(tokenizer)]
        text, whole = (tokenizer.decode(ids, skip_special_tokens=skip) for skip in (True, False))
        if _bare(row["text"]) not in (_bare(text), _bare(whole)):
            other.append((row, text))
    if 2 * len(other) > len(rows):
        row, text = other[0]
        raise RollwayError(
            f"{file}: the token ids of {len(other)} of {len(rows)} rollouts do not spell their text in the policy's "
            f"tokenizer (rollout {row['rollout_id']}: {text[:40]!r}, not {row['text'][:40]!r}); they are of another "
            "tokenizer: import the completions as text alone"
        )


def _bare(text: str) -> str:
    return "".join(text.split())


def _encoded(reader: Reader, prompt: dict[str, Any]) -> list[int]:
    wording = json.loads(prompt["meta"])["format"]
    return encode_prompt(reader.tokenizer, json.loads(prompt["messages"]), wording)


def _hash(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=16).digest()
