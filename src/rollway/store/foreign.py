"""Logs of other tools, as `rollway import --from NAME` reads them: which of their fields is which of ours.

The field names are those that the tools' code wrote in mid 2026; a file with others is refused by name, and `--map`
corrects single fields.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from rollway.errors import RollwayError


class Decoder(Protocol):
    """What of a tokenizer is used here."""

    def decode(self, tokens: list[int]) -> str: ...


Reshape = Callable[[dict[str, Any], Decoder | None, str], list[dict[str, Any]]]
"""(record, tokenizer or None, place for messages) -> records whose columns `fields` and `optional` name."""


@dataclass(frozen=True)
class Foreign:
    """One tool's log."""

    meaning: str
    fields: dict[str, str]
    """Our field -> its column, which must be there."""
    optional: dict[str, str]
    """Our field -> its column, taken where the first record has it."""
    reshape: Reshape | None = None
    filtered: bool = False
    """Whether it has a row for every filter of answers, so that one filter's rows have to be chosen."""


def mapping_for(name: str, first: dict[str, Any], own: dict[str, str]) -> dict[str, str]:
    """Our field -> column for a log of tool `name` whose first (reshaped) record is `first`; `own` goes before it."""
    foreign = FORMATS[name]
    optional = {field: column for field, column in foreign.optional.items() if _has(first, column)}
    found = {**foreign.fields, **optional}
    if name == "trl" and "reward" not in own:
        found |= _trl_reward(first)
    return found | own


def filter_of(record: dict[str, Any]) -> str:
    """The filter of answers whose verdict a row of lm-eval holds; `none` is its name for no filter."""
    return str(record.get("filter", "none"))


def chosen_filter(records: Iterable[dict[str, Any]], wanted: str | None, source: str) -> str:
    """The filter whose rows are imported: the only one, or `wanted`. Raises RollwayError naming those there are.

    lm-eval writes every response once per filter, each time with that filter's verdict.
    """
    found = list(dict.fromkeys(map(filter_of, records)))
    if wanted is not None and wanted not in found:
        raise RollwayError(f"{source}: has no rows of filter {wanted!r}; it has {', '.join(found) or 'none at all'}")
    if wanted is None and len(found) > 1:
        raise RollwayError(
            f"{source}: has every response once for each of the filters {', '.join(found)}; say whose verdicts are "
            f"meant: --filter {found[0]}"
        )
    return wanted if wanted is not None else (found or ["none"])[0]


def _has(record: dict[str, Any], column: str) -> bool:
    value: Any = record
    for part in [column] if column in record else column.split("."):
        if not isinstance(value, dict) or part not in value:
            return False
        value = value[part]
    return True


def _trl_reward(first: dict[str, Any]) -> dict[str, str]:
    """TRL names a column after each reward function; which is the reward is clear only where there is one."""
    rewards = [name for name, value in first.items() if name not in _TRL_COLUMNS and isinstance(value, int | float)]
    if len(rewards) > 1:
        raise RollwayError(
            f"import: TRL logged {', '.join(rewards)}; say which is the reward: --map reward={rewards[0]}"
        )
    return {"reward": rewards[0]} if rewards else {}


_TRL_COLUMNS = {"step", "prompt", "completion", "advantage"}


def _lm_eval(record: dict[str, Any], tokenizer: Decoder | None, place: str) -> list[dict[str, Any]]:
    """One record per response; the metric that `metrics` names first is the reward.

    Where a row has several responses its metric is that of what the filter made of them all: none has a reward then.
    """
    try:
        arguments = record["arguments"]
        first = arguments["gen_args_0"] if isinstance(arguments, dict) else arguments[0]
        prompt = first["arg_0"] if isinstance(first, dict) else first[0]
        responses = record["resps"]
        texts = [text for group in responses for text in (group if isinstance(group, list) else [group])]
    except (KeyError, IndexError, TypeError) as error:
        raise RollwayError(
            f"{place}: not a sample of lm-eval ({error!r} is missing); make it with `lm_eval --log_samples`"
        ) from None
    metrics = record.get("metrics") or []
    reward = {"reward": record[metrics[0]]} if metrics and metrics[0] in record and len(texts) == 1 else {}
    target = record.get("target")
    answer = {"answer": target if isinstance(target, str) else json.dumps(target)} if target is not None else {}
    if not all(isinstance(text, str) for text in texts):
        raise RollwayError(
            f"{place}: its responses are no texts (a loglikelihood task?); only generation can be imported"
        )
    return [{"prompt": prompt, "completion": text, **reward, **answer} for text in texts]


def _open_instruct(record: dict[str, Any], tokenizer: Decoder | None, place: str) -> list[dict[str, Any]]:
    if tokenizer is None:
        raise RollwayError(f"{place}: open-instruct logs token ids without text; give --tokenizer")
    tokens = record.get("prompt_tokens")
    if not isinstance(tokens, list):
        raise RollwayError(f"{place}: has no `prompt_tokens`, so it is no trace of open-instruct")
    truth = record.get("ground_truth")
    answer = {"ground_truth": truth if isinstance(truth, str) else json.dumps(truth)} if truth is not None else {}
    return [{**record, **answer, "prompt": tokenizer.decode(tokens)}]


FORMATS: dict[str, Foreign] = {
    "trl": Foreign(
        "TRL, `log_completions`: completions/completions_*.parquet",
        {"prompt": "prompt", "completion": "completion"},
        {},
    ),
    "verl": Foreign(
        "verl, `trainer.rollout_data_dir`: STEP.jsonl",
        {"prompt": "input", "completion": "output", "reward": "score"},
        {"answer": "gts"},
    ),
    "open-instruct": Foreign(
        "open-instruct, `save_traces`: JSON lines with token ids; needs --tokenizer",
        {"prompt": "prompt", "prompt_tokens": "prompt_tokens", "tokens": "response_tokens"},
        {"logprobs": "logprobs", "reward": "reward", "finish": "finish_reason", "answer": "ground_truth"},
        _open_instruct,
    ),
    "prime-rl": Foreign(
        "prime-rl and verifiers: train_rollouts.jsonl, results.jsonl",
        {"prompt": "prompt", "completion": "completion", "reward": "reward"},
        {"answer": "answer"},
    ),
    "lm-eval": Foreign(
        "lm-eval, `--log_samples`: samples_*.jsonl of a generation task",
        {"prompt": "prompt", "completion": "completion"},
        {"reward": "reward", "answer": "answer"},
        _lm_eval,
        filtered=True,
    ),
}


def per_model(mapping: dict[str, str], models: list[str]) -> list[dict[str, str]]:
    """One mapping per model, for tables with a column of solutions (and of verdicts) per model.

    `{model}` in a column's name stands for each. Raises RollwayError where no column has it, or `policy` is mapped.
    """
    if not any("{model}" in column for column in mapping.values()):
        raise RollwayError("import: --models needs a column with {model} in --map, e.g. completion={model}_solution")
    if "policy" in mapping:
        raise RollwayError("import: --models says whose rows they are; leave `policy` out of --map")
    return [{field: column.replace("{model}", model) for field, column in mapping.items()} for model in models]
