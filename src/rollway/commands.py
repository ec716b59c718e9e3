"""The commands that people type: sql, show, table, prune, import, track, schema, recipes."""

import json
import shutil
import sys
from pathlib import Path

from rollway.config.base import ConfigError
from rollway.errors import RollwayError


def sql(results: Path, query: str | None, file: Path | None, style: str, out: Path | None) -> None:
    """Runs a query over all runs, read-only; without one, lists the tables and their columns."""
    from rollway.store import catalog

    _must_exist(results)
    if query and file:
        raise RollwayError("sql: give a query or --file, not both")
    if file:
        query = file.read_text(encoding="utf-8")
    if query is None:
        print(catalog.describe(results))
        return
    if style == "parquet" and out is None:
        raise RollwayError("sql: --format parquet needs --out FILE")
    text = catalog.run_sql(results, query, style, out)
    if out is None:
        print(text)


def show(results: Path, rollout_id: str) -> None:
    """Prints one rollout: prompt, completion, tokens with log-probs, scores, advantage and its group."""
    from rollway.store import show as shown

    _must_exist(results)
    print(shown.show(results, rollout_id, colour=sys.stdout.isatty()))


def table(results: Path) -> None:
    """Prints held-out accuracy of every run before and after."""
    from rollway.report.table import before_after_table

    _must_exist(results)
    print(before_after_table(results))


def prune(configfile: Path, *, dry_run: bool) -> None:
    """Deletes weights and state of the rounds that `keep:` does not name; policy.json and all tables stay."""
    from rollway.config import load_experiment
    from rollway.config.recipes import read_yaml
    from rollway.runtime import retention
    from rollway.runtime.plan import Plan

    plan = Plan(load_experiment(read_yaml(configfile)))
    freed = 0
    for folder in retention.prunable(plan):
        freed += sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(folder)
        if not dry_run:
            shutil.rmtree(folder)
    print(f"{'would free' if dry_run else 'freed'} {freed / 1e6:.1f} MB")


def import_rollouts(
    results: Path, source: Path, run: str, mapping: list[str], *, task: str, scorer: str, tokenizer: str | None
) -> None:
    """Writes rollouts from elsewhere, and their rewards, as round 0 of a new run of that name."""
    from rollway.store import importing, parquet

    folder = results / run / "r0000" / "p0"
    prompts = results / "tasks" / task / "train.parquet"
    for path in (folder, prompts):
        if path.exists():
            raise RollwayError(f"{path}: exists already; choose another --run or --task")
    decoder = None
    if tokenizer is not None:
        from transformers import AutoTokenizer

        decoder = AutoTokenizer.from_pretrained(tokenizer)
    pairs = dict(_pair(text) for text in mapping)
    imported = importing.import_rollouts(source, pairs, task=task, scorer=scorer, tokenizer=decoder)
    parquet.write(folder / "rollouts-000.parquet", imported.rollouts, "rollouts")
    if imported.scores.num_rows:
        parquet.write(folder / "scores" / f"{scorer}-000.parquet", imported.scores, "scores")
    parquet.write(prompts, imported.prompts, "prompts")
    print(f"{imported.rollouts.num_rows} rollouts of {imported.prompts.num_rows} prompts as run {run}")


def track(results: Path, project: str, uri: str, *, rebuild: bool) -> None:
    """Projects every run of the folder into MLflow."""
    from rollway.tracking import mlflow_projection

    _must_exist(results)
    for run in sorted(path.parent for path in results.glob("*/run.json")):
        report = results / "report.html"
        mlflow_projection.project(results, run.name, project=project, uri=uri, report=report, rebuild=rebuild)
        print(run.name)


def schema(model: str) -> None:
    """Prints the JSON schema that editors complete YAML with."""
    from rollway.config.schema import json_schema

    print(json.dumps(json_schema(model), indent=1))


def recipes() -> None:
    """Lists the methods with their papers."""
    from rollway.config.recipes import load_recipe, recipe_names

    for name in recipe_names():
        recipe = load_recipe(name)
        print(f"{name:<24} {recipe.title}  ({recipe.paper})")


def _pair(text: str) -> tuple[str, str]:
    column, equals, field = text.partition("=")
    if not equals or not column or not field:
        raise ConfigError(f"--map {text!r}: write COLUMN=FIELD, for example --map completion=response")
    return column, field


def _must_exist(results: Path) -> None:
    if not results.is_dir():
        raise RollwayError(f"{results}: no such results folder; run `snakemake --cores 2` first, or give --results")
