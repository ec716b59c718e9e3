"""track: metrics files -> MLflow, a projection that can be thrown away and rebuilt."""

from pathlib import Path

from rollway.runtime import phases
from rollway.runtime.specs import TrackSpec
from rollway.store.atomic import write_json


def run(spec: TrackSpec, *, run: Path, report: Path, tracked: Path) -> None:
    """Projects one run into MLflow and writes the digest of what was projected."""
    from rollway.tracking import mlflow_projection

    phases.mark("work")
    digest = mlflow_projection.project(
        run.parent.parent,
        spec.run,
        project=spec.project,
        uri=spec.uri,
        report=report,
        traces=spec.traces,
        usage=spec.usage,
    )
    write_json(tracked, {"projected": digest})
