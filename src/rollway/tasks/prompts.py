"""Entries -> prompts: wording, answers, duplicates, splits."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from rollway.config.scorers import Scorer
from rollway.config.tasks import TaskConfig
from rollway.errors import RollwayError
from rollway.store.parquet import conform
from rollway.store.prompt_ids import hash_of, normalised
from rollway.store.prompt_ids import prompt_id as id_of
from rollway.tasks.entries import Entry, read_entries
from rollway.tasks.extract import Extractor, extractor
from rollway.template import lookup, render

_RESERVED = ("format", "demonstration", "dataset", "params", "entry")
_NEED_ANSWERS = ("exact", "math_verify")
_TESTS = {
    "humaneval": [{"prompt", "test", "entry_point"}],
    "mbpp": [{"test_list"}],
    "stdio": [{"tests"}, {"input_output"}],
}
"""What a scorer of programs reads of a prompt's meta, by its format: one of these sets of keys."""


@dataclass(frozen=True)
class Prepared:
    """The two splits in the `prompts` schema, and what became of the source's entries."""

    train: pa.Table
    heldout: pa.Table
    counts: dict[str, int]
    """rows, duplicates, conflicts (duplicates whose answers differ), leaks, train, heldout."""


@dataclass(frozen=True)
class _Prompt:
    where: str
    key: str
    prompt_id: str
    messages: str
    answer: str | None
    meta: str


def prepare(task_name: str, config: TaskConfig, root: Path) -> Prepared:
    """Prompts of a task, without duplicates or leaks, dealt into splits by hash(seed, prompt).

    Neither the splits nor their order depend on the order of the source. Relative paths start at `root`.
    Raises RollwayError naming file and row on bad entries, and when too few prompts are left for the splits.
    """
    source = _prompts(config, read_entries(config.source, root))
    heldout_source = _prompts(config, read_entries(config.heldout_source, root)) if config.heldout_source else []
    _check_ids([*source, *heldout_source])
    counts = Counter(rows=len(source) + len(heldout_source))
    train = _without_duplicates(source, config, counts)
    heldout = _without_duplicates(heldout_source, config, counts)
    if heldout_source:
        train = _without_leaks(train, heldout, config, counts)
    train, heldout = _ranked(train, config.splits.seed), _ranked(heldout, config.splits.seed)
    train, heldout = _split(task_name, config, train, heldout, counts)
    counts.update(train=len(train), heldout=len(heldout))
    names = ("rows", "duplicates", "conflicts", "leaks", "train", "heldout")
    return Prepared(
        _table(task_name, "train", train), _table(task_name, "heldout", heldout), {name: counts[name] for name in names}
    )


def require_answers(prompts: pa.Table, scorers: Mapping[str, Scorer]) -> None:
    """Raises RollwayError where a prompt lacks what one of the scorers compares completions with.

    exact and math_verify need an answer, reasoning_gym its entry, a program its tests, a judge an answer if its prompt
    names one.
    """
    for name, scorer in scorers.items():
        if scorer.kind in _NEED_ANSWERS or (scorer.kind == "judge" and "{answer" in scorer.prompt):
            lacking = [p for p, answer in _pairs(prompts, "answer") if answer is None]
            what, mend = "answer", "set `answer` in the task"
        elif scorer.kind == "reasoning_gym":
            lacking = [p for p, meta in _pairs(prompts, "meta") if "entry" not in json.loads(meta)]
            what, mend = "reasoning_gym entry", "take a source of kind reasoning_gym"
        elif scorer.kind == "program":
            wanted = _TESTS[scorer.format]
            lacking = [
                p for p, meta in _pairs(prompts, "meta") if not any(k <= json.loads(meta).keys() for k in wanted)
            ]
            what = f"{' or '.join(', '.join(sorted(keys)) for keys in wanted)} in their meta"
            mend = "name them in the task's `meta`"
        else:
            continue
        if lacking:
            raise RollwayError(
                f"scorer {name} ({scorer.kind}): {len(lacking)} of {prompts.num_rows} prompts have no {what}, "
                f"first prompt {lacking[0]}; {mend}, or use another scorer"
            )


