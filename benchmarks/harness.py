"""Does the same work in two ways, in turns, and writes down what each cost.

A cost is wall seconds or bytes: less is better. Ratios are taken pair by pair, so that what slows the machine for a
while slows both sides of a pair. `finish` prints the results and, with --record, adds them to history.jsonl.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

HISTORY = Path(__file__).parent / "history.jsonl"
LIBRARIES = [
    "torch",
    "transformers",
    "trl",
    "vllm",
    "duckdb",
    "pandas",
    "polars",
    "pyarrow",
    "snakemake",
    "liger-kernel",
]

Work = Callable[[], float | None]
"""Does the work once. Returns its cost, or None: then the wall seconds it took are the cost."""


@dataclass(frozen=True)
class Bar:
    """What a ratio (or, without a peer, the cost itself) has to reach. `goal` is what we should like."""

    kind: Literal["at most", "at least"]
    """at most: ours / peer is compared. at least: peer / ours, the speed-up."""
    value: float
    goal: float | None = None

    def reached(self, figure: float) -> bool:
        return figure <= self.value if self.kind == "at most" else figure >= self.value


def at_most(value: float, goal: float | None = None) -> Bar:
    return Bar("at most", value, goal)


def at_least(value: float, goal: float | None = None) -> Bar:
    return Bar("at least", value, goal)


@dataclass(frozen=True)
class Result:
    """Costs of one case by repetition; without a peer `theirs` is empty and the bar is on our cost."""

    bench: str
    case: str
    ours: Sequence[float]
    theirs: Sequence[float]
    peer: str
    bar: Bar | None
    unit: str = "s"
    note: str = ""

    def figures(self) -> list[float]:
        """What is compared with the bar, by repetition."""
        if not self.theirs:
            return list(self.ours)
        pairs = zip(self.ours, self.theirs, strict=True)
        if self.bar is not None and self.bar.kind == "at least":
            return [peer / own for own, peer in pairs]
        return [own / peer for own, peer in pairs]

    def figure(self) -> float:
        return statistics.median(self.figures())


def race(
    bench: str,
    case: str,
    ours: Work,
    peer: Work,
    *,
    peer_name: str,
    bar: Bar | None,
    repeats: int = 5,
    warmup: int = 1,
    unit: str = "s",
    note: str = "",
) -> Result:
    """Times both sides `repeats` times in turns, the order swapped every other time, after `warmup` untimed rounds."""
    for _ in range(warmup):
        ours()
        peer()
    costs: dict[str, list[float]] = {"ours": [], "peer": []}
    for turn in range(repeats):
        sides: list[tuple[str, Work]] = [("ours", ours), ("peer", peer)]
        for name, work in sides if turn % 2 == 0 else reversed(sides):
            costs[name].append(cost(work))
    return Result(bench, case, costs["ours"], costs["peer"], peer_name, bar, unit, note)


def measure(
    bench: str, case: str, ours: Work, *, bar: Bar | None, repeats: int = 5, warmup: int = 1, unit: str = "s", note=""
) -> Result:
    """A cost that no peer has; the bar is on the cost itself."""
    for _ in range(warmup):
        ours()
    return Result(bench, case, [cost(ours) for _ in range(repeats)], [], "", bar, unit, note)


def cost(work: Work) -> float:
    gc.collect()
    start = time.perf_counter()
    own = work()
    return time.perf_counter() - start if own is None else own


def parser(description: str | None, *, repeats: int = 5) -> argparse.ArgumentParser:
    """The options that every bench has."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--repeats", type=int, default=repeats, help="repetitions of each side")
    options.add_argument("--threads", type=int, default=2, help="threads of both sides")
    options.add_argument("--device", default="cpu", help="cpu or cuda")
    options.add_argument("--record", action="store_true", help=f"add the results to {HISTORY.name}")
    return options


def finish(results: Sequence[Result], options: argparse.Namespace) -> int:
    """Prints the results; with --record also keeps them. Returns 0: a bar that is missed is a result, not an error."""
    for result in results:
        print(line(result))
    if options.record:
        place = {"threads": options.threads, "device": options.device, "load": round(os.getloadavg()[0], 2)}
        surroundings = {**when(), **place, "machine": machine(options.device), "versions": versions()}
        with HISTORY.open("a") as file:
            for result in results:
                file.write(json.dumps(entry(result) | surroundings) + "\n")
    return 0


def line(result: Result) -> str:
    """One readable line."""
    kept = entry(result)
    own = f"{kept['ours']['median']:.4g} {result.unit} ({kept['ours']['min']:.4g} to {kept['ours']['max']:.4g})"
    verdict = "" if kept["reached"] is None else f"; bar {kept['bar']}: {'reached' if kept['reached'] else 'MISSED'}"
    head = f"{result.bench}: {result.case}: {own}"
    if not result.theirs:
        return head + verdict
    low, high = kept["range"]
    return (
        f"{head}, {result.peer} {kept['theirs']['median']:.4g} {result.unit};"
        f" ratio {kept['figure']:.3f} ({low:.3f} to {high:.3f}){verdict}"
    )


def entry(result: Result) -> dict[str, Any]:
    """What the history keeps of a result."""
    figures = result.figures()
    bar = result.bar
    return {
        "bench": result.bench,
        "case": result.case,
        "peer": result.peer,
        "unit": result.unit,
        "ours": _spread(result.ours),
        "theirs": _spread(result.theirs) if result.theirs else None,
        "figure": result.figure(),
        "range": [min(figures), max(figures)],
        "bar": None if bar is None else f"{bar.kind} {bar.value:g}",
        "goal": None if bar is None or bar.goal is None else f"{bar.kind} {bar.goal:g}",
        "reached": None if bar is None else bar.reached(result.figure()),
        "repeats": len(result.ours),
        "note": result.note,
    }


def _spread(costs: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(costs), "min": min(costs), "max": max(costs)}


def when() -> dict[str, Any]:
    """Day and commit; `changed` where files differ from the commit."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True)
        return done.stdout.strip()

    # The benches themselves write to the history and to two pages of the docs.
    changed = bool(git("status", "--porcelain", "--untracked-files=no", "--", "..", ":!history.jsonl", ":!../docs"))
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": git("rev-parse", "--short", "HEAD"),
        "changed": changed,
    }


def machine(device: str) -> str:
    """Processor, cores, memory and, where it was used, GPU."""
    cpu = platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = [row.partition(":")[2].strip() for row in information.read_text().splitlines() if "model name" in row]
        cpu = names[0] if names else cpu
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    text = f"{cpu}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB"
    if device == "cuda":
        import torch

        text += f", {torch.cuda.get_device_name()}"
    return text


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def in_child(command: Sequence[str], **environment: str) -> str:
    """Standard output of `python COMMAND` in a process of its own. Raises CalledProcessError, its stderr shown."""
    done = subprocess.run([sys.executable, *command], env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode:
        sys.stderr.write(done.stderr)
        done.check_returncode()
    return done.stdout
