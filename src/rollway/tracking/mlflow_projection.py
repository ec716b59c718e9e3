"""MLflow as a projection of the metrics files: it can be thrown away and rebuilt, and nothing reads it back.

One experiment per project; one parent run per entry of `runs:` (tag `rollway.group`), one child per seed, found by its
tag `rollway.key`. Metrics are logged at step = round. Each round's digest is kept as a tag: a round whose digest is
there already is not logged again, and when a digest has changed (the round was recomputed) the MLflow run is deleted
and built anew, so that curves have no ghosts.
"""

import hashlib
import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, unquote_plus

from rollway.errors import RollwayError
from rollway.runtime import phases
from rollway.store.catalog import open_catalog
from rollway.store.lineage import RUN_FILE, read_runs
from rollway.store.queries import rows as ask
from rollway.tracking import database
from rollway.tracking.plots import log_curves, seeds_of
from rollway.tracking.samples import delete_traces, log_traces, log_usage

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

KEY = "rollway.key"
GROUP = "rollway.group"
PARENT = "mlflow.parentRunId"
DEFAULT_URI = "sqlite:///mlflow.db"
DIGEST = "rollway.digest"
ROUND = "rollway.round."
UNFINISHED = "rollway.unfinished"
_BATCH = 900
_UNFIT = re.compile(r"[^\w\-. :/]")
_MAX_PARAM = 6000
_GROWING = ("rounds", "seeds", "keep")
"""Settings that may change without changing what was computed: as params they would force a rebuild."""
_STAGE_PREFIX = {"evaluate": "eval"}


@dataclass(frozen=True)
class Projection:
    """What MLflow is to show of one run. metrics: round -> metric key -> value; datasets: (name, context, path)."""

    run: str
    name: str
    """The entry of `runs:` that it is a seed of."""
    tags: dict[str, str]
    params: dict[str, str]
    metrics: dict[int, dict[str, float]]
    datasets: list[tuple[str, str, Path]]
    artifacts: list[Path]
    times: dict[int, int]

    def round_digest(self, round: int) -> str:
        """Of the values only: file times do not enter."""
        return _digest(self.metrics[round])

    def datasets_digest(self) -> str:
        return _digest([[name, context, file_digest(path)] for name, context, path in self.datasets])

    def fixed_digest(self) -> str:
        return _digest([self.params, self.tags])

    def digest(self) -> str:
        rounds = {str(round): self.round_digest(round) for round in self.metrics}
        return _digest([self.fixed_digest(), rounds, self.datasets_digest()])


def project(
    results: Path,
    run: str,
    *,
    project: str,
    uri: str,
    report: Path | None = None,
    rebuild: bool = False,
    traces: int = 0,
    usage: bool = False,
) -> str:
    """Brings the MLflow run of `run` up to date with its files and returns the digest of what was projected.

    The same files twice give the same histories. `rebuild` deletes and builds anew whatever is there. traces: so many
    rollouts of the last round become traces. usage: also seconds and memory of the stages, as measured. Where `uri` is
    the default, MLFLOW_TRACKING_URI goes before it; MLflow itself reads user and token of a server from the
    environment. Where MLflow is not installed a notice is printed and nothing happens; the digest is returned all the
    same. Raises RollwayError where MLflow cannot be reached or refuses.
    """
    wanted = collect(results, run, report)
    phases.mark("load")
    try:
        with _quiet():
            import mlflow  # noqa: F401
            from mlflow.tracking import MlflowClient  # noqa: F401
    except ImportError:
        print("rollway: mlflow is not installed, so nothing is tracked; `pip install mlflow` mends it", file=sys.stderr)
        return wanted.digest()
    phases.mark("work")
    uri = address(uri)
    with _quiet(), _in_words(uri):
        database.prepare(uri)
        new, run_id, parent, experiment = _begin(wanted, project, uri, rebuild)
        if new:
            log_curves(uri, run_id, results, [run])
            log_curves(uri, parent, results, seeds_of(results, wanted.name))
        if new and usage:
            log_usage(uri, run_id, results, run, new)
        if new:
            # Those of earlier rounds, or of the MLflow run that was here before, would pile up.
            delete_traces(uri, experiment, run)
        if new and traces:
            log_traces(uri, experiment, run_id, results, run, traces)
        _finish(wanted, uri, run_id)
    return wanted.digest()


def address(uri: str) -> str:
    """The tracking URI: of the environment where the config does not say one."""
    return os.environ.get("MLFLOW_TRACKING_URI", uri) if uri == DEFAULT_URI else uri


