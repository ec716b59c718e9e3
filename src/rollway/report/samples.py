"""Rollouts that the report shows in full: whole groups, chosen by hash and never by result."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import duckdb

from rollway.report.data import Run
from rollway.store.queries import rows as ask
from rollway.store.views import identifier, quote

MAX_RUNS = 12
MAX_ROUNDS = 6
GROUPS_PER_ROUND = 2
MAX_GROUP = 8
MAX_TEXT = 2000


@dataclass(frozen=True)
class Sample:
    """One rollout shown in full."""

    rollout_id: str
    sample: int
    source: str
    text: str
    cut: int
    finish: str
    length: int
    reward: float | None
    advantage: float | None
    correct: bool | None
    trained: bool
    scores: dict[str, float]


@dataclass(frozen=True)
class Group:
    """One prompt with the rollouts of its group."""

    round: int
    prompt: list[tuple[str, str]]
    answer: str | None
    samples: list[Sample] = field(default_factory=list)


def samples(catalog: duckdb.DuckDBPyConnection, runs: Sequence[Run]) -> dict[str, list[Group]]:
    """Run -> groups of rounds spread over the run, in order of rounds; runs without rollouts are left out."""
    shown = [run.run for run in runs[:MAX_RUNS]]
    rounds: dict[str, list[int]] = {}
    for run, round in ask(catalog, "SELECT DISTINCT run, round FROM seen_rollouts ORDER BY ALL"):
        rounds.setdefault(run, []).append(round)
    wanted = [(run, round) for run in shown for round in _spread(rounds.get(run, []), MAX_ROUNDS)]
    if not wanted:
        return {}
    scorers = _scorer_columns(catalog)
    groups: dict[tuple[str, int, str], Group] = {}
    for run, round, group, prompt_id, messages, answer, *facts in ask(catalog, _query(wanted, scorers)):
        key = (run, round, group)
        if key not in groups:
            groups[key] = Group(round, _conversation(messages, prompt_id), answer)
        sample = _sample(facts, scorers)
        if len(groups[key].samples) < MAX_GROUP or sample.source == "expert":
            groups[key].samples.append(sample)
    return {run: found for run in shown if (found := [g for (r, *_), g in groups.items() if r == run])}


def _query(wanted: list[tuple[str, int]], scorers: list[str]) -> str:
    """All groups in one statement: planning the views costs more than reading a few rounds."""
    pairs = ", ".join(f"({quote(run)}, {round})" for run, round in wanted)
    rounds = ", ".join(str(round) for round in sorted({round for _, round in wanted}))
    columns = "".join(f", s.{identifier(name)}" for name in scorers)
    return f"""
        WITH s AS MATERIALIZED (SELECT * FROM scored WHERE round IN ({rounds}) AND (run, round) IN ({pairs})),
        picked AS (
            SELECT run, round, group_id FROM s GROUP BY run, round, group_id
            QUALIFY row_number() OVER (PARTITION BY run, round ORDER BY md5(group_id), group_id) <= {GROUPS_PER_ROUND}),
        t AS (SELECT run, rollout_id, text FROM rollouts WHERE round IN ({rounds})),
        p AS (SELECT prompt_id, min(messages) AS messages, min(answer) AS answer FROM prompts GROUP BY prompt_id)
        SELECT s.run, s.round, s.group_id, s.prompt_id, p.messages, p.answer, s.rollout_id, s.sample, s.source, t.text,
            s.finish, s.length, s.reward, s.advantage, s.correct, s.slots{columns}
        FROM s JOIN picked USING (run, round, group_id)
        JOIN t ON t.run = s.home AND t.rollout_id = s.rollout_id
        LEFT JOIN p ON p.prompt_id = s.prompt_id
        ORDER BY s.run, s.round, md5(s.group_id), s.group_id, s.prompt_id, s.sample, s.rollout_id"""


def _sample(facts: list[Any], scorers: list[str]) -> Sample:
    rollout_id, sample, source, text, finish, length, reward, advantage, correct, slots, *each = facts
    verdicts = {name: value for name, value in zip(scorers, each, strict=True) if value is not None}
    cut = max(0, len(text) - MAX_TEXT)
    shown = text[:MAX_TEXT]
    return Sample(
        rollout_id, sample, source, shown, cut, finish, length, reward, advantage, correct, slots > 0, verdicts
    )


def _conversation(messages: str | None, prompt_id: str) -> list[tuple[str, str]]:
    if messages is None:
        return [("prompt", f"{prompt_id} (its text is not in results/tasks)")]
    return [(str(m["role"]), str(m["content"])[:MAX_TEXT]) for m in json.loads(messages)]


def _scorer_columns(catalog: duckdb.DuckDBPyConnection) -> list[str]:
    columns = [row[0] for row in ask(catalog, "DESCRIBE scored")]
    return columns[columns.index("slots") + 1 :]


def _spread(rounds: list[int], count: int) -> list[int]:
    """First, last, and evenly between."""
    if len(rounds) <= count:
        return rounds
    return sorted({rounds[round(i * (len(rounds) - 1) / (count - 1))] for i in range(count)})
