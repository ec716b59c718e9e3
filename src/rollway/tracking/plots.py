"""The learning curves as pictures among a run's artifacts, as the report draws them."""

import tempfile
from collections.abc import Collection
from pathlib import Path

from rollway.report import data, picture

FOLDER = "plots"


def log_curves(uri: str, run_id: str, results: Path, runs: Collection[str]) -> None:
    """`plots/curves.svg` of the MLflow run: every standard curve of `runs`, a picture that browsers show in light and
    dark. Nothing where they have no figure yet."""
    from mlflow.tracking import MlflowClient

    drawn = picture.curves_of(results, runs)
    if not drawn:
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "curves.svg"
        path.write_text(drawn, encoding="utf-8")
        MlflowClient(tracking_uri=uri).log_artifact(run_id, str(path), FOLDER)


def seeds_of(results: Path, name: str) -> list[str]:
    """The runs of one entry of `runs:`."""
    return [run.run for run in data.read(results) if run.name == name]
