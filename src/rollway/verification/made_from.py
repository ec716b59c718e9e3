"""Which files each file of a round was made from, by the plan: the edges of its lineage."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

from rollway.config.scorers import TeacherScorer
from rollway.runtime.plan import Plan
from rollway.runtime.spec_files import own_sql
from rollway.verification.provenance import Lineage

NOBODY = ""
"""Stage of what a person wrote: never the one that is named."""


def add(made: Lineage, plan: Plan, run: str, round: int, folder: Path) -> None:
    """Adds what the files that lie in the round's own folder say. Raises RollwayError where the plan cannot be told."""
    if round < plan.config_of(run).rounds:
        for path in sorted(folder.glob("p[0-9]*/rollouts-*.parquet")):
            _pass(made, plan, run, round, path)
        for path in sorted(folder.glob("discriminator-*.json")):
            _discriminator(made, plan, run, round, path)
        for path in sorted(folder.glob("teacher-*.json")):
            _teacher(made, plan, run, round, path)
        w = SimpleNamespace(run=run, round=round, p=0, next=round + 1)
        made.add(
            folder / "batch.parquet",
            "curate",
            prompts=_prompts(plan, run),
            rollouts=_by(plan.batch_rollouts(w), "rollout"),
            scores=_by(plan.batch_scores(w), "score"),
            sql=_by(own_sql(Path(path) for path in plan.curate_sql(w)), NOBODY),
        )
    if round and plan.home(run, round - 1, "train") == run:
        w = SimpleNamespace(run=run, round=round - 1, p=0, next=round)
        made.add(
            folder / "metrics.json",
            "train",
            batch=_by([plan.batch(w)], "curate"),
            rollouts=_by(plan.trained_rollouts(w), "rollout"),
            policy=_policies([plan.train_policy(w)]),
            reference=_policies(plan.reference_policy(w)),
            teacher=_policies(plan.teachers.named(w).values()),
        )
    w = SimpleNamespace(run=run, round=round)
    made.add(
        folder / "evals.parquet",
        "evaluate",
        prompts=_by([plan.heldout_prompts(w)], "prepare"),
        policy=_policies([plan.evaluated_policy(w)]),
        trained=_by(plan.evaluating_reward_model(w), "reward_model"),
    )
    made.add(folder / "lm_eval.json", "lm_eval", policy=_policies([plan.policy_path(run, round)]))


def shared(made: Lineage, results: Path) -> None:
    """What warm-ups and reward models say. No run.json has their settings: what they read is somewhere in `results`."""
    prompts = [(path, "prepare") for path in sorted(results.glob("tasks/*/train.parquet"))]
    for path in sorted(results.glob("warmups/*/metrics.json")):
        made.add(path, "warmup", among=True, prompts=prompts)
    if trained := sorted(results.glob("reward_models/*/metrics.json")):
        read = {
            "prompts": prompts,
            "rollouts": list(_by(sorted(results.glob("*/r[0-9]*/p[0-9]*/rollouts-*.parquet")), "rollout")),
            "scores": list(_by(sorted(results.glob("*/r[0-9]*/p[0-9]*/scores/*.parquet")), "score")),
            "policy": list(_by(sorted(results.glob("warmups/*/policy.json")), "warmup")),
        }
        for path in trained:
            made.add(path, "reward_model", among=True, **read)


def _pass(made: Lineage, plan: Plan, run: str, round: int, path: Path) -> None:
    shard = path.stem.rpartition("-")[2]
    p = int(path.parent.name[1:])
    w = SimpleNamespace(run=run, round=round, p=p, shard=shard)
    if plan.home(run, round, "rollout") == run and p in plan.passes(run, round):
        made.add(
            path,
            "rollout",
            prompts=_prompts(plan, run),
            policy=_policies([plan.rollout_policy(w)]),
            earlier_rollouts=_by(plan.earlier_rollouts(w), "rollout"),
            earlier_scores=_by(plan.earlier_scores(w), "score"),
            stored=_by(plan.stored_rollouts(w), NOBODY),
            author=_policies(plan.derived.author(w)),
            teacher=_policies([] if (mixed := plan.teachers.mixed_stored(w)) is None else [mixed]),
        )
    known = plan.recipe(run, round).score.scorers
    for file in sorted(path.parent.glob(f"scores/*-{shard}.parquet")):
        name = file.stem.rpartition("-")[0]
        if name not in known:
            continue
        w = SimpleNamespace(run=run, round=round, p=p, shard=shard, scorer=name)
        teacher = plan.teachers.read(w).get("teacher")
        made.add(
            file,
            "score",
            prompts=_prompts(plan, run),
            rollouts=_by([path], "rollout"),
            needs=_by(plan.needed_scores(w), "score"),
            trained=_by(plan.scoring_reward_model(w), "reward_model"),
            teacher=_policies([] if teacher is None else [teacher]),
            code=_by([] if isinstance(known[name], TeacherScorer) else plan.scorer_files(w), NOBODY),
        )


def _discriminator(made: Lineage, plan: Plan, run: str, round: int, path: Path) -> None:
    w = SimpleNamespace(run=run, round=round, scorer=path.stem.removeprefix("discriminator-"))
    made.add(
        path,
        "discriminator",
        prompts=_prompts(plan, run),
        rollouts=_by(plan.discriminators.rollouts(w), "rollout"),
        references=_by(plan.discriminators.references(w), NOBODY),
        previous=_by(plan.discriminators.previous(w), "discriminator"),
        policy=_policies(plan.discriminators.policy(w)),
    )


def _teacher(made: Lineage, plan: Plan, run: str, round: int, path: Path) -> None:
    w = SimpleNamespace(run=run, round=round, scorer=path.stem.removeprefix("teacher-"))
    if plan.teachers.named_so(run, round, w.scorer) is None:
        return
    made.add(
        path,
        "check_teacher",
        prompts=_prompts(plan, run),
        rollouts=_by(plan.teachers.checked_rollouts(w), "rollout"),
        needs=_by(plan.teachers.checked_needs(w), "score"),
        policy=_policies([plan.teachers.check_policy(w)]),
        teacher=_policies(plan.teachers.checked_model(w)),
    )


def _prompts(plan: Plan, run: str) -> Iterator[tuple[Path, str]]:
    return _by([plan.prompts_path(run, "train")], "prepare")


def _policies(paths: Iterable[str]) -> Iterator[tuple[Path, str]]:
    return ((Path(path), "warmup" if Path(path).parents[1].name == "warmups" else "train") for path in paths)


def _by(paths: Iterable[str | Path], stage: str) -> Iterator[tuple[Path, str]]:
    return ((Path(path), stage) for path in paths)
