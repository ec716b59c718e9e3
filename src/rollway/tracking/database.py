"""MLflow's database where it is a file: made whole or not at all.

MLflow makes one by dozens of migrations, each of which commits: killed between two it leaves a file in which no later
MLflow gets any further.
"""

from pathlib import Path

from rollway.store.atomic import atomic_path


def prepare(uri: str) -> None:
    """Makes the SQLite file of `uri` where there is none yet; nothing for servers and other databases."""
    path = file_of(uri)
    if path is None or path.exists():
        return
    from mlflow.tracking import MlflowClient

    with atomic_path(path) as temporary:
        MlflowClient(tracking_uri=f"sqlite:///{temporary}")


def file_of(uri: str) -> Path | None:
    """The SQLite file that `uri` means, if any."""
    if not uri.startswith("sqlite:"):
        return None
    from sqlalchemy.engine import make_url

    database = make_url(uri).database
    return None if database in (None, "", ":memory:") else Path(database)
