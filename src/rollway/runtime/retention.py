"""`keep:` and `rollway prune`: which rounds' weights may go."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from rollway.runtime.plan import Plan
from rollway.store.atomic import remove_leftovers, temporary_beside

PARTS = ("weights", "state")
"""Of a policy's folder, in the order in which they go: who finds no weights asks for no state."""


def prunable(plan: Plan) -> list[Path]:
    """Folders of weights and state that no `keep:` rule of any run protects, those of discriminators included.

    The final policy of every run, and every policy from which a fork sets out, always stay.
    """
    return [folder / part for folder in _unprotected(plan) for part in PARTS if (folder / part).is_dir()]


def prune(plan: Plan) -> Iterator[Path]:
    """Deletes them, and what a kill of an earlier call left of such; each is yielded before it goes.

    Each goes from its name at once: a kill leaves it whole, or not there.
    """
    for folder in _unprotected(plan):
        finished = any((folder / name).exists() for name in ("policy.json", "reward_model.json"))
        for part in PARTS:
            if finished:  # else what lies there may be a job's, on another machine
                remove_leftovers(folder, part)
            if (folder / part).is_dir():
                yield folder / part
                leaving = temporary_beside(folder / part)
                (folder / part).rename(leaving)
                shutil.rmtree(leaving)


def _unprotected(plan: Plan) -> list[Path]:
    candidates = {Path(plan.policy_path(run, r)).parent for run in plan.runs for r in _rounds(plan, run)}
    return sorted((candidates | _discriminators(plan)) - protected(plan))


def protected(plan: Plan) -> set[Path]:
    """Folders of policies and discriminators whose weights and state stay."""
    kept: set[Path] = set()
    for run in plan.runs:
        trained = [r for r in _rounds(plan, run) if Path(plan.policy_path(run, r)).exists()]
        folders = {r: Path(plan.policy_path(run, r)).parent for r in _rounds(plan, run)}
        kept |= {folders[r] for r in _kept_rounds(plan, run, trained)}
        kept |= {folders[r] for r in plan.evaluated_rounds(run) if r in folders and not _evaluated(plan, run, r)}
        fork = plan.config_of(run).fork
        if fork is not None:
            start = fork.round + 1 if fork.stage == "train" else fork.round
            kept |= {folders[r] for r in (start - plan.config_of(run).lag, start) if r in folders}
    return kept | _kept_discriminators(plan)


def _rounds(plan: Plan, run: str) -> range:
    """Rounds of the policies that a run trains."""
    return range(1, plan.config_of(run).rounds + 1)


def _discriminators(plan: Plan) -> set[Path]:
    """Folders of all that runs taught."""
    return {Path(path).parent for run in plan.runs for paths in _by_round(plan, run).values() for path in paths}


def _kept_discriminators(plan: Plan) -> set[Path]:
    """Those of the rounds that a run keeps, counted from its last one that there is, and what a fork goes on from."""
    kept: set[str] = set()
    for run in plan.runs:
        keep, found = plan.config_of(run).keep, _by_round(plan, run)
        made = [r for r, paths in found.items() if any(Path(path).exists() for path in paths)]
        rounds = {*made[-keep.last :], *(r for r in made if keep.every and r % keep.every == 0)}
        fork = plan.config_of(run).fork
        rounds |= set() if fork is None else {fork.round - 1, fork.round}
        kept |= {path for r in rounds for path in found.get(r, [])}
    return {Path(path).parent for path in kept}


def _by_round(plan: Plan, run: str) -> dict[int, list[str]]:
    rounds = range(plan.config_of(run).rounds)
    return {
        r: [p for name in plan.recipe(run, r).score.scorers for p in plan.discriminators.applied_by(run, r, name)]
        for r in rounds
    }


def _kept_rounds(plan: Plan, run: str, trained: list[int]) -> set[int]:
    keep = plan.config_of(run).keep
    kept = set(trained[-max(keep.last, plan.config_of(run).lag + 1) :])
    if keep.every:
        kept |= {r for r in trained if r % keep.every == 0}
    best = _best_round(plan, run, trained) if keep.best else None
    return kept | ({best} if best else set())


def _evaluated(plan: Plan, run: str, round: int) -> bool:
    return Path(plan.eval_path(run, round)).exists()


def _best_round(plan: Plan, run: str, trained: list[int]) -> int | None:
    scores = {}
    for r in plan.evaluated_rounds(run):
        path = Path(plan.eval_path(run, r).removesuffix(".parquet") + ".json")
        if r in trained and path.exists():
            values = {m["name"]: m["value"] for m in json.loads(path.read_text())["metrics"]}
            scores[r] = values["pass@1"]
    return max(scores, key=lambda r: (scores[r], -r)) if scores else None
