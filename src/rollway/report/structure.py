"""How the workflow hangs together: the rule graph, the fork tree, and where configs differ."""

from collections.abc import Iterator, Sequence
from typing import Any

from rollway.report.data import Run

RULES: dict[str, tuple[str, ...]] = {
    "prepare": (),
    "warmup": ("prepare",),
    "reward_model": ("prepare", "warmup", "rollout", "score"),
    "rollout": ("prepare", "warmup", "score", "train"),
    "discriminator": ("prepare", "warmup", "rollout", "discriminator"),
    "score": ("prepare", "rollout", "reward_model", "discriminator"),
    "curate": ("prepare", "rollout", "score"),
    "check_teacher": ("prepare", "warmup", "rollout", "score", "train", "reward_model"),
    "train": ("warmup", "rollout", "curate", "train", "check_teacher"),
    "evaluate": ("prepare", "warmup", "train", "reward_model"),
    "lm_eval": ("warmup", "train"),
    "describe": (),
    "catalog": ("describe", "score", "curate", "train", "evaluate", "lm_eval", "check_teacher", "discriminator"),
    "report": ("describe", "score", "curate", "train", "evaluate", "lm_eval", "check_teacher", "discriminator"),
    "track": ("describe", "report", "curate", "train", "evaluate", "lm_eval", "check_teacher", "discriminator"),
}
"""Rule -> the rules whose files it may read; which of them it does read depends on the config."""


def forks(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Every run with its parent, the round and stage it sets out from, and how deep it lies, parents before forks."""
    by_name = {run.run: run for run in runs}

    def below(parent: str | None, depth: int, seen: frozenset[str]) -> Iterator[dict[str, Any]]:
        for run in runs:
            origin = run.info.get("parent")
            origin = origin if origin in by_name else None
            if origin == parent and run.run not in seen:
                yield {
                    "run": run.run,
                    "parent": run.info.get("parent"),
                    "round": run.info.get("fork_round"),
                    "stage": run.info.get("fork_stage"),
                    "rounds": run.info.get("rounds"),
                    "depth": depth,
                }
                yield from below(run.run, depth + 1, seen | {run.run})

    return list(below(None, 0, frozenset()))


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """{"train.optimizer.lr": 0.001, ...}; lists, and empty mappings, are values."""
    if not isinstance(config, dict) or not config:
        return {prefix: config}
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def differences(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Keys whose values are not the same in all configurations: {key, values: {name: value or None}}.

    One run stands for all seeds of its name. Titles, papers, axes and seeds say nothing of the method and are left out.
    """
    configs: dict[str, dict[str, Any]] = {}
    for run in runs:
        if run.info.get("config"):
            configs.setdefault(run.name, flat(run.info["config"]))
    names, found = list(configs), []
    silent = ("seeds", "title", "paper", "status", "axes")
    keys = {key for config in configs.values() for key in config if key.split(".")[0] not in silent}
    for key in sorted(keys):
        values = [configs[name].get(key, "(absent)") for name in names]
        if any(value != values[0] for value in values):
            found.append({"key": key, "values": dict(zip(names, values, strict=True))})
    return found
