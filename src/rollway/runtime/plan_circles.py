"""Files that would be made of themselves: through rollouts taken from other runs, or through reward models."""

import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from rollway.config.reward_models import RunPairs
from rollway.errors import RollwayError

if TYPE_CHECKING:
    from rollway.runtime.plan import Plan

_ROLLOUTS = r"(?P<run>[^/]+)/r(?P<round>\d{4})/p(?P<p>\d)/rollouts-(?P<shard>\d{3})\.parquet"
_SCORES = r"(?P<run>[^/]+)/r(?P<round>\d{4})/p(?P<p>\d)/scores/(?P<scorer>.+)-(?P<shard>\d{3})\.parquet"
_BATCH = r"(?P<run>[^/]+)/r(?P<round>\d{4})/batch\.parquet"
_POLICY = r"(?P<run>[^/]+)/r(?P<next>\d{4})/policy\.json"
_DISCRIMINATOR = r"(?P<run>[^/]+)/r(?P<round>\d{4})/discriminators/(?P<scorer>.+)/reward_model\.json"
_MODEL = r"reward_models/(?P<reward_model>[^/]+)/reward_model\.json"


def check_circles(plan: "Plan") -> None:
    """Follows the files that the rules read, as Snakemake will. Raises RollwayError naming the circle and the mend.

    Only reward models, stored completions and teachers' references can close a circle: all else is ordered by rounds.
    """
    models = [n for n, model in plan.reward_models.configs.items() if isinstance(model.pairs, RunPairs)]
    starts = [plan.reward_models.path(name) for name in models]
    for run in plan.runs:
        for r in range(plan.config_of(run).rounds):
            if plan.home(run, r, "rollout") == run and plan.stored_files(run, r):
                starts += plan.rollout_paths(run, r, 0)[:1]
            for name, scorer in plan.recipe(run, r).score.scorers.items():
                if scorer.kind in ("teacher", "discriminator") and scorer.references:
                    starts += plan.score_paths(run, r, 0, name)[:1]
    done: set[str] = set()
    for start in starts:
        _search(plan, start, done)


def _search(plan: "Plan", start: str, done: set[str]) -> None:
    """Depth first, without recursion: chains are as long as runs have rounds."""
    if start in done:
        return
    chain, waiting = {start: None}, [_read(plan, start)]
    while waiting:
        file = next(waiting[-1], None)
        if file is None:
            waiting.pop()
            done.add(chain.popitem()[0])
        elif file in chain:
            files = list(chain)
            raise RollwayError(_sentence(plan, files[files.index(file) :]))
        elif file not in done:
            chain[file] = None
            waiting.append(_read(plan, file))


def _read(plan: "Plan", file: str) -> Iterator[str]:
    """The files of this config's rounds and reward models that the rule which makes `file` reads."""
    where = file.removeprefix(f"{plan.results}/")
    models = plan.reward_models
    if w := _wildcards(_ROLLOUTS, where):
        stored = [path for path in plan.stored_rollouts(w) if path in plan.made_rollouts]
        read = [plan.rollout_policy(w), *plan.earlier_rollouts(w), *plan.earlier_scores(w), *stored]
        read += plan.derived.author(w)
    elif w := _wildcards(_SCORES, where):
        models_read = [*plan.scoring_reward_model(w), *plan.teachers.policies(w)]
        models_read += [path for path in plan.scorer_files(w) if path in plan.made_rollouts]
        read = [plan.scored_rollouts(w), *plan.needed_scores(w), *models_read]
    elif w := _wildcards(_BATCH, where):
        read = [*plan.batch_rollouts(w), *plan.batch_scores(w)]
    elif w := _wildcards(_POLICY, where):
        read = [plan.batch(w), *plan.trained_rollouts(w), plan.train_policy(w)]
    elif w := _wildcards(_DISCRIMINATOR, where):
        told = [path for path in plan.discriminators.references(w) if path in plan.made_rollouts]
        read = [*plan.discriminators.rollouts(w), *told, *plan.discriminators.previous(w)]
    elif w := _wildcards(_MODEL, where):
        read = [*models.rollouts(w), *models.scores(w)]
    else:
        read = []  # a warm-up's policy
    # The shards of a pass read alike: one stands for all.
    return iter(dict.fromkeys(re.sub(r"-\d{3}\.parquet$", "-000.parquet", path) for path in read))


def _wildcards(pattern: str, where: str) -> Any:
    found = re.fullmatch(pattern, where)
    return SimpleNamespace(**found.groupdict()) if found else None


def _sentence(plan: "Plan", circle: list[str]) -> str:
    """`circle`: each file is made of the next, the last one of the first."""
    found = [i for i, file in enumerate(circle) if _model(plan, file)]
    if found:
        circle = circle[found[0] :] + circle[: found[0]]
        models = [name for file in circle if (name := _model(plan, file))]
        shown = _shown(plan, circle)
        return (
            f"reward_models.{models[-1]}.pairs: its pairs wait for scores of {models[0]}, which waits for them "
            f"({shown}): pair rollouts of rounds before that model is used, and rank them by other scorers "
            "(`pairs.reward`, `score.correct`)"
        )
    found = [i for i, file in enumerate(circle) if _stored(plan, file)]
    if not found:
        scores = next(file for file in circle if "/scores/" in file)
        return (
            f"{scores}: its teacher's references would be made of it ({' -> '.join([*circle, circle[0]])}); take "
            "completions that do not come from it: those of another run, or of earlier rounds"
        )
    circle = circle[found[0] :] + circle[: found[0]]
    run = plan.runs[circle[0].removeprefix(f"{plan.results}/").split("/")[0]][0]
    return (
        f"runs.{run}.rollout.engine.files: {circle[0]} would be made of itself ({_shown(plan, circle)}); take "
        "completions that do not come from it: those of another run, or of earlier rounds"
    )


def _shown(plan: "Plan", circle: list[str]) -> str:
    """The circle's reward models and stored completions, which say how it can be cut."""
    names = [
        _model(plan, file) or file.removeprefix(f"{plan.results}/").split("/p")[0]
        for file in circle
        if _model(plan, file) or _stored(plan, file)
    ]
    return " -> ".join([*names, names[0]])


def _model(plan: "Plan", file: str) -> str | None:
    found = _wildcards(_MODEL, file.removeprefix(f"{plan.results}/"))
    return found.reward_model if found else None


def _stored(plan: "Plan", file: str) -> bool:
    w = _wildcards(_ROLLOUTS, file.removeprefix(f"{plan.results}/"))
    return bool(w and plan.stored_rollouts(w))
