"""One RL step against TRL's GRPOTrainer: rollout, score, curate and train of 32 prompts x 8 completions x 64 tokens.

The same random Qwen3 (0.8 M parameters on the CPU, 0.6 B on a GPU), prompts, reward and learning rate; one update per
batch, no reference. TRL's figure is its steady step, in a process of its own. Ours is taken twice:

- inside the stages: the stage functions called one after another in one warm process, their files written as always;
- staged: through Snakemake and the warm worker, from one policy.json to the next, without the start of the workflow.
  Evaluation, report and tracking are not part of a step, and TRL does none.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import harness
import rl_bed

CASE = f"{rl_bed.PROMPTS} prompts x {rl_bed.GROUP} x {rl_bed.TOKENS} tokens, one update"


def main() -> int:
    options = harness.parser(__doc__)
    options.add_argument("--steps", type=int, default=3, help="steps of each side in one repetition")
    options.add_argument("--only", choices=("inside", "staged"), help="one of the two cases")
    options.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: of the case inside the stages")
    chosen = options.parse_args()
    if chosen.clock == "cpu" and chosen.only == "staged":
        options.error("--clock cpu is of the case inside the stages: the staged one is timed by its files")
    with tempfile.TemporaryDirectory(prefix="rl-step-") as temporary:
        folder = Path(temporary)
        rl_bed.write(folder, rl_bed.size_for(chosen.device))
        cases = [chosen.only] if chosen.only else ["inside", "staged"]
        peer = rl_bed.Side(
            "rl_trl.py",
            str(folder),
            rl_bed.size_for(chosen.device),
            "--device",
            chosen.device,
            threads=chosen.threads,
            device=chosen.device,
            log=folder / "trl.log",
        )
        results = [{"inside": _inside, "staged": _staged}[case](folder, peer, chosen) for case in cases]
        peer.close()
        return harness.finish(results, chosen)


def _inside(folder: Path, peer: rl_bed.Side, chosen: argparse.Namespace) -> harness.Result:
    rounds = (chosen.repeats + 1) * chosen.steps
    config = rl_bed.config(
        folder, rl_bed.size_for(chosen.device), {"inside": {"recipe": "grpo"}}, rounds=rounds, results="inside"
    )
    ours = rl_bed.Side(
        "rl_stages.py",
        str(config),
        "inside-s0",
        threads=chosen.threads,
        device=chosen.device,
        log=folder / "stages.log",
    )
    stages: list[dict[str, float]] = []
    column = 0 if chosen.clock == "wall" else 1

    def rounds_of_ours() -> float:
        done = ours.ask(str(chosen.steps))
        stages.extend(row[2] for row in done)
        return statistics.median(row[column] for row in done)

    result = harness.race(
        "rl_step",
        f"inside the stages: {CASE}",
        rounds_of_ours,
        lambda: _steps(peer, chosen.steps, column),
        peer_name="TRL",
        bar=harness.at_most(0.8, 0.5),
        repeats=chosen.repeats,
        unit="s" if chosen.clock == "wall" else "CPU s",
        note="files written as always; TRL: steady step",
    )
    ours.close()
    for name in stages[0]:
        print(f"  {name}: {statistics.median(stage[name] for stage in stages):.3f} s")
    return result


def _staged(folder: Path, peer: rl_bed.Side, chosen: argparse.Namespace) -> harness.Result:
    rounds = (chosen.repeats + 1) * (chosen.steps + 1)
    config = rl_bed.config(
        folder, rl_bed.size_for(chosen.device), {"staged": {"recipe": "grpo"}}, rounds=rounds, results="staged"
    )
    ours = rl_bed.Staged(folder, config, "staged", "staged-s0", threads=chosen.threads, device=chosen.device)
    result = harness.race(
        "rl_step",
        f"staged through Snakemake: {CASE}",
        # One round more than steps: the first policy is where the clock starts.
        lambda: statistics.median(ours.more(chosen.steps + 1)),
        lambda: _steps(peer, chosen.steps, 0),
        peer_name="TRL",
        bar=harness.at_most(1.0, 0.7),
        repeats=chosen.repeats,
        note="policy.json to policy.json, warm worker, --cores 2; no evaluation, report or tracking; TRL: steady step",
    )
    for stage in ("rollout-p0-000", "score-p0-even-000", "curate", "train"):
        print(f"  {stage}: {ours.job_seconds(stage):.3f} s in the job")
    return result


def _steps(peer: rl_bed.Side, steps: int, column: int) -> float:
    return statistics.median(row[column] for row in peer.ask(str(steps)))


if __name__ == "__main__":
    sys.exit(main())
