"""`rollway import`: rollouts of other frameworks, from JSON lines or Parquet, into the tables of rollway."""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rollway.config.recipes import parse
from rollway.config.scorers import ScoreConfig
from rollway.errors import RollwayError
from rollway.store.foreign import FORMATS, Decoder, chosen_filter, filter_of, mapping_for, per_model
from rollway.store.lineage import RUN_FILE
from rollway.store.parquet import conform, write
from rollway.store.prompt_ids import prompt_id as id_of
from rollway.store.tables import TABLES

FIELDS = {
    "completion": "the text that was written (required, unless tokens and a tokenizer are given)",
    "prompt": "the prompt: text, or a list of {role, content} (required, unless prompt_id is given)",
    "prompt_id": "the prompt's own id; else a hash of the prompt, the same that a task of this prompt gives",
    "prompt_tokens": "token ids of the prompt",
    "tokens": "token ids of the completion",
    "logprobs": "log-prob of each token, in nats",
    "train_mask": "whether the policy wrote the token; else all true",
    "reward": "a number, or true/false; goes into the scores table under `scorer`",
    "answer": "reference answer of the prompt",
    "group": "rows to compare with each other; else the rows of one prompt",
    "finish": "why the completion ended; else unknown",
    "policy": "name of the policy that wrote it; else the file's digest",
}


RESERVED = ("tasks", "warmups", "reward_models", "logs", "benchmarks")
"""Folders of a results folder that are no run's."""


@dataclass(frozen=True)
class Imported:
    """Declared tables; `prompts` are the distinct prompts met, with their answers, as split `train`."""

    rollouts: pa.Table
    scores: pa.Table
    prompts: pa.Table


def import_rollouts(
    source: Path,
    mapping: dict[str, str],
    *,
    task: str = "imported",
    scorer: str = "imported",
    round: int = 0,
    tokenizer: Decoder | None = None,
    prompt_format: str = "plain",
    tool: str | None = None,
    filter: str | None = None,
    models: Sequence[str] = (),
) -> Imported:
    """Reads `source` (.jsonl or .parquet, one row per completion) through `mapping`: our field -> its column, or a.b.c.

    tool: whose log it is, a key of `foreign.FORMATS`; `mapping` then only corrects. filter: whose rows of a log of
    lm-eval with several filters. models: a row holds a completion of each, in columns whose names have {model} in the
    mapping.
    Rows without tokens are allowed (empty lists; a run that trains on them tokenises their text); rows with tokens but
    without log-probs get NaN. `tokenizer` decodes tokens where there is no text. Ids of rollouts are hashes of prompt,
    completion and their number, so the same file gives the same ids; a prompt's id is the one it has in a task; rows
    come as source `offline`. Raises RollwayError with the line or row and the column at fault.
    """
    records = _reshaped(source, tool, tokenizer, filter)
    if tool is not None:
        mapping, records = _of_tool(tool, mapping, records)
    mappings = per_model(mapping, list(models)) if models else [mapping]
    _check_mapping(mapping, source)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:16] if source.is_file() else ""
    rollouts: list[dict[str, Any]] = []
    scores: list[dict[str, Any]] = []
    prompts: dict[str, dict[str, Any]] = {}
    samples: dict[tuple[str, str], int] = {}
    repeats: dict[str, int] = {}
    for entry in _entries(source, records, mappings, models, tokenizer):
        messages = entry.messages()
        given = entry.label("prompt_id", None)
        prompt_id = id_of(json.loads(messages)) if given is None else given
        group = f"{round}-{entry.label('group', prompt_id)}"
        tokens, text = entry.tokens("tokens"), entry.text()
        content = _hash(task, str(round), prompt_id, group, text, json.dumps(tokens))
        repeats[content] = repeats.get(content, -1) + 1
        rollout_id = _hash(content, str(repeats[content]))
        samples[group, prompt_id] = samples.get((group, prompt_id), -1) + 1
        rollouts.append(
            {
                "rollout_id": rollout_id,
                "round": round,
                "pass": 0,
                "policy": entry.label("policy", digest),
                "policy_round": round,
                "group_id": group,
                "prompt_id": prompt_id,
                "sample": samples[group, prompt_id],
                "source": "offline",
                "finish": entry.label("finish", "unknown"),
                "length": len(tokens),
                "engine": "import",
                "sampling": "{}",
                "prompt_tokens": entry.tokens("prompt_tokens"),
                "tokens": tokens,
                "logprobs": entry.logprobs(len(tokens)),
                "train_mask": entry.train_mask(len(tokens)),
                "segments": [{"start": 0, "end": len(tokens), "author": "offline", "turn": 0}] if tokens else [],
                "text": text,
            }
        )
        if "reward" in mapping:
            reward, error = entry.reward()
            scores.append(
                {"rollout_id": rollout_id, "scorer": scorer, "reward": reward, "components": [], "error": error}
            )
        if messages:
            answer, prompt_tokens = entry.label("answer", None), entry.tokens("prompt_tokens")
            prompts.setdefault(prompt_id, _prompt(prompt_id, task, messages, answer, prompt_tokens, prompt_format))
    if not rollouts:
        raise RollwayError(f"{source}: holds no rows; nothing was imported")
    return Imported(_table(rollouts, "rollouts"), _table(scores, "scores"), _table(list(prompts.values()), "prompts"))


