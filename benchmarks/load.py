"""Load: many rounds, wide rounds, many rollouts. What each takes in time, memory and files, and whether memory grows.

python benchmarks/load.py plan [--rounds 1000]                       # `snakemake -n`
python benchmarks/load.py rounds [--rounds 200]                      # tiny rounds, really run; the worker's memory
python benchmarks/load.py wide [--prompts 10000] [--samples 64]      # one round, through Snakemake up to its batch
python benchmarks/load.py rescore [--rollouts 1000000]               # stored rollouts under two further scorers

With --record the figures go to docs/load.md, the curve of the rounds to docs/images and docs/load.
"""

import argparse
import csv
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from harness import machine, when
from process_memory import descendants, proportional

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
PAGE = ROOT / "docs" / "load.md"
CURVE, SAMPLES = ROOT / "docs" / "images" / "load_rounds.svg", ROOT / "docs" / "load" / "rounds.csv"
SETTLED = 20
"""Rounds before the memory is compared: libraries are still being loaded in the first ones."""
MIB = 2**20


@dataclass(frozen=True)
class Sample:
    """What was seen when the policy of a round had appeared: memory in MiB, of the worker and of Snakemake alone (RSS),
    and of the worker with its jobs and what waits for the next one (PSS: shared pages by the number of processes)."""

    round: int
    seconds: float
    worker_rss: float
    worker_tree_pss: float
    worker_files: int
    snakemake_rss: float


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("case", choices=("plan", "rounds", "wide", "rescore"))
    options.add_argument("--rounds", type=int, help="of plan (1000) and rounds (200)")
    options.add_argument("--prompts", type=int, default=10_000)
    options.add_argument("--samples", type=int, default=64)
    options.add_argument("--rollouts", type=int, default=1_000_000, help="a multiple of 125,000")
    options.add_argument("--record", action="store_true")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="rollway-load-") as name:
        folder = Path(name)
        match chosen.case:
            case "plan":
                said = plan(folder, chosen.rounds or 1000)
            case "rounds":
                said = rounds(folder, chosen.rounds or 200, record=chosen.record)
            case "wide":
                said = wide(folder, chosen.prompts, chosen.samples)
            case "rescore":
                said = rescore(folder, chosen.rollouts)
    print("\n".join(said))
    if chosen.record:
        PAGE.write_text(with_case(PAGE.read_text(), chosen.case, said))
    return 0


def with_case(page: str, case: str, said: Sequence[str]) -> str:
    """The page with what a case came to between its two marks, and where and when that was."""
    begin, end = f"<!-- {case}: written by benchmarks/load.py -->", f"<!-- end of {case} -->"
    before, rest = page.split(begin)
    _, after = rest.split(end)
    taken = when()
    commit = f"`{taken['commit']}`" + (" and changes" if taken["changed"] else "")
    head = f"On {machine('cpu')}, {taken['date']}, commit {commit}:"
    return f"{before}{begin}\n\n{head}\n\n" + "\n".join(said) + f"\n\n{end}{after}"


def config(**changes: Any) -> dict[str, Any]:
    """A policy of a few thousand weights that spells words backwards."""
    made = {
        "project": "load",
        "tasks": {
            "spell": {
                "source": {"kind": "jsonl", "path": "words.jsonl"},
                "prompt": "{word}>",
                "answer": "{answer}",
                "splits": {"heldout": 8},
            }
        },
        "warmups": {
            "tiny": {
                "task": "spell",
                "policy": {
                    "kind": "scratch",
                    "tokenizer": {"kind": "char", "alphabet": "abcdefghijklmnopqrstuvwxyz>"},
                    "layers": 1,
                    "hidden": 16,
                    "heads": 1,
                    "kv_heads": 1,
                    "intermediate": 32,
                    "context": 16,
                },
                "sft": {"steps": 60, "batch": 32, "lr": 3.0e-3},
            }
        },
        "defaults": {
            "task": "spell",
            "warmup": "tiny",
            "rounds": 1,
            "rollout": {"prompts": 4, "group": 4, "sampling": {"max_tokens": 2}},
            "train": {"optimizer": {"lr": 1.0e-4}},
            "evaluate": {"samples": 2, "k": [1, 2], "bootstrap": 50, "every": 50},
        },
        "runs": {"grpo": {"recipe": "grpo"}},
        "mlflow": {"enabled": False},
    }
    for key, value in changes.items():
        made["defaults"][key] = {**made["defaults"][key], **value} if isinstance(value, dict) else value
    return made


