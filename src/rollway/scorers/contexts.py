"""What a teacher reads before a completion: templates over the row, and the ids that they become.

Token ids of completions are never made of text: where a template names `{completion}`, the sampled ids stand.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from rollway.config.contexts import COMPLETION, TeacherContext
from rollway.errors import RollwayError
from rollway.policies.causal_lm import Reader, encode_prompt
from rollway.scorers.rows import Row
from rollway.store import parquet
from rollway.template import render


@dataclass(frozen=True)
class Private:
    """What other rollouts and scorers say of a row."""

    sibling: str | None
    """The first right completion of its group that is another rollout."""
    reference: str | None
    """What somebody else wrote to its prompt."""
    right: bool | None
    """None where no scorer is read."""
    scores: Mapping[str, float]
    feedback: str | None = None
    """What a scorer wrote about the row."""


class Siblings:
    """The first two right completions of every group: whichever rollout asks, one of them is another's."""

    def __init__(self, parts: Iterable[pa.Table], right: Mapping[str, bool]) -> None:
        """parts: rollout_id, group_id, sample and text."""
        found: dict[str, list[tuple[int, str, str]]] = {}
        for part in parts:
            for row in part.to_pylist():
                if right[row["rollout_id"]]:
                    own = found.setdefault(row["group_id"], [])
                    own.append((row["sample"], row["rollout_id"], row["text"]))
                    own.sort()
                    del own[2:]
        self._found = found

    def of(self, row: Row) -> str | None:
        others = (text for _, name, text in self._found.get(row.group_id, []) if name != row.rollout_id)
        return next(others, None)


def references(who: str, files: Iterable[Path]) -> dict[str, str]:
    """By prompt_id the text of the first completion, by file and rollout_id. Raises RollwayError for files that hold no
    rollouts."""
    found: dict[str, str] = {}
    for file in files:
        if parquet.metadata(file).get("rollway.table") != "rollouts":
            raise RollwayError(
                f"{who}.references: {file} holds no rollouts; `rollway import` makes such a file of other formats"
            )
        table = parquet.read(file, ["rollout_id", "prompt_id", "text"]).sort_by("rollout_id")
        for prompt, text in zip(table["prompt_id"].to_pylist(), table["text"].to_pylist(), strict=True):
            found.setdefault(prompt, text)
    return found


def worded(
    contexts: Sequence[TeacherContext], row: Row, private: Private, reader: Reader, prompt_tokens: Sequence[int]
) -> tuple[int, list[int]] | None:
    """Number of the context that applies, and the ids before the completion's; None where the row has no teacher.

    Without contexts these are `prompt_tokens`, which the policy read.
    Raises RollwayError when a template names a field that is null or not there, or where chats meet a tokenizer without
    a chat template.
    """
    if not contexts:
        return 0, list(prompt_tokens)
    found = worded_apart(contexts, row, private, reader, prompt_tokens)
    return None if found is None else (found[0], found[1] + found[2])


def worded_apart(
    contexts: Sequence[TeacherContext], row: Row, private: Private, reader: Reader, prompt_tokens: Sequence[int]
) -> tuple[int, list[int], list[int]] | None:
    """As `worded`, of at least one context: its number, the prompt's ids, and those of the prefix."""
    for number, context in enumerate(contexts):
        others = {"sibling": private.sibling, "reference": private.reference, "feedback": private.feedback}
        if any(text is None and context.names(name) for name, text in others.items()):
            continue
        fields = _fields(context, row, private)
        ids = list(prompt_tokens)
        if context.prompt is not None:
            text = render(context.prompt, fields, "context.prompt")
            if text is None:
                raise RollwayError("a field of context.prompt is null on this row")
            messages = [*row.messages[:-1], {**row.messages[-1], "content": text}]
            ids = encode_prompt(reader, messages, row.meta["format"])
        return number, ids, _prefix(context.prefix, fields, row, reader)
    return None


def _fields(context: TeacherContext, row: Row, private: Private) -> dict[str, Any]:
    verdict = None if private.right is None else context.right if private.right else context.wrong
    others = {
        "sibling": private.sibling,
        "reference": private.reference,
        "feedback": private.feedback,
        "verdict": verdict,
    }
    return {**row.as_dict(private.scores), **others}


def _prefix(template: str, fields: Mapping[str, Any], row: Row, reader: Reader) -> list[int]:
    """Texts between completions are encoded each by itself."""
    ids: list[int] = []
    # A group in the pattern: texts and percentages take turns.
    pieces = COMPLETION.split(template)
    for text, percent in zip(pieces[::2], [*pieces[1::2], "0"], strict=True):
        said = render(text, fields, "context.prefix")
        if said is None:
            raise RollwayError("a field of context.prefix is null on this row")
        own = _without_end(row.tokens, reader)
        ids += _encoded(said, reader) + own[: len(own) * int(percent or 100) // 100]
    return ids


def _encoded(text: str, reader: Reader) -> list[int]:
    return list(reader.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def _without_end(tokens: Sequence[int], reader: Reader) -> list[int]:
    ends = {reader.tokenizer.eos_token_id, *reader.stop_ids}
    return list(tokens[:-1]) if len(tokens) and tokens[-1] in ends else list(tokens)
