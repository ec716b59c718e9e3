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
from contextlib import AbstractContextManager, nullcontext, suppress
from io import FileIO
from pathlib import Path
from typing import Any

from rollway.errors import RollwayError, of_system, unwritten
from rollway.printable import printable_lines
from rollway.runtime import phases
from rollway.runtime.notice import notice

COMPUTE_STAGES = ("warmup", "reward_model", "discriminator", "rollout", "train", "check_teacher", "evaluate", "lm_eval")
"""Stages that run a model: they hold a GPU where there is one, and are given torch's threads. So does score where
its scorer runs one."""


def run_stage(argv: list[str]) -> int:
    """Runs `stage NAME --spec JSON --log FILE --<file> PATH ...` and returns the exit code."""
    began, starting = time.time(), phases.since_start()
    phases.begin()
    name = argv[0]
    stage: Callable[..., None] = importlib.import_module(f"rollway.stages.{name}").run
    args = vars(_parser(name, stage).parse_args(argv[1:]))
    log_path: Path | None = args.pop("log")
    try:
        log = _log(log_path)
    except OSError as error:
        print(f"rollway: error: stage {name}: {unwritten(log_path or Path(os.devnull), error)}", file=sys.stderr)
        return 1
    with log:
        code = _guarded(name, stage, args, log)
    if log_path is not None and code == 0:
        _write_usage(log_path, began, starting)
    return code


def _guarded(name: str, stage: Callable[..., None], args: dict[str, Any], log: FileIO) -> int:
    from rollway.runtime import spec_files, specs
    from rollway.store import provenance

    try:
        spec = specs.load(name, args.pop("spec"))
        read = {role: args[role] for role in provenance.READ.get(name, ())}
        read |= spec_files.of_spec(name, spec)
        with _device(name, spec, args), provenance.made_from(read):
            phases.enter()
            stage(spec, **args)
        return 0
    except RollwayError as error:
        message = f"rollway: error: stage {name}: {error}"
    except KeyboardInterrupt:
        message = f"rollway: stage {name} was interrupted"
    except Exception as error:
        message = f"rollway: error: stage {name}: {of_system(error)}"
        if of_system(error) is None:
            message = f"rollway: stage {name} failed; this is a mistake in rollway or in code it calls\n"
            message += traceback.format_exc()
    # It may quote what a policy or a judge wrote.
    message = printable_lines(message)
    print(message, file=sys.stderr)
    # On the full disk that the message tells of, it can only be told there.
    with suppress(OSError):
        log.write(f"{message}\n".encode(errors="backslashreplace"))
    return 1


def _device(name: str, spec: Any, args: dict[str, Any]) -> AbstractContextManager[None]:
    """What the job computes on; takes `threads` out of `args` where the stage itself has no use for it."""
    from rollway.config.scorers import MODEL_SCORERS

    if name not in COMPUTE_STAGES and not (name == "score" and spec.config.kind in MODEL_SCORERS):
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


def _log(path: Path | None) -> FileIO:
    """Unbuffered: what cannot be written must not be tried again when the file is closed. Raises OSError.

    What the job before it used is forgotten: beside the log of a job that fails there is no such file.
    """
    if path is None:
        return FileIO(os.devnull, "w")
    path.parent.mkdir(parents=True, exist_ok=True)
    log = FileIO(path, "w")
    _usage_of(path).unlink(missing_ok=True)
    return log


def _usage_of(log: Path) -> Path:
    return log.with_suffix(".usage.json")


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
    path = _usage_of(log_path)
    try:
        path.write_text(json.dumps(usage) + "\n")
    except OSError as error:
        notice(f"{unwritten(path, error)}; the report lacks the time of this job")