def _pairs(prompts: pa.Table, column: str) -> list[tuple[str, Any]]:
    return list(zip(prompts.column("prompt_id").to_pylist(), prompts.column(column).to_pylist(), strict=True))


def _prompts(config: TaskConfig, entries: list[Entry]) -> list[_Prompt]:
    extract = extractor(config.extract)
    return [_prompt(config, entry, extract) for entry in entries]


def _prompt(config: TaskConfig, entry: Entry, extract: Extractor) -> _Prompt:
    messages = _messages(config, entry)
    answer = _answer(config, entry, extract)
    demonstration = answer
    if config.demonstration is not None:
        demonstration = render(config.demonstration, entry.fields, entry.where)
    kept = {name: lookup(name, entry.fields, entry.where) for name in config.meta}
    clash = [name for name in kept if name in _RESERVED]
    if clash:
        raise RollwayError(
            f"tasks meta: {clash} are names of rollway's own ({', '.join(_RESERVED)}); rename the fields"
        )
    meta = {"format": config.format, "demonstration": demonstration, **entry.meta, **kept}
    prompt_id = id_of(messages)
    if config.id is not None:
        value = lookup(config.id, entry.fields, entry.where)
        if not isinstance(value, str | int) or isinstance(value, bool):
            raise RollwayError(f"{entry.where}: id field {config.id!r} holds {value!r}, not a text or a whole number")
        prompt_id = str(value)
    texts = [_json(messages, entry.where, "messages"), answer or "", _json(meta, entry.where, "meta"), prompt_id]
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise RollwayError(
                f"{entry.where}: holds half of a surrogate pair, which is no text; mend the row"
            ) from None
    return _Prompt(entry.where, normalised(messages), prompt_id, texts[0], answer, texts[2])


def _messages(config: TaskConfig, entry: Entry) -> list[dict[str, Any]]:
    if config.messages is not None:
        return _given_messages(lookup(config.messages, entry.fields, entry.where), config.messages, entry.where)
    text = render(config.prompt, entry.fields, entry.where)
    if text is None or not text.strip():
        raise RollwayError(f"{entry.where}: its prompt is empty or null; mend or delete the row")
    system = [{"role": "system", "content": config.system}] if config.system is not None else []
    return [*system, {"role": "user", "content": text}]


def _given_messages(value: Any, field: str, where: str) -> list[dict[str, Any]]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RollwayError(f"{where}: field {field!r} is not JSON ({error})") from None
    well_formed = isinstance(value, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    )
    if not well_formed or not value:
        raise RollwayError(f"{where}: field {field!r} is not a list of {{role, content}} messages")
    if value[-1]["role"] == "assistant":
        raise RollwayError(f"{where}: field {field!r} ends with the assistant's message; it must end with a question")
    return [{"role": m["role"], "content": m["content"]} for m in value]


def _answer(config: TaskConfig, entry: Entry, extract: Extractor) -> str | None:
    if config.answer is None:
        return None
    text = render(config.answer, entry.fields, entry.where)
    if text is None:
        return None
    try:
        answer = extract(text)
    except TimeoutError:
        raise RollwayError(f"{entry.where}: extract {config.extract} takes too long; simplify the pattern") from None
    if answer is None:
        raise RollwayError(f"{entry.where}: extract {config.extract} finds no answer in {_short(text)!r}")
    return answer.strip() or None


def _check_ids(prompts: list[_Prompt]) -> None:
    """Raises RollwayError when two rows of different prompts share an id."""
    first: dict[str, _Prompt] = {}
    for prompt in prompts:
        other = first.setdefault(prompt.prompt_id, prompt)
        if other is not prompt and prompt.prompt_id != hash_of(prompt.key)[:16]:
            raise RollwayError(
                f"{prompt.where}: id {prompt.prompt_id!r} was already given at {other.where}; "
                "ids must be unique over both splits (without `id`, a hash of the prompt is taken)"
            )


