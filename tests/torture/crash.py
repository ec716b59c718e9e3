"""Crash equivalence: a run that is killed again and again ends with the bytes of one that is not.

python tests/torture/crash.py --kills 200 --seed 0 --docs

Small projects are run through Snakemake. In each, one job of every stage is picked by chance, and at a chance moment of
its usual time something is killed: everything at once (as when the power goes), Snakemake, the worker or the job; or
they are told to end. The project is run again, and killed in the next stage, until it is finished; then every table,
checkpoint, metric and page is compared byte for byte with an uninterrupted run's. Every eighth project runs its stages
without the warm worker. Prints a line per kill, and a table by stage.
"""

import argparse
import json
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent / "src")]

from torture.kills import WAYS, Aim, Kill, run_and_kill  # noqa: E402
from torture.subject import OWN_STAGES, PROJECTS, contents, differing, making  # noqa: E402
from workflow.project import Project  # noqa: E402

TWICE = ("rollout", "train")
"""Stages that are killed in two of their jobs in every project: they write most."""
FOLDERS = {"tasks": "prepare", "warmups": "warmup", "reward_models": "reward_model"}
LOGS = {"check": "check_teacher"}
"""Stages whose log's first word is another."""
COLD_EVERY = 8
COLD = 2.5
"""Seconds by which a job with a model is longer without the worker: it imports torch itself."""
MODEL = ("warmup", "reward_model", "discriminator", "check_teacher", "rollout", "train", "evaluate")


@dataclass(frozen=True)
class Job:
    """A job of the uninterrupted run: its stage, its log, when it began and how many seconds it took."""

    stage: str
    log: str
    began: float
    seconds: float


@dataclass
class Outcome:
    seed: int
    kills: list[tuple[int, Kill]] = field(default_factory=list)
    """With the number of the project."""
    projects: int = 0
    cold: int = 0
    files: int = 0
    """Compared, over all projects."""
    differing: list[str] = field(default_factory=list)
    minutes: float = 0.0


def torture(
    kills: int,
    seed: int,
    folder: Path,
    say: Any = print,
    *,
    kind: str = "every",
    stages: Sequence[str] | None = None,
    cold_every: int = COLD_EVERY,
    minutes: float = float("inf"),
) -> Outcome:
    """`kills` kills, or a few more; every project is brought to its end.

    minutes: after them no further project is begun.
    kind: of project, a key of PROJECTS. stages: only these are killed in; None: all.
    All projects lie in turn at the same place, as the catalogue holds paths.
    """
    with making(kind) as make:
        return _torture(kills, seed, folder, say, make, stages, cold_every, minutes)


def _torture(
    kills: int,
    seed: int,
    folder: Path,
    say: Any,
    make: Callable[[Path], Project],
    stages: Sequence[str] | None,
    cold_every: int,
    minutes: float,
) -> Outcome:
    started = time.monotonic()
    whole = make(folder / "project")
    whole.snakemake()
    expected, usual = contents(whole), jobs(whole)
    shutil.rmtree(whole.folder)
    outcome = Outcome(seed)
    while len(outcome.kills) < kills and time.monotonic() - started < 60.0 * minutes:
        number = outcome.projects
        project = make(folder / "project")
        project.warm = not cold_every or number % cold_every != cold_every - 1
        outcome.cold += not project.warm
        for aim in aims(usual, random.Random(f"{seed} {number}"), warm=project.warm):
            if len(outcome.kills) >= kills:
                break
            if (stages is not None and aim.stage not in stages) or is_done(project, aim.log):
                continue
            kill = run_and_kill(project, aim)
            if kill is None:
                say(f"     project {number} ended before {Path(aim.log).stem} began")
                break
            outcome.kills.append((number, kill))
            late = "" if kill.at_work else "  (it had just ended)"
            say(f"{len(outcome.kills):4} {kill.way:<13} {kill.delay * 1000:5.0f} ms into {Path(kill.log).stem}{late}")
        project.snakemake("--nolock")
        found = contents(project)
        wrong = differing(expected, found)
        outcome.projects, outcome.files = number + 1, outcome.files + len({*expected, *found})
        outcome.differing += [f"project {number}: {name}" for name in wrong]
        say(f"     project {number} is finished: {len(found)} files, {len(wrong)} differ")
        if wrong:
            project.folder.rename(folder / f"differing-{number}")
        else:
            shutil.rmtree(project.folder)
    outcome.minutes = (time.monotonic() - started) / 60
    return outcome


