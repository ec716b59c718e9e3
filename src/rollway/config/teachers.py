"""Teachers: whose log-probs a scorer of kind `teacher` stores, and the context in which it reads a rollout."""

import re
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NonNegativeInt, model_validator

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


TeacherModel = Annotated[HuggingFaceTeacher | WarmupTeacher | PolicyTeacher | LiveModel, Field(discriminator="kind")]


class TeacherContext(Strict):
    """What the teacher reads before the completion's tokens, in place of what the policy read.

    Templates name fields of the row: prompt (its last message), answer, completion, messages, meta, task, scores;
    `sibling`, the first right completion of the same group that is not this one; `reference`, a stored completion of
    the prompt by somebody else (`references`); `verdict`, one of the two texts below.
    """

    prompt: str | None = None
    """Template of the last message; None: as the policy read it."""
    prefix: str = ""
    """Template of what stands between prompt and completion, in the assistant's turn. `{completion}` in it stands for
    the completion's own tokens without the end token."""
    right: str | None = None
    """`{verdict}` of a right rollout."""
    wrong: str | None = None
    """`{verdict}` of a wrong one."""

    @property
    def templates(self) -> str:
        return f"{self.prompt or ''} {self.prefix}"

    @property
    def needs_others(self) -> bool:
        """Whether it names what not every rollout has."""
        return self.names("sibling") or self.names("reference")

    def names(self, field: str) -> bool:
        """Whether a template names the field, or what lies in it."""
        return re.search(rf"(?<!\{{)\{{\s*{field}\b", self.templates) is not None

    @model_validator(mode="after")
    def _says_something(self) -> "TeacherContext":
        if self.prompt is None and not self.prefix:
            raise ValueError(
                "a context gives `prompt`, `prefix` or both; leave `context` out for the policy's own prompt"
            )
        texts = (self.right is not None, self.wrong is not None)
        if self.names("verdict") and not all(texts):
            raise ValueError("`{verdict}` needs its two texts: give `right` and `wrong`")
        if any(texts) and not self.names("verdict"):
            raise ValueError("`right` and `wrong` have no effect without `{verdict}` in a template; remove them")
        return self


def check_teachers(experiment: "Experiment") -> None:
    """Warm-ups that teachers name. Raises ConfigError with the mend."""
    for name, run in experiment.resolved.items():
        for start in (0, *(step.from_round for step in run.schedule)):
            for key, scorer in experiment.settings(name, start).score.scorers.items():
                if scorer.kind != "teacher" or not isinstance(scorer.model, WarmupTeacher):
                    continue
                if scorer.model.name not in experiment.warmups:
                    raise ConfigError(
                        f"runs.{name}.score.scorers.{key}.model.name: {scorer.model.name!r} is not in warmups "
                        f"({', '.join(experiment.warmups)})"
                    )
