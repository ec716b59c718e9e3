"""curate: rollouts, scores and the method's SQL -> the batch to train on."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pyarrow as pa

from rollway import curation
from rollway.runtime.notice import notice
from rollway.runtime.paths import by_scorer
from rollway.runtime.specs import CurateSpec
from rollway.store import parquet
from rollway.store.atomic import write_json
from rollway.store.tables import SPAN


def run(
    spec: CurateSpec,
    *,
    prompts: Path,
    rollouts: list[Path],
    scores: list[Path],
    batch: Path,
    metrics: Path,
    threads: int = 1,
    memory: int = 2000,
) -> None:
    """Writes the narrow batch and what there is to say of the round's rewards. `memory` is in MB."""
    files = by_scorer(scores)

    def take(parts: Iterator[pa.Table]) -> None:
        first = next(parts)
        parts = chain([first], parts)
        span = [SPAN] if SPAN in first.column_names else []
        if spec.curate.teacher is None and not span:
            parquet.write_parts(batch, parts, "batch")
        else:
            parquet.write_groups(batch, parts, "batch", [*span, *spec.teacher_columns])

    figures = curation.curate_into(
        take,
        rollouts,
        files,
        spec.score,
        spec.curate,
        round=spec.round,
        prompts=[prompts],
        threads=threads,
        memory_limit=f"{memory}MB",
        given=curation.given_values(spec.curate, round=spec.round, seed=spec.seed),
        spill_in=batch.parent,
        teacher_columns=spec.teacher_columns,
    )
    figures |= curation.fault_shares(files, spec.score, spec.round)
    named = [{"step": 0, "name": name, "value": value} for name, value in sorted(figures.items())]
    write_json(metrics, {"round": spec.round, "stage": "curate", "metrics": named})
    rows, reward = int(figures["batch_rows"]), figures["reward_mean"]
    notice(f"round {spec.round}: {rows} rows to train on, mean reward {reward:.3f}{_refilled(figures)}")


def _refilled(found: dict[str, float]) -> str:
    """What dynamic sampling came to, where it took more than one pass."""
    passes = int(found["passes"])
    if passes == 1 or "groups_missing" not in found:
        return ""
    missing, surplus = int(found["groups_missing"]), int(found["groups_surplus"])
    more = f"; {surplus} groups beyond the prompt batch were cut" if surplus else ""
    return f"; after {passes} passes {missing} groups of the prompt batch are missing{more}"
