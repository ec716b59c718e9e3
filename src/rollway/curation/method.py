"""What only SQL and training side by side show of a method: steps that nothing reads, values that nothing makes."""

from collections.abc import Mapping

from rollway.config.recipes import Recipe
from rollway.curation.curate import plan, scorers_read
from rollway.curation.dry_run import dry_run
from rollway.curation.sql_file import Value
from rollway.curation.steps import Step
from rollway.errors import RollwayError
from rollway.store.tables import SPAN

_MADE = {"reward": ("reward",), "advantage": ("advantage", "token_advantage"), "route": ("route",)}
"""Columns of the steps that only make columns; weights always weigh, and the other steps choose rows."""


def check_method(recipe: Recipe, given: Mapping[str, Value] | None = None) -> None:
    """Tries the SQL on no rows, and holds what it makes against what later steps and training read.

    Raises RollwayError that names the key or the SQL file, and the mend.
    """
    curate, train = recipe.curate, recipe.train
    todo = plan(curate, given)
    _check_replay(todo, curate.replay)
    made = dry_run(curate, scorers_read(recipe.score, curate, given), given, derived=bool(recipe.rollout.derive))
    for step, columns in _MADE.items():
        if getattr(curate, step) is not None and not _is_read(step, columns, todo, train.reads()):
            raise RollwayError(
                f"curate.{step}: has no effect, since neither the objective nor a later SQL file reads the "
                f"{step}; remove it, for example with `curate: {{{step}: null}}`"
            )
    if curate.pair is not None and not _is_read("pair", ("pair_id", "role"), todo, train.reads()):
        raise RollwayError(
            "curate.pair: the objective compares no pairs, so it would only drop rows: choose rows with curate.filter "
            "or curate.select, or set train.objective.preference"
        )
    if "advantage" in train.reads() and "advantage" not in made:
        raise RollwayError(
            "curate.advantage: the objective needs an advantage, and nothing makes one: set curate.advantage, for "
            "example {sql: grpo}, or a train.advantage that is made of the rewards (returns, gae, leave_one_out)"
        )
    if SPAN in made and (curate.teacher is not None or train.objective.distill is not None):
        raise RollwayError(
            "curate.weight or select returns span, which trains rows from their prefix on, and no teacher says "
            "anything of a prefix: take span out of the SQL, or train.objective.distill and curate.teacher out of the "
            "recipe"
        )
    ratio = train.objective.ratio
    if "token_advantage" in made and "advantage" in train.reads() and ratio is not None and ratio.kind == "sequence":
        raise RollwayError(
            "curate.advantage: makes one advantage per token, and ratio sequence takes one per row: set "
            "`ratio: sequence_token`, or return no token_advantage"
        )


def _check_replay(todo: list[Step], replay: int) -> None:
    for step in todo:
        reach = step.file.reach
        oldest = None if reach is None else step.values[reach]
        if isinstance(oldest, int) and oldest > replay:
            raise RollwayError(
                f"curate.replay: shows {replay} earlier rounds, and {step.file.path} draws from {oldest} "
                f"(curate.{step.file.step}.{reach}): set `replay: {oldest}`, or take curate.{step.file.step} out"
            )


def _is_read(step: str, columns: tuple[str, ...], todo: list[Step], trained: frozenset[str]) -> bool:
    names = [s.file.step for s in todo]
    later = todo[names.index(step) + 1 :]
    return not trained.isdisjoint(columns) or any(s.file.reads(*columns) for s in later)
