"""Peak memory of an RL step: everything that Snakemake runs, against TRL's one process.

Both run the steps of rl_step.py from nothing: imports and set-up are in it. Memory is the sum over the processes of
their proportional set size, every 50 ms.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import harness
import process_memory
import rl_bed

MIB = 2**20


def main() -> int:
    options = harness.parser(__doc__, repeats=3)
    options.add_argument("--steps", type=int, default=3, help="steps of each side in one repetition")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="rl-memory-") as temporary:
        folder = Path(temporary)
        size = rl_bed.size_for(chosen.device)
        rl_bed.write(folder, size)
        rounds = chosen.repeats * chosen.steps
        config = rl_bed.config(folder, size, {"memory": {"recipe": "grpo"}}, rounds=rounds, results="memory")
        staged = rl_bed.Staged(folder, config, "memory", "memory-s0", threads=chosen.threads, device=chosen.device)
        result = harness.race(
            "rl_memory",
            f"peak memory of an RL step, {rl_bed.PROMPTS} prompts x {rl_bed.GROUP} x {rl_bed.TOKENS} tokens",
            lambda: _ours(staged, chosen),
            lambda: _trl(folder, size, chosen),
            peer_name="TRL",
            bar=harness.at_most(0.8),
            repeats=chosen.repeats,
            warmup=0,
            unit="MiB",
            note="PSS of all processes, sampled every 50 ms; imports and set-up included",
        )
        return harness.finish([result], chosen)


def _ours(staged: rl_bed.Staged, chosen: argparse.Namespace) -> float:
    workflow = staged.start(chosen.steps)
    with process_memory.watched(workflow.process.pid) as peak:
        workflow.finish()
    return _told("ours", peak)


def _trl(folder: Path, size: str, chosen: argparse.Namespace) -> float:
    arguments = [str(folder), size, "--device", chosen.device]
    # Not told to be ready yet: its imports are watched too.
    side = rl_bed.Side(
        "rl_trl.py",
        *arguments,
        threads=chosen.threads,
        device=chosen.device,
        log=folder / "trl.log",
        wait=False,
    )
    with process_memory.watched(side.process.pid) as peak:
        side.answer()
        side.ask(str(chosen.steps))
        side.close()
    return _told("TRL", peak)


def _told(name: str, peak: process_memory.Peak) -> float:
    print(f"  {name}: {peak.samples} samples; at the peak:")
    for process, size in sorted(peak.parts.items(), key=lambda part: -part[1]):
        print(f"    {size / MIB:7.1f} MiB  {process}")
    return peak.total / MIB


if __name__ == "__main__":
    sys.exit(main())