def register_version(folder: Path, run: str, name: str, uri: str, tags: dict[str, str]) -> str:
    """Makes an exported policy a new version of the registered model `name`; returns "NAME version N".

    Its files become artifacts (`model/`) of the MLflow run that shows `run`. Raises RollwayError where there is none.
    """
    uri = address(uri)
    with _quiet(), _in_words(uri):
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        found = client.search_runs(experiments, f"tags.`{KEY}` = '{run}'")
        if not found:
            shown = _without_password(uri, uri)
            raise RollwayError(f"{shown}: shows no run {run}; run `rollway track --uri {shown}` first")
        run_id = found[0].info.run_id
        client.log_artifacts(run_id, str(folder), "model")
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise RollwayError(f"--register {name}: {_without_password(error.message, uri)}") from error
        source = f"{found[0].info.artifact_uri}/model"
        version = client.create_model_version(name, source, run_id, tags=tags)
    return f"{name} version {version.version}"


def collect(results: Path, run: str, report: Path | None = None) -> Projection:
    """Reads what is to be shown of `run`: its files, and its parent's where it is a fork."""
    info = read_runs(results).get(run, {})
    with open_catalog(results, of=[run]) as catalog:
        metrics = "SELECT round, stage, step, name, value FROM seen_metrics WHERE run = ? ORDER BY ALL"
        rows = ask(catalog, metrics, run)
        homes = ask(catalog, "SELECT DISTINCT round, home FROM seen_batch WHERE run = ? ORDER BY ALL", run)
    rounds = sorted({row[0] for row in rows})
    files = [results / run / RUN_FILE, *([report] if report else [])]
    tasks = sorted((results / "tasks" / str(info.get("task", ""))).glob("*.parquet")) if info.get("task") else []
    datasets = [(f"{info['task']}-{path.stem}", _split_context(path.stem), path) for path in tasks]
    datasets += [
        (f"batch-r{round:04d}", "training", results / home / f"r{round:04d}" / "batch.parquet") for round, home in homes
    ]
    facts = {
        k: info[k] for k in ("recipe", "seed", "task", "warmup", "parent", "fork_round", "fork_stage") if k in info
    }
    return Projection(
        run=run,
        name=str(info.get("name") or run),
        tags={f"rollway.{k}": str(v) for k, v in facts.items() if v is not None},
        params=flatten({k: v for k, v in (info.get("config") or {}).items() if k not in _GROWING}),
        metrics={round: _of_round([row[1:] for row in rows if row[0] == round]) for round in rounds},
        datasets=datasets,
        artifacts=[path for path in files if path.is_file()],
        times={round: _file_time(results, run, round) for round in rounds},
    )


def flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """A nested config as dotted keys; lists and scalars as JSON text."""
    if isinstance(value, dict) and value:
        return {k: v for name, inner in value.items() for k, v in flatten(inner, f"{prefix}{name}.").items()}
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return {prefix.rstrip("."): text[:_MAX_PARAM]} if prefix else {}


def file_digest(path: Path) -> str:
    """First 16 hex digits of the file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _of_round(rows: list[tuple[str, int, str, float | None]]) -> dict[str, float]:
    """Metric keys with the stage in front. Of several steps: their mean, and the last as `NAME.last`."""
    values: dict[str, list[float]] = {}
    for stage, _, name, value in rows:
        if value is not None:
            plain = _UNFIT.sub("_", name.removeprefix(f"{stage}/").replace("@", "_at_"))
            values.setdefault(f"{_STAGE_PREFIX.get(stage, stage)}/{plain}", []).append(value)
    metrics = {}
    for key, steps in sorted(values.items()):
        metrics[key] = sum(steps) / len(steps)
        if len(steps) > 1:
            metrics[f"{key}.last"] = steps[-1]
    return metrics


def _begin(wanted: Projection, project: str, uri: str, rebuild: bool) -> tuple[list[int], str, str, str]:
    """Logs what is new but for its digests: an MLflow run that stays without them is built anew next time. Returns the
    rounds that were new and the ids of the MLflow run, of its parent and of the experiment."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = _experiment(client, project, uri)
    found = client.search_runs([experiment], f"tags.`{KEY}` = '{wanted.run}'", order_by=["attributes.start_time"])
    rounds, fixed = _round_digests(wanted), _fixed_digests(wanted)
    parent = _parent(client, experiment, wanted)
    current = found[0] if len(found) == 1 else None
    files = {(name, file_digest(path)) for name, _, path in wanted.datasets}
    if current is None or rebuild or not _extends(current, rounds, fixed[DIGEST], files):
        for old in found:
            client.delete_run(old.info.run_id)
        start = min(wanted.times.values(), default=0)
        tags = {**wanted.tags, KEY: wanted.run, UNFINISHED: "true", PARENT: parent}
        current = client.create_run(experiment, start_time=start, tags=tags, run_name=wanted.run)
        _log_params(client, current.info.run_id, wanted.params)
    run_id, known = current.info.run_id, current.data.tags
    if known.get(PARENT) != parent:
        client.set_tag(run_id, PARENT, parent)
    new = [round for round in wanted.metrics if f"{ROUND}{round:04d}" not in known]
    if new or known.get(f"{DIGEST}.datasets") != fixed[f"{DIGEST}.datasets"]:
        client.set_tag(run_id, UNFINISHED, "true")
    _log_metrics(client, run_id, wanted, new)
    _log_datasets(client, run_id, wanted)
    for path in wanted.artifacts:
        client.log_artifact(run_id, str(path))
    return new, run_id, parent, experiment