def _without_duplicates(prompts: list[_Prompt], config: TaskConfig, counts: Counter[str]) -> list[_Prompt]:
    """One prompt per text. Which one stays depends on the rows' content only, never on their order."""
    kept: dict[str, _Prompt] = {}
    conflicting: set[str] = set()
    for prompt in prompts:
        other = kept.setdefault(prompt.key, prompt)
        if other is prompt:
            continue
        if config.on_duplicate == "refuse":
            raise RollwayError(f"{prompt.where}: same prompt as {other.where}; delete one, or set on_duplicate: drop")
        counts["duplicates"] += 1
        if other.answer != prompt.answer:
            conflicting.add(prompt.key)
        kept[prompt.key] = min(other, prompt, key=lambda p: (p.answer or "", p.meta, p.messages, p.prompt_id))
    counts["conflicts"] += len(conflicting)
    return list(kept.values())


def _without_leaks(
    train: list[_Prompt], heldout: list[_Prompt], config: TaskConfig, counts: Counter[str]
) -> list[_Prompt]:
    """Training prompts that the whole held-out source (not only the part taken of it) does not contain."""
    test = {prompt.key: prompt for prompt in heldout}
    leaks = [prompt for prompt in train if prompt.key in test]
    if leaks and config.on_duplicate == "refuse":
        raise RollwayError(
            f"{leaks[0].where}: same prompt as {test[leaks[0].key].where}, which is held out ({len(leaks)} such); "
            "delete them, or set on_duplicate: drop"
        )
    counts["leaks"] += len(leaks)
    return [prompt for prompt in train if prompt.key not in test]


def _ranked(prompts: list[_Prompt], seed: int) -> list[_Prompt]:
    return sorted(prompts, key=lambda p: hash_of(f"{seed}\n{p.key}"))


def _split(
    task: str, config: TaskConfig, train: list[_Prompt], heldout: list[_Prompt], counts: Counter[str]
) -> tuple[list[_Prompt], list[_Prompt]]:
    wanted, wanted_heldout = config.splits.train, config.splits.heldout
    if config.heldout_source is None:
        assert wanted_heldout is not None
        available = len(train)
        train, heldout = train[wanted_heldout:], train[:wanted_heldout]
        need = wanted_heldout + (wanted or 1)
        text = f"{wanted_heldout} held out and {wanted or 'at least 1'} for training"
    else:
        available = len(train)
        need = wanted or 1
        text = f"{need} for training"
        if wanted_heldout is not None and len(heldout) < wanted_heldout:
            raise RollwayError(
                f"task {task}: heldout_source has {len(heldout)} different prompts, splits.heldout asks for "
                f"{wanted_heldout}; lower it, or set it to null for all of them"
            )
        heldout = heldout[:wanted_heldout]
    if available < need:
        raise RollwayError(
            f"task {task}: {available} prompts are left ({counts['duplicates']} duplicates and {counts['leaks']} leaks "
            f"dropped), but splits ask for {text}; lower tasks.{task}.splits or give a larger source"
        )
    return train[:wanted], heldout


def _table(task: str, split: str, prompts: list[_Prompt]) -> pa.Table:
    columns = {
        "prompt_id": pa.array([p.prompt_id for p in prompts], pa.string()),
        "task": pa.array([task] * len(prompts), pa.string()),
        "split": pa.array([split] * len(prompts), pa.string()),
        "messages": pa.array([p.messages for p in prompts], pa.string()),
        "answer": pa.array([p.answer for p in prompts], pa.string()),
        "meta": pa.array([p.meta for p in prompts], pa.string()),
    }
    return conform(pa.table(columns), "prompts")


def _json(value: Any, where: str, what: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RollwayError(f"{where}: {what} cannot be kept as JSON ({error}); leave that field out") from None


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"...{text[-77:]}"
