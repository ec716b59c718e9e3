"""The commands that people type: sql, show, table, compare, prune, import, track, schema, recipes and more."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rollway.config.base import ConfigError
from rollway.errors import RollwayError

if TYPE_CHECKING:
    from rollway.exporting.rollouts import Form


def sql(
    results: Path, query: str | None, file: Path | None, style: str, out: Path | None, *, listed: str | None = None
) -> None:
    """Runs a query over all runs, read-only; without one, a prompt at a terminal, and elsewhere what can be asked.

    listed: only list the views and macros, those that have this word.
    """
    from rollway.store import catalog

    _must_exist(results)
    if query and file:
        raise RollwayError("sql: give a query or --file, not both")
    if listed is not None:
        print(catalog.describe(results, listed))
        return
    if file:
        try:
            query = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RollwayError(f"sql: {file}: cannot be read ({error})") from None
    if query is None:
        if sys.stdin.isatty() and sys.stdout.isatty():
            from rollway.terminal import prompt

            prompt.run(results)
        else:
            print(catalog.describe(results))
        return
    if style == "parquet" and out is None:
        raise RollwayError("sql: --format parquet needs --output FILE")
    text = catalog.run_sql(results, query, style, out, name=str(file) if file and str(file) != "-" else "")
    if out is None:
        from rollway.printable import printable_lines

        print(printable_lines(text) if sys.stdout.isatty() else text)


def show(results: Path, rollout_id: str, by: str | None = None, run: str | None = None) -> None:
    """Prints one rollout: prompt, completion, tokens with log-probs, scores, advantage and its group.

    by: what the tokens of the completion are coloured by at a terminal; elsewhere it is checked, and text is plain.
    """
    from rollway.store import show as shown

    _must_exist(results)
    print(shown.show(results, rollout_id, colour=sys.stdout.isatty(), by=by, run=run))


def status(configfile: Path, results: Path | None, *, check: bool) -> None:
    """Prints what of every run is there, what is missing or failed and, unless told not to, what is stale and why.

    results: that folder as it is, whatever config made it; then nothing is known of what is stale.
    """
    from rollway.terminal import status as shown

    if results is not None:
        from rollway.runtime import status as files

        _must_exist(results)
        states = files.of_folder(results)
        print(shown.runs_table(states) if states else f"{results}: there is no run in this folder yet")
        print("\n".join(shown.notes(states)), end="\n" if shown.notes(states) else "")
        return
    from rollway.config import load_experiment
    from rollway.config.recipes import read_yaml
    from rollway.runtime import status as files
    from rollway.runtime.plan import Plan

    plan = Plan(load_experiment(read_yaml(configfile)))
    states = files.of_plan(plan)
    print(shown.runs_table(states))
    said = shown.notes(states)
    said += [f"not of this config: {', '.join(others)}"] if (others := files.others(plan, list(plan.runs))) else []
    said += [held] if (held := shown.at_work(Path.cwd())) else []
    print("\n".join(said), end="\n" if said else "", flush=True)
    if check:
        from rollway.runtime import stale

        print("\n".join(shown.outlook_lines(stale.outlook(configfile))))


def verify(results: Path, runs: list[str] | None, rollouts: int, tolerance: float | None) -> int:
    """Prints what is wrong with a results folder and how to mend it, a line each; 1 where something is."""
    from rollway import verification

    found = verification.verify(results, runs, rollouts=rollouts, tolerance=tolerance)
    for finding in found.findings:
        print(finding)
    looked = f"{found.files} files, {found.rounds} rounds, {found.batches} batches made again, "
    looked += f"log-probs of {found.recomputed} rollouts computed again"
    looked += f" (largest difference {found.largest:.2g} nats)" if found.recomputed else ""
    for why, times in sorted(found.left_out.items()):
        print(f"not checked: {times} {why}")
    print(f"{results}: {looked}: {len(found.findings) or 'nothing'} wrong")
    return 1 if found.findings else 0


def diff(results: Path, a: str, b: str) -> None:
    """Prints what was asked of two runs and what came of it, side by side."""
    from rollway.comparison import diff as compared

    print(compared.text(compared.diff(results, a, b)))


def table(results: Path) -> None:
    """Prints held-out accuracy of every run before and after."""
    from rollway.report.table import before_after_table

    _must_exist(results)
    print(before_after_table(results))


def report(results: Path, out: Path | None, title: str | None, *, show: bool) -> None:
    """Writes the report of a results folder, of what is there now, and shows it."""
    from rollway.report import build, serve, usage

    _must_exist(results)
    page = out or results / "report.html"
    build.build(results, page, title=title or build.title_of(results), logs=usage.logs_of(results))
    print(f"{page}: {page.stat().st_size / 1e6:.1f} MB")
    if show:
        serve.open_page(page.resolve().as_uri())


def serve(results: Path, port: int, title: str | None, *, show: bool) -> None:
    """Shows the report of a results folder while it grows, on 127.0.0.1, until interrupted."""
    from rollway.report import build
    from rollway.report.serve import serve as serving

    _must_exist(results)
    serving(results, port, title or build.title_of(results), show=show)


def compare(
    results: Path,
    baseline: str | None,
    ks: list[int] | None,
    style: str,
    picture: Path | None,
    names: list[str] | None = None,
) -> None:
    """Prints every run's final pass@k and its paired difference from a baseline; draws the learning curves."""
    from rollway.comparison import render, runs
    from rollway.store.atomic import write_text
    from rollway.store.queries import as_text

    _must_exist(results)
    comparison = runs.compare_runs(results, baseline, ks, names)
    print(render.runs_table(comparison) if style == "table" else as_text(runs.rows(comparison), style))
    if picture is not None:
        write_text(picture, render.curves_svg(comparison))