def jobs(project: Project) -> list[Job]:
    """Every job of a finished project, in the order in which they began."""
    found = []
    for path in project.folder.glob("logs/**/*.usage.json"):
        used = json.loads(path.read_text())
        log = path.with_name(path.name.replace(".usage.json", ".log")).relative_to(project.folder)
        found.append(Job(stage_of(log), str(log), used["began"], used["seconds"]))
    return sorted(found, key=lambda job: job.began)


def stage_of(log: Path) -> str:
    """log: relative to the project."""
    for pattern, name in OWN_STAGES.items():
        if re.search(pattern, str(log)):
            return name
    word = re.split(r"[-.]", log.name)[0]
    return FOLDERS.get(log.parts[1]) or LOGS.get(word, word)


def is_done(project: Project, log: str) -> bool:
    return (project.folder / log).with_suffix(".usage.json").exists()


def aims(usual: Sequence[Job], draw: random.Random, *, warm: bool) -> list[Aim]:
    """One job of every stage, two of some, in the order of their beginnings; the moment is uniform over its time."""
    by_stage: dict[str, list[Job]] = {}
    for job in usual:
        by_stage.setdefault(job.stage, []).append(job)
    picked = [
        job
        for stage, of_stage in by_stage.items()
        for job in draw.sample(of_stage, min(len(of_stage), 2 if stage in TWICE else 1))
    ]
    ways = [way for way in WAYS if warm or way != "worker"]
    draw.shuffle(ways)
    made = []
    for number, job in enumerate(sorted(picked, key=lambda job: job.began)):
        seconds = job.seconds + (COLD if not warm and job.stage.split(",")[0] in MODEL else 0.0)
        made.append(Aim(job.stage, job.log, ways[number % len(ways)], draw.uniform(0.0, seconds)))
    return made


def by_stage(kills: Sequence[Kill]) -> list[list[str]]:
    """Rows of a table: stage, then how often each way; `at work`: kills that the job did not end before."""
    counts = Counter((kill.stage, kill.way) for kill in kills)
    at_work = Counter(kill.stage for kill in kills if kill.at_work)
    rows = [["stage", *WAYS, "all", "at work"]]
    for stage in dict.fromkeys(kill.stage for kill in kills):
        row = [counts[stage, way] for way in WAYS]
        rows.append([stage, *(str(n) for n in [*row, sum(row), at_work[stage]])])
    sums = [sum(int(row[column]) for row in rows[1:]) for column in range(1, len(WAYS) + 3)]
    return [*rows, ["all", *map(str, sums)]]


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--kills", type=int, default=200)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--docs", action="store_true", help="write the log into docs/torture.md and docs/torture/")
    options.add_argument("--out", type=Path, help="also write the kills and what came of them here, as JSON")
    options.add_argument("--cold-every", type=int, default=COLD_EVERY, help="0: always with the warm worker")
    options.add_argument("--minutes", type=float, default=float("inf"), help="begin no further project after them")
    options.add_argument("--project", choices=PROJECTS, default="every", help="what is tortured (subject.py)")
    chosen = options.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="rollway-torture-")).resolve()
    outcome = torture(
        chosen.kills,
        chosen.seed,
        folder,
        lambda line: print(line, flush=True),
        kind=chosen.project,
        cold_every=chosen.cold_every,
        minutes=chosen.minutes,
    )
    rows = by_stage([kill for _, kill in outcome.kills])
    print("\n".join(" ".join(f"{cell:>13}" for cell in row) for row in rows))
    print(f"{len(outcome.kills)} kills in {outcome.projects} projects, {outcome.minutes:.1f} minutes; ", end="")
    print(f"{outcome.files} files compared, {len(outcome.differing)} differ")
    if chosen.docs:
        from torture.page import write

        write(outcome, rows, chosen.project)
    if chosen.out is not None:
        chosen.out.write_text(json.dumps(asdict(outcome), indent=1) + "\n")
    if outcome.differing:
        print("\n".join(f"  {name}" for name in outcome.differing) + f"\nkept: {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
