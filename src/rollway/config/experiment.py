"""A whole experiment: tasks, warm-ups and runs. This is what `config/config.yaml` holds."""

import re
from functools import cached_property
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from rollway.config.base import ConfigError, Strict, as_given, deep_merge
from rollway.config.contexts import TeacherContext
from rollway.config.derived_checks import check_phases, gives_verdicts
from rollway.config.lm_eval import LmEvalConfig
from rollway.config.policies import WarmupConfig
from rollway.config.recipes import Recipe, parse, recipe_mapping
from rollway.config.reward_models import RewardModelConfig, check_reward_models
from rollway.config.secrets import refuse_secrets
from rollway.config.tasks import TaskConfig
from rollway.config.teachers import check_teachers

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.]*(-[A-Za-z0-9_.]+)*")
STAGES = ("rollout", "score", "curate", "train")


class Fork(Strict):
    """Reuse another run's files up to and including one stage of one round."""

    run: str
    """Key in `runs` (the same seed is taken)."""
    round: NonNegativeInt
    """The last round that is reused, in whole or in part (from 0)."""
    stage: Literal["rollout", "score", "curate", "train"] = "score"
    """The last stage of that round that is reused; the later ones are this run's own."""
    optimizer: Literal["carried", "fresh"] = Field("carried", exclude_if=lambda value: value == "carried")
    """What this run's first update starts from: all that training carried beside the weights of the policy that it
    takes up, or fresh: nothing of it, as after a warm-up. Fresh are the moments of policy and critic, the objective's
    dual variables, last entropy and moments, the losses that `train.guard` compares with, and the counts of updates
    and shuffles, so that the metrics' `step`, the schedule of the learning rate, `train.objective_horizon` and
    `train.critic.warmup_updates` begin anew. Weights stay: those of the critic and of the average (`train.ema`) too."""

    @property
    def first(self) -> int:
        """The first round that the fork trains itself."""
        return self.round + (self.stage == "train")

    def begins_anew(self, round: int) -> bool:
        """Whether training in `round` leaves the optimiser of the policy before it behind."""
        return self.optimizer == "fresh" and round == self.first


class Keep(Strict):
    """Which rounds' weights and state `rollway prune` leaves in place (round 0, the warm-up's, always stays)."""

    last: PositiveInt = 2
    """How many of the latest rounds."""
    every: PositiveInt | None = None
    """Also every round whose number is a multiple of this; None: no such rounds."""
    best: bool = True
    """Also the round with the highest held-out pass@1."""


class EvaluateConfig(Strict):
    """Held-out evaluation."""

    every: PositiveInt = 1
    """Rounds between evaluations; the first and the last round are always evaluated."""
    samples: PositiveInt = 4
    """Completions per prompt (n)."""
    prompts: PositiveInt | None = None
    """None: all held-out prompts."""
    temperature: float = Field(1.0, ge=0.0)
    """Temperature of the samples; 0 is greedy."""
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    """Smallest share of probability that samples are drawn from; 1.0: off."""
    top_k: NonNegativeInt = 0
    """Number of likeliest tokens that samples are drawn from; 0: off."""
    k: list[PositiveInt] = [1, 4]
    """The k of pass@k and maj@k; none may exceed `samples`. Three or more also give `pass_auc`, the log-log area."""
    bootstrap: PositiveInt = 1000
    """Resamples (over prompts) behind each interval."""
    confidence: float = Field(0.95, gt=0.0, lt=1.0)
    """Coverage of each interval."""
    revise: TeacherContext | None = Field(None, exclude_if=lambda value: value is None)
    """Every sample is answered once more behind this context, made of the sample, and judged again: figures
    `revised/...`, columns `revised_...`. None: it is not."""

    def rounds(self, last: int) -> list[int]:
        """Rounds whose policies are evaluated, of a run whose last policy is that of round `last`."""
        return sorted({*range(0, last + 1, self.every), last})

    @model_validator(mode="after")
    def _revisions_read_what_there_is(self) -> "EvaluateConfig":
        for field in ("sibling", "reference", "feedback", "scores"):
            if self.revise is not None and self.revise.names(field):
                raise ValueError(
                    f"evaluate.revise names `{{{field}}}`, which held-out samples do not have; name prompt, "
                    "completion, answer, meta or verdict"
                )
        return self

    @model_validator(mode="after")
    def _k_at_most_n(self) -> "EvaluateConfig":
        if max(self.k) > self.samples:
            raise ValueError(
                f"evaluate.k asks for pass@{max(self.k)} of {self.samples} samples: raise evaluate.samples"
            )
        return self


class ScheduleStep(Strict):
    """Settings that change from a round on; earlier rounds are left alone."""

    from_round: PositiveInt = Field(alias="from")
    """First round with these settings."""
    rollout: dict[str, Any] = {}
    """Keys of `rollout` that change."""
    score: dict[str, Any] = {}
    """Keys of `score` that change."""
    curate: dict[str, Any] = {}
    """Keys of `curate` that change."""
    train: dict[str, Any] = {}
    """Keys of `train` that change."""


