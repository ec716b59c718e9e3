"""What scorers read (rollouts joined with their prompts) and what they say (verdicts)."""

import copy
import json
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from rollway.errors import RollwayError
from rollway.runtime.notice import tick


@dataclass(frozen=True)
class Row:
    """One rollout and its prompt. `tokens` are the completion's ids, `length` their number."""

    rollout_id: str
    prompt_id: str
    group_id: str
    sample: int
    completion: str
    length: int
    finish: str
    tokens: list[int]
    task: str
    messages: list[dict[str, str]]
    answer: str | None
    meta: dict[str, Any]

    def as_dict(self, scores: Mapping[str, float]) -> dict[str, Any]:
        """A copy that user code may change without changing other rows; `prompt` is the last message's text."""
        fields = copy.deepcopy(self.__dict__)
        return {**fields, "prompt": self.messages[-1]["content"], "scores": dict(scores)}


@dataclass(frozen=True)
class Verdict:
    """A scorer's word on one row. With an error, the reward is 0."""

    reward: float
    components: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    feedback: str | None = None
    """What a teacher may read about the row."""

    @staticmethod
    def failed(error: str) -> "Verdict":
        return Verdict(0.0, {}, error)

    def checked(self) -> "Verdict":
        """The verdict, or a failed one where a number is not finite."""
        for name, value in [("reward", self.reward), *self.components.items()]:
            if not math.isfinite(value):
                return Verdict.failed(storable(f"{name} is {value}"))
        if not self.components and self.error is None and self.feedback is None:
            return self
        return Verdict(
            self.reward,
            {storable(name): value for name, value in self.components.items()},
            None if self.error is None else storable(self.error),
            None if self.feedback is None else storable(self.feedback),
        )


def storable(text: str) -> str:
    """`text` with ? for halves of characters, which Python's strings can hold and files cannot."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def tell(verdicts: Sequence[Verdict]) -> None:
    """Advances the stage's bar by scored rows, with their mean reward."""
    if verdicts:
        tick(len(verdicts), reward=sum(verdict.reward for verdict in verdicts) / len(verdicts))


def join(rollouts: pa.Table, prompts: pa.Table) -> list[Row]:
    """Rollouts with their prompts, in order.

    Read of rollouts: rollout_id, prompt_id, group_id, sample, text, length, finish, and tokens where they are there.
    Raises RollwayError when a rollout's prompt is not among `prompts`.
    """
    asked = prompts.select(["prompt_id", "task", "messages", "answer", "meta"])
    places = asked_of(rollouts, asked)
    met = pc.unique(places)
    by_place = dict(zip(met.to_pylist(), asked.take(met).to_pylist(), strict=True))
    parsed = {place: (json.loads(p["messages"]), json.loads(p["meta"])) for place, p in by_place.items()}
    columns = [c for c in COLUMNS if c in rollouts.column_names]
    rows = []
    for rollout, place in zip(rollouts.select(columns).to_pylist(), places.to_pylist(), strict=True):
        prompt, (messages, meta) = by_place[place], parsed[place]
        rollout["completion"] = rollout.pop("text")
        rollout.setdefault("tokens", [])
        rows.append(Row(**rollout, task=prompt["task"], messages=messages, answer=prompt["answer"], meta=meta))
    return rows


COLUMNS = ["rollout_id", "prompt_id", "group_id", "sample", "text", "length", "finish", "tokens"]
"""Columns of rollouts that rows are made of."""


def asked_of(rollouts: pa.Table, prompts: pa.Table) -> pa.ChunkedArray:
    """[N] the place of each rollout's prompt. Raises RollwayError where it is not there."""
    places = pc.index_in(rollouts.column("prompt_id"), prompts.column("prompt_id"))
    if places.null_count:
        lost = rollouts.filter(pc.is_null(places)).slice(0, 1).to_pylist()[0]
        raise RollwayError(
            f"rollout {lost['rollout_id']}: its prompt {lost['prompt_id']} is not among the task's prompts; "
            "the task was prepared anew since: run the rollout stage again"
        )
    return places


K = TypeVar("K")


def each(rows: list[Row], judge: Callable[[Row], Verdict], same: Callable[[Row], Hashable]) -> list[Verdict]:
    """Verdicts row by row; rows of the same key are judged once. An exception becomes that row's error."""
    known: dict[Hashable, Verdict] = {}
    return [judged(row, judge, same(row), known) for row in rows]


def judged(item: K, judge: Callable[[K], Verdict], key: Hashable, known: dict[Hashable, Verdict]) -> Verdict:
    """The verdict on `item`; items of one key are judged once. An exception becomes its error."""
    verdict = known.get(key)
    if verdict is None:
        try:
            verdict = judge(item)
        except Exception as error:
            # Verifiers meet any text a policy can write: what they raise belongs to the row, and is counted.
            verdict = Verdict.failed(described(error))
        known[key] = verdict
    return verdict


def described(error: BaseException) -> str:
    """Type and first line of an exception."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}"[:300] if text else type(error).__name__
