"""What Snakemake would run, and why: its own dry run, read job by job and put together by cause."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rollway.errors import RollwayError

FOLLOWS = "Input files updated by another job"
_KINDS = {
    "Missing output files": "missing",
    "Params have changed since last execution": "settings changed",
    "Updated input files": "input changed",
    "Set of input files has changed since last execution": "other inputs than before",
    "Code has changed since last execution": "rule changed",
    "Software environment definition has changed since last execution": "environment changed",
    "Forced execution": "forced",
}
_REPORTING = {"all", "catalog", "track", "report", "describe"}
"""Rules that follow every change: they are counted, and not told apart."""


@dataclass(frozen=True)
class Job:
    """One job of the dry run."""

    rule: str
    run: str
    round: int | None
    reason: str


@dataclass
class Cause:
    """Jobs of one rule and run that have the same reason of their own; `why` in the words of the config."""

    rule: str
    run: str
    why: str
    rounds: list[int] = field(default_factory=list)
    jobs: int = 0


@dataclass(frozen=True)
class Outlook:
    """Causes, the number of jobs that follow from them, and of those that only report."""

    causes: list[Cause]
    following: int
    reporting: int

    @property
    def jobs(self) -> int:
        return sum(cause.jobs for cause in self.causes) + self.following + self.reporting


def outlook(configfile: Path, folder: Path | None = None) -> Outlook:
    """Asks `snakemake -n` in `folder` (None: the current one), which neither locks nor writes.

    Raises RollwayError where there is no Snakefile, or with what Snakemake says is wrong.
    """
    here = folder or Path.cwd()
    if not (here / "Snakefile").exists() and not (here / "workflow" / "Snakefile").exists():
        raise RollwayError(f"{here}: has no Snakefile; run this where `snakemake` is run")
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "-n", "--nolock", "--cores", "1", "--configfile", str(configfile)],
        cwd=here,
        capture_output=True,
        text=True,
    )
    said = done.stdout + done.stderr
    if done.returncode:
        lines = [line for line in said.splitlines() if "error" in line.lower()] or said.splitlines()[-1:]
        raise RollwayError(f"snakemake -n: {' '.join(lines).strip() or 'failed'}")
    return outlook_of(list(jobs(said)))


def jobs(text: str) -> Iterator[Job]:
    """The jobs in the output of a dry run."""
    for block in re.split(r"^\[.*\]\n", text, flags=re.MULTILINE)[1:]:
        rule = re.match(r"(?:local)?(?:rule|checkpoint) (\w+):", block)
        if not rule:
            continue
        fields = dict(re.findall(r"^    (\w+): (.*)$", block, re.MULTILINE))
        named = dict(pair.split("=", 1) for pair in fields.get("wildcards", "").split(", ") if "=" in pair)
        number = named.get("round") or named.get("next")
        # What trains in round r writes into the folder of round r + 1.
        round = None if number is None else int(number) - (1 if "next" in named else 0)
        run = named.get("run") or named.get("task") or named.get("warmup") or named.get("reward_model") or ""
        who = f"{rule[1]} {named['scorer']}" if "scorer" in named else rule[1]
        yield Job(who, run, round, fields.get("reason", "").strip())


def outlook_of(found: list[Job]) -> Outlook:
    """Jobs with a reason of their own by rule, run and reason; the rest by number."""
    causes: dict[tuple[str, str, str], Cause] = {}
    following = reporting = 0
    for job in found:
        why = why_of(job.reason)
        if job.rule in _REPORTING:
            reporting += 1
        elif why is None:
            following += 1
        else:
            cause = causes.setdefault((job.rule, job.run, why), Cause(job.rule, job.run, why))
            cause.jobs += 1
            if job.round is not None and job.round not in cause.rounds:
                cause.rounds.append(job.round)
    for cause in causes.values():
        cause.rounds.sort()
    return Outlook(list(causes.values()), following, reporting)


def why_of(reason: str) -> str | None:
    """The job's own reasons; None where it only follows from another job."""
    parts = []
    for kind, words in _KINDS.items():
        if kind not in reason:
            continue
        detail = reason.split(kind, 1)[1].removeprefix(":").strip()
        match words:
            case "settings changed":
                parts.append(_settings(detail))
            case "input changed":
                parts.append(f"{words}: {_paths(detail)}")
            case _:
                parts.append(words)
    if parts:
        return "; ".join(parts)
    return None if FOLLOWS in reason or not reason else " ".join(reason.split())[:120]


def _paths(detail: str) -> str:
    paths = detail.split(";")[0].split(", ")
    return paths[0].strip() + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")


def _settings(detail: str) -> str:
    """`train.optimizer.lr 0.001 -> 0.002`, from the specs before and now; without detail where they are not there."""
    both = re.search(r"before: (.*?) now: (.*?)\s*(?:;|$)", detail, re.DOTALL)
    if not both:
        return "settings changed"
    try:
        before, now = (_flat(json.loads(shlex.split(text)[0])) for text in both.groups())
    except (ValueError, IndexError):
        return "settings changed"
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    told = [f"{key} {_value(before, key)} -> {_value(now, key)}" for key in changed[:3]]
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return ", ".join(told) + more if told else "settings changed"


def _flat(value: Any, key: str = "") -> dict[str, str]:
    if isinstance(value, dict) and value:
        found: dict[str, str] = {}
        for name, part in value.items():
            found |= _flat(part, f"{key}.{name}" if key else name)
        return found
    return {key: json.dumps(value)}


def _value(flat: dict[str, str], key: str) -> str:
    text = flat.get(key, "(default)")
    return text if len(text) <= 40 else text[:37] + "..."
