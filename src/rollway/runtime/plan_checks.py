"""What only the whole plan shows to be wrong: refused before any job runs, with the mend."""

from pathlib import Path

from rollway.config.checks import check_carried
from rollway.errors import RollwayError
from rollway.runtime.plan import Plan
from rollway.runtime.plan_circles import check_circles
from rollway.runtime.plan_reused import check_reused


def check(plan: Plan) -> None:
    """SQL files, their parameters and columns, scorer files, demonstrations, reused rollouts, pairs of reward models,
    circles.

    Raises RollwayError naming the run or the reward model.
    """
    seen: set[str] = set()
    for name, run in plan.experiment.resolved.items():
        for start in (0, *(step.from_round for step in run.schedule)):
            _check_sql(plan, name, start, seen)
            _check_scorers(plan, name, start)
            _check_demonstrations(plan, name, start)
    for run_id in plan.runs:
        check_reused(plan, run_id)
        _check_state(plan, run_id)
        _check_stored_files(plan, run_id)
    plan.reward_models.check()
    check_circles(plan)


def _check_sql(plan: Plan, name: str, start: int, seen: set[str]) -> None:
    """`seen`: methods that have been tried already; runs share them."""
    from rollway import curation
    from rollway.curation import parents

    recipe = plan.settings(name, start)
    method = f"{recipe.curate.model_dump_json()} {' '.join(recipe.score.scorers)} {recipe.train.model_dump_json()}"
    method += " ".join(derive.parents.model_dump_json() for derive in recipe.rollout.derive)
    if method in seen:
        return
    seen.add(method)
    given = curation.given_values(recipe.curate, round=start, seed=0)
    try:
        curation.check_method(recipe, given)
        for derive in recipe.rollout.derive:
            parents.check(recipe.score, recipe.curate.reward, derive, given)
    except RollwayError as error:
        raise RollwayError(f"runs.{name}: {error}") from None


def _check_scorers(plan: Plan, name: str, start: int) -> None:
    score = plan.settings(name, start).score
    if score.correct is None:
        raise RollwayError(f"runs.{name}.score.correct: evaluation needs the scorer that says what is right; name one")
    for key, scorer in score.scorers.items():
        if scorer.kind == "python" and ".py:" in scorer.function:
            file = Path(scorer.function.rsplit(":", 1)[0])
            if not file.is_file():
                raise RollwayError(f"runs.{name}.score.scorers.{key}.function: {file}: no such file")
        for reference in scorer.references if scorer.kind == "teacher" else []:
            if reference not in plan.made_rollouts and not Path(reference).is_file():
                raise RollwayError(
                    f"runs.{name}.score.scorers.{key}.references: {reference}: no such file, and no run of this config "
                    "makes it; `rollway import` makes one of other formats"
                )


def _check_demonstrations(plan: Plan, name: str, start: int) -> None:
    """Experts' solutions come from the task."""
    key = plan.experiment.resolved[name].task
    task = plan.experiment.tasks[key]
    if plan.settings(name, start).rollout.experts and task.demonstration is None and task.answer is None:
        raise RollwayError(
            f"runs.{name}.rollout.experts: task {key} has neither demonstrations nor answers; set "
            f"tasks.{key}.demonstration, or leave experts out"
        )


def _check_state(plan: Plan, run: str) -> None:
    """What the rounds before leave in the checkpoint must fit the objective that goes on from it."""
    fork = plan.config_of(run).fork
    for r in range(1 if fork is None else max(1, fork.first), plan.config_of(run).rounds):
        if fork is not None and fork.begins_anew(r):
            continue
        before = plan.recipe(plan.home(run, r - 1, "train"), r - 1)
        try:
            check_carried(before.train.objective, plan.recipe(run, r).train.objective)
        except ValueError as error:
            raise RollwayError(f"runs.{plan.runs[run][0]}: round {r}: {error}") from None


def _check_stored_files(plan: Plan, run: str) -> None:
    """Files of stored completions are there, or some run of the config makes them before they are read."""
    config, name = plan.config_of(run), plan.runs[run][0]
    own = [r for r in range(config.rounds) if plan.home(run, r, "rollout") == run]
    starts = [r for r in own if r == own[0] or any(step.from_round == r for step in config.schedule)]
    if config.lag and starts and all(plan.stored_files(run, r) for r in starts):
        raise RollwayError(f"runs.{name}.lag: has no effect on stored completions, no policy samples them; remove it")
    for r in starts:
        files = plan.stored_files(run, r)
        for file in files:
            if files.count(file) > 1:
                raise RollwayError(f"runs.{name}.rollout.engine.files: names {file} twice; once is enough")
            where = f"runs.{name}.rollout.engine.files: {file}"
            if file not in plan.made_rollouts and not Path(file).exists():
                raise RollwayError(
                    f"{where}: no such file, and no run of this config makes it; `rollway import` makes one of other "
                    f"frameworks' files; another run's are {plan.results}/RUN-s{{seed}}/r0000/p0/rollouts-000.parquet"
                )
