"""The settings of a run as its run.json has them, and what decides how it is evaluated."""

from collections.abc import Mapping
from typing import Any

from rollway.config.base import as_given, deep_merge
from rollway.config.experiment import EvaluateConfig
from rollway.config.recipes import Recipe, parse
from rollway.config.rollouts import Sampling
from rollway.config.scorers import ScoreConfig

_OPERATIONAL = {"max_error_share", "processes", "batch", "requests_per_second", "parallel"}
"""Fields of scorers that decide how fast, or at how many failures, a stage stops: the verdicts are the same."""


def recipe_settings(config: Mapping[str, Any], round: int) -> dict[str, Any]:
    """The recipe's part of a run's config as it stands in `round`, schedule applied."""
    mapping = {key: value for key, value in config.items() if key in Recipe.model_fields}
    for step in config.get("schedule", []):
        if step["from"] <= round:
            mapping = deep_merge(mapping, {key: value for key, value in step.items() if key != "from"})
    return mapping


def evaluation_settings(info: Mapping[str, Any], round: int) -> dict[str, Any]:
    """What held-out figures of the policy of `round` depend on besides policy and prompt, by name.

    As the evaluate stage takes them: from the recipe in `round`, for the policy of the end from that in the last round.
    The scorer counts by what it does, not by what it is called. info: the content of run.json; {} has the defaults.
    Raises ConfigError where run.json has settings that this version does not know.
    """
    config = info.get("config") or {}
    last = int(config.get("rounds", info.get("rounds", round + 1))) - 1
    recipe = recipe_settings(config, min(round, last))
    place = f"run.json of {info.get('name', 'a run')}"
    evaluate = parse(EvaluateConfig, config.get("evaluate", {}), f"{place}, evaluate")
    sampling = parse(Sampling, recipe.get("rollout", {}).get("sampling", {}), f"{place}, rollout.sampling")
    given = {name: getattr(evaluate, name) for name in ("temperature", "top_p", "top_k")}
    given |= {"max_tokens": sampling.max_tokens, "stop": sampling.stop}
    score = parse(ScoreConfig, _correctness(recipe.get("score", {})), f"{place}, score")
    return given | {"scorer": _verifier(score), "threshold": score.threshold}


def _correctness(score: dict[str, Any]) -> dict[str, Any]:
    """Of the score settings only what says which rollout is right."""
    usual = ScoreConfig()
    name = score.get("correct", usual.correct)
    scorers = {key: value for key, value in score.get("scorers", usual.scorers).items() if key == name}
    return {**score, "scorers": scorers, "reward": {}, "correct": name}


def _verifier(score: ScoreConfig) -> dict[str, Any] | None:
    if score.correct is None:
        return None
    return {key: value for key, value in as_given(score.scorers[score.correct]).items() if key not in _OPERATIONAL}