def compare_gradients(
    results: Path,
    run: str,
    round: int,
    recipes: list[str],
    *,
    configfile: Path | None,
    at: str,
    style: str,
    out: Path | None,
    picture: Path | None,
) -> None:
    """Prints norms, cosines and gated shares of several recipes' gradients on one round's rollouts."""
    import pyarrow.parquet as pq

    from rollway.comparison import gradients, render
    from rollway.config import load_experiment
    from rollway.config.recipes import read_yaml
    from rollway.store.atomic import atomic_path, write_text
    from rollway.store.queries import as_text

    _must_exist(results)
    if style == "parquet" and out is None:
        raise RollwayError("compare-gradients: --format parquet needs --out FILE")
    experiment = None if configfile is None else load_experiment(read_yaml(configfile))
    comparison = gradients.compare_gradients(results, run, round, recipes, experiment=experiment, at=at)
    text = render.gradients_table(comparison) if style == "table" else ""
    if style in ("csv", "json"):
        text = as_text(gradients.rows(comparison), style)
    if out is None:
        print(text)
    elif style == "parquet":
        with atomic_path(out) as temporary:
            pq.write_table(gradients.rows(comparison), temporary, compression="zstd")
    else:
        write_text(out, text + "\n")
    if picture is not None:
        write_text(picture, render.heat_map(comparison))


def filter_fit(
    results: Path,
    run: str,
    rounds: list[int],
    *,
    reward: str,
    truth: str,
    bins: int,
    high: float | None,
    low: float | None,
    style: str,
) -> None:
    """Prints how well reward predicts the true score under each of PF-PPO's filters, and which one that chooses."""
    from rollway.comparison import filters, render
    from rollway.store.queries import as_text

    _must_exist(results)
    comparison = filters.compare_filters(results, run, rounds, reward, truth, bins=bins, high=high, low=low)
    print(render.filters_table(comparison) if style == "table" else as_text(filters.rows(comparison), style))


def prune(configfile: Path, *, dry_run: bool) -> None:
    """Deletes weights and state of the rounds that `keep:` does not name; policy.json and all tables stay."""
    from rollway.config import load_experiment
    from rollway.config.recipes import read_yaml
    from rollway.runtime import retention
    from rollway.runtime.plan import Plan

    plan = Plan(load_experiment(read_yaml(configfile)))
    freed = 0
    for folder in retention.prunable(plan) if dry_run else retention.prune(plan):
        freed += sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(folder)
    print(f"{'would free' if dry_run else 'freed'} {freed / 1e6:.1f} MB")


def import_rollouts(
    results: Path,
    source: Path,
    run: str,
    mapping: list[str],
    scorer: str,
    tokenizer: str | None,
    *,
    tool: str | None,
    filter: str | None,
    models: list[str],
) -> None:
    """Writes rollouts from elsewhere, and their rewards, as round 0 of a run of that name."""
    from rollway.store import importing

    decoder = None
    if tokenizer is not None:
        from rollway.policies.causal_lm import load_tokenizer
        from rollway.policies.manifest import NamedPolicy

        decoder = load_tokenizer(tokenizer, NamedPolicy("base", base=tokenizer))
    pairs = dict(_pair(text) for text in mapping)
    done = importing.import_into(
        results, source, run, pairs, scorer=scorer, tokenizer=decoder, tool=tool, filter=filter, models=models
    )
    print(done)


def export_model(
    results: Path, run: str, round: int | None, out: Path, *, adapter: bool, register: str | None, uri: str
) -> None:
    """Writes a policy as a Hugging Face folder with a model card; with `register` also makes it a model version."""
    from rollway.exporting import model

    _must_exist(results)
    source = model.export_model(results, run, round, out, adapter=adapter)
    print(f"{out}: policy of {run} after {source.round} rounds")
    if register is not None:
        print(model.register(out, source, register, uri))


def export_rollouts(results: Path, run: str, rounds: list[int], form: "Form", out: Path, where: str | None) -> None:
    """Writes stored rollouts as a dataset of other trainers."""
    from rollway.exporting import rollouts

    _must_exist(results)
    count, remark = rollouts.export_rollouts(results, run, rounds, form, out, where=where)
    print(f"{out}: {count} rows" + (f" ({remark})" if remark else ""))


def track(results: Path, project: str, uri: str, *, rebuild: bool, traces: int, usage: bool) -> None:
    """Projects every run of the folder into MLflow."""
    from rollway.tracking import mlflow_projection

    _must_exist(results)
    for run in sorted(path.parent for path in results.glob("*/run.json")):
        report = results / "report.html"
        mlflow_projection.project(
            results,
            run.name,
            project=project,
            uri=uri,
            report=report,
            rebuild=rebuild,
            traces=traces,
            usage=usage,
        )
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
