"""Scorers: what judges a rollout, and how their verdicts make the reward."""

import re
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    FiniteFloat,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from rollway.config.base import Strict
from rollway.config.contexts import TeacherContext
from rollway.config.pair_training import PairTraining
from rollway.config.tasks import Extract, Pattern
from rollway.config.teachers import LIVE_TEACHER, LiveModel, PolicyTeacher, TeacherCheck, TeacherModel


class ScorerBase(Strict):
    needs: list[str] = []
    """Scorers whose rewards this one reads, as `scores` (python, judge and teacher only); a teacher reads `feedback` of
    the first of them that writes any."""
    max_error_share: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of rows that may fail (recorded per row, reward 0) before the stage stops."""


class ExactScorer(ScorerBase):
    """1 if the completion equals the answer, else 0."""

    kind: Literal["exact"] = "exact"
    strip: bool = True
    """Ignore white space around both."""
    ignore_case: bool = False
    """Upper and lower case are the same."""
    extract: Extract = "none"
    """How the answer is taken from the completion: none, hash, boxed, last_number, or regex:PATTERN."""


class ReasoningGymScorer(ScorerBase):
    """The dataset's own verifier (partial credit included); all but those that compare texts run in processes with a
    limit per row, and none evaluates an answer as Python."""

    kind: Literal["reasoning_gym"] = "reasoning_gym"
    extract: Extract = "none"
    """How the answer is taken from the completion: none, hash, boxed, last_number, or regex:PATTERN."""
    partial: bool = Field(True, exclude_if=lambda value: value is True)
    """What the verifier gives, as it is. Many give a part for a text that only contains the answer, or for any text at
    all; false: 1 for its full score, else 0."""
    timeout: PositiveFloat = Field(5.0, exclude_if=lambda value: value == 5.0)
    """Seconds of processor time per row; a row that takes longer counts as wrong (component `timeout`)."""
    processes: PositiveInt | None = Field(None, exclude_if=lambda value: value is None)
    """None: as many as the stage has threads."""


class MathVerifyScorer(ScorerBase):
    """Mathematical equality by `math_verify`, in a pool of processes with a time limit per row."""

    kind: Literal["math_verify"] = "math_verify"
    extract: Extract = "none"
    """none: as math_verify finds it (boxed or $...$ first; of bare numbers the first); hash, boxed, last_number, or
    regex:PATTERN: only that text is compared, and a completion without it is wrong."""
    timeout: PositiveFloat = 5.0
    """Seconds of processor time per row; a row that takes longer counts as wrong (component `timeout`)."""
    processes: PositiveInt | None = None
    """None: as many as the stage has threads."""


class LengthScorer(ScorerBase):
    """Overlong shaping (DAPO, arXiv 2503.14476, eq. 13): 0 to limit - cache tokens, then linear to -1 at limit."""

    kind: Literal["length"] = "length"
    limit: PositiveInt
    """Tokens."""
    cache: PositiveInt
    """Tokens over which the penalty grows."""

    @model_validator(mode="after")
    def _cache_fits(self) -> "LengthScorer":
        if self.cache > self.limit:
            raise ValueError(f"cache {self.cache} exceeds limit {self.limit}: the penalty would start below 0 tokens")
        return self


class FormatScorer(ScorerBase):
    """1 if the completion matches a regular expression, else 0."""

    kind: Literal["format"] = "format"
    pattern: Pattern
    """Regular expression, as the `regex` package reads it."""
    full: bool = True
    """The whole completion must match; else anywhere in it."""


class PythonScorer(ScorerBase):
    """Your own function, by dotted path: `package.module:function` or `path/to/file.py:function`.

    Called as `function(row: dict, **params)` for each rollout (keys: completion, answer, meta, messages, tokens, ...);
    returns a number, or a mapping with `reward` and further named components.
    """

    kind: Literal["python"] = "python"
    function: str
    """Where the function is: `package.module:function` or `path/to/file.py:function`."""
    params: dict[str, Any] = {}
    """Keyword arguments of every call."""
    timeout: PositiveFloat | None = Field(None, exclude_if=lambda value: value is None)
    """Seconds by the clock per call: the function then runs in a process of its own, which is killed when a call takes
    longer (the row's error). None: in the stage's process, and a call that never returns hangs the stage."""
    recheck: float = Field(0.0, ge=0.0, le=1.0, exclude_if=lambda value: value == 0.0)
    """Share of rows, drawn by hash, that are judged a second time. Where the two rewards differ the lower one counts,
    and the component `unstable`, 0 on the others judged twice, is 1."""
    feedback: bool = False
    """The function's mapping may hold `feedback`, a text about the rollout that a teacher's context names."""


class ProgramScorer(ScorerBase):
    """1 if a program that the policy wrote passes all of its tests, else 0: run in a sandbox, never in the stage."""

    kind: Literal["program"] = "program"
    format: Literal["humaneval", "mbpp", "stdio"]
    """What the task's `meta` holds. humaneval: prompt, test, entry_point. mbpp: test_list, perhaps test_setup_code and
    entry_point. stdio: tests, a list of {input, output}, or input_output, {inputs, outputs}."""
    code: Literal["last_block", "all", "continuation"] = "last_block"
    """The program in a completion: its last block between lines of three backticks (all of it where there is none);
    all of it; or, with humaneval, the prompt and the completion that continues it."""
    partial: bool = False
    """The reward is the share of tests passed; each is then run. In humaneval all assertions are one test."""
    cpu: PositiveInt = 5
    """Seconds of processor time, per test of stdio, else for all tests together."""
    wall: PositiveFloat = 15.0
    """Seconds by the clock, for a program that sleeps or waits; more than `cpu`, because the machine may be busy."""
    memory: int = Field(default=512, ge=64)
    """MiB of address space, for each process of a program."""
    scratch: PositiveInt = 16
    """MiB of files in the scratch folder, the one place where a program may write."""
    output: PositiveInt = 4
    """MiB that a program may print, or return from one call."""
    processes: PositiveInt = 16
    """Threads and processes at once, the first one included."""
    fork: bool = False
    """Whether a program may start processes beside threads; the limits of `cpu` and `memory` then hold for each."""
    packages: list[str] = []
    """Modules of this environment that programs may use beside the standard library, imported beforehand (`numpy`); the
    environment's site-packages can then be read."""
    recheck: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of rows, drawn by hash, whose programs are run a second time; a program of several rows where any is drawn.
    Where the two rewards differ the lower one counts, and the component `unstable`, 0 on the others run twice, is 1."""
    parallel: PositiveInt | None = None
    """Programs run at once. None: as many as the stage has threads."""

    @model_validator(mode="after")
    def _fits(self) -> "ProgramScorer":
        if self.code == "continuation" and self.format != "humaneval":
            raise ValueError("`code: continuation` needs `format: humaneval`, whose `meta.prompt` is continued")
        if self.wall < self.cpu:
            raise ValueError(f"wall {self.wall:g} is less than cpu {self.cpu}, which would have no effect")
        for package in self.packages:
            if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", package):
                raise ValueError(f"packages: {package!r} is no name of a module")
        return self


class RewardModelScorer(ScorerBase):
    """A Hugging Face sequence-classification model with one output: one that exists, or one trained here."""

    kind: Literal["reward_model"] = "reward_model"
    name: str | None = None
    """Hub name or local folder."""
    trained: str | None = None
    """Key in `reward_models`, in place of `name`."""
    revision: str | None = None
    """Git revision on the hub, only with `name`; pin it for reproducible runs."""
    batch: PositiveInt = 64
    """Rows per forward pass."""
    normalise: bool | None = None
    """Only with `trained`: subtract the mean and divide by the standard deviation that the model's outputs had over the
    completions it was trained on. None: true with `trained`."""

    @model_validator(mode="after")
    def _one_model(self) -> "RewardModelScorer":
        if (self.name is None) == (self.trained is None):
            raise ValueError("a reward_model scorer takes exactly one of `name` and `trained`")
        if self.trained is not None and self.revision is not None:
            raise ValueError("`revision` has no effect with `trained`; remove it")
        if self.name is not None and self.normalise is not None:
            raise ValueError(
                "`normalise` needs `trained`: only a model trained here has a recorded mean and standard deviation"
            )
        return self


class DiscriminatorScorer(ScorerBase):
    """A reward model of the run's own that is taught anew in every round, on that round's rollouts, to tell a teacher's
    text from the policy's (GAD, arXiv 2511.10643). The first is the policy of round 0 under a new head."""

    kind: Literal["discriminator"] = "discriminator"
    references: list[str] = []
    """Files of rollouts, imported or another run's, whose completions are the teacher's text; `{seed}` stands for the
    run's seed. Of several of one prompt the first, by file and rollout_id. Empty: the task's demonstrations."""
    training: PairTraining = PairTraining()
    """How it is taught; every round goes on from the weights of the round before."""
    heldout_share: float = Field(0.2, gt=0.0, lt=1.0)
    """Share of the round's prompts whose pairs are not trained on, dealt by a hash of the prompt: what it makes of them
    says how well the two can be told apart."""
    batch: PositiveInt = 64
    """Rows per forward pass, when it scores."""


class JudgeScorer(ScorerBase):
    """A language model behind an OpenAI-compatible URL that returns a structured verdict."""

    kind: Literal["judge"] = "judge"
    url: str = Field(pattern=r"^https?://")
    """Base URL that ends in the version (`https://host/v1`); `/chat/completions` is added."""
    model: str
    """Name of the model, as the server knows it."""
    prompt: str
    """Template over the row's fields: completion, answer, messages, prompt (the last message), meta, scores."""
    key_env: str | None = None
    """Environment variable that holds the key; the key itself is never written anywhere."""
    low: FiniteFloat = 1.0
    """Lowest score the judge may give; it becomes reward 0."""
    high: FiniteFloat = 10.0
    """Highest score the judge may give; it becomes reward 1."""
    normalise: bool = True
    """The reward is (score - low) / (high - low); false: the score as the judge gave it (DaGRPO's margin is on it)."""
    requests_per_second: PositiveFloat = 10.0
    """Most requests started per second."""
    parallel: PositiveInt = 8
    """Most requests under way at once."""
    retries: NonNegativeInt = 3
    """Further attempts per row, where another attempt can help."""
    timeout: PositiveFloat = 60.0
    """Seconds per request."""
    recheck: float = Field(0.0, ge=0.0, le=1.0, exclude_if=lambda value: value == 0.0)
    """As that of `python`; the second request goes past the cache."""

    @model_validator(mode="after")
    def _range(self) -> "JudgeScorer":
        if self.low >= self.high:
            raise ValueError(f"low {self.low} must lie below high {self.high}")
        return self


class TeacherScorer(ScorerBase):
    """A language model's log-probs of the completion's own tokens, stored token by token; the reward is their mean.

    It reads the same tokens as the policy wrote, so it needs the policy's tokenizer and vocabulary; the output layers
    of the two may differ by rows of padding beyond it, which then have no mass.
    """

    kind: Literal["teacher"] = "teacher"
    model: TeacherModel
    """Whose log-probs."""
    context: list[TeacherContext] = []
    """What it reads before the completion: the first of these whose `sibling`, `feedback` and `reference` there are;
    without any, the rollout has no teacher. Empty: the policy's own prompt, token by token."""
    context_tokens: PositiveInt | None = None
    """Most tokens of a context (SDPO: 10240), cut or refused as `overlong` says; None: what the model's window
    leaves."""
    references: list[str] = []
    """Files of rollouts, imported or another run's, whose completions contexts name as `reference`: how a teacher that
    is known by its text alone takes part. Of several of one prompt the first, by file and rollout_id."""
    threshold: FiniteFloat = 1.0
    """Only with `needs`, whose first scorer says what is right: least reward of a right rollout."""
    entropy: bool = True
    """Store the entropy of each token's distribution."""
    top_k: NonNegativeInt = 0
    """Store the K likeliest tokens of each position with their log-probs; 0: none. 8 K bytes per token."""
    temperature: PositiveFloat = 1.0
    """Divides the logits of all that is stored. That of the rollouts where log-probs of sampled tokens are read, and
    then `distill.temperature` is it too; else 1."""
    overlong: Literal["error", "cut"] = "error"
    """Where a context exceeds `context_tokens`, or with the completion the model's window: error: the row fails; cut:
    its first tokens go, the BOS token apart (component `cut` counts them)."""
    micro_tokens: PositiveInt = 16384
    """Most tokens (padding included) in one forward; the result does not depend on it."""
    check: TeacherCheck | None = Field(TeacherCheck(), exclude_if=lambda value: value == TeacherCheck())
    """Whether it is any better than the policy, before anything is trained on it. None: nobody looks. A policy of the
    run without a context is never looked at: it is not meant to know better."""

    def is_checked(self) -> bool:
        """Whether it is compared with the policy."""
        return self.check is not None and not self._is_the_policy()

    def _is_the_policy(self) -> bool:
        return isinstance(self.model, PolicyTeacher) and not self.context

    @model_validator(mode="after")
    def _parts_agree(self) -> "TeacherScorer":
        if self.check is not None and self.check != TeacherCheck() and self._is_the_policy():
            raise ValueError(
                "`check` has no effect on a policy of the run in its own context, which is not meant to know better; "
                "remove it"
            )
        read = ("sibling", "verdict", "scores", "feedback")
        private = any(c.names(field) for c in self.context for field in read)
        if private and not self.needs:
            raise ValueError(
                "a context that names sibling, verdict, scores or feedback reads other scorers: set `needs`, the first "
                "of which says what is right"
            )
        if self.needs and not private:
            raise ValueError("`needs` has no effect: no context names sibling, verdict, scores or feedback; remove it")
        judged = any(c.names(field) for c in self.context for field in ("sibling", "verdict"))
        if self.threshold != 1.0 and not judged:
            raise ValueError("`threshold` has no effect: no context names sibling or verdict; remove it")
        if bool(self.references) != any(c.names("reference") for c in self.context):
            raise ValueError("`references` and a context that names `{reference}` go together: set both, or neither")
        if any(not c.needs_others for c in self.context[:-1]):
            raise ValueError(
                "a context without sibling, feedback or reference is always used, so it stands last in the list"
            )
        if isinstance(self.model, LiveModel):
            if not self.context:
                raise ValueError("a live teacher's context is all that is stored, and there is none: give `context`")
            asked = (("entropy", not self.entropy), ("top_k", self.top_k > 0), ("temperature", self.temperature != 1.0))
            idle = [name for name, given in asked if given]
            if idle:
                raise ValueError(f"{', '.join(idle)} have no effect: a live teacher speaks in the trainer; remove them")
        limits = ["`overlong: cut`"] if self.overlong == "cut" else []
        limits += ["`context_tokens`"] if self.context_tokens is not None else []
        if limits and not self.context:
            raise ValueError(
                f"{' and '.join(limits)} has no effect on the policy's own prompt; give a context, or remove it"
            )
        return self


Scorer = Annotated[
    ExactScorer
    | ReasoningGymScorer
    | MathVerifyScorer
    | LengthScorer
    | FormatScorer
    | PythonScorer
    | ProgramScorer
    | RewardModelScorer
    | DiscriminatorScorer
    | JudgeScorer
    | TeacherScorer,
    Field(discriminator="kind"),
]


MODEL_SCORERS = ("reward_model", "discriminator", "teacher")
"""Kinds of scorers that run a model: theirs are the score jobs that take a GPU where there is one."""


SCORED_COLUMNS = frozenset(
    [
        "rollout_id",
        "round",
        "pass",
        "policy",
        "policy_round",
        "group_id",
        "prompt_id",
        "sample",
        "source",
        "finish",
        "length",
        "engine",
        "parent_id",
        "prefix_length",
        "branch_at",
        "episode_id",
        "text",
        "text_hash",
        "mean_logprob",
        "task",
        "answer",
        "meta",
        "reward",
        "reward_parts",
        "correct",
        "has_teacher",
        "age",
        "slot",
        "span",
        "advantage",
        "weight",
        "route",
        "pair_id",
        "role",
    ]
)
"""Columns of `scored` that curation SQL reads: a scorer's own column must be called otherwise."""


def _without_null(value: Any) -> Any:
    return {name: scorer for name, scorer in value.items() if scorer is not None} if isinstance(value, dict) else value


Scorers = Annotated[dict[str, Scorer], BeforeValidator(_without_null, json_schema_input_type=dict[str, Scorer | None])]


class ScoreConfig(Strict):
    """The scorers of a run and what becomes of their verdicts."""

    scorers: Scorers = {"exact": ExactScorer()}
    """Scorers by name; each name is a column of `scored`. null takes one out that a recipe has."""
    reward: dict[str, float] = {"exact": 1.0}
    """Weights of the sum that is the reward. Scorers not named here are recorded only."""
    correct: str | None = "exact"
    """The scorer that says whether a rollout is right: its reward >= threshold."""
    threshold: NonNegativeFloat = 1.0
    """Least reward of the scorer `correct` at which a rollout is right."""

    @model_validator(mode="after")
    def _names_exist(self) -> "ScoreConfig":
        for name in [*self.reward, *([] if self.correct is None else [self.correct])]:
            if name not in self.scorers:
                raise ValueError(
                    f"score names scorer {name!r}, which is not in score.scorers ({', '.join(self.scorers)})"
                )
        if self.correct is not None and self.scorers[self.correct].kind == "teacher":
            raise ValueError(
                f"score.correct: {self.correct!r} is a teacher, whose log-probs say of nothing that it is right"
            )
        if self.correct is not None and self.scorers[self.correct].kind == "discriminator":
            raise ValueError(
                f"score.correct: {self.correct!r} is a discriminator, which says whose a text is and not whether it is "
                "right: name another"
            )
        if self.correct is not None and self.scorers[self.correct].needs:
            raise ValueError(
                f"score.correct: {self.correct!r} needs other scorers, and evaluation runs it alone: name another"
            )
        for name, scorer in self.scorers.items():
            if not re.fullmatch(r"[A-Za-z0-9_.]+(-[A-Za-z0-9_.]+)*", name):
                raise ValueError(f"scorer {name!r}: names are made of letters, digits, _ . and single dashes")
            if name in SCORED_COLUMNS:
                raise ValueError(f"a scorer cannot be called {name!r}, which is a column of `scored`: rename it")
            if name == LIVE_TEACHER:
                raise ValueError(f"a scorer cannot be called {name!r}, as the check of a live teacher is: rename it")
            if scorer.needs and scorer.kind not in ("python", "judge", "teacher"):
                raise ValueError(f"scorer {name!r}: `needs` has no effect on kind {scorer.kind}; remove it")
            for need in scorer.needs:
                if need not in self.scorers or need == name:
                    raise ValueError(f"scorer {name!r} needs {need!r}, which is not another scorer of this run")
            if isinstance(scorer, TeacherScorer) and any(c.names("feedback") for c in scorer.context):
                needed = [self.scorers[need] for need in scorer.needs]
                if not any(isinstance(need, PythonScorer) and need.feedback for need in needed):
                    raise ValueError(
                        f"scorer {name!r}: a context names feedback, and no scorer that it needs writes any: name in "
                        "`needs` one of kind python with `feedback: true`"
                    )
            self._check_order([name])
        return self

    def _check_order(self, chain: list[str]) -> None:
        for need in self.scorers[chain[-1]].needs:
            if need in chain:
                raise ValueError(f"scorers need each other in a circle: {' -> '.join([*chain, need])}")
            self._check_order([*chain, need])


def same_scorer(mine: ScoreConfig, theirs: ScoreConfig, name: str) -> bool:
    """Whether two runs mean the same by a scorer, and by all that it reads."""
    own, other = mine.scorers.get(name), theirs.scorers.get(name)
    if own is None or other is None or unchecked(own) != unchecked(other):
        return False
    return all(same_scorer(mine, theirs, need) for need in own.needs)


def unchecked(scorer: Scorer) -> Scorer:
    """The scorer as far as its verdicts go: how a teacher is checked is no part of them."""
    return scorer.model_copy(update={"check": TeacherCheck()}) if isinstance(scorer, TeacherScorer) else scorer
