"""score: rollouts -> one scorer's verdicts."""

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
    """Writes one row per rollout: reward, components, and the error where the scorer failed."""
    asked = parquet.read(prompts)
    tasks.require_answers(asked, {spec.scorer: spec.config})
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
    read = {name: _rewards(paths) for name, paths in by_scorer(needs).items()}
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


def _teacher(
    spec: ScoreSpec, config: TeacherScorer, prompts: pa.Table, rollouts: Path, needs: list[Path], scores: Path
) -> None:
    from rollway.scorers.teacher import columns, score_teacher

    if spec.policy is None:
        raise RollwayError(f"scorer {spec.scorer}: the spec names no `policy`, whose tokens are scored")
    with progress(f"score {spec.scorer}", parquet.rows(rollouts)):
        phases.mark("work")
        tables = score_teacher(
            spec.scorer,
            config,
            rollouts,
            prompts,
            needs={name: _rewards(paths) for name, paths in by_scorer(needs).items()},
            policy=Path(spec.policy),
            teacher=Path(spec.teacher) if spec.teacher else None,
            root=Path.cwd(),
        )
        parquet.write_groups(scores, tables, "scores", columns(config))


def _rewards(paths: list[Path]) -> dict[str, float]:
    table = parquet.read_many(paths, ["rollout_id", "reward"])
    return dict(zip(table.column("rollout_id").to_pylist(), table.column("reward").to_pylist(), strict=True))
