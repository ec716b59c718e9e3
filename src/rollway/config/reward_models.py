"""Reward models: trained from preference pairs, then named by scorers of kind reward_model."""

import re
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, FiniteFloat, NonNegativeInt, field_validator

from rollway.config.base import ConfigError, Strict
from rollway.config.curation import SqlPart
from rollway.config.pair_training import PairTraining
from rollway.config.policies import Dtype
from rollway.config.tasks import Source

if TYPE_CHECKING:
    from rollway.config.experiment import Experiment


class WarmupBase(Strict):
    """The backbone and the tokenizer of a warm-up's policy, under a new head."""

    kind: Literal["warmup"] = "warmup"
    name: str
    """Key in `warmups`."""
    seed: NonNegativeInt = 0
    """Seed of the warm-up, as in its folder `{name}-s{seed}`. One that no run has is warmed up for this model alone."""


class HuggingFaceBase(Strict):
    """A Hugging Face model: a language model gets a new head, a reward model is trained on."""

    kind: Literal["huggingface"] = "huggingface"
    name: str
    """Hub name or folder."""
    revision: str | None = None
    """Git revision on the hub; pin it for reproducible runs."""
    dtype: Dtype = "float32"
    """Number format of the weights while training, and as they are saved; scores are always computed in float32."""


Base = Annotated[WarmupBase | HuggingFaceBase, Field(discriminator="kind")]


class RunPairs(Strict):
    """Pairs among the stored, scored rollouts of a run of this config."""

    kind: Literal["run"] = "run"
    run: str
    """Key in `runs`."""
    seed: NonNegativeInt = 0
    """Which of the run's seeds."""
    rounds: list[NonNegativeInt] = [0]
    """Rounds whose rollouts are paired, each round by itself."""
    reward: dict[str, FiniteFloat] | None = None
    """Weights of the run's scorers in the reward that ranks the rollouts; None: as the run ranks them, shaped by its
    `curate.reward`."""
    pair: SqlPart = SqlPart(sql="best_worst")
    """The SQL file of `workflow/sql/pairs` that makes the pairs, with its parameters."""

    @field_validator("rounds")
    @classmethod
    def _rounds_are_a_set(cls, rounds: list[int]) -> list[int]:
        if not rounds or len(set(rounds)) != len(rounds):
            raise ValueError(f"{rounds} is empty or repeats a round")
        return rounds

    @field_validator("reward")
    @classmethod
    def _reward_ranks(cls, reward: dict[str, float] | None) -> dict[str, float] | None:
        if reward is not None and not any(reward.values()):
            raise ValueError(
                f"{reward} gives every rollout the same reward; weigh a scorer, or leave `reward` out: the run's own "
                "reward then ranks them"
            )
        return reward


class FilePairs(Strict):
    """Pairs from a file or dataset, worded by templates over its fields."""

    kind: Literal["file"] = "file"
    source: Source
    """Where the entries come from."""
    prompt: str = "{prompt}"
    """Template of the prompt."""
    chosen: str = "{chosen}"
    """Template of the better completion."""
    rejected: str = "{rejected}"
    """Template of the worse completion."""
    format: Literal["plain", "chat"] = "plain"
    """plain: prompt and completion one after the other. chat: a user's and an assistant's message, worded by the
    tokenizer's chat template. As the task's `format` whose rollouts will be scored."""


Pairs = Annotated[RunPairs | FilePairs, Field(discriminator="kind")]


class RewardModelConfig(PairTraining):
    """A classifier with one output, trained so that chosen completions get more than rejected ones (Bradley-Terry)."""

    base: Base
    """The model to start from."""
    pairs: Pairs
    """What it learns."""
    heldout_share: float = Field(0.2, gt=0.0, lt=1.0)
    """Share of the prompts whose pairs are never trained on, dealt by a hash of the prompt: no prompt is on both
    sides."""
    flip: float = Field(0.0, ge=0.0, le=1.0)
    """Label noise for studies: share of the training pairs whose chosen and rejected are swapped, drawn by a hash of
    the pair. Held-out pairs are never swapped."""


def check_reward_models(experiment: "Experiment") -> None:
    """Names that reward models and their scorers point at. Raises ConfigError with the mend."""
    for name, model in experiment.reward_models.items():
        place = f"reward_models.{name}"
        if re.fullmatch(r"r\d{4}", name):
            raise ConfigError(f"{place}: is named like the folder of a round; give it another name")
        if isinstance(model.base, WarmupBase) and model.base.name not in experiment.warmups:
            raise ConfigError(
                f"{place}.base.name: {model.base.name!r} is not in warmups ({', '.join(experiment.warmups)})"
            )
        if isinstance(model.pairs, RunPairs):
            _check_run_pairs(experiment, f"{place}.pairs", model.pairs)
    for name in experiment.runs:
        run = experiment.resolved[name]
        for start in (0, *(step.from_round for step in run.schedule)):
            for key, scorer in experiment.settings(name, start).score.scorers.items():
                if scorer.kind != "reward_model" or scorer.trained is None:
                    continue
                if scorer.trained not in experiment.reward_models:
                    known = ", ".join(experiment.reward_models) or "there are none"
                    raise ConfigError(
                        f"runs.{name}.score.scorers.{key}.trained: {scorer.trained!r} is not in reward_models ({known})"
                    )


def _check_run_pairs(experiment: "Experiment", place: str, pairs: RunPairs) -> None:
    if pairs.run not in experiment.runs:
        raise ConfigError(f"{place}.run: {pairs.run!r} is not in runs ({', '.join(experiment.runs)})")
    run = experiment.resolved[pairs.run]
    if pairs.seed not in run.seeds:
        raise ConfigError(f"{place}.seed: run {pairs.run} has the seeds {run.seeds}; name one, or add {pairs.seed}")
    if max(pairs.rounds) >= run.rounds:
        raise ConfigError(f"{place}.rounds: run {pairs.run} has rounds 0 to {run.rounds - 1}; raise its `rounds`")
    for round in pairs.rounds:
        starts = [step.from_round for step in run.schedule if step.from_round <= round]
        scorers = experiment.settings(pairs.run, max(starts, default=0)).score.scorers
        for scorer in pairs.reward or {}:
            if scorer not in scorers:
                raise ConfigError(
                    f"{place}.reward: {scorer!r} is not a scorer of run {pairs.run} in round {round} "
                    f"({', '.join(scorers)})"
                )
