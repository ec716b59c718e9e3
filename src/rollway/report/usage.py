"""Where time and memory went: the `*.usage.json` that every job leaves beside its log."""

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

_FOLDERS = {"tasks": "prepare", "warmups": "warmup", "reward_models": "reward_model"}
_AFTER = {"report", "track"}
"""Jobs that read this page or write it: left out, so that building it again changes nothing."""


@dataclass(frozen=True)
class Job:
    """What one job took. `run` and `round` are None for what runs share; seconds of wall time and of CPU; MB."""

    stage: str
    run: str | None
    round: int | None
    seconds: float
    cpu_seconds: float
    peak_mb: float


@dataclass(frozen=True)
class Total:
    """All jobs of one stage; `peak_mb` is the largest of any."""

    stage: str
    jobs: int
    seconds: float
    cpu_seconds: float
    peak_mb: float


def logs_of(results: Path) -> Path | None:
    """The workflow writes logs beside the default results folder, and inside any other."""
    places = (results / "logs", results.resolve().parent / "logs")
    return next((folder for folder in places if folder.is_dir()), None)


def read_jobs(logs: Path | None, runs: set[str]) -> list[Job]:
    """Every finished job of the stages, in order of their logs; files that are being written are left out."""
    found = []
    for path in sorted(logs.rglob("*.usage.json")) if logs else []:
        try:
            used = json.loads(path.read_text(encoding="utf-8"))
            job = _job(path, used, runs)
        except (ValueError, KeyError, TypeError, OSError):
            continue  # a job is writing it
        if job.stage not in _AFTER:
            found.append(job)
    return found


def _job(path: Path, used: dict[str, float], runs: set[str]) -> Job:
    folder, name = path.parent.name, path.name.split(".")[0]
    round = int(folder[1:]) if re.fullmatch(r"r\d{4}", folder) else None
    run = path.parent.parent.name if round is not None else folder
    stage = _FOLDERS.get(folder) or name.split("-")[0]
    if stage == "train" and round is not None:
        round -= 1  # its log lies with the policy it makes, that of the next round
    figures = [float(used[key]) for key in ("seconds", "cpu_seconds", "peak_rss_mb")]
    return Job(stage, run if run in runs else None, round, *figures)


def totals(jobs: list[Job]) -> list[Total]:
    """By stage, longest first."""
    of: dict[str, list[Job]] = defaultdict(list)
    for job in jobs:
        of[job.stage].append(job)
    rows = [
        Total(
            stage,
            len(them),
            sum(job.seconds for job in them),
            sum(job.cpu_seconds for job in them),
            max(job.peak_mb for job in them),
        )
        for stage, them in of.items()
    ]
    return sorted(rows, key=lambda total: (-total.seconds, total.stage))


def seconds_by_round(jobs: list[Job]) -> dict[tuple[str, int], float]:
    """(run, round) -> wall seconds of all its jobs, evaluation included."""
    spent: dict[tuple[str, int], float] = defaultdict(float)
    for job in jobs:
        if job.run is not None and job.round is not None:
            spent[job.run, job.round] += job.seconds
    return dict(spent)
