"""Small results folders with every table, made by the store's own writers."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from rollway.store import parquet
from rollway.store.atomic import write_json
from rollway.store.tables import TABLES

PROMPTS, GROUP = 3, 4
CONFIG = {
    "score": {
        "scorers": {"exact": {"kind": "exact"}, "format": {"kind": "format"}},
        "reward": {"exact": 1.0, "format": 0.5},
    },
    "train": {"optimizer": {"lr": 0.001}, "objective": {"kl": None}},
    "rounds": 2,
}
HOSTILE = "<script>alert('x')</script>\x1b[31m &amp; \u202e"


def make_results(root: Path, runs: dict[str, int], text: str = "abc", **info: Any) -> Path:
    """`runs`: run -> rounds. Each has rollouts, scores of two scorers, batch, metrics and evaluations that improve."""
    write_prompts(root)
    for run, rounds in runs.items():
        write_run_info(root, run, rounds=rounds, **info)
        for round in range(rounds):
            write_round(root, run, round, text)
        for round in range(rounds + 1):
            write_evaluation(root, run, round)
    return root


def write_prompts(root: Path) -> None:
    for split in ("train", "heldout"):
        rows = [
            {
                "prompt_id": f"{split}-{i}",
                "task": "add",
                "split": split,
                "messages": json.dumps([{"role": "user", "content": f"{i}+{i}="}]),
                "answer": str(2 * i),
                "meta": json.dumps({"format": "plain"}),
            }
            for i in range(PROMPTS)
        ]
        write(root / "tasks" / "add" / f"{split}.parquet", rows, "prompts")


def write_run_info(root: Path, run: str, **info: Any) -> None:
    name, _, seed = run.rpartition("-s")
    base = {
        "name": name,
        "recipe": "grpo",
        "title": "GRPO",
        "seed": int(seed),
        "task": "add",
        "warmup": "tiny",
        "rounds": 2,
    }
    write_json(
        root / run / "run.json",
        {**base, "parent": None, "fork_round": None, "fork_stage": None, "config": CONFIG, **info},
    )


def rollout_rows(run: str, round: int, text: str = "abc") -> list[dict[str, Any]]:
    return [
        {
            "rollout_id": f"{run}-{round}-{prompt}-{sample}",
            "round": round,
            "pass": 0,
            "policy": "digest",
            "policy_round": round,
            "group_id": f"{round}-{prompt}",
            "prompt_id": f"train-{prompt}",
            "sample": sample,
            "source": "policy",
            "finish": "length" if sample == 3 else "stop",
            "length": 3,
            "engine": "transformers",
            "sampling": "{}",
            "prompt_tokens": [1],
            "tokens": [5, 6, 2],
            "logprobs": [-0.1, -2.0, -4.0],
            "train_mask": [True, True, False],
            "segments": [{"start": 0, "end": 3, "author": "policy", "turn": 0}],
            "text": text,
        }
        for prompt in range(PROMPTS)
        for sample in range(GROUP)
    ]


def write_round(
    root: Path,
    run: str,
    round: int,
    text: str = "abc",
    parts: tuple[str, ...] = ("rollout", "score", "curate", "train"),
) -> None:
    """Sample 0 is right everywhere, sample 1 too except for prompt 2; curation drops group 2."""
    folder = root / run / f"r{round:04d}"
    rows = rollout_rows(run, round, text)
    if "rollout" in parts:
        half = len(rows) // 2
        write(folder / "p0" / "rollouts-000.parquet", rows[:half], "rollouts")
        write(folder / "p0" / "rollouts-001.parquet", rows[half:], "rollouts")
    if "score" in parts:
        for scorer in ("exact", "format"):
            scores = [score(row, scorer) for row in rows]
            write(folder / "p0" / "scores" / f"{scorer}-000.parquet", scores, "scores")
    if "curate" in parts:
        kept = [row for row in rows if row["prompt_id"] != "train-2"]
        batch = [
            {
                "rollout_id": r["rollout_id"],
                "slot": 0,
                "advantage": 0.5 - r["sample"],
                "reward": 7.0,
                "correct": r["sample"] == 0,
            }
            for r in kept
        ]
        write(folder / "batch.parquet", batch, "batch")
        write_metrics(
            folder / "curate.json", round, "curate", {"reward_mean": 0.5 + round, "groups_with_signal_share": None}
        )
    if "train" in parts:
        steps = [{"step": s, "name": "train/grad_norm", "value": 1.0 + s + round} for s in (1, 2)]
        path = root / run / f"r{round + 1:04d}" / "metrics.json"
        write_json(path, {"round": round, "stage": "train", "metrics": steps})


def score(row: dict[str, Any], scorer: str) -> dict[str, Any]:
    right = row["sample"] == 0 or (row["sample"] == 1 and row["prompt_id"] != "train-2")
    reward = float(right) if scorer == "exact" else 1.0
    return {"rollout_id": row["rollout_id"], "scorer": scorer, "reward": reward, "components": [("part", 0.25)]}


def write_evaluation(root: Path, run: str, round: int, samples: int = 4) -> None:
    """min(round + 1, samples) of the samples are right."""
    folder = root / run / f"r{round:04d}"
    rows = [
        {
            "prompt_id": f"heldout-{prompt}",
            "sample": sample,
            "correct": sample <= round,
            "reward": float(sample <= round),
            "length": 3,
            "finish": "stop",
            "text": "abc",
            "answer": "abc",
            "tokens": [5, 6, 2],
            "logprobs": [-0.1, -2.0, -4.0],
        }
        for prompt in range(PROMPTS)
        for sample in range(samples)
    ]
    write(folder / "evals.parquet", rows, "evals")
    right = min(round + 1, samples) / samples
    figures = {"pass@1": right, "pass@1/low": right - 0.1, "pass@1/high": right + 0.1}
    write_metrics(folder / "evals.json", round, "evaluate", figures)


def write_metrics(path: Path, round: int, stage: str, values: dict[str, float | None]) -> None:
    rows = [{"step": 0, "name": name, "value": value} for name, value in values.items()]
    write_json(path, {"round": round, "stage": stage, "metrics": rows})


TAUGHT = {
    "teacher_logprob": [-0.5, -1.0, -2.0],
    "teacher_entropy": [0.1, 0.2, 0.3],
    "teacher_topk_ids": [[5, 1], [6, 1], [2, 1]],
    "teacher_topk_logprobs": [[-0.5, -1.5]] * 3,
}


def teacher_rows(run: str, round: int) -> list[dict[str, Any]]:
    """Of the rollouts of prompt 2 there is nothing to say."""
    core, none = {"scorer": "teacher", "components": {}, "reward": -1.0}, dict.fromkeys(TAUGHT)
    return [
        {**core, "rollout_id": row["rollout_id"], **(none if row["prompt_id"] == "train-2" else TAUGHT)}
        for row in rollout_rows(run, round)
    ]


def add_teacher(root: Path, run: str, rounds: int) -> None:
    """A scorer of kind teacher, and batches with its columns in which wrong rollouts are routed to distillation."""
    for round in range(rounds):
        folder = root / run / f"r{round:04d}"
        write(folder / "p0" / "scores" / "teacher-000.parquet", teacher_rows(run, round), "scores")
        rows = parquet.read(folder / "batch.parquet").to_pylist()
        routed = [{**row, **TAUGHT, "route": "policy" if row["correct"] else "distill"} for row in rows]
        write(folder / "batch.parquet", routed, "batch")


def write(path: Path, rows: list[dict[str, Any]], table: str) -> None:
    optional = {name for row in rows for name in row}
    parquet.write(path, pa.Table.from_pylist(rows, schema=TABLES[table].schema(optional)), table)
