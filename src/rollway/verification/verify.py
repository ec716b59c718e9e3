"""Walks a results folder: each file by itself, then what stands in one against what it was made from."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa

from rollway.comparison import stored as stored_rounds
from rollway.comparison.stored import StoredRound
from rollway.config.experiment import EvaluateConfig
from rollway.config.recipes import Recipe, parse
from rollway.config.rollouts import StoredEngine
from rollway.errors import RollwayError
from rollway.runtime.plan import Plan
from rollway.runtime.plan_told import Untold, plan_of
from rollway.runtime.status import NO_RUN
from rollway.store import parquet
from rollway.store.atomic import read_json
from rollway.store.lineage import RUN_FILE, Inherited, inherited
from rollway.verification import expected, made_from, models, tables
from rollway.verification.findings import Finding
from rollway.verification.provenance import Lineage

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

    def lead(self, made: Lineage) -> None:
        """Puts what is wrong with files that others were made from before what follows from it, each thing once."""
        found = [*made.findings(), *(made.follows(finding) for finding in self.findings)]
        self.findings[:] = dict.fromkeys(found)

    def skip(self, why: str) -> None:
        self.left_out[why] = self.left_out.get(why, 0) + 1

    def check(self, file: Path, stage: str, work: Callable[..., Iterator[str] | None], *of: Any) -> bool:
        """Whether `work` had nothing to say; a RollwayError is something.

        So is a file that parses and has not the shape that its stage gives it: it must not cost the other findings.
        """
        try:
            said = list(work(*of) or ())
        except RollwayError as error:
            said = [str(error).removeprefix(f"{file}: ").partition("; ")[0]]
        except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError, OSError) as error:
            said = [f"damaged ({error!r})"]
        self.findings += [Finding(file, wrong, stage) for wrong in said]
        return not said


@dataclass(frozen=True)
class _Folder:
    """What is known of the whole results folder, and what its rounds add."""

    results: Path
    described: set[str]
    """Runs that are no import, as far as one can see."""
    infos: dict[str, dict[str, Any]]
    """Content of the run.json files that can be read."""
    lineage: list[Inherited]
    plans: dict[str, Plan]
    """Of the runs whose run.json is what `describe` writes."""
    kept: set[Path] | None
    """Folders whose weights must be there; None: unknown."""
    outcome: Outcome
    made: Lineage = field(default_factory=Lineage)


def verify(
    results: Path, runs: Sequence[str] | None = None, *, rollouts: int = 8, tolerance: float | None = None
) -> Outcome:
    """Checks a results folder, or only `runs` of it with the tasks, warm-ups and reward models.

    rollouts: of each round, whose log-probs are computed again with the policy that wrote them, where its weights are
    kept; 0: none. tolerance: nats by which they may differ; None: 0.001 for float32, 0.1 for half precision.
    Raises RollwayError where there is no such folder or run.
    """
    if not results.is_dir():
        raise RollwayError(f"{results}: there is no such results folder")
    there = {p.parent.name for p in (*results.glob(f"*/{ROUND}"), *results.glob(f"*/{RUN_FILE}"))} - set(NO_RUN)
    if unknown := sorted(set(runs or ()) - there):
        raise RollwayError(
            f"--runs {unknown[0]}: {results} has no rounds of it; it has {', '.join(sorted(there)) or 'no run'}"
        )
    outcome = Outcome()
    folder = _folder(results, there, outcome)
    known: set[Path] = set()
    for run in sorted(there) if runs is None else runs:
        if run in folder.plans:
            _expected(folder.plans[run], run, known, outcome)
    _tasks(results, outcome)
    for path in sorted(results.glob("warmups/*/policy.json")):
        models.policy(path, "warmup", {path.parent}, outcome)
    models.others(results, outcome)
    for run in sorted(there) if runs is None else runs:
        for path in sorted((results / run).glob(ROUND)):
            _round(folder, run, int(path.name[1:]), path, rollouts, tolerance)
    made_from.shared(folder.made, results)
    outcome.lead(folder.made)
    return outcome


def _folder(results: Path, there: set[str], outcome: Outcome) -> _Folder:
    infos: dict[str, dict[str, Any]] = {}
    for path in sorted(results.glob(f"*/{RUN_FILE}")):
        outcome.files += 1
        outcome.check(path, "describe", _info, path, infos)
    described = {run for run in there if (results / run / RUN_FILE).exists()}
    for run in sorted(there - described):
        path = results / run / RUN_FILE
        if any(any(results.glob(f"{run}/{ROUND}/{name}")) for name in TRAINED):
            described.add(run)
            outcome.findings.append(
                Finding(
                    path, "missing, lost or not made yet, and the run's rounds hold what training wrote", "describe"
                )
            )
    plans: dict[str, Plan] = {}
    for run in infos:
        try:
            plans[run] = plan_of(results, run, infos)
        except Untold as error:
            outcome.skip("runs whose run.json, or that of a run they fork, is no use: only each file by itself is seen")
            path = results / error.run / RUN_FILE
            if not any(finding.file == path for finding in outcome.findings):
                outcome.findings.append(Finding(path, str(error), "describe"))
    try:
        lineage = inherited({run: infos[run] for run in plans})
    except RollwayError:
        lineage = []  # a circle, which was said of the run.json files
    try:
        kept = expected.kept(plans.values())
    except (RollwayError, ValueError, KeyError, TypeError):
        # The figures of the best policy are damaged, which is said of them, or SQL is not there.
        kept = None
    return _Folder(results, described, infos, lineage, plans, kept, outcome)


def _info(path: Path, infos: dict[str, dict[str, Any]]) -> Iterator[str]:
    info = read_json(path, "the describe stage")
    if not isinstance(info, dict):
        yield "is not a mapping"
        return
    infos[path.parent.name] = info


def _expected(plan: Plan, run: str, known: set[Path], outcome: Outcome) -> None:
    try:
        outcome.findings += list(expected.missing(plan, run, known))
    except RollwayError:
        outcome.skip("runs of which nobody can say what is missing: SQL files that decide it are not there")


def _tasks(results: Path, outcome: Outcome) -> None:
    for path in sorted(results.glob("tasks/*/*.parquet")):
        outcome.files += 1
        outcome.check(path, "prepare", tables.whole, path, "prompts")


TRAINED = ("policy.json", "metrics.json", "batch.parquet", "curate.json", "evals.parquet", "evals.json")
"""Files of a round that no import writes."""


def _round(at: _Folder, run: str, round: int, folder: Path, count: int, tolerance: float | None) -> None:
    outcome = at.outcome
    outcome.rounds += 1
    before = len(outcome.findings)
    imported = run not in at.described
    _json_files(folder, outcome)
    if (folder / "policy.json").exists():
        models.policy(folder / "policy.json", "train", at.kept, outcome)
    for path in sorted(folder.glob("discriminators/*/reward_model.json")):
        models.reward_model(path, "discriminator", at.kept, outcome)
    held = sorted(folder.glob("p[0-9]*/rollouts-*.parquet"))
    for path, table, stage in _tables_of(folder):
        outcome.files += 1
        outcome.check(path, "import" if imported else stage, tables.whole, path, table)
    plan = at.plans.get(run)
    if plan is not None:
        try:
            made_from.add(at.made, plan, run, round, folder)
        except RollwayError:
            outcome.skip("rounds whose SQL files are not there: what their files were made from")
    if len(outcome.findings) > before:
        return  # what is not whole cannot be compared with anything
    for path in held:
        _scores_beside(path, imported, outcome)
    if plan is None:
        for path in held:
            outcome.check(path, "import" if imported else "rollout", tables.rollouts, parquet.read(path), None, {})
        return
    stored = StoredRound(at.results, run, round, at.infos[run], at.lineage, at.infos)
    whole = len(outcome.findings)
    if stored.rollouts(round):
        recipe = parse(Recipe, stored.settings(), f"run {run}")
        _rollouts(stored, recipe, held, outcome)
        whole_rollouts = not any(finding.file in held for finding in outcome.findings[whole:])
        _batch(stored, recipe, plan, folder / "batch.parquet", outcome)
        if count and held and whole_rollouts:
            _log_probs(stored, recipe, held, count, tolerance, outcome)
    _evals(folder, at.infos[run], Path(plan.prompts_path(run, "heldout")), outcome)


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
    for pattern, stage in (
        ("curate.json", "curate"),
        ("metrics.json", "train"),
        ("evals.json", "evaluate"),
        ("lm_eval.json", "lm_eval"),
        ("teacher-*.json", "check_teacher"),
        ("discriminator-*.json", "discriminator"),
    ):
        for path in sorted(folder.glob(pattern)):
            outcome.files += 1
            outcome.check(path, stage, models.figures, path)
    if (answers := folder / "lm_eval_results.json").exists():
        outcome.files += 1
        outcome.check(answers, "lm_eval", models.parsed, answers)


def _scores_beside(path: Path, imported: bool, outcome: Outcome) -> None:
    shard = path.stem.rpartition("-")[2]
    scored = parquet.read(path, ["rollout_id"]).column("rollout_id")
    for file in sorted(path.parent.glob(f"scores/*-{shard}.parquet")):
        scorer = file.stem.rpartition("-")[0]
        stage = "import" if imported else "score"
        outcome.check(file, stage, tables.scores, parquet.read(file), scored, scorer)


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
            continue  # said of what is missing
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


def _batch(stored: StoredRound, recipe: Recipe, plan: Plan, path: Path, outcome: Outcome) -> None:
    """A batch against the one that its scores and SQL give now."""
    if not path.exists():
        return
    batch = parquet.read(path)
    rounds = range(max(0, stored.round - recipe.curate.replay), stored.round + 1)
    files = [file for r in rounds for file in stored.rollouts(r)]
    w = SimpleNamespace(run=stored.run, round=stored.round)
    if not all(Path(file).exists() for file in (*plan.batch_rollouts(w), *plan.batch_scores(w))):
        outcome.skip("batches made of files that are missing")
        return
    scores = [file for r in rounds for scorer in stored.scorers(r) for file in stored.scores(r, scorer)]
    if not all(_readable(file) for file in (*files, *scores)):
        # Said of those files, which may be those of the run that this one forks.
        outcome.skip("batches made of files that are not whole")
        return
    known = {i for file in files for i in parquet.read(file, ["rollout_id"]).column("rollout_id").to_pylist()}
    if not outcome.check(path, "curate", tables.batch, batch, known):
        return
    outcome.batches += 1
    try:
        made, _ = stored_rounds.curated(stored, recipe)
    except RollwayError as error:
        outcome.check(path, "curate", _raise, error)
        return
    outcome.check(path, "curate", tables.differing, batch, made.batch)
    if (figures := path.with_name("curate.json")).exists():
        outcome.check(figures, "curate", _figures_of_batch, figures, made.metrics)


def _raise(error: RollwayError) -> Iterator[str]:
    raise error
    yield


def _figures_of_batch(path: Path, made: Mapping[str, float]) -> Iterator[str]:
    told = read_json(path, "the curate stage")["metrics"]
    # Shares of rows that a scorer failed on, or judged differently the second time, are no figures of the batch.
    named = {name: {"step": 0, "value": value} for name, value in made.items()}
    if wrong := _not_the_same([row for row in told if not _FAULTS.fullmatch(row["name"])], named, 1e-6):
        yield f"figures that scores and SQL do not give ({', '.join(wrong[:3])})"


_FAULTS = re.compile(r"score_.*_(errors|unstable)")


def _not_the_same(told: list[dict[str, Any]], made: Mapping[str, Mapping[str, Any]], within: float = 1e-9) -> list[str]:
    """Names of figures that are told twice, or otherwise than they are made, or that nothing makes or tells."""
    counts = Counter(row["name"] for row in told)
    wrong = {name for name, times in counts.items() if times > 1 or name not in made} | (made.keys() - counts.keys())
    for row in told:
        if (own := made.get(row["name"])) is not None:
            same = row["step"] == own["step"] and _close(row["value"], own["value"], within)
            wrong |= set() if same else {row["name"]}
    return sorted(wrong)


def _readable(path: Path) -> bool:
    try:
        parquet.read(path, ["rollout_id"])
    except RollwayError:
        return False
    return True


def _evals(folder: Path, info: dict[str, Any], heldout: Path, outcome: Outcome) -> None:
    from rollway import evaluation

    evals, path = folder / "evals.parquet", folder / "evals.json"
    if not evals.exists() or not path.exists():
        return
    config = EvaluateConfig.model_validate(info["config"].get("evaluate", {}))
    table = parquet.read(evals)

    def compare() -> Iterator[str]:
        told = json.loads(path.read_text(encoding="utf-8"))["metrics"]
        if wrong := _not_the_same(told, {row["name"]: row for row in evaluation.summarise(table, config)}):
            yield f"figures that the samples do not give ({', '.join(wrong[:3])})"

    def complete() -> Iterator[str]:
        asked = parquet.read(heldout, ["prompt_id"]).column("prompt_id").to_pylist()[: config.prompts]
        yield from tables.evals(table, asked, config.samples)

    outcome.check(path, "evaluate", compare)
    if heldout.exists():  # else it is said to be missing
        outcome.check(evals, "evaluate", complete)


def _close(a: float | None, b: float | None, within: float = 1e-9) -> bool:
    if a is None or b is None:
        return a is b
    return math.isclose(a, b, rel_tol=within, abs_tol=1e-12) or (math.isnan(a) and math.isnan(b))


def _log_probs(
    stored: StoredRound, recipe: Recipe, held: list[Path], count: int, tolerance: float | None, outcome: Outcome
) -> None:
    """Of rollouts of every shard and pass. What one policy wrote is computed with it loaded once."""
    from rollway.verification.log_probs import COLUMNS, has_weights, recompute, sample

    if isinstance(recipe.rollout.engine, StoredEngine):
        return  # whoever wrote them, it was none of this run's policies
    asked: list[tuple[Path, float]] = []
    for path in held:
        derive = recipe.rollout.derived_in(int(path.parent.name[1:]))
        sampling = recipe.rollout.sampling if derive is None else derive.sampling or recipe.rollout.sampling
        if (whose := recipe.rollout.whose(derive)) is not None:
            outcome.skip(f"files of {whose}: their log-probs are not the policy's own")
        else:
            asked.append((path, sampling.temperature or 1.0))
    if not asked:
        return
    policies = _policies(stored)
    samples = sample([parquet.read(path, [*COLUMNS]) for path, _ in asked], count)
    by_policy: dict[Path, list[tuple[Path, float, list[dict[str, Any]]]]] = {}
    for (path, temperature), rows in zip(asked, samples, strict=True):
        for name in sorted({row["policy"] for row in rows}):
            if name in policies:
                mine = [row for row in rows if row["policy"] == name]
                by_policy.setdefault(policies[name], []).append((path, temperature, mine))
    for policy, files in by_policy.items():

        def compare(policy: Path = policy, files: Any = files) -> Iterator[str]:
            if not has_weights(policy):
                outcome.skip("policies without weights, of whose rollouts no log-prob was computed again")
                return
            said = recompute(files, policy, tolerance)
            outcome.recomputed += said.rows
            outcome.largest = max(outcome.largest, said.largest)
            for path, wrong in said.wrong.items():
                outcome.check(path, "rollout", iter, wrong)
            yield from ()

        outcome.check(policy, "warmup" if policy.parents[1].name == "warmups" else "train", compare)


def _policies(stored: StoredRound) -> dict[str, Path]:
    """Digest -> policy.json of what may have written the round's rollouts."""
    from rollway.policies import manifest

    files = [*(stored.policy(r) for r in range(stored.round + 1)), *stored.results.glob("warmups/*/policy.json")]
    return {manifest.digest(path): path for path in files if path.exists()}
