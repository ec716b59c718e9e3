"""Five methods take their first update from the same rollouts: `fork`, against five TRL runs of one step.

Ours: one run rolls out and scores; it and four forks curate and train, through Snakemake and the warm worker, training
jobs side by side with a thread each. Counted from the file of the starting policy (the worker is warm then) to the last
of the five policies.

TRL: five trainers one after another in one warm process, each on a fresh copy of the model, one step each. Its imports
and a first trainer are not counted.

All make one update of 32 prompts x 8 completions x 64 tokens. None of the five drops a row.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import harness
import rl_bed

METHODS: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo"},
    "dr-grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "sapo": {"loss_type": "sapo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.28},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
}
"""Recipe -> the same method's settings in TRL."""
PARENT = "grpo"


def main() -> int:
    chosen = harness.parser(__doc__, repeats=3).parse_args()
    with tempfile.TemporaryDirectory(prefix="fork-") as temporary:
        folder = Path(temporary)
        size = rl_bed.size_for(chosen.device)
        rl_bed.write(folder, size)
        arguments = [str(folder), size, "--device", chosen.device, "--new"]
        peer = rl_bed.Side(
            "rl_trl.py", *arguments, threads=chosen.threads, device=chosen.device, log=folder / "trl.log"
        )
        forks = Forks(folder, size, chosen)
        result = harness.race(
            "fork",
            f"first update of {len(METHODS)} methods from the same rollouts",
            forks,
            lambda: _trl(peer),
            peer_name="TRL, one run each",
            bar=harness.at_least(2.3),
            repeats=chosen.repeats,
            note="ours: first policy to last policy, worker warm; TRL: trainer and one step each, imports not counted",
        )
        peer.close()
        return harness.finish([result], chosen)


def _trl(peer: rl_bed.Side) -> float:
    """Seconds of five trainers and their steps."""
    words = [" ".join(f"{key}={json.dumps(value)}" for key, value in more.items()) for more in METHODS.values()]
    return sum(peer.ask(f"new {settings}")[0] for settings in words)


class Forks:
    """Each call makes the five first updates anew, in a results folder of its own."""

    def __init__(self, folder: Path, size: str, chosen: argparse.Namespace) -> None:
        self.folder, self.size, self.chosen, self.calls = folder, size, chosen, 0

    def __call__(self) -> float:
        self.calls += 1
        results = f"forks-{self.calls}"
        parent = {"fork": {"run": PARENT, "round": 0, "stage": "score"}}
        runs = {name: {"recipe": name, **({} if name == PARENT else parent)} for name in METHODS}
        # Some recipes make several updates of a batch; TRL is given one.
        once = {"train": {"minibatches": 1, "optimizer": {"lr": rl_bed.LEARNING_RATE}}}
        config = rl_bed.config(self.folder, self.size, runs, rounds=1, results=results, defaults=once)
        policies = [self.folder / results / f"{name}-s0" / "r0001" / "policy.json" for name in METHODS]
        threads = {"rollout": self.chosen.threads, "train": 1 if self.chosen.device == "cpu" else self.chosen.threads}
        command = rl_bed.snakemake(config, [str(path) for path in policies], threads, cores=self.chosen.threads)
        environment = rl_bed.environment(self.chosen.threads, self.chosen.device)
        rl_bed.Workflow([sys.executable, *command], self.folder, environment).finish()
        first = self.folder / results / "warmups" / "random-s0" / "policy.json"
        _check_work(self.folder / results)
        return max(path.stat().st_mtime for path in policies) - first.stat().st_mtime


def _check_work(results: Path) -> None:
    """Every method must have trained on all rows: a batch without signal costs nothing."""
    for name in METHODS:
        metrics = json.loads((results / f"{name}-s0" / "r0001" / "metrics.json").read_text())["metrics"]
        found = {row["name"]: row["value"] for row in metrics}
        if found["rows"] != rl_bed.PROMPTS * rl_bed.GROUP or found["skipped"]:
            raise SystemExit(f"{name}: trained on {found['rows']:.0f} rows, skipped {found['skipped']:.0f}")


if __name__ == "__main__":
    sys.exit(main())
