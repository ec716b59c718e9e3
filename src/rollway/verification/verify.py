"""Walks a results folder: each file by itself, then what stands in one against what it was made from."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from rollway.comparison import stored as stored_rounds
from rollway.comparison.stored import StoredRound
from rollway.config.experiment import EvaluateConfig
from rollway.config.recipes import Recipe, parse
from rollway.config.rollouts import StoredEngine
from rollway.errors import RollwayError
from rollway.runtime.status import NO_RUN
from rollway.store import parquet
from rollway.store.lineage import read_runs
from rollway.verification import tables
from rollway.verification.findings import Finding
from rollway.verification.provenance import Digests, changed

ROUND = "r[0-9][0-9][0-9][0-9]"


@dataclass
class Outcome:
    """What was looked at and what is wrong with it."""

    findings: list[Finding] = field(default_factory=list)
    files: int = 0
    rounds: int = 0
    recomputed: int = 0
    """Rollouts whose log-probs were computed again."""
    batches: int = 0
    """Batches that were made again."""
    largest: float = 0.0
    """Largest difference of a log-prob, in nats."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Why something could not be looked at -> how often."""

    def skip(self, why: str) -> None:
        self.left_out[why] = self.left_out.get(why, 0) + 1

    def check(self, file: Path, stage: str, work: Callable[..., Iterator[str] | None], *of: Any) -> bool:
        """Whether `work` had nothing to say; a RollwayError is something."""
        try:
            said = list(work(*of) or ())
        except RollwayError as error:
            said = [str(error).removeprefix(f"{file}: ").partition("; ")[0]]
        self.findings += [Finding(file, wrong, stage) for wrong in said]
        return not said


def verify(
    results: Path, runs: Sequence[str] | None = None, *, rollouts: int = 8, tolerance: float | None = None
) -> Outcome:
    """Checks a results folder, or only `runs` of it with the tasks and warm-ups.

    rollouts: of each round, whose log-probs are computed again with the policy that wrote them, where its weights are
    kept; 0: none. tolerance: nats by which they may differ; None: 0.001 for float32, 0.1 for half precision.
    Raises RollwayError where there is no such folder or run.
    """
    if not results.is_dir():
        raise RollwayError(f"{results}: there is no such results folder")
    infos = read_runs(results)
    there = sorted({p.parent.name for p in results.glob(f"*/{ROUND}")} - set(NO_RUN))
    if unknown := sorted(set(runs or ()) - set(there)):
        raise RollwayError(f"--runs {unknown[0]}: {results} has no rounds of it; it has {', '.join(there) or 'no run'}")
    outcome = Outcome()
    _tasks(results, outcome)
    for path in sorted(results.glob("warmups/*/policy.json")):
        _policy(path, "warmup", outcome)
    for run in there if runs is None else runs:
        for folder in sorted((results / run).glob(ROUND)):
            _round(results, run, int(folder.name[1:]), folder, infos.get(run), rollouts, tolerance, outcome)
    return outcome


def _tasks(results: Path, outcome: Outcome) -> None:
    for path in sorted(results.glob("tasks/*/*.parquet")):
        outcome.files += 1
        outcome.check(path, "prepare", tables.whole, path, "prompts")


def _round(
    results: Path,
    run: str,
    round: int,
    folder: Path,
    info: dict[str, Any] | None,
    count: int,
    tolerance: float | None,
    outcome: Outcome,
) -> None:
    outcome.rounds += 1
    before = len(outcome.findings)
    _json_files(folder, outcome)
    if (folder / "policy.json").exists():
        _policy(folder / "policy.json", "train", outcome)
    held = sorted(folder.glob("p[0-9]*/rollouts-*.parquet"))
    for path, table, stage in _tables_of(folder):
        outcome.files += 1
        outcome.check(path, stage if info is not None else "import", tables.whole, path, table)
    if len(outcome.findings) > before:
        return  # what is not whole cannot be compared with anything
    for path in held:
        _scores_beside(path, info is not None, outcome)
    if info is None:
        for path in held:
            outcome.check(path, "import", tables.rollouts, parquet.read(path), None, {})
        return
    stored = _opened(results, run, round)
    if stored is None:
        _evals(folder, info, outcome)
        return
    recipe = parse(Recipe, stored.settings(), f"run {run}")
    _rollouts(stored, recipe, held, outcome)
    _batch(stored, recipe, folder / "batch.parquet", outcome)
    _evals(folder, info, outcome)
    if count and held and len(outcome.findings) == before:
        _log_probs(stored, recipe, held, count, tolerance, outcome)
    _made_from(stored, recipe, folder, held, outcome)


