"""What the workflow adds to the arithmetic of its stages: the default run, and where its wall time goes.

overhead = (wall - own) / wall, where
  wall  is that of `snakemake --cores 2`, from its start to its end;
  own   is the sum, over the jobs that follow one another (prepare, warm-up, the rounds' rollout, score, curate and
        train, the last evaluation, report, track), of what their arithmetic took inside the process: without the start
        of the process, the loading of files and model, and the writing. Curation reads, computes and writes at once:
        all of it counts as its own, as does all of what report and track do.

A second figure takes the import of MLflow, most of what track does, as overhead. A third counts loading and writing as
the stages' own too: what Snakemake and process starts alone add. With --record the table of the middle repetition goes
to docs/speed.md.

python benchmarks/workflow_overhead.py [--rounds N] [--repeats N] [--record]
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import yaml
from harness import Result, at_most, finish, machine, parser, when

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
RUN = "grpo-s0"
PAGE = ROOT / "docs/speed.md"
BEGIN, END = "<!-- profile: written by benchmarks/workflow_overhead.py -->", "<!-- end of profile -->"


@dataclass(frozen=True)
class Job:
    """A finished job of the chain: seconds, `began` and `ended` since the workflow's start."""

    stage: str
    began: float
    ended: float
    starting: float
    phases: dict[str, float]


def main() -> int:
    options = parser(__doc__, repeats=3)
    options.add_argument("--rounds", type=int, help="of the default run; default: all of its rounds")
    chosen = options.parse_args()
    beyond_arithmetic, beyond_import, beyond_stages, tables = [], [], [], []
    for _ in range(chosen.repeats):
        with tempfile.TemporaryDirectory(prefix="overhead-") as name:
            wall, jobs = _run(Path(name), chosen.rounds)
        tables.append(_table(wall, jobs))
        print(tables[-1])
        arithmetic = sum(job.phases.get("work", 0.0) for job in jobs)
        imported = sum(job.phases["load"] for job in jobs if job.stage == "track")
        beyond_arithmetic.append(1 - (arithmetic + imported) / wall)
        beyond_import.append(1 - arithmetic / wall)
        beyond_stages.append(1 - sum(sum(job.phases.values()) for job in jobs) / wall)
    case = f"default run, {sum(job.stage == 'train' for job in jobs)} rounds"
    figures = {
        "beyond arithmetic": (beyond_arithmetic, at_most(0.1)),
        "beyond arithmetic and the import of MLflow": (beyond_import, None),
        "outside the stages": (beyond_stages, None),
    }
    results = [
        Result("workflow_overhead", f"{case}: {what}", shares, [], "", bar, "of wall")
        for what, (shares, bar) in figures.items()
    ]
    if chosen.record:
        middle = sorted(range(chosen.repeats), key=beyond_arithmetic.__getitem__)[chosen.repeats // 2]
        PAGE.write_text(with_profile(PAGE.read_text(), f"{case}, seconds", tables[middle]))
    return finish(results, chosen)


def with_profile(page: str, title: str, profile: str) -> str:
    """The page with the profile between its two marks, and where and when it was taken."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    taken = when()
    commit = f"`{taken['commit']}`" + (" and changes" if taken["changed"] else "")
    head = f"The {title}, on {machine('cpu')} ({taken['date']}, commit {commit}):"
    return f"{before}{BEGIN}\n\n{head}\n\n```text\n{profile}\n```\n\n{END}{after}"


def _run(folder: Path, rounds: int | None) -> tuple[float, list[Job]]:
    config = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    rounds = rounds or config["defaults"]["rounds"]
    config["defaults"]["rounds"] = rounds
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    command = [str(BIN / "snakemake"), "--snakefile", str(ROOT / "Snakefile"), "--configfile", "config.yaml"]
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    start = time.time()
    done = subprocess.run([*command, "--cores", "2"], cwd=folder, env=environment, capture_output=True, text=True)
    wall = time.time() - start
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return wall, _chain(folder / "logs", rounds, start)


def _chain(logs: Path, rounds: int, start: float) -> list[Job]:
    """The jobs that wait for one another, in order."""
    names = ["tasks/spell", "warmups/tiny-s0"]
    for r in range(rounds):
        names += [f"{RUN}/r{r:04d}/{stage}" for stage in ("rollout-p0-000", "score-p0-exact-000", "curate")]
        names.append(f"{RUN}/r{r + 1:04d}/train")
    names += [f"{RUN}/r{rounds:04d}/evaluate", "report", f"{RUN}/track"]
    jobs = []
    for name in names:
        usage = json.loads((logs / f"{name}.usage.json").read_text())
        if not usage["warm"]:
            print(f"{name} ran cold", file=sys.stderr)
        stage = {"spell": "prepare", "tiny-s0": "warmup"}.get(Path(name).name, Path(name).name.split("-")[0])
        began = usage["began"] - start
        jobs.append(Job(stage, began, began + usage["seconds"], usage["starting"], usage["phases"]))
    return jobs


def _table(wall: float, jobs: list[Job]) -> str:
    """Seconds of the wall by stage and by what they went into; its lines sum to the wall."""
    columns = ("workflow", "starting", "load", "work", "write")
    spent: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(columns, 0.0))
    ended = 0.0
    for job in jobs:
        # A process that starts while another stage still ends is not counted twice.
        gap = job.began - ended
        starting = min(job.starting, max(gap, 0.0))
        spent[job.stage]["starting"] += starting
        spent["start" if ended == 0.0 else job.stage]["workflow"] += gap - starting
        for phase, seconds in job.phases.items():
            spent[job.stage][phase] += seconds
        ended = job.ended
    spent["end"]["workflow"] = wall - ended
    counts = {stage: sum(job.stage == stage for job in jobs) for stage in spent}
    lines = [f"{'stage':10} {'jobs':>5}" + "".join(f"{column:>10}" for column in columns) + f"{'sum':>10}"]
    for stage in ("start", *(s for s in spent if s not in ("start", "end")), "end"):
        row = [spent[stage][column] for column in columns]
        lines.append(f"{stage:10} {counts[stage]:5}" + "".join(f"{value:10.2f}" for value in [*row, sum(row)]))
    total = [sum(row[column] for row in spent.values()) for column in columns]
    lines.append(f"{'sum':10} {len(jobs):5}" + "".join(f"{value:10.2f}" for value in [*total, sum(total)]))
    shares = "".join(f"{value / wall:10.1%}" for value in [*total, sum(total)])
    return "\n".join([*lines, f"{'share':10} {'':5}{shares}"])


if __name__ == "__main__":
    sys.exit(main())
