"""Forks: which run's folder holds which rounds of a run. Read from each run's `run.json`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollway.errors import RollwayError
from rollway.store.atomic import read_json

RUN_FILE = "run.json"
STAGES = ("rollout", "score", "curate", "train", "evaluate")


@dataclass(frozen=True)
class Inherited:
    """Rounds first_round to last_round (inclusive) of `stage` that `run` reads from the folder of `home`."""

    run: str
    stage: str
    home: str
    first_round: int
    last_round: int


def read_runs(results: Path) -> dict[str, dict[str, Any]]:
    """Run -> the content of its `run.json` (recipe, seed, parent, fork_round, fork_stage, config, ...), sorted by run.

    A folder without one is no run of the config (imported, or older): it has no parent. Raises RollwayError on damage.
    """
    runs = {}
    for path in sorted(results.glob(f"*/{RUN_FILE}")):
        info = read_json(path, "the describe stage")
        if not isinstance(info, dict):
            raise RollwayError(f"{path}: is not a mapping; delete it and run the workflow again")
        runs[path.parent.name] = info
    return runs


def inherited(runs: dict[str, dict[str, Any]]) -> list[Inherited]:
    """Every range of rounds that a fork takes from an ancestor, the nearest ancestor first.

    A fork of round k after stage s owns, of each stage, the rounds from k + 1 (stages up to s) or from k (later ones);
    its policy of round k is still the parent's, so an evaluation of round k is too.
    """
    found = []
    for run in runs:
        for stage in STAGES:
            found += _of_stage(runs, run, stage)
    return found


def _of_stage(runs: dict[str, dict[str, Any]], run: str, stage: str) -> list[Inherited]:
    found: list[Inherited] = []
    home, below, seen = run, None, {run}
    while (info := runs.get(home)) and info.get("parent"):
        first_own = _first_own(info, stage)
        last = first_own - 1 if below is None else min(first_own - 1, below)
        home, below = info["parent"], last
        if home in seen:
            raise RollwayError(f"run {run} forks in a circle through {home}; correct `fork` in the config")
        seen.add(home)
        grandparent = runs.get(home) or {}
        first = _first_own(grandparent, stage) if grandparent.get("parent") else 0
        if first <= last:
            found.append(Inherited(run, stage, home, first, last))
    return found


def _first_own(info: dict[str, Any], stage: str) -> int:
    fork_round, fork_stage = int(info["fork_round"]), info.get("fork_stage") or "score"
    if stage == "evaluate":
        return fork_round + (2 if fork_stage == "train" else 1)
    return fork_round + (1 if STAGES.index(stage) <= STAGES.index(fork_stage) else 0)
