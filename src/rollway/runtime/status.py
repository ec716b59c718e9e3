"""What of each run is there, what failed, and what a job is writing: from files alone, without Snakemake."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rollway.config.experiment import EvaluateConfig
from rollway.runtime.plan import Plan
from rollway.store.lineage import Inherited, inherited, read_runs

STAGES = ("rollout", "score", "curate", "train", "evaluate")
_FILES = {
    "rollout": "r[0-9][0-9][0-9][0-9]/p[0-9]*/rollouts-*.parquet",
    "score": "r[0-9][0-9][0-9][0-9]/p[0-9]*/scores/*.parquet",
    "curate": "r[0-9][0-9][0-9][0-9]/batch.parquet",
    "train": "r[0-9][0-9][0-9][0-9]/metrics.json",
    "evaluate": "r[0-9][0-9][0-9][0-9]/evals.parquet",
}
_MISTAKE = re.compile(r"^rollway: (?:error: |stage \w+ (?:failed|was interrupted)).*$", re.MULTILINE)
NO_RUN = ("tasks", "warmups", "reward_models", "logs", "benchmarks")


@dataclass(frozen=True)
class StageState:
    """Rounds of one stage that are whole, and those that are missing; `planned` is None where no plan is known."""

    done: list[int]
    missing: list[int]
    planned: int | None


@dataclass(frozen=True)
class RunState:
    """One run. `first` and `last`: held-out (round, pass@1) of its first and its last evaluation."""

    run: str
    recipe: str
    stages: dict[str, StageState]
    first: tuple[int, float] | None = None
    last: tuple[int, float] | None = None
    parts: dict[str, int] = field(default_factory=dict)
    """Finished parts of rollout files that are not whole yet: folder of the round -> their number."""
    failures: dict[str, str] = field(default_factory=dict)
    """Log of a job that failed -> its message."""
    teachers: list[str] = field(default_factory=list)
    """What was found of teachers that are not shown to be better than the policy, a sentence each."""

    @property
    def whole(self) -> bool:
        """All planned files are there."""
        return not missing(self.stages)


def of_plan(plan: Plan) -> list[RunState]:
    """Every run of the config: the files that the plan wants, a fork's parent's among them."""
    results = Path(plan.results)
    logs = Path("logs") if plan.results == "results" else results / "logs"
    states = []
    for run in plan.runs:
        wanted = _wanted(plan, run)
        stages = {}
        for stage, rounds in wanted.items():
            done = [r for r, paths in rounds.items() if all(Path(path).exists() for path in paths)]
            stages[stage] = StageState(done, [r for r in rounds if r not in done], len(rounds))
        evals = {r: Path(paths[0]).with_suffix(".json") for r, paths in wanted["evaluate"].items()}
        ends = _ends({r: path for r, path in evals.items() if r in stages["evaluate"].done})
        recipe = plan.config_of(run).recipe
        parts, failures, teachers = _told(results / run, logs / run)
        states.append(RunState(run, recipe, stages, *ends, parts, failures, teachers))
    return states


def of_folder(results: Path, only: Sequence[str] | None = None) -> list[RunState]:
    """Every run folder of `results`, whatever config made it; rounds missing between the first and the last are told.

    A fork's inherited rounds are its parent's files. only: these runs. Raises RollwayError on a damaged run.json.
    """
    infos = read_runs(results)
    lineage = inherited(infos)
    folders = {p.name for p in results.iterdir() if p.is_dir() and any(p.glob("r[0-9][0-9][0-9][0-9]"))}
    runs = sorted({*infos, *(folders - set(NO_RUN))})
    logs = next((p for p in (results / "logs", results.parent / "logs") if p.is_dir()), results / "logs")
    states = []
    for run in runs if only is None else [run for run in runs if run in only]:
        stages = _stages_of_folder(results, run, infos.get(run, {}), lineage)
        own = _own_files(results / run, "evaluate")
        evals = {r: path.with_suffix(".json") for r, path in own.items()}
        for part in (i for i in lineage if i.run == run and i.stage == "evaluate"):
            theirs = _own_files(results / part.home, "evaluate")
            evals |= {
                r: theirs[r].with_suffix(".json")
                for r in range(part.first_round, part.last_round + 1)
                if r in theirs and r not in evals
            }
        ends = _ends(dict(sorted(evals.items())))
        recipe = str(infos.get(run, {}).get("recipe", "(no run.json)"))
        parts, failures, teachers = _told(results / run, logs / run)
        states.append(RunState(run, recipe, stages, *ends, parts, failures, teachers))
    return states


def stages_of_folder(results: Path, runs: Sequence[str]) -> dict[str, dict[str, StageState]]:
    """Run -> stage -> its rounds, as `of_folder` has them, without a look at logs."""
    infos = read_runs(results)
    lineage = inherited(infos)
    return {run: _stages_of_folder(results, run, infos.get(run, {}), lineage) for run in runs}


def missing(stages: dict[str, StageState]) -> str:
    """What is not there, in words: `rollout, score of round 1; evaluate of rounds 3-4`; empty where nothing is."""
    of_rounds: dict[str, list[str]] = {}
    for name, stage in stages.items():
        if stage.missing:
            of_rounds.setdefault(ranges(stage.missing), []).append(name)
    return "; ".join(
        f"{', '.join(names)} of round{'' if rounds.isdigit() else 's'} {rounds}" for rounds, names in of_rounds.items()
    )


def others(plan: Plan, runs: Sequence[str]) -> list[str]:
    """Run folders of the results folder that are not of this config."""
    results = Path(plan.results)
    if not results.is_dir():
        return []
    there = [p.name for p in results.iterdir() if p.is_dir() and any(p.glob("r[0-9][0-9][0-9][0-9]"))]
    return sorted(set(there) - set(runs) - set(NO_RUN))


def ranges(numbers: Sequence[int]) -> str:
    """0-4, 7."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)


