"""The plan of a run as its run.json tells it, without the config: which files it writes, in the order of its stages."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rollway.config.base import ConfigError
from rollway.config.experiment import Experiment, RunConfig
from rollway.config.recipes import Recipe, parse
from rollway.runtime.plan import Plan
from rollway.runtime.specs import RunInfo


class Untold(ConfigError):
    """The run.json of `run`, which may be one that the asked one forks, is missing or is not what `describe` writes."""

    def __init__(self, run: str, why: str) -> None:
        super().__init__(why)
        self.run = run


class Told(Experiment):
    """Runs that are whole by themselves: their recipe is what run.json says, whatever its file says today."""

    taught: frozenset[str] = frozenset()
    """Those whose warm-up has `sft`."""

    def _resolve(self, name: str) -> RunConfig:
        return parse(RunConfig, self.runs[name], f"run.json of {name}")

    def _merged(self, name: str) -> dict[str, Any]:
        return self.runs[name]


def plan_of(results: Path, run: str, infos: Mapping[str, Mapping[str, Any]]) -> Plan:
    """The plan of a run and of those that it forks. infos: run -> content of run.json.

    Raises Untold.
    """
    runs: dict[str, dict[str, Any]] = {}
    taught: set[str] = set()
    at: str | None = run
    while at is not None:
        info, config = _read(at, infos)
        if info.name in runs:
            raise Untold(at, f"{run} forks in a circle")
        runs[info.name] = {**config, "seeds": [info.seed]}
        at = info.parent
        taught |= {info.name} if info.warmup_sft else set()
    plan = Plan(Told(results=str(results), tasks={}, warmups={}, runs=runs, taught=frozenset(taught)))
    for name in runs:
        told = f"{name}-s{info.seed}"
        try:
            for start in (0, *(step.from_round for step in plan.experiment.resolved[name].schedule)):
                plan.experiment.settings(name, start)
            for key in ("task", "warmup", "rounds"):
                if infos[told][key] != getattr(plan.experiment.resolved[name], key):
                    raise Untold(told, f"its {key} is not that of its config")
        except ConfigError as error:
            raise Untold(told, str(error)) from None
    return plan


def _read(run: str, infos: Mapping[str, Mapping[str, Any]]) -> tuple[RunInfo, dict[str, Any]]:
    """What it says of the run, and the run's config."""
    if run not in infos:
        raise Untold(run, "missing, and the run is forked")
    told = {key: value for key, value in infos[run].items() if key in RunInfo.model_fields}
    config = infos[run].get("config")
    try:
        info = parse(RunInfo, told, "is not what describe writes")
    except ConfigError as error:
        raise Untold(run, str(error)) from None
    if not isinstance(config, dict):
        raise Untold(run, "is not what describe writes: `config` is missing or no mapping")
    if f"{info.name}-s{info.seed}" != run:
        raise Untold(run, f"is that of {info.name}-s{info.seed}")
    fork = config.get("fork") or {}
    if not isinstance(fork, dict):
        raise Untold(run, "is not what describe writes: `config.fork` is no mapping")
    if info.parent != (f"{fork.get('run')}-s{info.seed}" if fork else None):
        raise Untold(run, "its parent is not the run that its config forks")
    if fork and (info.fork_round, info.fork_stage or "score") != (fork.get("round"), fork.get("stage", "score")):
        raise Untold(run, "it is not forked where its config says")
    return info, config


def files(plan: Plan, run: str) -> Iterator[tuple[Path, str]]:
    """Every file that the run needs or writes, with its stage, in the order in which stages can write them.

    Raises RollwayError where SQL that decides it cannot be read.
    """
    config = plan.config_of(run)
    yield from ((Path(plan.prompts_path(run, split)), "prepare") for split in ("train", "heldout"))
    warmup = Path(plan.warmup_path(run))
    yield warmup, "warmup"
    if isinstance(plan.experiment, Told) and run.rpartition("-s")[0] in plan.experiment.taught:
        yield warmup.with_name("metrics.json"), "warmup"
    evaluated, more = set(plan.evaluated_rounds(run)), {Path(path) for path in plan.lm_evals.paths(run)}
    checks = {Path(path) for path in plan.teachers.checks(run)}
    taught = {Path(path) for path in plan.discriminators.metrics(run)}
    for round in range(config.rounds + 1):
        folder = Path(plan.folder(run, round))
        if round in evaluated:
            evals = Path(plan.eval_path(run, round))
            yield from ((evals.with_suffix(suffix), "evaluate") for suffix in (".parquet", ".json"))
        if (figures := folder / "lm_eval.json") in more:
            yield figures, "lm_eval"
            yield folder / "lm_eval_results.json", "lm_eval"
        if round < config.rounds:
            yield from _of_round(plan, run, round, plan.recipe(run, round))
            for path in sorted(path for path in taught if path.parent == folder):
                yield path, "discriminator"
            for path in sorted(path for path in checks if path.parent == folder):
                yield path, "check_teacher"
                yield path.with_suffix(".parquet"), "check_teacher"
            curated = Path(plan.folder(plan.home(run, round, "curate"), round))
            yield from ((curated / name, "curate") for name in ("batch.parquet", "curate.json"))
            after = Path(plan.policy_path(run, round + 1))
            yield from ((path, "train") for path in (after, after.with_name("metrics.json")))


def _of_round(plan: Plan, run: str, round: int, recipe: Recipe) -> Iterator[tuple[Path, str]]:
    trained = [scorer.trained for scorer in recipe.score.scorers.values() if scorer.kind == "reward_model"]
    for name in sorted({name for name in trained if name is not None}):
        folder = Path(plan.reward_models.path(name)).parent
        yield from ((folder / file, "reward_model") for file in ("reward_model.json", "metrics.json"))
    for p in plan.passes(run, round):
        yield from ((Path(path), "rollout") for path in plan.rollout_paths(run, round, p))
        for name in recipe.score.scorers:
            yield from ((Path(path), "discriminator") for path in plan.discriminators.applied_by(run, round, name))
            yield from ((Path(path), "score") for path in plan.score_paths(run, round, p, name))