class RunConfig(Recipe):
    """A run: a recipe on a task from a warm-up. All seeds of it share these settings."""

    recipe: str
    """The method: a name in `config/recipes/`, or the path of a `.yaml` file of your own."""
    task: str
    """Key in `tasks`."""
    warmup: str
    """Key in `warmups`: the policy of round 0."""
    seeds: list[NonNegativeInt] = [0]
    """The run is made once per seed, in `<run>-s<seed>`."""
    rounds: int = Field(1, ge=1, le=9999)
    """Rounds of rollout, score, curate and train."""
    lag: Literal[0, 1] = 0
    """1: rollouts of round r come from policy r-1, so that generation and training can overlap."""
    schedule: list[ScheduleStep] = []
    """Changes of settings on the way, in the order of their rounds."""
    fork: Fork | None = None
    """Start from another run's files; None: from the warm-up."""
    keep: Keep = Keep()
    """What `rollway prune` leaves in place."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """When and how the policy is measured on held-out prompts."""
    lm_eval: LmEvalConfig | None = Field(None, exclude_if=lambda value: value is None)
    """lm-eval on the policy besides; None: not run."""


class MlflowConfig(Strict):
    """Where `track` projects the metrics."""

    uri: str = "sqlite:///mlflow.db"
    """Tracking URI; a relative sqlite path lies in the working folder. Where it is left at this default the environment
    variable MLFLOW_TRACKING_URI goes before it; user and token of a server are read from the environment only."""
    traces: NonNegativeInt = 4
    """Rollouts of the last round shown as traces: the best and the worst half by reward."""
    usage: bool = False
    """Also log seconds and peak memory of every stage; they differ from one execution to the next."""
    enabled: bool = True
    """False: no run is tracked."""


class Experiment(Strict):
    """Everything that one `snakemake` call runs."""

    project: str = "rollway"
    """Name of the MLflow experiment and of the report."""
    results: str = "results"
    """Folder of all outputs."""
    tasks: dict[str, TaskConfig]
    """Tasks by name."""
    warmups: dict[str, WarmupConfig]
    """Starting policies by name."""
    defaults: dict[str, Any] = {}
    """Settings merged under every run (and over its recipe)."""
    runs: dict[str, dict[str, Any]]
    """Runs by name; what a run does not set comes from `defaults`, then from its recipe."""
    reward_models: dict[str, RewardModelConfig] = {}
    """Reward models by name, trained where a scorer names one (`trained`), or as targets of their own."""
    mlflow: MlflowConfig = MlflowConfig()
    """Where the metrics of runs are tracked."""

    @cached_property
    def resolved(self) -> dict[str, RunConfig]:
        """Every run with recipe, defaults and its own settings merged and validated."""
        return {name: self._resolve(name) for name in self.runs}

    def _resolve(self, name: str) -> RunConfig:
        own = deep_merge(self.defaults, self.runs[name])
        if "recipe" not in own:
            raise ConfigError(f"runs.{name}: has no `recipe`; name one of config/recipes")
        if "extends" in own:
            raise ConfigError(
                f"runs.{name}.extends: has no effect in a run; name the recipe, or write a recipe that extends it"
            )
        return parse(RunConfig, self._merged(name), f"runs.{name}")

    def _merged(self, name: str) -> dict[str, Any]:
        own = deep_merge(self.defaults, self.runs[name])
        return deep_merge(recipe_mapping(str(own["recipe"])), own)

    def settings(self, name: str, round: int) -> Recipe:
        """The run's recipe as it stands in `round`, schedule applied."""
        run = self.resolved[name]
        mapping = {key: value for key, value in self._merged(name).items() if key in Recipe.model_fields}
        for step in run.schedule:
            if step.from_round <= round:
                mapping = deep_merge(mapping, {k: v for k, v in as_given(step).items() if k != "from"})
        return parse(Recipe, mapping, f"runs.{name} (schedule, round {round})")


def load_experiment(mapping: dict[str, Any]) -> Experiment:
    """Validates a whole config: keys, types, names that point at each other, every schedule step.

    Raises ConfigError with one sentence per mistake.
    """
    refuse_secrets(mapping, "config")
    experiment = parse(Experiment, mapping, "config")
    names = {
        "tasks": list(experiment.tasks),
        "warmups": list(experiment.warmups),
        "runs": list(experiment.runs),
        "reward_models": list(experiment.reward_models),
    }
    for kind in names:
        for name in names[kind]:
            if not NAME.fullmatch(name):
                raise ConfigError(f"{kind}.{name}: names are made of letters, digits, _ . and single dashes")
    if not experiment.runs:
        raise ConfigError("runs: is empty; name at least one run")
    for name, warmup in experiment.warmups.items():
        _check_warmup(experiment, name, warmup)
    for name in experiment.runs:
        _check_run(experiment, name)
    check_reward_models(experiment)
    check_teachers(experiment)
    return experiment


