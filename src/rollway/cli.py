"""The command line. Nothing heavy is imported until a command needs it."""

import argparse
import os
import sys
from pathlib import Path

from rollway.errors import RollwayError
from rollway.printable import printable_lines

STAGES = (
    "prepare",
    "warmup",
    "reward_model",
    "rollout",
    "discriminator",
    "score",
    "curate",
    "train",
    "check_teacher",
    "evaluate",
    "lm_eval",
    "describe",
    "catalog",
    "track",
    "report",
)


def entry() -> None:
    """The `rollway` command: hands a stage to the warm worker where there is one, else runs it here."""
    argv = sys.argv[1:]
    socket = os.environ.get("ROLLWAY_WORKER", "")
    if socket and argv[:1] == ["stage"]:
        from rollway.runtime import client

        code = client.run(argv, socket)
        if code is not None:
            sys.exit(code)
    sys.exit(main(argv))


def main(argv: list[str]) -> int:
    """Runs one command and returns its exit code. Mistakes of the user become one sentence on stderr and 1."""
    if argv[:1] == ["stage"] and argv[1:2] and argv[1] in STAGES:
        from rollway.runtime.jobs import run_stage
        from rollway.runtime.openmp import spin_briefly

        spin_briefly()
        return run_stage(argv[1:])
    args = _parser().parse_args(argv)
    try:
        return _command(args)
    except RollwayError as error:
        print(printable_lines(f"rollway: error: {error}"), file=sys.stderr)
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rollway", description="Policy optimisation as a workflow. `snakemake` runs it."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    stage = commands.add_parser("stage", help="run one stage (what the workflow's jobs call)")
    stage.add_argument("name", choices=STAGES)

    sql = _with_results(commands.add_parser("sql", help="query every table of a results folder"))
    sql.add_argument("query", nargs="?", help="a SELECT; absent: a prompt, or the list where there is no terminal")
    sql.add_argument("-f", "--file", type=Path, help="read the query from a file; - is standard input")
    sql.add_argument("--list", nargs="?", const="", metavar="WORD", help="views, macros and examples (that name WORD)")
    sql.add_argument("--format", choices=("table", "csv", "json", "jsonl", "parquet"), default="table")
    sql.add_argument("--output", "--out", dest="out", type=Path, help="write here, not to stdout (needed for parquet)")

    show = _with_results(commands.add_parser("show", help="show one rollout: prompt, tokens, scores, advantage, group"))
    show.add_argument("rollout_id")
    show.add_argument(
        "--by", choices=("logprob", "entropy", "advantage", "ratio"), help="what colours the tokens (default: logprob)"
    )
    show.add_argument("--run", help="as this run sees it, where several have the rollout (a fork and its parent)")

    status = commands.add_parser("status", help="what of every run is there, what failed, what is stale and why")
    status.add_argument("--configfile", type=Path, default=Path("config/config.yaml"))
    status.add_argument("--results", type=Path, help="a results folder as it is, without its config")
    status.add_argument("--no-check", action="store_true", help="do not ask Snakemake what is stale (it takes seconds)")

    verify = _with_results(
        commands.add_parser("verify", help="check that a results folder is whole and agrees with itself")
    )
    verify.add_argument("--runs", nargs="+", metavar="RUN", help="only these, for example grpo-s0 (default: all)")
    verify.add_argument(
        "--rollouts",
        type=int,
        default=8,
        help="of each round, whose log-probs are computed again (default: 8; 0: none)",
    )
    verify.add_argument("--tolerance", type=float, help="nats by which log-probs may differ (default: by dtype)")

    differ = _with_results(commands.add_parser("diff", help="config and results of two runs side by side"))
    differ.add_argument("a", metavar="RUN", help="for example grpo-s0, or results/other/grpo-s0")
    differ.add_argument("b", metavar="RUN")

    table = _with_results(commands.add_parser("table", help="held-out accuracy of every run before and after"))
    table.set_defaults(command="table")

    report = _with_results(commands.add_parser("report", help="write the HTML report of a results folder again"))
    report.add_argument("--out", type=Path, help="write here (default: report.html in the results folder)")
    report.add_argument("--title", help="default: that of the page that is replaced")
    report.add_argument("--open", action="store_true", help="show it in the browser")

    serve = _with_results(commands.add_parser("serve", help="the report while a run goes on, for this machine alone"))
    serve.add_argument("--port", type=int, default=8765, help="0: any free one (default: 8765)")
    serve.add_argument("--title", help="default: that of report.html, where it is there")
    serve.add_argument("--open", action="store_true", help="show it in the browser")

    _add_comparisons(commands)

    prune = commands.add_parser("prune", help="delete weights and state of rounds that `keep:` does not name")
    prune.add_argument("--configfile", type=Path, default=Path("config/config.yaml"))
    prune.add_argument("--dry-run", "-n", action="store_true", help="only say what would go")

    imported = commands.add_parser("import", help="bring rollouts from elsewhere into a results folder")
    imported.add_argument("source", type=Path, help="JSONL or Parquet")
    imported.add_argument("--run", required=True, help="name they get in the tables")
    imported.add_argument(
        "--map", nargs="+", default=[], metavar="COLUMN=FIELD", help="rollway column=field of the source"
    )
    tools = ("trl", "verl", "open-instruct", "prime-rl", "lm-eval")
    imported.add_argument("--from", dest="tool", choices=tools, help="whose log it is; --map then only corrects")
    imported.add_argument("--filter", metavar="NAME", help="whose verdicts, where lm-eval logged several filters")
    imported.add_argument(
        "--models", nargs="+", default=[], metavar="NAME", help="columns named with {model} in --map, one per model"
    )
    imported.add_argument("--scorer", default="imported", help="scorer name for the rewards (default: imported)")
    imported.add_argument("--tokenizer", help="folder or hub name, to decode token ids where there is no text")
    _with_results(imported)

    _add_export(commands)

    track = _with_results(commands.add_parser("track", help="rebuild the MLflow projection from the metrics files"))
    track.add_argument("--rebuild", action="store_true", help="delete the runs' projection first")
    track.add_argument("--uri", default="sqlite:///mlflow.db")
    track.add_argument("--project", default="rollway")
    track.add_argument("--traces", type=int, default=4, help="rollouts of the last round shown as traces (default: 4)")
    track.add_argument("--usage", action="store_true", help="also seconds and memory of the stages")

    schema = commands.add_parser("schema", help="print the JSON schema of config.yaml or of a recipe")
    schema.add_argument("model", choices=("config", "recipe"))

    recipes = commands.add_parser("recipes", help="list the methods")
    recipes.set_defaults(command="recipes")
    return parser


def _add_comparisons(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    compare = _with_results(commands.add_parser("compare", help="final pass@k of all runs, with honest statistics"))
    compare.add_argument("--baseline", metavar="RUN", help="key in `runs:` that the others are compared with")
    compare.add_argument("--runs", nargs="+", metavar="RUN", help="only these keys of `runs:` (default: all)")
    compare.add_argument("--k", type=int, nargs="+", help="k of pass@k (default: 1 and 4 as far as samples allow)")
    compare.add_argument("--format", choices=("table", "csv", "json"), default="table")
    compare.add_argument("--svg", type=Path, help="also draw the learning curves into this file")

    gradients = _with_results(
        commands.add_parser("compare-gradients", help="gradients of several recipes on the same stored rollouts")
    )
    gradients.add_argument("--run", required=True, help="whose rollouts, for example grpo-s0")
    gradients.add_argument("--round", type=int, required=True)
    gradients.add_argument("--recipes", required=True, metavar="A,B,C", help="names of recipes, or keys of `runs:`")
    gradients.add_argument("--configfile", type=Path, help="take settings from this config, not from the run")
    gradients.add_argument("--at", choices=("same", "next"), default="same", help="policy: of this round or the next")
    gradients.add_argument("--format", choices=("table", "csv", "json", "parquet"), default="table")
    gradients.add_argument("--out", type=Path, help="write here instead of stdout (needed for parquet)")
    gradients.add_argument("--svg", type=Path, help="also draw the cosine matrix into this file")

    fit = _with_results(commands.add_parser("filter-fit", help="choose PF-PPO's filter on stored scored rollouts"))
    fit.add_argument("--run", required=True, help="whose rollouts, for example ppo-s0")
    fit.add_argument("--rounds", type=int, nargs="+", required=True, help="rounds that make one buffer")
    fit.add_argument("--reward", required=True, metavar="SCORER", help="what the filters rank by: a reward model")
    fit.add_argument("--truth", required=True, metavar="SCORER", help="the true score that reward should predict")
    fit.add_argument("--bins", type=int, default=6, help="groups of similar reward (default: 6, at most 20)")
    fit.add_argument("--high", type=float, help="also try filters by threshold: least reward of the top")
    fit.add_argument("--low", type=float, help="with --high: greatest reward of the bottom")
    fit.add_argument("--format", choices=("table", "csv", "json"), default="table")


def _add_export(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    export = commands.add_parser("export", help="a policy as a Hugging Face folder, or rollouts as a dataset")
    kinds = export.add_subparsers(dest="what", required=True, metavar="WHAT")

    model = _with_results(kinds.add_parser("model", help="weights, tokenizer and model card in a new folder"))
    model.add_argument("run", help="for example grpo-s0")
    model.add_argument("--round", type=int, help="of the policy (default: the last one with weights)")
    model.add_argument("--out", type=Path, required=True, help="new folder")
    model.add_argument("--adapter", action="store_true", help="a LoRA as it is, not merged into its base")
    model.add_argument("--register", metavar="NAME", help="also a version of this model in MLflow's registry")
    model.add_argument("--uri", default="sqlite:///mlflow.db", help="MLflow's, for --register")

    rollouts = _with_results(kinds.add_parser("rollouts", help="a dataset for other trainers: .jsonl or .parquet"))
    rollouts.add_argument("run", help="for example grpo-s0")
    rollouts.add_argument("--rounds", type=int, nargs="+", required=True)
    rollouts.add_argument("--as", dest="form", choices=("rows", "sft", "preference"), default="rows")
    rollouts.add_argument("--where", metavar="SQL", help="condition on the columns of `scored`, e.g. 'reward > 0.5'")
    rollouts.add_argument("--out", type=Path, required=True, help="file ending in .jsonl or .parquet")


def _with_results(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--results", type=Path, default=Path("results"), help="results folder (default: results)")
    return parser


def _command(args: argparse.Namespace) -> int:
    from rollway import commands

    match args.command:
        case "sql":
            commands.sql(args.results, args.query, args.file, args.format, args.out, listed=args.list)
        case "show":
            commands.show(args.results, args.rollout_id, args.by, args.run)
        case "status":
            commands.status(args.configfile, args.results, check=not args.no_check)
        case "verify":
            return commands.verify(args.results, args.runs, args.rollouts, args.tolerance)
        case "diff":
            commands.diff(args.results, args.a, args.b)
        case "table":
            commands.table(args.results)
        case "report":
            commands.report(args.results, args.out, args.title, show=args.open)
        case "serve":
            commands.serve(args.results, args.port, args.title, show=args.open)
        case "compare":
            commands.compare(args.results, args.baseline, args.k, args.format, args.svg, args.runs)
        case "compare-gradients":
            commands.compare_gradients(
                args.results,
                args.run,
                args.round,
                args.recipes.split(","),
                configfile=args.configfile,
                at=args.at,
                style=args.format,
                out=args.out,
                picture=args.svg,
            )
        case "filter-fit":
            commands.filter_fit(
                args.results,
                args.run,
                args.rounds,
                reward=args.reward,
                truth=args.truth,
                bins=args.bins,
                high=args.high,
                low=args.low,
                style=args.format,
            )
        case "prune":
            commands.prune(args.configfile, dry_run=args.dry_run)
        case "import":
            commands.import_rollouts(
                args.results,
                args.source,
                args.run,
                args.map,
                args.scorer,
                args.tokenizer,
                tool=args.tool,
                filter=args.filter,
                models=args.models,
            )
        case "export" if args.what == "model":
            commands.export_model(
                args.results,
                args.run,
                args.round,
                args.out,
                adapter=args.adapter,
                register=args.register,
                uri=args.uri,
            )
        case "export":
            commands.export_rollouts(args.results, args.run, args.rounds, args.form, args.out, args.where)
        case "track":
            commands.track(
                args.results,
                args.project,
                args.uri,
                rebuild=args.rebuild,
                traces=args.traces,
                usage=args.usage,
            )
        case "schema":
            commands.schema(args.model)
        case "recipes":
            commands.recipes()
    return 0
