"""Runs one stage job: parses its command line from the stage's own signature, keeps its log, accounts for its time."""

import argparse
import importlib
import inspect
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TextIO

from rollway.errors import RollwayError
from rollway.runtime import phases

COMPUTE_STAGES = ("warmup", "reward_model", "rollout", "train", "evaluate", "lm_eval")
"""Stages that run a model: they hold a GPU where there is one, and are given torch's threads. So does score where
its scorer is a reward model."""


def run_stage(argv: list[str]) -> int:
    """Runs `stage NAME --spec JSON --log FILE --<file> PATH ...` and returns the exit code."""
    began, starting = time.time(), phases.since_start()
    phases.begin()
    name = argv[0]
    stage: Callable[..., None] = importlib.import_module(f"rollway.stages.{name}").run
    args = vars(_parser(name, stage).parse_args(argv[1:]))
    log_path: Path | None = args.pop("log")
    with _log(log_path) as log:
        code = _guarded(name, stage, args, log)
    if log_path is not None and code == 0:
        _write_usage(log_path, began, starting)
    return code


def _guarded(name: str, stage: Callable[..., None], args: dict[str, Any], log: TextIO) -> int:
    from rollway.runtime import specs

    try:
        spec = specs.load(name, args.pop("spec"))
        with _device(name, spec, args):
            phases.enter()
            stage(spec, **args)
        return 0
    except RollwayError as error:
        message = f"rollway: error: stage {name}: {error}"
    except KeyboardInterrupt:
        message = f"rollway: stage {name} was interrupted"
    except Exception:
        message = (
            f"rollway: stage {name} failed; this is a mistake in rollway or in code it calls\n{traceback.format_exc()}"
        )
    print(message, file=sys.stderr)
    print(message, file=log, flush=True)
    return 1


def _device(name: str, spec: Any, args: dict[str, Any]) -> AbstractContextManager[None]:
    """What the job computes on; takes `threads` out of `args` where the stage itself has no use for it."""
    if name not in COMPUTE_STAGES and not (name == "score" and spec.config.kind in ("reward_model", "teacher")):
        return nullcontext()
    from rollway.runtime.device import compute

    match name:
        case "rollout":
            engine = spec.rollout.engine
        case "evaluate":
            engine = spec.engine
        case _:
            engine = None
    return compute(args.pop("threads") if name in COMPUTE_STAGES else args["threads"], engine)


def _parser(name: str, stage: Callable[..., None]) -> argparse.ArgumentParser:
    """One option per keyword of the stage's `run`: a path, a list of paths, or a number."""
    parser = argparse.ArgumentParser(prog=f"rollway stage {name}", description=inspect.getdoc(stage))
    parser.add_argument("--spec", required=True, help="the stage's settings as JSON")
    parser.add_argument("--log", type=Path, help="file for messages; the time used is written beside it")
    if name in COMPUTE_STAGES:
        parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    for key, parameter in list(inspect.signature(stage, eval_str=True).parameters.items())[1:]:
        option = "--" + key.replace("_", "-")
        if parameter.annotation == list[Path]:
            parser.add_argument(option, type=Path, nargs="*", default=[])
        else:
            required = parameter.default is inspect.Parameter.empty
            parser.add_argument(
                option, type=parameter.annotation, required=required, default=None if required else parameter.default
            )
    return parser


def _log(path: Path | None) -> TextIO:
    if path is None:
        return open(os.devnull, "w")
    path.parent.mkdir(parents=True, exist_ok=True)
    return open(path, "w", encoding="utf-8")


def _write_usage(log_path: Path, began: float, starting: float | None) -> None:
    """Time and memory beside the log: never in a results file, whose bytes must not depend on them."""
    main = sys.modules["__main__"].__spec__
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    spent = phases.seconds()
    usage = {
        "began": round(began, 4),
        "seconds": round(sum(spent.values()), 4),
        "cpu_seconds": round(sum(u.ru_utime + u.ru_stime for u in used), 4),
        "peak_rss_mb": round(max(u.ru_maxrss for u in used) / 1024, 1),
        "starting": None if starting is None else round(starting, 2),
        "phases": {phase: round(seconds, 4) for phase, seconds in spent.items()},
        "warm": main is not None and main.name == "rollway.runtime.worker",
    }
    log_path.with_suffix(".usage.json").write_text(json.dumps(usage) + "\n")
