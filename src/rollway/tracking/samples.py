"""What MLflow shows besides curves: a few rollouts as traces, and what the stages cost."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rollway.store.catalog import with_catalog

RUN = "rollway.run"
"""Tag of a trace: the run that its rollout is of."""

_SAMPLES = """
    SELECT s.rollout_id, s.round, p.messages, s.text, s.reward, s.advantage, s.correct, s.length, s.finish, p.answer
    FROM scored AS s
    JOIN (SELECT DISTINCT ON (prompt_id) prompt_id, messages, answer FROM prompts ORDER BY prompt_id, task) AS p
      ON s.prompt_id = p.prompt_id
    WHERE s.run = $run AND s.round = (SELECT max(round) FROM scored WHERE run = $run)
    QUALIFY row_number() OVER (ORDER BY s.reward DESC NULLS LAST, s.rollout_id) <= ceil($count / 2)
         OR row_number() OVER (ORDER BY s.reward ASC NULLS LAST, s.rollout_id DESC) <= floor($count / 2)
    ORDER BY s.reward DESC NULLS LAST, s.rollout_id"""


def samples(results: Path, run: str, count: int) -> list[dict[str, Any]]:
    """`count` rollouts of the last round: the best half and the worst half by reward."""
    params = {"run": run, "count": count}
    return with_catalog(
        results, lambda catalog: catalog.sql(_SAMPLES, params=params).to_arrow_table().to_pylist(), of=[run]
    )


def delete_traces(uri: str, experiment: str, run: str) -> None:
    """Every trace of `run` in the experiment, whichever MLflow run it was logged for.

    Raises OSError where MLflow keeps them.
    """
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    wanted = f"tags.`{RUN}` = '{run}'"
    while found := client.search_traces(locations=[experiment], filter_string=wanted, include_spans=False):
        if not client.delete_traces(experiment, trace_ids=[trace.info.trace_id for trace in found]):
            raise OSError(f"{len(found)} traces of run {run} are there still after they were deleted")


def log_traces(uri: str, experiment: str, run_id: str, results: Path, run: str, count: int) -> None:
    """Each rollout is one trace: the prompt's messages in, the completion out, its figures as attributes."""
    import mlflow
    from mlflow.tracking import MlflowClient

    mlflow.set_tracking_uri(uri)
    client = MlflowClient(tracking_uri=uri)
    for row in samples(results, run, count):
        figures = ("round", "reward", "advantage", "correct", "length", "finish", "answer")
        with _unnamed():
            span = client.start_trace(
                name=row["rollout_id"],
                span_type="LLM",
                inputs={"messages": json.loads(row["messages"])},
                attributes={name: row[name] for name in figures},
                tags={RUN: run, "rollway.round": str(row["round"])},
                experiment_id=experiment,
                run_id=run_id,
            )
            client.end_trace(span.trace_id, outputs={"completion": row["text"]})


@contextmanager
def _unnamed() -> Iterator[None]:
    """MLflow writes the login name of whoever runs it into every trace; its runs have none."""
    before = os.environ.get("LOGNAME")
    os.environ["LOGNAME"] = "rollway"
    try:
        yield
    finally:
        if before is None:
            del os.environ["LOGNAME"]
        else:
            os.environ["LOGNAME"] = before


def log_usage(uri: str, run_id: str, results: Path, run: str, rounds: list[int]) -> None:
    """Seconds, processor seconds and peak memory of each stage, as `usage/STAGE/...` at step = round."""
    from mlflow.entities import Metric
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    rows = [
        Metric(f"usage/{stage}/{name}", value, 0, round)
        for round in rounds
        for stage, figures in usage_of(results, run, round).items()
        for name, value in figures.items()
    ]
    for start in range(0, len(rows), 900):
        client.log_batch(run_id, metrics=rows[start : start + 900])


def usage_of(results: Path, run: str, round: int) -> dict[str, dict[str, float]]:
    """Stage -> what its jobs of one round cost together (memory: the largest), from the files beside the logs.

    The train job of a round writes its log into the next round's folder, as its policy.
    """
    logs = next((path for path in (results / "logs", results.parent / "logs") if path.is_dir()), None)
    if logs is None:
        return {}
    files = [path for path in sorted((logs / run / f"r{round:04d}").glob("*.usage.json")) if _stage(path) != "train"]
    files += sorted((logs / run / f"r{round + 1:04d}").glob("train*.usage.json"))
    found: dict[str, dict[str, float]] = {}
    for path in files:
        job = json.loads(path.read_text(encoding="utf-8"))
        total = found.setdefault(_stage(path), {"seconds": 0.0, "cpu_seconds": 0.0, "peak_rss_mb": 0.0})
        total["seconds"] += job["seconds"]
        total["cpu_seconds"] += job["cpu_seconds"]
        total["peak_rss_mb"] = max(total["peak_rss_mb"], job["peak_rss_mb"])
    return found


def _stage(path: Path) -> str:
    return path.name.partition(".")[0].partition("-")[0]