def _wanted(plan: Plan, run: str) -> dict[str, dict[int, list[str]]]:
    rounds = range(plan.config_of(run).rounds)
    found: dict[str, dict[int, list[str]]] = {stage: {} for stage in STAGES}
    for r in rounds:
        passes = plan.passes(run, r)
        found["rollout"][r] = [path for p in passes for path in plan.rollout_paths(run, r, p)]
        scorers = plan.recipe(run, r).score.scorers
        found["score"][r] = [path for p in passes for name in scorers for path in plan.score_paths(run, r, p, name)]
        found["curate"][r] = [f"{plan.folder(plan.home(run, r, 'curate'), r)}/batch.parquet"]
        found["train"][r] = [plan.policy_path(run, r + 1)]
    found["evaluate"] = {r: [plan.eval_path(run, r)] for r in plan.evaluated_rounds(run)}
    return found


def _own_files(folder: Path, stage: str) -> dict[int, Path]:
    """Round -> one of its files of that stage. A train job writes into the folder of the round after."""
    found: dict[int, Path] = {}
    for path in sorted(folder.glob(_FILES[stage])):
        round = int(path.relative_to(folder).parts[0][1:]) - (1 if stage == "train" else 0)
        if round >= 0:
            found.setdefault(round, path)
    return found


def _stages_of_folder(
    results: Path, run: str, info: dict[str, Any], lineage: Sequence[Inherited]
) -> dict[str, StageState]:
    """What run.json plans; without one (imported) nothing is planned, and what lies between the first and the last
    round of a stage is missing."""
    rounds, config = info.get("rounds"), info.get("config") or {}
    stages = {}
    for stage in STAGES:
        done = set(_own_files(results / run, stage))
        for part in lineage:
            if part.run == run and part.stage == stage:
                theirs = _own_files(results / part.home, stage)
                done |= {r for r in range(part.first_round, part.last_round + 1) if r in theirs}
        wanted: Sequence[int] = [] if stage == "evaluate" else range(max(done, default=-1) + 1)
        if rounds is not None:
            every = (config.get("evaluate") or {}).get("every", EvaluateConfig().every)
            wanted = EvaluateConfig(every=every).rounds(rounds) if stage == "evaluate" else range(rounds)
        if stage == "score" and (config.get("score") or {}).get("scorers") == {}:
            wanted = []
        planned = None if rounds is None else len(wanted)
        stages[stage] = StageState(sorted(done), [r for r in wanted if r not in done], planned)
    return stages


def _ends(files: dict[int, Path]) -> tuple[tuple[int, float] | None, tuple[int, float] | None]:
    found = []
    for round, path in files.items():
        try:
            metrics = json.loads(path.read_text(encoding="utf-8"))["metrics"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not written yet, or damaged: the tables say so where they are read
        found += [(round, m["value"]) for m in metrics if m["name"] == "pass@1" and m["value"] is not None]
    return (found[0], found[-1]) if found else (None, None)


def _told(folder: Path, logs: Path) -> tuple[dict[str, int], dict[str, str], list[str]]:
    return _parts(folder), _failures(logs), _teachers(folder)


def _teachers(folder: Path) -> list[str]:
    """Teachers whose last check did not show them to be better."""
    last: dict[str, tuple[int, dict[str, float]]] = {}
    for path in sorted(folder.glob("r[0-9][0-9][0-9][0-9]/teacher-*.json")):
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            scorer = path.stem.removeprefix("teacher-")
            figures = {m["name"].removeprefix(f"{scorer}/"): m["value"] for m in held["metrics"]}
            last[scorer] = int(held["round"]), figures
        except (OSError, ValueError, KeyError, TypeError):
            continue  # half written, or damaged: `rollway verify` says so
    return [
        f"{scorer} {_no_better(figures)} (round {round})"
        for scorer, (round, figures) in last.items()
        if not figures.get("better")
    ]


def _no_better(figures: dict[str, float]) -> str:
    if not figures.get("rollouts"):
        return "could not be compared with the policy, no rollout has what its context names"
    verdict = "is worse than" if figures["difference/high"] < 0 else "is not shown to be better than"
    return f"{verdict} the policy: right {figures['teacher']:.3f}, the policy {figures['policy']:.3f}"


def _parts(folder: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    for path in folder.glob("r[0-9][0-9][0-9][0-9]/p[0-9]*/.partial-*/part-*.parquet"):
        round = path.parents[2].name
        found[round] = found.get(round, 0) + 1
    return dict(sorted(found.items()))


def _failures(logs: Path) -> dict[str, str]:
    """Logs whose last job ended with a message: a job that ends well writes its usage after its log."""
    found = {}
    for log in sorted(logs.rglob("*.log")) if logs.is_dir() else []:
        stat, usage = log.stat(), log.with_suffix(".usage.json")
        if not stat.st_size or (usage.exists() and usage.stat().st_mtime >= stat.st_mtime):
            continue
        mistake = _MISTAKE.search(log.read_text(encoding="utf-8", errors="replace"))
        if mistake:
            found[str(log)] = mistake[0].removeprefix("rollway: ")
    return found
