"""Scorers: what judges a rollout, and how their verdicts make the reward."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, FiniteFloat, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rollway.config.base import Strict
from rollway.config.tasks import Extract, Pattern
from rollway.config.teachers import LiveModel, TeacherContext, TeacherModel


class ScorerBase(Strict):
    needs: list[str] = []
    """Scorers whose rewards this one reads, as `scores` (python, judge and teacher only)."""
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
    """The dataset's own verifier (partial credit included)."""

    kind: Literal["reasoning_gym"] = "reasoning_gym"
    extract: Extract = "none"
    """How the answer is taken from the completion: none, hash, boxed, last_number, or regex:PATTERN."""


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
    """Share of programs, drawn by hash, that are run a second time. Where the two rewards differ the lower one counts,
    and the component `unstable` is 1."""
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

    @model_validator(mode="after")
    def _range(self) -> "JudgeScorer":
        if self.low >= self.high:
            raise ValueError(f"low {self.low} must lie below high {self.high}")
        return self


class TeacherScorer(ScorerBase):
    """A language model's log-probs of the completion's own tokens, stored token by token; the reward is their mean.

    It reads the same tokens as the policy wrote, so it needs the policy's tokenizer and vocabulary.
    """

    kind: Literal["teacher"] = "teacher"
    model: TeacherModel
    """Whose log-probs."""
    context: list[TeacherContext] = []
    """What it reads before the completion: the first of these whose `sibling` and `reference` there are; without any,
    the rollout has no teacher. Empty: the policy's own prompt, token by token."""
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
    """Divides the logits of all that is stored; `distill` with estimate sampled compares at that of the rollouts."""
    overlong: Literal["error", "cut"] = "error"
    """Where context and completion exceed the model's window: error: the row fails; cut: the context's first tokens go,
    the BOS token apart (component `cut` counts them)."""
    micro_tokens: PositiveInt = 16384
    """Most tokens (padding included) in one forward; the result does not depend on it."""

    @model_validator(mode="after")
    def _parts_agree(self) -> "TeacherScorer":
        private = any(c.names(field) for c in self.context for field in ("sibling", "verdict", "scores"))
        if private and not self.needs:
            raise ValueError(
                "a context that names sibling, verdict or scores reads other scorers: set `needs`, the first of which "
                "says what is right"
            )
        if self.needs and not private:
            raise ValueError("`needs` has no effect: no context names sibling, verdict or scores; remove it")
        judged = any(c.names(field) for c in self.context for field in ("sibling", "verdict"))
        if self.threshold != 1.0 and not judged:
            raise ValueError("`threshold` has no effect: no context names sibling or verdict; remove it")
        if bool(self.references) != any(c.names("reference") for c in self.context):
            raise ValueError("`references` and a context that names `{reference}` go together: set both, or neither")
        if any(not c.needs_others for c in self.context[:-1]):
            raise ValueError("a context without sibling or reference is always used, so it stands last in the list")
        if isinstance(self.model, LiveModel):
            if not self.context:
                raise ValueError("a live teacher's context is all that is stored, and there is none: give `context`")
            idle = [name for name in ("entropy", "top_k", "temperature") if name in self.model_fields_set]
            if idle:
                raise ValueError(f"{', '.join(idle)} have no effect: a live teacher speaks in the trainer; remove them")
        if self.overlong == "cut" and not self.context:
            raise ValueError("`overlong: cut` has no effect on the policy's own prompt; give a context, or remove it")
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
    | JudgeScorer
    | TeacherScorer,
    Field(discriminator="kind"),
]


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
        "age",
        "slot",
        "advantage",
        "weight",
        "route",
        "pair_id",
        "role",
    ]
)
"""Columns of `scored` that curation SQL reads: a scorer's own column must be called otherwise."""


class ScoreConfig(Strict):
    """The scorers of a run and what becomes of their verdicts."""

    scorers: dict[str, Scorer] = {"exact": ExactScorer()}
    """Scorers by name; each name is a column of `scored`."""
    reward: dict[str, float] = {"exact": 1.0}
    """Weights of the sum that is the reward. Scorers not named here are recorded only."""
    correct: str | None = "exact"
    """The scorer that says whether a rollout is right: its reward >= threshold."""
    threshold: NonNegativeFloat = 1.0
    """Least reward of the scorer `correct` at which a rollout is right."""

    @model_validator(mode="after")
    def _names_exist(self) -> "ScoreConfig":
        for name in [*self.reward, *([self.correct] if self.correct else [])]:
            if name not in self.scorers:
                raise ValueError(
                    f"score names scorer {name!r}, which is not in score.scorers ({', '.join(self.scorers)})"
                )
        if self.correct is not None and self.scorers[self.correct].kind == "teacher":
            raise ValueError(
                f"score.correct: {self.correct!r} is a teacher, whose log-probs say of nothing that it is right"
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
            if scorer.needs and scorer.kind not in ("python", "judge", "teacher"):
                raise ValueError(f"scorer {name!r}: `needs` has no effect on kind {scorer.kind}; remove it")
            for need in scorer.needs:
                if need not in self.scorers or need == name:
                    raise ValueError(f"scorer {name!r} needs {need!r}, which is not another scorer of this run")
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
    if own is None or own != other:
        return False
    return all(same_scorer(mine, theirs, need) for need in own.needs)