def _finish(wanted: Projection, uri: str, run_id: str) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    known = client.get_run(run_id).data.tags
    for name, value in {**_round_digests(wanted), **_fixed_digests(wanted)}.items():
        if known.get(name) != value:
            client.set_tag(run_id, name, value)
    if UNFINISHED in known:
        client.delete_tag(run_id, UNFINISHED)
    client.set_terminated(run_id, "FINISHED", max(wanted.times.values(), default=0))


def _round_digests(wanted: Projection) -> dict[str, str]:
    return {f"{ROUND}{round:04d}": wanted.round_digest(round) for round in wanted.metrics}


def _fixed_digests(wanted: Projection) -> dict[str, str]:
    return {DIGEST: wanted.fixed_digest(), f"{DIGEST}.datasets": wanted.datasets_digest()}


def _parent(client: "MlflowClient", experiment: str, wanted: Projection) -> str:
    """The MLflow run that the seeds of one entry of `runs:` are children of; it has tags and no figures of its own."""
    found = client.search_runs([experiment], f"tags.`{GROUP}` = '{wanted.name}'")
    if found:
        return str(found[0].info.run_id)
    tags = {GROUP: wanted.name, **{k: v for k, v in wanted.tags.items() if k != "rollway.seed"}}
    start = min(wanted.times.values(), default=0)
    run = client.create_run(experiment, start_time=start, tags=tags, run_name=wanted.name)
    client.set_terminated(run.info.run_id, "FINISHED", start)
    return str(run.info.run_id)


def _extends(current: "Run", rounds: dict[str, str], fixed: str, files: set[tuple[str, str]]) -> bool:
    """Whether what MLflow holds is a beginning of what is wanted, so that only what is new needs logging."""
    known = current.data.tags
    logged = {name: value for name, value in known.items() if name.startswith(ROUND)}
    same = all(rounds.get(name) == value for name, value in logged.items())
    return same and known.get(DIGEST) == fixed and UNFINISHED not in known and _datasets_of(current) <= files


def _datasets_of(run: "Run") -> set[tuple[str, str]]:
    return {(i.dataset.name, i.dataset.digest) for i in run.inputs.dataset_inputs}


def _experiment(client: "MlflowClient", project: str, uri: str) -> str:
    experiment = client.get_experiment_by_name(project)
    if experiment is not None:
        if experiment.lifecycle_stage == "deleted":
            client.restore_experiment(experiment.experiment_id)
        return str(experiment.experiment_id)
    location = None
    if uri.startswith("sqlite:///"):
        location = (Path(uri.removeprefix("sqlite:///")).resolve().parent / "mlruns" / project).as_uri()
    return str(client.create_experiment(project, artifact_location=location))


def _log_params(client: "MlflowClient", run_id: str, params: dict[str, str]) -> None:
    from mlflow.entities import Param

    rows = [Param(key, value) for key, value in sorted(params.items())]
    for start in range(0, len(rows), 100):
        client.log_batch(run_id, params=rows[start : start + 100])


def _log_metrics(client: "MlflowClient", run_id: str, wanted: Projection, rounds: list[int]) -> None:
    from mlflow.entities import Metric

    rows = [
        Metric(key, value, wanted.times[round], round)
        for round in rounds
        for key, value in wanted.metrics[round].items()
    ]
    for start in range(0, len(rows), _BATCH):
        client.log_batch(run_id, metrics=rows[start : start + _BATCH])


def _log_datasets(client: "MlflowClient", run_id: str, wanted: Projection) -> None:
    import pyarrow.parquet as pq
    from mlflow.entities import Dataset, DatasetInput, InputTag

    known = _datasets_of(client.get_run(run_id))
    inputs = []
    for name, context, path in wanted.datasets:
        digest = file_digest(path)
        if (name, digest) in known:
            continue
        file = pq.read_metadata(path)
        columns = [{"name": field.name, "type": str(field.type)} for field in file.schema.to_arrow_schema()]
        dataset = Dataset(
            name,
            digest,
            "local",
            json.dumps({"uri": str(path)}),
            schema=json.dumps({"mlflow_colspec": _colspec(columns)}),
            profile=json.dumps({"num_rows": file.num_rows}),
        )
        inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", context)]))
    if inputs:
        client.log_inputs(run_id, inputs)


