"""Crash equivalence: a run that is killed again and again ends with the bytes of one that is not.

python tests/torture/crash.py --kills 200 --seed 0

Small projects are run through Snakemake. In each, a job that has just begun is picked by chance, and after a chance
delay something is killed: everything at once (as when the power goes), Snakemake, the worker, or the job; or Snakemake
is told to end. The project is run again, and killed again, until it is finished; then every table, checkpoint and
metric is compared byte for byte with an uninterrupted run's. Prints a line per kill, and a table by stage.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent / "src")]

from rollway.config import deep_merge  # noqa: E402
from workflow.project import TINY, Project  # noqa: E402

WAYS = ("power", "snakemake", "worker", "job", "terminate", "interrupt")
"""What is killed. power: all processes at once; terminate, interrupt: SIGTERM or SIGINT to Snakemake and its group."""
JOB = re.compile(r"job (\d+): stage (\w+) ")
WORKER = re.compile(r"worker (\d+) listens")
AHEAD = 3
"""A run is killed in one of its first jobs, so that a project is killed in most of its jobs before it ends."""
DELAY = 0.25
"""Most seconds between the start of a job and the kill: most jobs here take less."""
SHARED = ("report.html", "rollway.duckdb", ".worker", ".cache", "tracked.json")
"""Not compared: they hold times, or are no results."""


@dataclass
class Kill:
    project: int
    stage: str
    way: str
    delay: float


@dataclass
class Outcome:
    kills: list[Kill] = field(default_factory=list)
    projects: int = 0
    files: int = 0
    """Compared, over all projects."""
    differing: list[str] = field(default_factory=list)


def config() -> dict[str, Any]:
    """Every stage of a run: two shards in small parts, two rounds, evaluations before and after."""
    changes = {
        "defaults": {"rollout": {"shards": 2, "part": 4}, "evaluate": {"every": 2}},
        "warmups": {"tiny": {"sft": {"steps": 40}}},
        "mlflow": {"enabled": False},
    }
    return deep_merge(TINY, changes)


def torture(kills: int, seed: int, folder: Path, say: Any = print) -> Outcome:
    """At least `kills` kills; every project is brought to its end."""
    whole = Project(folder / "whole", config())
    whole.snakemake()
    expected = digests(whole.folder / "results")
    draw, outcome = random.Random(seed), Outcome()
    while len(outcome.kills) < kills:
        number = outcome.projects
        project = Project(folder / f"killed-{number}", config())
        while len(outcome.kills) < kills and (kill := _run_and_kill(project, number, draw)) is not None:
            outcome.kills.append(kill)
            say(f"{len(outcome.kills):4} {kill.way:<10} {kill.stage:<10} {kill.delay * 1000:4.0f} ms  project {number}")
        project.snakemake("--nolock")
        found = digests(project.folder / "results")
        names = sorted({*expected, *found})
        wrong = [name for name in names if expected.get(name) != found.get(name)]
        outcome.projects, outcome.files = number + 1, outcome.files + len(names)
        outcome.differing += [f"project {number}: {name}" for name in wrong]
        say(f"     project {number} is finished: {len(names)} files, {len(wrong)} differ")
        if not wrong:
            shutil.rmtree(project.folder)
    return outcome


def digests(results: Path) -> dict[str, str]:
    """Relative path -> sha256 of every result."""
    files = (path for path in sorted(results.rglob("*")) if path.is_file())
    inside = ((path.relative_to(results), path) for path in files)
    return {
        str(name): hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in inside
        if name.parts[0] not in SHARED and name.name not in SHARED
    }


def by_stage(kills: list[Kill]) -> str:
    """A table: stage by way of killing."""
    counts = Counter((kill.stage, kill.way) for kill in kills)
    stages = sorted({kill.stage for kill in kills})
    lines = [" ".join([f"{'':<12}", *(f"{way:>10}" for way in WAYS), f"{'all':>6}"])]
    for stage in stages:
        row = [counts[stage, way] for way in WAYS]
        lines.append(" ".join([f"{stage:<12}", *(f"{n:>10}" for n in row), f"{sum(row):>6}"]))
    return "\n".join(lines)


def _run_and_kill(project: Project, number: int, draw: random.Random) -> Kill | None:
    """One call of Snakemake, killed; None when it came to its end first."""
    skipped, way, delay = draw.randrange(AHEAD), draw.choice(WAYS), draw.uniform(0.0, DELAY)
    log = project.folder / "results/.worker/worker.log"
    log.unlink(missing_ok=True)
    with (project.folder / "output").open("w") as output:
        running = subprocess.Popen(
            # A killed Snakemake leaves its lock; who it was is known here.
            project.command("--cores", "2", "--nolock"),
            cwd=project.folder,
            env=project.environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    while running.poll() is None:
        text = log.read_text(errors="replace") if log.exists() else ""
        jobs = JOB.findall(text)
        if len(jobs) > skipped:
            pid, stage = jobs[skipped]
            time.sleep(delay)
            _kill(way, running, int(WORKER.findall(text)[0]), int(pid))
            _wait_until_gone(running, project.folder)
            return Kill(number, stage, way, delay)
        time.sleep(0.005)
    if running.returncode:
        raise AssertionError(f"project {number}: Snakemake failed:\n{(project.folder / 'output').read_text()[-5000:]}")
    return None


def _kill(way: str, running: "subprocess.Popen[bytes]", worker: int, job: int) -> None:
    match way:
        case "power":
            for pid in (running.pid, worker, job):
                _signal(pid, signal.SIGKILL)
        case "snakemake":
            _signal(running.pid, signal.SIGKILL)
        case "worker":
            _signal(worker, signal.SIGKILL)
        case "job":
            _signal(job, signal.SIGKILL)
        case "terminate" | "interrupt":
            number = signal.SIGTERM if way == "terminate" else signal.SIGINT
            try:
                os.killpg(running.pid, number)
            except ProcessLookupError:
                pass


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def _wait_until_gone(running: "subprocess.Popen[bytes]", folder: Path) -> None:
    """Snakemake and all that works in the folder. What a dead Snakemake leaves must end by itself."""
    running.wait(timeout=120)
    deadline = time.monotonic() + 30
    while left := _at_work(folder):
        if time.monotonic() > deadline:
            raise AssertionError(f"still running: {left}")
        time.sleep(0.02)


def _at_work(folder: Path) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.readlink(entry / "cwd") == str(folder):
                found.append((entry / "cmdline").read_text(errors="replace").replace("\0", " ")[:200])
        except OSError:
            continue
    return [command for command in found if command]


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--kills", type=int, default=200)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", type=Path, help="also write the kills and what came of them here, as JSON")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="rollway-torture-") as temporary:
        outcome = torture(chosen.kills, chosen.seed, Path(temporary).resolve(), lambda line: print(line, flush=True))
    print(by_stage(outcome.kills))
    print(f"{len(outcome.kills)} kills in {outcome.projects} projects; {outcome.files} files compared, ", end="")
    print(f"{len(outcome.differing)} differ" + "".join(f"\n  {name}" for name in outcome.differing))
    if chosen.out is not None:
        kills = [vars(kill) for kill in outcome.kills]
        result = {"seed": chosen.seed, "kills": kills, "files": outcome.files, "differing": outcome.differing}
        chosen.out.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if outcome.differing else 0


if __name__ == "__main__":
    sys.exit(main())
