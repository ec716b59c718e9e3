"""Rounds of ours inside one warm process, stage after stage, without the workflow: the files are written as always.

python benchmarks/rl_stages.py CONFIG RUN --threads N

Reads lines from standard input: `N` runs the next N rounds and answers with a JSON list of [wall seconds, CPU seconds,
{stage: wall seconds}], one per round; an empty line or the end ends it.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("config", type=Path)
    options.add_argument("run")
    options.add_argument("--threads", type=int, default=2)
    chosen = options.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(chosen.threads)
    # Stages print; standard output is for answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(chosen.threads)
    rounds = Rounds(chosen.config, chosen.run, chosen.threads)
    rounds.warm_up()
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        if not line.strip():
            return
        print(json.dumps([rounds.next() for _ in range(int(line))]), file=answers, flush=True)


class At:
    """Snakemake's wildcards, as the plan reads them."""

    def __init__(self, **values: str) -> None:
        self.__dict__.update(values)


class Rounds:
    def __init__(self, config: Path, run: str, threads: int) -> None:
        import yaml

        from rollway.config import load_experiment
        from rollway.runtime.plan import Plan

        self.plan = Plan(load_experiment(yaml.safe_load(config.read_text())))
        self.run, self.threads, self.round = run, threads, 0

    def warm_up(self) -> None:
        """Prompts and the policy of round 0."""
        from rollway.runtime import specs
        from rollway.stages import prepare, warmup

        plan, config = self.plan, self.plan.config_of(self.run)
        train, heldout = (Path(plan.prompts_path(self.run, split)) for split in ("train", "heldout"))
        prepare.run(_spec(specs.PrepareSpec, plan.prepare_spec(At(task=config.task))), train=train, heldout=heldout)
        spec = _spec(specs.WarmupSpec, plan.warmup_spec(At(warmup=config.warmup, seed="0")))
        warmup.run(spec, prompts=[], policy=Path(plan.warmup_path(self.run)))

    def next(self) -> tuple[float, float, dict[str, float]]:
        """One round."""
        wall, cpu = time.perf_counter(), time.process_time()
        seconds = {}
        for name, stage in (("rollout", self.rollout), ("score", self.score), ("curate", self.curate)):
            start = time.perf_counter()
            stage()
            seconds[name] = time.perf_counter() - start
        start = time.perf_counter()
        self.train()
        seconds["train"] = time.perf_counter() - start
        self.round += 1
        return time.perf_counter() - wall, time.process_time() - cpu, seconds

    def rollout(self) -> None:
        from rollway.runtime import specs
        from rollway.stages import rollout

        rollout.run(
            _spec(specs.RolloutSpec, self.plan.rollout_spec(self._at(p="0", shard="000"))),
            prompts=Path(self.plan.prompts_path(self.run, "train")),
            policy=Path(self.plan.rollout_policy(self._at())),
            rollouts=self._rollouts(),
            earlier_rollouts=[],
            earlier_scores=[],
            stored=[],
        )

    def score(self) -> None:
        from rollway.runtime import specs
        from rollway.stages import score

        score.run(
            _spec(specs.ScoreSpec, self.plan.score_spec(self._at(p="0", shard="000", scorer="even"))),
            prompts=Path(self.plan.prompts_path(self.run, "train")),
            rollouts=self._rollouts(),
            needs=[],
            scores=self._scores(),
            cache=Path(self.plan.results) / ".cache",
            threads=self.threads,
        )

    def curate(self) -> None:
        from rollway.runtime import specs
        from rollway.stages import curate

        curate.run(
            _spec(specs.CurateSpec, self.plan.curate_spec(self._at())),
            prompts=Path(self.plan.prompts_path(self.run, "train")),
            rollouts=[self._rollouts()],
            scores=[self._scores()],
            batch=self._folder() / "batch.parquet",
            metrics=self._folder() / "curate.json",
            threads=self.threads,
        )

    def train(self) -> None:
        from rollway.runtime import specs
        from rollway.stages import train

        at = self._at(next=f"{self.round + 1:04d}")
        following = Path(self.plan.policy_path(self.run, self.round + 1))
        train.run(
            _spec(specs.TrainSpec, self.plan.train_spec(at)),
            batch=self._folder() / "batch.parquet",
            rollouts=[self._rollouts()],
            policy=Path(self.plan.train_policy(at)),
            reference=[],
            next_policy=following,
            metrics=following.parent / "metrics.json",
        )

    def _at(self, **more: str) -> At:
        return At(run=self.run, round=f"{self.round:04d}", **more)

    def _folder(self) -> Path:
        return Path(self.plan.folder(self.run, self.round))

    def _rollouts(self) -> Path:
        return Path(self.plan.rollout_paths(self.run, self.round, 0)[0])

    def _scores(self) -> Path:
        return Path(self.plan.score_paths(self.run, self.round, 0, "even")[0])


def _spec(kind: type[Any], text: str) -> Any:
    return kind.model_validate_json(text)


if __name__ == "__main__":
    main()