def _check_warmup(experiment: Experiment, name: str, warmup: WarmupConfig) -> None:
    needs_text = warmup.sft is not None or (warmup.policy.kind == "scratch" and warmup.policy.tokenizer.kind == "bpe")
    if needs_text and warmup.task is None:
        raise ConfigError(f"warmups.{name}.task: name the task whose demonstrations are learnt")
    if not needs_text and warmup.task is not None:
        raise ConfigError(f"warmups.{name}.task: has no effect without `sft` or a bpe tokenizer; remove it")
    if warmup.task is not None and warmup.task not in experiment.tasks:
        raise ConfigError(f"warmups.{name}.task: {warmup.task!r} is not in tasks ({', '.join(experiment.tasks)})")


def _check_run(experiment: Experiment, name: str) -> None:
    run = experiment.resolved[name]
    if run.task not in experiment.tasks:
        raise ConfigError(f"runs.{name}.task: {run.task!r} is not in tasks ({', '.join(experiment.tasks)})")
    if run.warmup not in experiment.warmups:
        raise ConfigError(f"runs.{name}.warmup: {run.warmup!r} is not in warmups ({', '.join(experiment.warmups)})")
    if not run.seeds or len(set(run.seeds)) != len(run.seeds):
        raise ConfigError(f"runs.{name}.seeds: {run.seeds} is empty or repeats a seed")
    starts = [step.from_round for step in run.schedule]
    if starts != sorted(set(starts)):
        raise ConfigError(f"runs.{name}.schedule: `from` must rise from step to step, it is {starts}")
    for step in run.schedule:
        if step.from_round >= run.rounds:
            raise ConfigError(f"runs.{name}.schedule: from {step.from_round} has no effect in {run.rounds} rounds")
        experiment.settings(name, step.from_round)
    if run.fork:
        _check_fork(experiment, name, run)
    _check_phases(experiment, name, run)


def _check_fork(experiment: Experiment, name: str, run: RunConfig) -> None:
    chain = [name]
    fork = run.fork
    while fork is not None:
        if fork.run in chain:
            raise ConfigError(f"runs.{name}.fork: goes round in a circle ({' -> '.join([*chain, fork.run])})")
        if fork.run not in experiment.runs:
            raise ConfigError(f"runs.{name}.fork.run: {fork.run!r} is not in runs ({', '.join(experiment.runs)})")
        chain.append(fork.run)
        fork = experiment.resolved[fork.run].fork
    assert run.fork is not None
    parent = experiment.resolved[run.fork.run]
    missing = sorted(set(run.seeds) - set(parent.seeds))
    if missing:
        raise ConfigError(f"runs.{name}.fork: parent {run.fork.run} has no seeds {missing}")
    if run.fork.round >= parent.rounds:
        raise ConfigError(f"runs.{name}.fork.round: parent {run.fork.run} has rounds 0 to {parent.rounds - 1}")
    if run.rounds <= run.fork.round:
        raise ConfigError(f"runs.{name}.rounds: {run.rounds} ends before the fork at round {run.fork.round}; raise it")
    if run.fork.optimizer == "fresh" and run.fork.first == 0:
        raise ConfigError(f"runs.{name}.fork.optimizer: has no effect, a warm-up's policy has none; remove it")
    early = [step.from_round for step in run.schedule if step.from_round < run.fork.round]
    if early:
        raise ConfigError(f"runs.{name}.schedule: from {early[0]} has no effect before the fork at {run.fork.round}")
    for key in ("task", "warmup", "lag"):
        mine, theirs = run.model_dump()[key], parent.model_dump()[key]
        if mine != theirs:
            raise ConfigError(f"runs.{name}.{key}: {mine!r} differs from {theirs!r} of {run.fork.run}, which it forks")


def _check_phases(experiment: Experiment, name: str, run: RunConfig) -> None:
    """What is right is the same in all rounds that hand it on, those of the runs that this one forks among them."""
    for recipe, last in _segments(experiment, name, run.rounds - 1, 0 if run.fork is None else run.fork.first):
        if not gives_verdicts(recipe.score):
            continue
        for before in _rolled_out(experiment, name, last):
            try:
                check_phases(recipe.score, before)
            except ValueError as error:
                raise ConfigError(f"runs.{name}: {error}") from None


def _rolled_out(experiment: Experiment, name: str, last: int) -> list[Recipe]:
    """Settings under which rounds 0 to `last` were rolled out; those of a fork's first ones are its parent's."""
    fork = experiment.resolved[name].fork
    inherited = [] if fork is None else _rolled_out(experiment, fork.run, min(last, fork.round))
    own = _segments(experiment, name, last, 0 if fork is None else fork.round + 1)
    return inherited + [recipe for recipe, _ in own]


def _segments(experiment: Experiment, name: str, last: int, first: int) -> list[tuple[Recipe, int]]:
    """The run's own settings in rounds `first` to `last`, each with the last of these rounds that it holds in."""
    run = experiment.resolved[name]
    starts = [0, *(step.from_round for step in run.schedule if step.from_round <= last)]
    ends = [*(start - 1 for start in starts[1:]), last]
    held = [(start, end) for start, end in zip(starts, ends, strict=True) if end >= first]
    return [(experiment.settings(name, start) if start else run, end) for start, end in held]