def _tables_of(folder: Path) -> Iterator[tuple[Path, str, str]]:
    """Files of a round, the table that each is, and the stage that writes it."""
    for pattern, table, stage in (
        ("p[0-9]*/rollouts-*.parquet", "rollouts", "rollout"),
        ("p[0-9]*/scores/*.parquet", "scores", "score"),
        ("batch.parquet", "batch", "curate"),
        ("evals.parquet", "evals", "evaluate"),
        ("teacher-*.parquet", "teacher_checks", "check_teacher"),
    ):
        for path in sorted(folder.glob(pattern)):
            yield path, table, stage


def _json_files(folder: Path, outcome: Outcome) -> None:
    for name, stage in (("curate.json", "curate"), ("metrics.json", "train"), ("evals.json", "evaluate")):
        if (path := folder / name).exists():
            outcome.files += 1
            outcome.check(path, stage, _figures, path)
    for path in sorted(folder.glob("teacher-*.json")):
        outcome.files += 1
        outcome.check(path, "check_teacher", _figures, path)


def _figures(path: Path) -> Iterator[str]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["metrics"]
        odd = [row["name"] for row in rows if row["value"] is not None and not math.isfinite(row["value"])]
    except (ValueError, KeyError, TypeError) as error:
        yield f"damaged ({error!r})"
        return
    if odd:
        yield f"figures that are not finite ({', '.join(odd[:3])})"


def _policy(path: Path, stage: str, outcome: Outcome) -> None:
    """policy.json and the files that it names; weights that were pruned are no fault."""
    from rollway.policies import manifest

    outcome.files += 1

    def look() -> Iterator[str]:
        found = manifest.read_manifest(path)
        if any(p.folder is not None and not (path.parent / p.folder).exists() for p in found.policies.values()):
            outcome.skip("policies without weights (pruned)")
        else:
            manifest.verify(path)
        yield from ()

    outcome.check(path, stage, look)


def _scores_beside(path: Path, described: bool, outcome: Outcome) -> None:
    shard = path.stem.rpartition("-")[2]
    scored = parquet.read(path, ["rollout_id"]).column("rollout_id")
    for file in sorted(path.parent.glob(f"scores/*-{shard}.parquet")):
        scorer = file.stem.rpartition("-")[0]
        stage = "score" if described else "import"
        outcome.check(file, stage, tables.scores, parquet.read(file), scored, scorer)


def _opened(results: Path, run: str, round: int) -> StoredRound | None:
    """None where the folder is only that of the last policy."""
    try:
        return stored_rounds.open_round(results, run, round)
    except RollwayError:
        return None


def _rollouts(stored: StoredRound, recipe: Recipe, held: list[Path], outcome: Outcome) -> None:
    """The files that lie in this run's own folder."""
    from rollway.policies import manifest

    prompts = _prompt_ids(stored, outcome)
    policies = {}
    for round in range(max(0, stored.round - 2), stored.round + 1):
        if (path := stored.policy(round)).exists():
            policies[round] = manifest.digest(path)
    passes: dict[Path, list[pa.Table]] = {}
    for path in held:
        table = parquet.read(path)
        outcome.check(path, "rollout", tables.rollouts, table, prompts, policies)
        passes.setdefault(path.parent, []).append(table.select(["group_id", "sample", "source"]))
    if isinstance(recipe.rollout.engine, StoredEngine):
        return
    for folder, parts in passes.items():
        first = folder / "rollouts-000.parquet"
        if len(parts) != recipe.rollout.shards:
            wanted = [folder / f"rollouts-{n:03d}.parquet" for n in range(recipe.rollout.shards)]
            absent = [path for path in wanted if not path.exists()]
            for path in absent:
                outcome.findings.append(Finding(path, "missing", "rollout"))
            continue
        # Later passes draw as many prompts as earlier ones left to be found.
        expected = recipe.rollout.prompts if folder.name == "p0" else None
        whole = pa.concat_tables(parts)
        outcome.check(first, "rollout", tables.groups, whole, recipe.rollout.group, expected)


def _prompt_ids(stored: StoredRound, outcome: Outcome) -> set[str] | None:
    try:
        return set(parquet.read(stored.prompts(), ["prompt_id"]).column("prompt_id").to_pylist())
    except RollwayError:
        outcome.skip("rounds whose task has no prompts file")
        return None


