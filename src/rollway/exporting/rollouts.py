"""A run's stored rollouts as a dataset that other trainers read: TRL's formats, or all that is known of every row."""

import json
import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from rollway.errors import RollwayError
from rollway.store.atomic import atomic_path
from rollway.store.catalog import with_catalog
from rollway.store.queries import plain

Form = Literal["rows", "sft", "preference"]
FORMS: dict[str, str] = {
    "rows": "every row of the batch with tokens, log-probs, rewards and advantage",
    "sft": "prompt and completion of right rollouts (TRL's prompt-completion format)",
    "preference": "prompt, chosen and rejected: the batch's pairs, else the best and the worst of each group",
}
SUFFIXES = (".jsonl", ".parquet")

_ROWS = """
    SELECT s.rollout_id, s.run, s.round, s.group_id, s.prompt_id, s.sample, s.source, s.policy, s.finish, s.length,
           p.messages, p.meta, p.answer, s.text AS completion, r.prompt_tokens, r.tokens, r.logprobs, r.train_mask,
           s.reward, s.correct, s.advantage, s.weight, s.route, s.slots
    FROM scored AS s
    JOIN seen_rollouts AS r ON s.run = r.run AND s.rollout_id = r.rollout_id
    LEFT JOIN (SELECT DISTINCT ON (prompt_id) prompt_id, messages, meta, answer FROM prompts ORDER BY prompt_id, task)
         AS p ON s.prompt_id = p.prompt_id
    WHERE s.run = $run AND list_contains($rounds, s.round)
    ORDER BY s.round, s.group_id, s.sample, s.rollout_id"""
_PAIRS = """
    SELECT round, pair_id, rollout_id, role FROM seen_batch
    WHERE run = $run AND list_contains($rounds, round) AND pair_id IS NOT NULL ORDER BY round, pair_id, role"""


def export_rollouts(
    results: Path, run: str, rounds: list[int], form: Form, out: Path, *, where: str | None = None
) -> tuple[int, str]:
    """Writes `out` (.jsonl or .parquet), whole or not at all; returns the rows written and a remark.

    A plain prompt is a text, a chat a list of messages, as TRL has them. where: a condition in SQL on the columns of
    the view `scored`, e.g. `reward > 0.5`; `sft` without one takes what is right. Rollouts whose prompt is in no file
    of tasks are left out, which the remark says. Raises RollwayError when nothing matches or is left, or on a mistake
    in the condition.
    """
    if out.suffix not in SUFFIXES:
        raise RollwayError(f"--out {out}: end it in {' or '.join(SUFFIXES)}")
    condition = where if where is not None else ("correct" if form == "sft" else None)
    rows = with_catalog(results, lambda catalog: _ask(catalog, _filtered(condition), run, rounds, condition))
    pairs = []
    if form == "preference":
        pairs = with_catalog(results, lambda catalog: _ask(catalog, _PAIRS, run, rounds, None))
    if not rows:
        what = f" where {condition}" if condition else ""
        raise RollwayError(f"run {run}, rounds {', '.join(map(str, rounds))}: no rollout{what}; see `rollway sql`")
    known = [row for row in rows if row["messages"] is not None]
    remarks = []
    if lost := len(rows) - len(known):
        remarks = [f"{lost} of {len(rows)} rollouts are left out, whose prompts are not in {results / 'tasks'}"]
    match form:
        case "rows":
            written = [_whole(row) for row in known]
        case "sft":
            written = [_prompt_of(row) | {"completion": _said(row)} for row in known]
        case "preference":
            written, remark = _preferences(known, pairs)
            remarks = [remark, *remarks]
    if not written:
        raise RollwayError(f"run {run}: {'; '.join(remarks)}; nothing is written")
    _write(written, out)
    return len(written), "; ".join(remarks)


def _filtered(condition: str | None) -> str:
    # A parenthesis that the condition closes too early must not let it become another statement: DuckDB parses one.
    return _ROWS if condition is None else f"SELECT * FROM ({_ROWS}) AS scored WHERE ({condition})\n"


def _ask(
    catalog: duckdb.DuckDBPyConnection, query: str, run: str, rounds: list[int], condition: str | None
) -> list[dict[str, Any]]:
    try:
        if len(catalog.extract_statements(query)) != 1:
            raise RollwayError(f"--where {condition!r}: is more than a condition")
        catalog.execute("SET threads = 1")
        return catalog.sql(query, params={"run": run, "rounds": rounds}).to_arrow_table().to_pylist()
    except duckdb.Error as error:
        reason = " ".join(str(error).split())
        raise RollwayError(f"--where {condition!r}: {reason}" if condition else reason) from error


def _prompt_of(row: dict[str, Any]) -> dict[str, Any]:
    messages = json.loads(row["messages"])
    if json.loads(row["meta"]).get("format") == "chat":
        return {"prompt": [{"role": m["role"], "content": m["content"]} for m in messages]}
    return {"prompt": "".join(message["content"] for message in messages)}


def _said(row: dict[str, Any]) -> Any:
    """The completion, as text or as the assistant's message, like the prompt beside it."""
    chat = json.loads(row["meta"]).get("format") == "chat"
    return [{"role": "assistant", "content": row["completion"]}] if chat else row["completion"]


def _whole(row: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in row.items() if name not in ("messages", "meta", "completion")}
    return _prompt_of(row) | {"completion": _said(row)} | kept


def _preferences(rows: list[dict[str, Any]], pairs: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    by_id = {row["rollout_id"]: row for row in rows}
    if pairs:
        ends: dict[tuple[int, str], dict[str, str]] = defaultdict(dict)
        for pair in pairs:
            ends[pair["round"], pair["pair_id"]][pair["role"]] = pair["rollout_id"]
        whole = [(e["chosen"], e["rejected"]) for e in ends.values() if {"chosen", "rejected"} <= e.keys()]
        known = [(by_id[c], by_id[r]) for c, r in whole if c in by_id and r in by_id]
        return [_pair(*pair) for pair in known], f"{len(known)} of the batch's {len(whole)} pairs"
    groups: dict[tuple[int, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["reward"] is not None and math.isfinite(row["reward"]):
            groups[row["round"], row["group_id"]].append(row)
    extremes = [(max(g, key=_reward), min(g, key=_reward)) for g in groups.values()]
    differ = [(best, worst) for best, worst in extremes if best["reward"] > worst["reward"]]
    remark = f"{len(differ)} of {len(groups)} groups have rewards that differ: their best and worst rollouts"
    return [_pair(*pair) for pair in differ], remark


def _reward(row: dict[str, Any]) -> float:
    return float(row["reward"])


def _pair(chosen: dict[str, Any], rejected: dict[str, Any]) -> dict[str, Any]:
    return _prompt_of(chosen) | {
        "chosen": _said(chosen),
        "rejected": _said(rejected),
        "chosen_reward": chosen["reward"],
        "rejected_reward": rejected["reward"],
        "chosen_id": chosen["rollout_id"],
        "rejected_id": rejected["rollout_id"],
    }


def _write(rows: list[dict[str, Any]], out: Path) -> None:
    with atomic_path(out) as temporary:
        if out.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), temporary, compression="zstd")
        else:
            temporary.write_text("".join(_lines(rows)), encoding="utf-8")


def _lines(rows: Iterable[dict[str, Any]]) -> Iterable[str]:
    """What is no finite number (NaN: no policy sampled this token) has no place in JSON: it becomes null."""
    for row in rows:
        yield json.dumps(plain(row), ensure_ascii=False, allow_nan=False) + "\n"
