"""score: rollouts -> one scorer's verdicts."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa

from rollway import scorers, tasks
from rollway.config.scorers import TeacherScorer
from rollway.errors import RollwayError
from rollway.runtime import phases
from rollway.runtime.notice import progress
from rollway.runtime.paths import by_scorer
from rollway.runtime.specs import ScoreSpec
from rollway.scorers import texts
from rollway.scorers.rows import COLUMNS
from rollway.store import parquet


def run(
    spec: ScoreSpec,
    *,
    prompts: Path,
    rollouts: Path,
    needs: list[Path],
    scores: Path,
    cache: Path,
    threads: int = 1,
) -> None:
    """Writes one row per rollout: reward, components, and the error where the scorer failed.

    Where more rows fail than may, what was scored goes into the folder `failed` beside the file that is not written.
    """
    asked = parquet.read(prompts)
    tasks.require_answers(asked, {spec.scorer: spec.config})
    with _kept(scores):
        _write(spec, asked, rollouts, needs, scores, cache, threads)


def _write(
    spec: ScoreSpec, asked: pa.Table, rollouts: Path, needs: list[Path], scores: Path, cache: Path, threads: int
) -> None:
    if isinstance(spec.config, scorers.TextScorer):
        parts = parquet.read_in_parts(rollouts, texts.COLUMNS)
        with progress(f"score {spec.scorer}", parquet.rows(rollouts)):
            phases.mark("work")
            verdicts = scorers.score_texts(spec.scorer, spec.config, parts, asked)
        phases.mark("write")
        parquet.write(scores, verdicts, "scores")
        return
    if isinstance(spec.config, TeacherScorer):
        _teacher(spec, spec.config, asked, rollouts, needs, scores)
        return
    # Token ids are many; only what a user's own function or a judge's prompt may name is read of them.
    columns = COLUMNS if spec.config.kind in ("python", "judge") else [c for c in COLUMNS if c != "tokens"]
    rows = scorers.join(parquet.read(rollouts, columns), asked)
    read = {name: rewards_of(paths) for name, paths in by_scorer(needs).items()}
    with progress(f"score {spec.scorer}", len(rows)):
        phases.mark("work")
        verdicts = scorers.score(
            spec.scorer,
            spec.config,
            rows,
            needs=read,
            threads=threads,
            root=Path.cwd(),
            cache=cache,
            trained=Path(spec.trained) if spec.trained else None,
        )
    phases.mark("write")
    parquet.write(scores, verdicts, "scores")


@contextmanager
def _kept(scores: Path) -> Iterator[None]:
    place = scores.parent / "failed" / scores.name
    try:
        yield
    except scorers.ScorerFailed as error:
        parquet.write(place, error.scores, "scores")
        raise RollwayError(f"{error}. What was scored until then is in {place}") from None
    # What an earlier attempt left there is out of date now.
    place.unlink(missing_ok=True)
    with suppress(OSError):
        place.parent.rmdir()


def _teacher(
    spec: ScoreSpec, config: TeacherScorer, prompts: pa.Table, rollouts: Path, needs: list[Path], scores: Path
) -> None:
    from rollway.scorers.teacher import columns, score_teacher

    if spec.policy is None:
        raise RollwayError(f"scorer {spec.scorer}: the spec names no `policy`, whose tokens are scored")
    files = by_scorer(needs)
    with progress(f"score {spec.scorer}", parquet.rows(rollouts)):
        phases.mark("work")
        tables = score_teacher(
            spec.scorer,
            config,
            rollouts,
            prompts,
            needs={name: rewards_of(paths) for name, paths in files.items()},
            policy=Path(spec.policy),
            teacher=Path(spec.teacher) if spec.teacher else None,
            root=Path.cwd(),
            feedback=feedback_of([files[name] for name in config.needs if name in files]),
        )
        parquet.write_groups(scores, tables, "scores", columns(config))


def feedback_of(scorers: list[list[Path]]) -> dict[str, str | None]:
    """By rollout_id what the first scorer that writes any wrote; nothing where none does."""
    for paths in scorers:
        if all("feedback" in parquet.names(path) for path in paths):
            table = parquet.read_many(paths, ["rollout_id", "feedback"])
            return dict(zip(table.column("rollout_id").to_pylist(), table.column("feedback").to_pylist(), strict=True))
    return {}


def rewards_of(paths: list[Path]) -> dict[str, float]:
    table = parquet.read_many(paths, ["rollout_id", "reward"])
    return dict(zip(table.column("rollout_id").to_pylist(), table.column("reward").to_pylist(), strict=True))
