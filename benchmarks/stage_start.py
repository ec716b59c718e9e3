"""From the start of a stage's process to its first useful work, warm (through the worker) and cold.

First useful work: the first prompt that is decoded, batch that is trained on, row that is scored. Before it lie the
interpreter, imports, the reading of spec and files, and the model's loading. Jobs are those of one round of the default
run (a cut warm-up), called as Snakemake calls them; both sides write the same files.

python benchmarks/stage_start.py [--repeats N] [--record]
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import yaml
from harness import Result, at_most, finish, parser

from rollway.runtime import warm

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
STAGES = ("describe", "score", "curate", "rollout", "train", "evaluate")
TORCH = ("rollout", "train", "evaluate")


def main() -> int:
    options = parser(__doc__).parse_args()
    os.environ["PATH"] = f"{BIN}:{os.environ['PATH']}"
    with tempfile.TemporaryDirectory(prefix="stage-start-") as name:
        folder = Path(name)
        jobs = _project(folder)
        warm.start(str(folder / "results/.worker/socket"), SimpleNamespace(local_exec=True), "results")
        _wait_until_ready(folder / "results/.worker/worker.log")
        seconds = _measured(folder, jobs, options)
        warm.stop(str(folder / "results/.worker/socket"))
    return finish(_results(seconds), options)


def _project(folder: Path) -> dict[str, list[str]]:
    """One round of the default run in `folder`; returns the command of a job of each stage."""
    config = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    config["warmups"]["tiny"]["sft"]["steps"] = 20
    config["defaults"]["rounds"] = 1
    config["mlflow"] = {"enabled": False}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    snakemake = [str(BIN / "snakemake"), "--snakefile", str(ROOT / "Snakefile"), "--configfile", "config.yaml"]
    targets = [f"results/grpo-s0/{file}" for file in ("run.json", "r0001/policy.json", "r0001/evals.json")]
    done = subprocess.run([*snakemake, "--cores", "2", "-p", *targets], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found: dict[str, list[str]] = {}
    for line in re.findall(r"rollway stage .*", done.stderr + done.stdout):
        command = shlex.split(line)
        found.setdefault(command[2], command)
    return {stage: found[stage] for stage in STAGES}


def _wait_until_ready(log: Path) -> None:
    deadline = time.monotonic() + 300
    while " done after " not in log.read_text():
        if time.monotonic() > deadline:
            raise SystemExit(f"the worker did not get ready:\n{log.read_text()}")
        time.sleep(0.2)


def _measured(
    folder: Path, jobs: dict[str, list[str]], options: argparse.Namespace
) -> dict[str, dict[str, list[float]]]:
    """Stage -> side -> seconds by repetition; the sides take turns, after one warm round that does not count."""
    seconds: dict[str, dict[str, list[float]]] = {stage: {"warm": [], "cold": []} for stage in STAGES}
    cold = {name: value for name, value in os.environ.items() if name != "ROLLWAY_WORKER"}
    for command in jobs.values():
        _first_work(folder, command, dict(os.environ), warm=True)
    for _ in range(options.repeats):
        for stage, command in jobs.items():
            seconds[stage]["warm"].append(_first_work(folder, command, dict(os.environ), warm=True))
            seconds[stage]["cold"].append(_first_work(folder, command, cold, warm=False))
    return seconds


def _first_work(folder: Path, command: list[str], environment: dict[str, str], *, warm: bool) -> float:
    environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    start = time.time()
    subprocess.run(command, cwd=folder, env=environment, check=True, stderr=subprocess.DEVNULL)
    log = folder / command[command.index("--log") + 1]
    usage = json.loads(log.with_suffix(".usage.json").read_text())
    if usage["warm"] != warm:
        raise SystemExit(f"{command[2]}: ran {'cold' if warm else 'warm'}; see results/.worker/worker.log")
    return float(usage["began"] - start + usage["phases"].get("load", 0.0))


def _results(seconds: dict[str, dict[str, list[float]]]) -> list[Result]:
    results = [
        Result("stage_start", stage, sides["warm"], sides["cold"], "cold start", None)
        for stage, sides in seconds.items()
    ]
    slowest = [max(turn) for turn in zip(*(sides["warm"] for sides in seconds.values()), strict=True)]
    heavy = [min(turn) for turn in zip(*(seconds[stage]["cold"] for stage in TORCH), strict=True)]
    note = "warm: the slowest stage of each repetition"
    return [
        *results,
        Result("stage_start", "slowest stage, warm", slowest, [], "", at_most(0.2), note=note),
        Result("stage_start", "fastest stage with torch, cold", heavy, [], "", None, note="what warm starts save"),
    ]


if __name__ == "__main__":
    sys.exit(main())