def _batch(stored: StoredRound, recipe: Recipe, path: Path, outcome: Outcome) -> None:
    """A batch against the one that its scores and SQL give now."""
    if not path.exists():
        return
    batch = parquet.read(path)
    rounds = range(max(0, stored.round - recipe.curate.replay), stored.round + 1)
    files = [file for r in rounds for file in stored.rollouts(r)]
    scores = [file for r in rounds for scorer in stored.scorers(r) for file in stored.scores(r, scorer)]
    if not all(_readable(file) for file in (*files, *scores)):
        # Said of those files, which may be those of the run that this one forks.
        outcome.skip("batches made of files that are not whole")
        return
    known = {i for file in files for i in parquet.read(file, ["rollout_id"]).column("rollout_id").to_pylist()}
    if not outcome.check(path, "curate", tables.batch, batch, known):
        return
    outcome.batches += 1
    outcome.check(path, "curate", _made_again, batch, stored, recipe)


def _made_from(stored: StoredRound, recipe: Recipe, folder: Path, held: list[Path], outcome: Outcome) -> None:
    """Lineage from prompts to policy: each file of the round against the files that its job read."""
    digests, at = Digests(), stored.round
    rounds = range(max(0, at - recipe.curate.replay), at + 1)
    rollouts = [file for r in rounds for file in stored.rollouts(r)]
    scores = [file for r in rounds for scorer in stored.scorers(r) for file in stored.scores(r, scorer)]
    policies = [stored.policy(r) for r in range(max(0, at - 2), at + 1)]
    task = {"prompts": [stored.prompts()], "policy": policies}
    for path in held:
        own = stored.rollouts(at)
        earlier = {"earlier_rollouts": own, "earlier_scores": [f for f in scores if f.parents[1].parent == folder]}
        outcome.check(path, "rollout", changed, path, task | earlier, digests)
        for file in sorted(path.parent.glob(f"scores/*-{path.stem.rpartition('-')[2]}.parquet")):
            outcome.check(file, "score", changed, file, task | {"rollouts": [path]}, digests)
    batch = folder / "batch.parquet"
    outcome.check(batch, "curate", changed, batch, task | {"rollouts": rollouts, "scores": scores}, digests)
    if (evals := folder / "evals.parquet").exists():
        outcome.check(evals, "evaluate", changed, evals, {"policy": policies}, digests)
    made = stored.policy(at + 1).with_name("metrics.json")
    if stored.home("train", at).name == stored.run:
        read = {"batch": [batch], "rollouts": rollouts, "policy": policies, "reference": [stored.policy(0), *policies]}
        outcome.check(made, "train", changed, made, read, digests)


def _readable(path: Path) -> bool:
    try:
        parquet.read(path, ["rollout_id"])
    except RollwayError:
        return False
    return True


def _made_again(batch: pa.Table, stored: StoredRound, recipe: Recipe) -> Iterator[str]:
    yield from tables.differing(batch, stored_rounds.curated(stored, recipe)[0])


def _evals(folder: Path, info: dict[str, Any], outcome: Outcome) -> None:
    from rollway import evaluation

    if not (folder / "evals.parquet").exists():
        return

    path = folder / "evals.json"
    config = EvaluateConfig.model_validate(info["config"]["evaluate"])

    def compare() -> Iterator[str]:
        if not path.exists():
            yield "missing"
            return
        told = {row["name"]: row["value"] for row in json.loads(path.read_text(encoding="utf-8"))["metrics"]}
        made = {
            row["name"]: row["value"] for row in evaluation.summarise(parquet.read(folder / "evals.parquet"), config)
        }
        wrong = [name for name, value in made.items() if not _close(told.get(name), value)]
        if wrong:
            yield f"figures that the samples do not give ({', '.join(wrong[:3])})"

    outcome.check(path, "evaluate", compare)


def _close(a: float | None, b: float) -> bool:
    return a is not None and (math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12) or (math.isnan(a) and math.isnan(b)))


def _log_probs(
    stored: StoredRound, recipe: Recipe, held: list[Path], count: int, tolerance: float | None, outcome: Outcome
) -> None:
    from rollway.verification.log_probs import recompute

    sampling = recipe.rollout.sampling
    if sampling.top_p < 1.0 or sampling.top_k > 0:
        outcome.skip("rounds whose sampler was truncated (top_p, top_k): their log-probs are not the policy's own")
        return
    for path in held[:1]:
        table = parquet.read(path, [*tables.PAYLOAD])
        said = recompute(table, stored.policy, sampling.temperature or 1.0, count, tolerance)
        if said is None:
            outcome.skip("rounds whose policy has no weights any more: log-probs were not computed again")
            continue
        outcome.recomputed += said.rows
        outcome.largest = max(outcome.largest, said.largest)
        outcome.check(path, "rollout", iter, said.wrong)
