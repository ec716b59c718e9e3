"""How long each query of docs/cookbook.md takes over a results folder of a million rollouts.

    python benchmarks/queries.py [--rollouts N] [--folder DIR] [--threads N] [--repeats N] [--record]

The folder is made of the store's own writers, of random content: two runs and a fork of 100 rounds, groups of 8,
completions of 16 to 112 tokens (64 on average, with log-probs and entropies), two scorers, evaluations every 2 rounds.
It is kept under --folder for the next time.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import duckdb
import harness
import numpy as np
import pyarrow as pa

from rollway.store import cookbook, parquet
from rollway.store.atomic import write_json
from rollway.store.catalog import with_catalog
from rollway.store.tables import TABLES

GROUP, ROUNDS, EVERY, SAMPLES, HELDOUT = 8, 100, 2, 4, 500
LIMIT = 2.0
"""Seconds that a query may take."""
FORK, LAST = "drgrpo-s0", 50
"""The fork takes its rounds up to LAST from the first run."""
WORDS = np.array(["so", "then", "we", "add", "the", "sums", "and", "see", "it", "is", "right", "carry", "seven", "ten"])


def main() -> int:
    options = harness.parser(__doc__.splitlines()[0] if __doc__ else None, repeats=3)
    options.add_argument("--rollouts", type=int, default=1_000_000)
    options.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "rollway-queries")
    args = options.parse_args()
    results = args.folder / f"{args.rollouts}"
    if not (results / "whole").exists():
        make_results(results, args.rollouts)
    found = measured(results, args)
    code = harness.finish(found, args)
    print(f"{sum(map(within, found))} of {len(found)} queries within {LIMIT:g} s")
    return code


def within(result: harness.Result) -> bool:
    return result.bar is not None and result.bar.reached(result.figure())


def measured(results: Path, args: argparse.Namespace) -> list[harness.Result]:
    """Every query with the catalogue opened anew, as `rollway sql` asks it."""

    def work(catalog: duckdb.DuckDBPyConnection, query: str) -> None:
        catalog.execute(f"SET threads = {args.threads}")
        catalog.execute(query).fetchall()

    found = []
    for number, recipe in enumerate(cookbook.read(cookbook.PAGE), start=1):

        def ask(query: str = recipe.query) -> None:
            with_catalog(results, lambda catalog: work(catalog, query))

        note = f"{args.rollouts:,} rollouts"
        case = f"{number}. {recipe.question}"
        found.append(harness.measure("queries", case, ask, bar=harness.at_most(LIMIT), repeats=args.repeats, note=note))
    return found


def make_results(root: Path, rollouts: int) -> None:
    """Two runs of ROUNDS rounds, and a fork of the last ones, that hold `rollouts` rollouts together."""
    started = time.perf_counter()
    rng = np.random.default_rng(0)
    runs = {"grpo-s0": range(ROUNDS), "rloo-s0": range(ROUNDS), FORK: range(LAST, ROUNDS)}
    groups = max(1, rollouts // (GROUP * sum(map(len, runs.values()))))
    write_prompts(root, 20 * groups)
    for run, rounds in runs.items():
        parent = {"parent": "grpo-s0", "fork_round": LAST - 1, "fork_stage": "train"} if run == FORK else {}
        write_json(root / run / "run.json", run_info(run, **parent))
        for round in rounds:
            write_round(root / run, run, round, groups, rng)
        for round in range(rounds.start, ROUNDS + 1, EVERY):
            write_evaluation(root / run / f"r{round:04d}", round, rng)
    (root / "whole").touch()
    print(f"made {root} in {time.perf_counter() - started:.0f} s", file=sys.stderr)


def run_info(run: str, **more: object) -> dict[str, object]:
    score = {
        "scorers": {"exact": {"kind": "exact"}, "short": {"kind": "length", "limit": 112, "cache": 32}},
        "reward": {"exact": 1.0, "short": 0.1},
        "correct": "exact",
    }
    name = run.removesuffix("-s0")
    place = {"name": name, "recipe": name, "title": name, "seed": 0, "task": "spell", "warmup": "tiny"}
    lineage = {"parent": None, "fork_round": None, "fork_stage": None}
    return place | lineage | {"rounds": ROUNDS, "config": {"score": score, "rounds": ROUNDS}} | more


def write_prompts(root: Path, train: int) -> None:
    for split, count in (("train", train), ("heldout", HELDOUT)):
        content = [json.dumps([{"role": "user", "content": f"{split} {n}>"}]) for n in range(count)]
        table = pa.table(
            {
                "prompt_id": [f"{split}-{n:06d}" for n in range(count)],
                "task": ["spell"] * count,
                "split": [split] * count,
                "messages": content,
                "answer": [str(n) for n in range(count)],
                "meta": ['{"format": "plain"}'] * count,
            }
        )
        parquet.write(root / "tasks" / "spell" / f"{split}.parquet", table, "prompts")


def write_round(folder: Path, run: str, round: int, groups: int, rng: np.random.Generator) -> None:
    count, folder = groups * GROUP, folder / f"r{round:04d}"
    lengths = rng.integers(16, 113, count)
    ids = [f"{run}-{round:04d}-{n // GROUP:05d}-{n % GROUP:04d}" for n in range(count)]
    block = (round % 20) * groups
    group_ids = [f"{run}-{round:04d}-{n:05d}" for n in range(groups)]
    rollouts = {
        "rollout_id": ids,
        "round": np.full(count, round, np.int32),
        "pass": np.zeros(count, np.int32),
        "policy": [f"{run}-{round}"] * count,
        "policy_round": np.full(count, round, np.int32),
        "group_id": np.repeat(group_ids, GROUP),
        "prompt_id": np.repeat([f"train-{block + n:06d}" for n in range(groups)], GROUP),
        "sample": np.tile(np.arange(GROUP, dtype=np.int32), groups),
        "source": ["policy"] * count,
        "finish": np.where(lengths > 108, "length", "stop"),
        "length": lengths.astype(np.int32),
        "engine": ["transformers"] * count,
        "sampling": ['{"max_tokens": 112, "temperature": 1.0}'] * count,
        **payload(lengths, rng),
    }
    parquet.write(folder / "p0" / "rollouts-000.parquet", pa.table(rollouts), "rollouts")
    right = rng.random(count) < 0.2 + 0.6 * round / ROUNDS
    for scorer, reward in (("exact", right), ("short", rng.random(count) < 0.9)):
        scores = {
            "rollout_id": ids,
            "scorer": [scorer] * count,
            "reward": reward.astype(float),
            "components": [[]] * count,
        }
        parquet.write(folder / "p0" / "scores" / f"{scorer}-000.parquet", cast(scores, "scores"), "scores")
    kept = np.flatnonzero(np.repeat(right.reshape(groups, GROUP).std(1) > 0, GROUP))
    batch = {
        "rollout_id": [ids[n] for n in kept],
        "slot": np.zeros(len(kept), np.int32),
        "advantage": rng.normal(size=len(kept)),
        "weight": np.ones(len(kept)),
        "reward": right[kept].astype(float),
        "correct": right[kept],
        "group_id": [group_ids[n // GROUP] for n in kept],
        "age": np.zeros(len(kept), np.int32),
    }
    parquet.write(folder / "batch.parquet", pa.table(batch), "batch")
    curated = {"reward_mean": float(right.mean()), "length_mean": float(lengths.mean())}
    write_metrics(folder / "curate.json", round, "curate", curated)
    after = folder.parent / f"r{round + 1:04d}"
    trained = {name: float(rng.random()) for name in ("grad_norm", "entropy_old", "gap_max", "loss")}
    write_metrics(after / "metrics.json", round, "train", trained)


def payload(lengths: np.ndarray, rng: np.random.Generator) -> dict[str, object]:
    total, offsets = int(lengths.sum()), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    logprobs = -rng.exponential(0.4, total).astype(np.float32)
    every = [{"start": 0, "end": int(length), "author": "policy", "turn": 0} for length in lengths]
    schema = TABLES["rollouts"].schema()
    return {
        "prompt_tokens": [[7, 8, 9]] * len(lengths),
        "tokens": pa.ListArray.from_arrays(offsets, rng.zipf(1.3, total).clip(max=32_000).astype(np.int32)),
        "logprobs": pa.ListArray.from_arrays(offsets, logprobs),
        "train_mask": pa.ListArray.from_arrays(offsets, np.ones(total, bool)),
        "segments": pa.array([[s] for s in every], schema.field("segments").type),
        "text": [" ".join(words) for words in WORDS[rng.integers(0, len(WORDS), (len(lengths), 24))]],
        "entropy": pa.ListArray.from_arrays(offsets, rng.exponential(0.5, total).astype(np.float32)),
    }


def write_evaluation(folder: Path, round: int, rng: np.random.Generator) -> None:
    count = HELDOUT * SAMPLES
    lengths = rng.integers(16, 113, count)
    right = rng.random(count) < 0.2 + 0.6 * round / ROUNDS
    prompts = np.repeat(np.arange(HELDOUT), SAMPLES)
    own = payload(lengths, rng)
    evals = {
        "prompt_id": [f"heldout-{n:06d}" for n in prompts],
        "sample": np.tile(np.arange(SAMPLES, dtype=np.int32), HELDOUT),
        "correct": right,
        "reward": right.astype(float),
        "length": lengths.astype(np.int32),
        "finish": np.where(lengths > 108, "length", "stop"),
        "answer": np.where(right, prompts, rng.integers(0, 9, count)).astype(str),
        **{name: own[name] for name in ("text", "tokens", "logprobs")},
    }
    parquet.write(folder / "evals.parquet", pa.table(evals), "evals")
    write_metrics(folder / "evals.json", round, "evaluate", {"pass@1": float(right.mean())})


def write_metrics(path: Path, round: int, stage: str, values: dict[str, float]) -> None:
    rows = [{"step": round if stage == "train" else 0, "name": name, "value": value} for name, value in values.items()]
    write_json(path, {"round": round, "stage": stage, "metrics": rows})


def cast(columns: dict[str, object], table: str) -> pa.Table:
    schema = TABLES[table].schema()
    return pa.table({name: pa.array(values, schema.field(name).type) for name, values in columns.items()})


if __name__ == "__main__":
    sys.exit(main())