def import_into(
    results: Path,
    source: Path,
    run: str,
    mapping: dict[str, str],
    *,
    scorer: str = "imported",
    tokenizer: Decoder | None = None,
    tool: str | None = None,
    filter: str | None = None,
    models: Sequence[str] = (),
) -> str:
    """Imports `source` as round 0 of a run called `run` and says what was written.

    Prompts become the task of that name. Importing again replaces what an earlier import wrote. Raises RollwayError
    before anything is written, also where `run` is a run or a task of the workflow, or a name is none.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", run) or run in RESERVED:
        raise RollwayError(
            f"import: {run!r} cannot be a run's name; use letters, digits, _ . and -, and none of {', '.join(RESERVED)}"
        )
    parse(ScoreConfig, {"scorers": {scorer: {"kind": "exact"}}, "reward": {}, "correct": None}, "import: --scorer")
    if (results / run / RUN_FILE).exists() or (results / run).is_file():
        raise RollwayError(f"import: {results / run} belongs to a run of the workflow; choose another name")
    found = import_rollouts(
        source, mapping, task=run, scorer=scorer, tokenizer=tokenizer, tool=tool, filter=filter, models=models
    )
    folder = results / run / "r0000" / "p0"
    train = results / "tasks" / run / "train.parquet"
    # A task of the workflow has both splits; an import writes one.
    if found.prompts.num_rows and train.with_name("heldout.parquet").exists():
        raise RollwayError(f"import: {train.parent} belongs to a task of the workflow; choose another name with --run")
    if found.prompts.num_rows:
        write(train, found.prompts, "prompts")
    if found.scores.num_rows:
        write(folder / "scores" / f"{scorer}-000.parquet", found.scores, "scores")
    write(folder / "rollouts-000.parquet", found.rollouts, "rollouts")
    counts = f"{found.rollouts.num_rows} rollouts, {found.scores.num_rows} scores, {found.prompts.num_rows} prompts"
    return f"{results / run}: {counts} from {source}"


class _Row:
    """One row's fields in our types; every complaint names file, line and column."""

    def __init__(self, row: dict[str, Any], place: str, mapping: Mapping[str, str], tokenizer: Decoder | None) -> None:
        self.row, self.place, self.mapping, self.tokenizer = row, place, mapping, tokenizer

    def wrong(self, field: str, why: str) -> RollwayError:
        return RollwayError(f"{self.place}: column {self.mapping.get(field, field)!r} ({field}) {why}")

    def label(self, field: str, default: str | None) -> str | None:
        """The value as text, whatever it is."""
        value = self.row.get(field)
        if value is None:
            return default
        try:
            return self._whole(field, str(value))
        except RecursionError:
            raise self.wrong(field, "is nested too deeply; give text or a number") from None

    def messages(self) -> str:
        return self._whole("prompt", self._messages())

    def text(self) -> str:
        return self._whole("completion", self._text())

    def _whole(self, field: str, text: str) -> str:
        """Text that can be stored: JSON may escape half of a character (`\\ud800`), which UTF-8 cannot hold."""
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise self.wrong(field, "holds a lone surrogate (half of a character); mend or remove the row")
        return text

    def _messages(self) -> str:
        match self.row.get("prompt"):
            case None if self.row.get("prompt_id") is not None:
                return ""
            case str(text):
                return json.dumps([{"role": "user", "content": text}], ensure_ascii=False)
            case list(turns) if all(isinstance(t, dict) and isinstance(t.get("content"), str) for t in turns):
                if not all(isinstance(t.get("role"), str) for t in turns):
                    raise self.wrong("prompt", "has a message without a role; a message is {role, content}, both text")
                return json.dumps([{"role": t["role"], "content": t["content"]} for t in turns], ensure_ascii=False)
            case None:
                raise self.wrong("prompt", "is missing; map `prompt` or `prompt_id`")
            case other:
                raise self.wrong("prompt", f"is {type(other).__name__}, not text or a list of {{role, content}}")

    def _text(self) -> str:
        match self.row.get("completion"):
            case str(text):
                return text
            case list(turns) if turns and all(isinstance(t, dict) for t in turns):
                return self._of_turns(turns)
            case None if self.row.get("tokens") is not None and self.tokenizer is not None:
                return self.tokenizer.decode(self.tokens("tokens"))
            case None:
                raise self.wrong("completion", "is missing; map `completion`, or `tokens` with a tokenizer")
            case other:
                raise self.wrong("completion", f"is {type(other).__name__}, not text or a list of {{role, content}}")

    def _of_turns(self, turns: list[dict[str, Any]]) -> str:
        """The turns as one text. What others wrote is allowed where a mask says which tokens they are."""
        for number, turn in enumerate(turns):
            if turn.get("tool_calls"):
                raise self.wrong("completion", f"calls tools in turn {number}: such a call is no text; remove the row")
            if not isinstance(turn.get("content"), str):
                raise self.wrong("completion", f"has no text as `content` of turn {number}; mend or remove the row")
        others = dict.fromkeys(str(turn["role"]) for turn in turns if turn.get("role", "assistant") != "assistant")
        if others and (self.row.get("tokens") is None or self.row.get("train_mask") is None):
            raise self.wrong(
                "completion",
                f"has turns of {', '.join(others)}, which would pass for the policy's own text; map `tokens` and "
                "`train_mask`, which tell them apart, or keep only rows of one assistant turn",
            )
        return "".join(turn["content"] for turn in turns)

    def tokens(self, field: str) -> list[int]:
        value = self.row.get(field)
        if value is None:
            return []
        if not isinstance(value, list) or not all(type(t) is int and 0 <= t < 2**31 for t in value):
            raise self.wrong(field, "is not a list of token ids (whole numbers from 0)")
        return value

    def logprobs(self, count: int) -> list[float]:
        value = self.row.get("logprobs")
        if value is None:
            return [math.nan] * count
        if not isinstance(value, list) or not all(isinstance(v, (int, float)) for v in value):
            raise self.wrong("logprobs", "is not a list of numbers")
        self._same_length("logprobs", value, count)
        if any(v > 1e-6 for v in value):
            raise self.wrong("logprobs", "holds positive numbers; log-probs are at most 0 (are they probabilities?)")
        try:
            return [float(v) for v in value]
        except OverflowError:
            raise self.wrong("logprobs", "holds a number too large to store; mend or remove the row") from None

    def train_mask(self, count: int) -> list[bool]:
        value = self.row.get("train_mask")
        if value is None:
            return [True] * count
        if not isinstance(value, list) or not all(v in (0, 1) for v in value):
            raise self.wrong("train_mask", "is not a list of true/false or 0/1")
        self._same_length("train_mask", value, count)
        return [bool(v) for v in value]

    def reward(self) -> tuple[float, str | None]:
        value = self.row.get("reward")
        if value is None:
            return 0.0, "the source has no reward here"
        if not isinstance(value, (bool, int, float)):
            shown = repr(value[:60]) if isinstance(value, str) else type(value).__name__
            raise self.wrong("reward", f"is {shown}, not a number")
        try:
            reward = float(value)
        except OverflowError:
            raise self.wrong("reward", "is a number too large to store; mend or remove the row") from None
        return (reward, None) if math.isfinite(reward) else (0.0, f"the source's reward is {reward}")

    def _same_length(self, field: str, value: list, count: int) -> None:
        if len(value) != count:
            raise self.wrong(field, f"has {len(value)} entries for {count} tokens; they must match")


