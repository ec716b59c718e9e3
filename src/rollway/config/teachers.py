"""Teachers: whose log-probs a scorer of kind `teacher` stores, and the context in which it reads a rollout."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from rollway.config.base import ConfigError, Strict
from rollway.config.policies import Dtype

if TYPE_CHECKING:
    from rollway.config.experiment import Experiment


class HuggingFaceTeacher(Strict):
    """Any Hugging Face causal language model with the policy's tokenizer."""

    kind: Literal["huggingface"] = "huggingface"
    name: str
    """Hub name or folder."""
    revision: str | None = None
    """Git revision on the hub; pin it for reproducible runs."""
    dtype: Dtype = "float32"
    """Number format of the weights; logits are float32 all the same."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Implementation of attention in `transformers`."""


class WarmupTeacher(Strict):
    """The policy of a warm-up of this experiment, for example a larger one that was taught better."""

    kind: Literal["warmup"] = "warmup"
    name: str
    """Key in `warmups`."""
    seed: NonNegativeInt = 0
    """Seed of the warm-up, as in its folder `{name}-s{seed}`. One that no run has is warmed up for this alone."""


class PolicyTeacher(Strict):
    """A policy of the run itself: of this round, of an earlier one, or of the start."""

    kind: Literal["policy"] = "policy"
    age: NonNegativeInt | Literal["initial"] = 0
    """0: the policy that this round updates; n: the one of n rounds before (before round n the initial one); initial:
    that of the warm-up."""
    policy: Literal["main", "ema"] = "main"
    """Which of the round's named policies: the trained one, or its moving average where the trainer keeps one. The
    warm-up's policy has no average and stands for it."""


class LiveModel(Strict):
    """No model: only what the teacher reads is stored, for the trainer's live teacher (`train.teacher`). The reward is
    1 where a rollout has a context, else 0."""

    kind: Literal["live"] = "live"


OtherModel = Annotated[HuggingFaceTeacher | WarmupTeacher, Field(discriminator="kind")]
"""A live teacher that is no policy of the run."""
TeacherModel = Annotated[HuggingFaceTeacher | WarmupTeacher | PolicyTeacher | LiveModel, Field(discriminator="kind")]


class TeacherCheck(Strict):
    """Whether a teacher is right more often than the policy, seen before the policy is trained on what it says: both
    answer the prompts of the same rollouts once, the teacher after its context, on common random numbers."""

    otherwise: Literal["warn", "stop"] = "warn"
    """Where the 95 % interval of the difference does not lie above 0. warn: a line that says so, also in status and
    report; stop: the round is not trained."""
    rollouts: PositiveInt = 128
    """Most rollouts that are asked again, one of each group first."""
    every: PositiveInt | None = None
    """Rounds between checks; None: before the first round, and where the settings of the teacher change."""


LIVE_TEACHER = "train.teacher"
"""Name of the checks of a live teacher that is another model and that no scorer stands for."""


def check_teachers(experiment: "Experiment") -> None:
    """Warm-ups that teachers and authors name. Raises ConfigError with the mend."""
    for name, run in experiment.resolved.items():
        for start in (0, *(step.from_round for step in run.schedule)):
            live = experiment.settings(name, start).train.teacher
            other = None if live is None else live.model
            if isinstance(other, WarmupTeacher) and other.name not in experiment.warmups:
                raise ConfigError(
                    f"runs.{name}.train.teacher.model.name: {other.name!r} is not in warmups "
                    f"({', '.join(experiment.warmups)})"
                )
            mix = experiment.settings(name, start).rollout.mix
            if mix is not None and isinstance(mix.model, WarmupTeacher) and mix.model.name not in experiment.warmups:
                raise ConfigError(
                    f"runs.{name}.rollout.mix.model.name: {mix.model.name!r} is not in warmups "
                    f"({', '.join(experiment.warmups)})"
                )
            for derive in experiment.settings(name, start).rollout.derive:
                if isinstance(derive.author, WarmupTeacher) and derive.author.name not in experiment.warmups:
                    raise ConfigError(
                        f"runs.{name}.rollout.derive.{derive.name}.author.name: {derive.author.name!r} is not in "
                        f"warmups ({', '.join(experiment.warmups)})"
                    )
            for key, scorer in experiment.settings(name, start).score.scorers.items():
                if scorer.kind != "teacher" or not isinstance(scorer.model, WarmupTeacher):
                    continue
                if scorer.model.name not in experiment.warmups:
                    raise ConfigError(
                        f"runs.{name}.score.scorers.{key}.model.name: {scorer.model.name!r} is not in warmups "
                        f"({', '.join(experiment.warmups)})"
                    )
