"""prepare: task source -> prompts, shared by all runs."""

from pathlib import Path

from rollway.runtime import phases
from rollway.runtime.notice import notice
from rollway.runtime.specs import PrepareSpec
from rollway.store import parquet


def run(spec: PrepareSpec, *, train: Path, heldout: Path) -> None:
    """Writes the prompts of both splits of one task."""
    from rollway import tasks

    phases.mark("work")
    prepared = tasks.prepare(spec.name, spec.task, Path.cwd())
    counts = {f"count.{name}": str(value) for name, value in sorted(prepared.counts.items())}
    phases.mark("write")
    parquet.write(train, prepared.train, "prompts", counts)
    parquet.write(heldout, prepared.heldout, "prompts", counts)
    notice(f"task {spec.name}: " + ", ".join(f"{name} {value}" for name, value in prepared.counts.items()))