def write(folder: Path, made: dict[str, Any], words: int) -> None:
    """The project's files; words of 1 to 4 letters, each once."""
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    chosen: dict[str, None] = {}
    while len(chosen) < words:
        chosen["".join(draw.choices(letters, k=draw.randint(1, 4)))] = None
    rows = [json.dumps({"word": word, "answer": word[::-1][:1]}) for word in chosen]
    (folder / "words.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "config.yaml").write_text(yaml.safe_dump(made, sort_keys=False))


def command(*arguments: str) -> list[str]:
    return [str(BIN / "snakemake"), "--snakefile", str(ROOT / "Snakefile"), "--configfile", "config.yaml", *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}


def run(folder: Path, *arguments: str) -> float:
    """Snakemake to its end; wall seconds."""
    started = time.perf_counter()
    done = subprocess.run(command(*arguments), cwd=folder, env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit((done.stdout + done.stderr)[-5000:])
    return time.perf_counter() - started


def plan(folder: Path, count: int) -> list[str]:
    """A dry run of so many rounds: seconds, and the peak memory of Snakemake."""
    write(folder, config(rounds=count, evaluate={"every": 100}), 64)
    seconds = run(folder, "-n", "--cores", "2", "--quiet", "all")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return [f"`snakemake -n` of {count:,} rounds takes {seconds:.1f} s and {peak:,.0f} MiB."]


def rounds(folder: Path, count: int, *, record: bool) -> list[str]:
    """So many rounds, really run; memory at each new policy, and the line through it."""
    write(folder, config(rounds=count), 64)
    log = (folder / "output").open("w")
    running = subprocess.Popen(
        command("--cores", "2"), cwd=folder, env=environment(), stdout=log, stderr=log, start_new_session=True
    )
    seen: list[Sample] = []
    watching = threading.Thread(target=_watch, args=(folder, running, count, seen))
    started = time.perf_counter()
    watching.start()
    running.wait()
    watching.join()
    seconds = time.perf_counter() - started
    if running.returncode:
        raise SystemExit((folder / "output").read_text()[-5000:])
    files, size = holdings(folder / "results")
    said = [
        f"{count} rounds, {seconds:,.0f} s ({_pace(seen)}); {files:,} files, {size:,.0f} MiB under `results`.",
        "",
        "| memory of | in round "
        + f"{seen[0].round} | in round {seen[-1].round} | MiB per 100 rounds from round {SETTLED} on (95 %) |",
        "|---|---|---|---|",
        *(_row(seen, name, words) for name, words in _CURVES.items()),
        "",
        f"The worker had {seen[0].worker_files} files open at first and {seen[-1].worker_files} in the end.",
    ]
    if record:
        SAMPLES.parent.mkdir(exist_ok=True)
        with SAMPLES.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([field.name for field in fields(Sample)])
            writer.writerows([[_short(getattr(s, field.name)) for field in fields(Sample)] for s in seen])
        CURVE.write_text(drawn(seen))
        said += [
            "",
            "![memory over the rounds](images/load_rounds.svg)",
            "",
            "Every round: [rounds.csv](load/rounds.csv).",
        ]
    return said


_CURVES = {
    "worker_rss": "the worker (RSS)",
    "worker_tree_pss": "the worker and all its processes (PSS)",
    "snakemake_rss": "Snakemake (RSS)",
}


def _short(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _pace(seen: Sequence[Sample]) -> str:
    """Seconds per round in the first and in the last quarter."""
    quarter = max(2, len(seen) // 4)
    first, last = seen[:quarter], seen[-quarter:]
    per = [(part[-1].seconds - part[0].seconds) / (part[-1].round - part[0].round) for part in (first, last)]
    return f"{per[0]:.2f} s a round in the first quarter, {per[1]:.2f} s in the last"


def _row(seen: Sequence[Sample], name: str, words: str) -> str:
    settled = [s for s in seen if s.round >= SETTLED] or list(seen)
    slope, half = slope_of([s.round for s in settled], [getattr(s, name) for s in settled])
    ends = [getattr(seen[0], name), getattr(seen[-1], name)]
    return f"| {words} | {ends[0]:,.1f} | {ends[1]:,.1f} | {100 * slope:+.2f} ± {100 * half:.2f} |"


def slope_of(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Least squares: slope, and half the width of its 95 % interval (normal approximation)."""
    at, values = np.asarray(x, float), np.asarray(y, float)
    if len(at) < 3:
        return 0.0, float("inf")
    centred = at - at.mean()
    slope = float(centred @ values / (centred @ centred))
    rest = values - values.mean() - slope * centred
    return slope, 1.96 * float(np.sqrt(rest @ rest / (len(at) - 2) / (centred @ centred)))


def _watch(folder: Path, running: "subprocess.Popen[bytes]", count: int, seen: list[Sample]) -> None:
    started, worker = time.perf_counter(), 0
    for number in range(1, count + 1):
        path = folder / f"results/grpo-s0/r{number:04d}/policy.json"
        while not path.exists():
            if running.poll() is not None and not path.exists():
                return
            time.sleep(0.01)
        worker = worker or _worker(folder)
        seen.append(
            Sample(
                number,
                time.perf_counter() - started,
                _resident(worker),
                sum(proportional(pid) for pid in descendants(worker)) / MIB,
                len(os.listdir(f"/proc/{worker}/fd")),
                _resident(running.pid),
            )
        )


def _worker(folder: Path) -> int:
    first = (folder / "results/.worker/worker.log").read_text().splitlines()[0].split()
    return int(first[first.index("worker") + 1])


def _resident(pid: int) -> float:
    rows = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(row.split()[1]) / 1024 for row in rows if row.startswith("VmRSS:")), 0.0)


def holdings(folder: Path) -> tuple[int, float]:
    """Files below a folder, and their MiB."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return len(sizes), sum(sizes) / MIB


def drawn(seen: Sequence[Sample], width: int = 640, height: int = 240) -> str:
    """The memory over the rounds, as SVG."""
    left, right, top, bottom = 60, 200, 16, 36
    colours = {"worker_rss": "#2a6fdb", "worker_tree_pss": "#0a8f6a", "snakemake_rss": "#c2571a"}
    most = 1.1 * max(getattr(s, name) for s in seen for name in _CURVES)
    last = max(s.round for s in seen)

    def x(round: float) -> float:
        return left + round / last * (width - left - right)

    def y(value: float) -> float:
        return height - bottom - value / most * (height - top - bottom)

    parts = [
        f'<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg" font-family="sans-serif"'
        ' font-size="11"><rect width="100%" height="100%" fill="white"/>'
    ]
    step = float(f"{most / 4:.0e}")
    parts += [
        f'<line x1="{left}" x2="{width - right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="#ddd"/>'
        f'<text x="{left - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:,.0f}</text>'
        for tick in np.arange(0, most, step)
    ]
    parts.append(f'<text x="{left - 6}" y="{top - 4}" text-anchor="end">MiB</text>')
    parts += [
        f'<text x="{x(tick):.1f}" y="{height - bottom + 16}" text-anchor="middle">{tick}</text>'
        for tick in (0, last // 2, last)
    ]
    parts.append(f'<text x="{x(last / 2):.1f}" y="{height - 6}" text-anchor="middle">round</text>')
    for name, words in _CURVES.items():
        points = " ".join(f"{x(s.round):.1f},{y(getattr(s, name)):.1f}" for s in seen)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colours[name]}" stroke-width="1.5"/>')
        label = {"worker_tree_pss": "worker and its processes (PSS)"}.get(name, words)
        at = y(getattr(seen[-1], name)) + 4
        parts.append(f'<text x="{width - right + 8}" y="{at:.1f}" fill="{colours[name]}">{label}</text>')
    return "".join([*parts, "</svg>\n"])


def wide(folder: Path, prompts: int, samples: int) -> list[str]:
    """One round of many prompts and samples through Snakemake: rollout, score and curate; then a scorer more, the
    catalogue, and a question."""
    rollout = {"prompts": prompts, "group": samples, "part": 65_536, "sampling": {"max_tokens": 2}}
    made = config(rollout=rollout)
    made["warmups"]["tiny"]["sft"]["steps"] = 300
    write(folder, made, prompts + 8)
    batch = "results/grpo-s0/r0000/batch.parquet"
    seconds = run(folder, "--cores", "2", batch, "results/grpo-s0/run.json")
    scorers = {"exact": {"kind": "exact"}, "short": {"kind": "python", "function": "mine.py:judge"}}
    made["defaults"]["score"] = {"scorers": scorers, "reward": {"exact": 1.0}, "correct": "exact"}
    (folder / "mine.py").write_text("def judge(row):\n    return float(len(row['completion']) == 1)\n")
    (folder / "config.yaml").write_text(yaml.safe_dump(made, sort_keys=False))
    again = run(folder, "--cores", "2", "all_scores")
    files, size = holdings(folder / "results")
    lines = [
        f"{prompts:,} prompts x {samples} samples = {prompts * samples:,} rollouts in one round: {seconds:,.0f} s up "
        f"to the batch, {again:,.0f} s for a Python scorer that was added later; {files} files, {size:,.0f} MiB.",
        "",
        "| stage | seconds | CPU seconds | peak MiB | rollouts/s |",
        "|---|---|---|---|---|",
    ]
    for stage, name in (
        ("rollout", "rollout-p0-000"),
        ("score: exact", "score-p0-exact-000"),
        ("curate", "curate"),
        ("score: Python", "score-p0-short-000"),
    ):
        used = json.loads((folder / f"logs/grpo-s0/r0000/{name}.usage.json").read_text())
        lines.append(_line(stage, used["seconds"], used["cpu_seconds"], used["peak_rss_mb"], prompts * samples))
    questions = {
        "catalogue written": "from rollway.store.catalog import write_database as f; f(Path('results'))",
        "`SELECT avg(reward), count(*) FROM scored`": "from rollway.store.catalog import run_sql as f; "
        "print(f(Path('results'), 'SELECT avg(reward), count(*) FROM scored'))",
        "`rollway report`": "from rollway.report.build import build as f; f(Path('results'), Path('report.html'))",
    }
    for words, code in questions.items():
        lines.append(_line(words, *_in_process(folder, code), prompts * samples))
    return lines


def _line(words: str, seconds: float, cpu: float, peak: float, rows: int) -> str:
    return f"| {words} | {seconds:,.1f} | {cpu:,.1f} | {peak:,.0f} | {rows / seconds:,.0f} |"


def _in_process(folder: Path, code: str) -> tuple[float, float, float]:
    """Wall and CPU seconds and peak MiB of a Python process of its own."""
    measured = (
        "import json, resource, sys, time; from pathlib import Path; start = time.perf_counter()\n"
        f"{code}\n"
        "u = resource.getrusage(resource.RUSAGE_SELF)\n"
        "peak = next(int(r.split()[1]) for r in open('/proc/self/status') if r.startswith('VmHWM')) / 1024\n"
        "print(json.dumps([time.perf_counter() - start, u.ru_utime + u.ru_stime, peak]), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", measured], cwd=folder, env=environment(), capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    seconds, cpu, peak = json.loads(done.stderr.splitlines()[-1])
    return seconds, cpu, peak


def rescore(folder: Path, rollouts: int) -> list[str]:
    """Stored rollouts of 64 tokens on average, in shards: the score stage over each, by a pattern and by a
    Python function of the user's."""
    import pyarrow.parquet as pq

    import curation

    curation.write_data(folder, rollouts)
    _write_prompts(folder, [pq.read_table(path, columns=["prompt_id"]) for path in curation.rollout_files(folder)])
    (folder / "mine.py").write_text("def judge(row):\n    return float(len(row['completion']) % 2)\n")
    files, size = holdings(folder)
    lines = [
        f"{rollouts:,} rollouts in {rollouts // curation.SHARD} shards; {files} files, {size:,.0f} MiB before.",
        "",
        "| scorer | seconds | CPU seconds | peak MiB of a job | rollouts/s |",
        "|---|---|---|---|---|",
    ]
    scorers = {
        "pattern": {"kind": "format", "pattern": "answer [0-9]*7"},
        "Python": {"kind": "python", "function": "mine.py:judge"},
    }
    for name, settings in scorers.items():
        used = [_score(folder, path, name.lower(), settings) for path in curation.rollout_files(folder)]
        seconds, cpu, peak = sum(u[0] for u in used), sum(u[1] for u in used), max(u[2] for u in used)
        lines.append(_line(name, seconds, cpu, peak, rollouts))
    added = len(list((folder / "scores").glob("p*-*.parquet")))
    after = holdings(folder)
    lines += [
        "",
        f"{added} files of scores, {after[1] - size:,.0f} MiB more. One job at a time, each a process of its own.",
    ]
    return lines


def _write_prompts(folder: Path, ids: Sequence[Any]) -> None:
    import pyarrow as pa
    import pyarrow.compute as pc

    from rollway.store import parquet

    names = pc.unique(pa.concat_tables(ids).column("prompt_id"))
    count = len(names)

    def constant(value: str) -> pa.Array:
        return pa.repeat(pa.scalar(value), count)

    columns = {
        "prompt_id": names,
        "task": constant("load"),
        "split": constant("train"),
        "messages": constant('[{"role": "user", "content": "1+1="}]'),
        "answer": constant("2"),
        "meta": constant('{"format": "plain"}'),
    }
    parquet.write(folder / "prompts.parquet", pa.table(columns), "prompts")


def _score(folder: Path, rollouts: Path, name: str, settings: dict[str, Any]) -> tuple[float, float, float]:
    spec = json.dumps({"version": 1, "scorer": name, "config": settings})
    shard = rollouts.stem.rpartition("-")[2]
    code = (
        "from rollway.runtime.jobs import run_stage\n"
        f"code = run_stage(['score', '--spec', {spec!r}, '--prompts', 'prompts.parquet', '--rollouts',"
        f" {rollouts.name!r}, '--cache', 'cache', '--scores', 'scores/{name}-{shard}.parquet'])\n"
        "assert code == 0"
    )
    return _in_process(folder, code)


if __name__ == "__main__":
    sys.exit(main())
