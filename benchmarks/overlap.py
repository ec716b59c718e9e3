"""`lag: 1` against `lag: 0`: rounds per second where rollout and training cost about the same.

Through Snakemake and the warm worker, with a core (or a GPU) for each stage: with lag 1 the rollouts of round r + 1 are
generated while round r is trained. On the CPU completions are long, so that decoding costs what the update does; the
most that overlap can give is (rollout + train) / max(rollout, train), printed beside the figure.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import harness
import rl_bed

ROUNDS = 6
SETTINGS = {"prompts": 16, "group": 8, "sampling": {"max_tokens": 192}}


def main() -> int:
    options = harness.parser(__doc__, repeats=3)
    options.set_defaults(threads=1)
    options.add_argument("--rounds", type=int, default=ROUNDS, help="rounds of each side in one repetition")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="overlap-") as temporary:
        folder = Path(temporary)
        size = rl_bed.size_for(chosen.device)
        rl_bed.write(folder, size)
        sides = {lag: _side(folder, size, lag, chosen) for lag in (0, 1)}
        result = harness.race(
            "overlap",
            "seconds per round, lag 1 against lag 0",
            lambda: _round(sides[1], chosen.rounds),
            lambda: _round(sides[0], chosen.rounds),
            peer_name="lag 0",
            bar=None,
            repeats=chosen.repeats,
            note="two jobs at a time, a core or a GPU each; policy.json to policy.json",
        )
        stages = [sides[0].job_seconds(stage) for stage in ("rollout-p0-000", "train")]
        print(f"  lag 0: rollout {stages[0]:.2f} s, train {stages[1]:.2f} s in the job;", end=" ")
        print(f"the least that lag 1 can need is {max(stages) / sum(stages):.2f} of it")
        for lag, side in sides.items():
            print(f"  lag {lag}: {_shared(side):.0%} of the rollouts' time lies inside training")
        return harness.finish([result], chosen)


def _side(folder: Path, size: str, lag: int, chosen: argparse.Namespace) -> rl_bed.Staged:
    name = f"lag{lag}"
    rounds = (chosen.repeats + 1) * chosen.rounds
    defaults = {"rollout": SETTINGS, "lag": lag}
    config = rl_bed.config(folder, size, {name: {"recipe": "grpo"}}, rounds=rounds, results=name, defaults=defaults)
    return rl_bed.Staged(folder, config, name, f"{name}-s0", threads=chosen.threads, device=chosen.device)


def _round(side: rl_bed.Staged, rounds: int) -> float:
    """Seconds per round, the first two left out: one starts the worker, the other starts the pipeline."""
    return statistics.mean(side.more(rounds)[1:])


def _shared(side: rl_bed.Staged) -> float:
    trained = side.spans("train")
    rollouts = side.spans("rollout-p0-000")
    both = sum(max(0.0, min(e, f) - max(b, s)) for b, e in rollouts for s, f in trained)
    return both / sum(end - begin for begin, end in rollouts)


if __name__ == "__main__":
    sys.exit(main())