def _colspec(columns: list[dict[str, str]]) -> list[dict[str, Any]]:
    kinds = {"string": "string", "int32": "integer", "double": "double", "bool": "boolean", "float": "float"}
    return [{"name": c["name"], "type": kinds.get(c["type"], "string"), "required": True} for c in columns]


def _split_context(split: str) -> str:
    return "training" if split == "train" else "evaluation"


def _file_time(results: Path, run: str, round: int) -> int:
    """Milliseconds of the round's newest metrics file, for MLflow's time axis; 0 where the files are a parent's."""
    files = [
        *(results / run / f"r{round:04d}" / name for name in ("curate.json", "evals.json")),
        results / run / f"r{round + 1:04d}" / "metrics.json",
    ]
    return max((int(path.stat().st_mtime * 1000) for path in files if path.is_file()), default=0)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def _quiet() -> Iterator[None]:
    """MLflow and alembic write pages of INFO on first use of a database, and MLflow phones home unless told not to."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    os.environ.setdefault("MLFLOW_ENABLE_ASYNC_TRACE_LOGGING", "false")
    names = ("mlflow", "alembic", "alembic.runtime.migration", "mlflow.store.db.utils", "mlflow.tracking")
    levels = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def _in_words(uri: str) -> Iterator[None]:
    """What MLflow says went wrong (an unreachable server, a refusal, a damaged database) as one RollwayError."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except ImportError as error:
        # A driver that the address asks for: SQLAlchemy imports it when it is first needed.
        raise RollwayError(
            f"MLflow at {_without_password(uri, uri)} needs the Python module {error.name or error}, which is not "
            "installed here. What was computed is there: install it, or mend `mlflow.uri`, and run again (`rollway "
            "track`), or set `mlflow: {enabled: false}`"
        ) from error
    except (MlflowException, SQLAlchemyError, OSError) as error:
        first = _without_password(str(error).strip(), uri).partition("\n")[0][:300]
        file = database.file_of(uri)
        place = "`mlflow.uri` or the server" if file is None else f"{file}, or move it away (a new one is made),"
        raise RollwayError(
            f"MLflow at {_without_password(uri, uri)}: {first}. What was computed is there: mend {place} "
            "and run again (`rollway track`), or set `mlflow: {enabled: false}`"
        ) from error


_WHO = re.compile(r"//(?:[^\s/@:]*:(?![0-9]+(?:[/?#\s]|$))(?:(?!://).)*|[^\s/@:]*:\S*|[^\s/@]*)@")
"""User and password in a text: a password may hold a /, an @ or a gap, and reaches to the last @ of its line. A port is
none."""


def _without_password(text: str, address: str = "") -> str:
    """Addresses without user, password and query, any of which may be a secret.

    address: one that the text may hold, of which it is thus known where it ends.
    """
    if address:
        known = re.sub(r"//(?:[^/@:]*:.*|[^/@]*)@", "//", address, flags=re.DOTALL)
        text = text.replace(address, re.sub(r"[?#].*", "", known, flags=re.DOTALL))
        for secret in _secrets_of(address):
            text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", "***", text)
    return re.sub(r"(://[^\s'\"?#]*)[?#][^\s'\")\]]*", r"\1", _WHO.sub("//", text))


def _secrets_of(address: str) -> list[str]:
    """What an address holds behind its path, and its password, or a user without one, as they stand there and decoded,
    longest first: messages repeat them without the address around them. Shorter ones than four characters, and short
    values under names that are no secrets (`sslmode=require`), are found in the address alone."""
    who = re.match(r"[^/]*//(?:([^/@:]*):(.*)|([^/@]*))@", address, flags=re.DOTALL)
    _, _, behind = (address if who is None else address[who.end() :]).partition("?")
    query, _, fragment = behind.partition("#")
    fragment = fragment or address.partition("#")[2]
    pairs = [pair.partition("=")[::2] for pair in query.split("&")]
    values = [value or name for name, value in pairs if not value or len(value) >= 8 or _SECRET.search(name)]
    held = [fragment, *([] if who is None else [who[2] or who[3] or ""]), *values]
    forms = {form for text in held for form in (text, unquote(text), unquote_plus(text)) if len(form) >= 4}
    return sorted(forms, key=len, reverse=True)


_SECRET = re.compile(r"key|token|secret|pass|pwd|auth|sig|cred", re.IGNORECASE)