def _check_mapping(mapping: dict[str, str], source: Path) -> None:
    for field in mapping:
        if field not in FIELDS:
            near = get_close_matches(field, FIELDS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"fields are {', '.join(FIELDS)}"
            raise RollwayError(f"import: unknown field {field!r} in the mapping; {hint}")
    for needed, instead in (("completion", "tokens"), ("prompt", "prompt_id")):
        if needed not in mapping and instead not in mapping:
            raise RollwayError(f"import: map `{needed}` (or `{instead}`) to a column of {source}")


def _entries(
    source: Path,
    records: Iterator[tuple[str, dict[str, Any]]],
    mappings: list[dict[str, str]],
    models: Sequence[str],
    tokenizer: Decoder | None,
) -> Iterator[_Row]:
    """One entry per record and mapping; with `models` each mapping is one model's."""
    for place, record in records:
        for number, columns in enumerate(mappings):
            row = {field: _dig(record, column, f"{source}, {place}") for field, column in columns.items()}
            if models:
                row["policy"] = models[number]
            yield _Row(row, f"{source}, {place}", columns, tokenizer)


def _reshaped(
    source: Path, tool: str | None, tokenizer: Decoder | None, filter: str | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    foreign = None if tool is None else FORMATS[tool]
    filtered, reshape = (False, None) if foreign is None else (foreign.filtered, foreign.reshape)
    if filter is not None and not filtered:
        raise RollwayError(f"import: --filter {filter} chooses among the rows of lm-eval; leave it out")
    chosen = chosen_filter((record for _, record in _records(source)), filter, str(source)) if filtered else ""
    for place, record in _records(source):
        if filtered and filter_of(record) != chosen:
            continue
        if reshape is None:
            yield place, record
        else:
            for part in reshape(record, tokenizer, f"{source}, {place}"):
                yield place, part


def _of_tool(
    tool: str, own: dict[str, str], records: Iterator[tuple[str, dict[str, Any]]]
) -> tuple[dict[str, str], Iterator[tuple[str, dict[str, Any]]]]:
    """The mapping for that tool's log, and all its records: the first one tells which optional columns there are."""
    first = next(records, None)
    if first is None:
        return FORMATS[tool].fields | own, iter(())
    return mapping_for(tool, first[1], own), chain([first], records)


def _records(source: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not source.is_file():
        raise RollwayError(f"{source}: no such file")
    match source.suffix:
        case ".jsonl" | ".ndjson":
            yield from _json_lines(source)
        case ".parquet":
            yield from _parquet_rows(source)
        case other:
            raise RollwayError(f"{source}: {other or 'no'} ending; .jsonl and .parquet can be imported")


def _json_lines(source: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with source.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise RollwayError(
                    f"{source}, line {number}: not valid JSON ({error}); mend or remove the line"
                ) from error
            except RecursionError:
                raise RollwayError(
                    f"{source}, line {number}: JSON nested too deeply; mend or remove the line"
                ) from None
            if not isinstance(record, dict):
                raise RollwayError(f"{source}, line {number}: holds {type(record).__name__}, not an object")
            yield f"line {number}", record


def _parquet_rows(source: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    try:
        with pq.ParquetFile(source) as file:
            for batch in file.iter_batches(4096):
                for record in batch.to_pylist():
                    yield f"row {number}", record
                    number += 1
    except (pa.ArrowInvalid, OSError) as error:
        raise RollwayError(f"{source}: not a whole Parquet file ({str(error).splitlines()[0]})") from error
    except UnicodeDecodeError as error:
        raise RollwayError(f"{source}, row {number} or soon after: text that is not UTF-8 ({error}); mend it") from None


def _dig(record: dict[str, Any], column: str, place: str) -> Any:
    """The value at a column name, or at a dotted path where no column has the whole name."""
    if column in record:
        return record[column]
    value: Any = record
    for part in column.split("."):
        if not isinstance(value, dict) or part not in value:
            near = get_close_matches(column, [str(k) for k in record], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(map(str, record))}"
            raise RollwayError(f"{place}: no column {column!r}{hint}")
        value = value[part]
    return value


def _prompt(
    prompt_id: str, task: str, messages: str, answer: str | None, tokens: list[int], format: str
) -> dict[str, Any]:
    return {
        "prompt_id": prompt_id,
        "task": task,
        "split": "train",
        "messages": messages,
        "prompt_tokens": tokens or None,
        "answer": answer,
        "meta": json.dumps({"format": format}),
    }


def _table(rows: list[dict[str, Any]], name: str) -> pa.Table:
    schema = TABLES[name].schema()
    return conform(pa.Table.from_pylist(rows, schema=schema), name)


def _hash(*parts: str) -> str:
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:16]
