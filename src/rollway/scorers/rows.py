"""What scorers read (rollouts joined with their prompts) and what they say (verdicts)."""

import copy
import json
import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from rollway.errors import RollwayError


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

    @staticmethod
    def failed(error: str) -> "Verdict":
        return Verdict(0.0, {}, error)

    def checked(self) -> "Verdict":
        """The verdict, or a failed one where a number is not finite."""
        for name, value in [("reward", self.reward), *self.components.items()]:
            if not math.isfinite(value):
                return Verdict.failed(f"{name} is {value}")
        return self


def join(rollouts: pa.Table, prompts: pa.Table) -> list[Row]:
    """Rollouts with their prompts, in order.

    Read of rollouts: rollout_id, prompt_id, group_id, sample, text, length, finish, tokens.
    Raises RollwayError when a rollout's prompt is not among `prompts`.
    """
    asked = prompts.select(["prompt_id", "task", "messages", "answer", "meta"])
    met = asked.filter(pc.is_in(asked.column("prompt_id"), rollouts.column("prompt_id")))
    by_id = {p["prompt_id"]: p for p in met.to_pylist()}
    parsed = {key: (json.loads(p["messages"]), json.loads(p["meta"])) for key, p in by_id.items()}
    columns = ["rollout_id", "prompt_id", "group_id", "sample", "text", "length", "finish", "tokens"]
    rows = []
    for rollout in rollouts.select(columns).to_pylist():
        prompt = by_id.get(rollout["prompt_id"])
        if prompt is None:
            raise RollwayError(
                f"rollout {rollout['rollout_id']}: its prompt {rollout['prompt_id']} is not among the task's prompts; "
                "the task was prepared anew since: run the rollout stage again"
            )
        messages, meta = parsed[rollout["prompt_id"]]
        rollout["completion"] = rollout.pop("text")
        rows.append(Row(**rollout, task=prompt["task"], messages=messages, answer=prompt["answer"], meta=meta))
    return rows


def each(rows: list[Row], judge: Callable[[Row], Verdict], same: Callable[[Row], Hashable]) -> list[Verdict]:
    """Verdicts row by row; rows of the same key are judged once. An exception becomes that row's error."""
    known: dict[Hashable, Verdict] = {}
    verdicts = []
    for row in rows:
        key = same(row)
        if key not in known:
            try:
                known[key] = judge(row)
            except Exception as error:
                # Verifiers meet any text a policy can write: what they raise belongs to the row, and is counted.
                known[key] = Verdict.failed(described(error))
        verdicts.append(known[key])
    return verdicts


def described(error: BaseException) -> str:
    """Type and first line of an exception."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}"[:300] if text else type(error).__name__
