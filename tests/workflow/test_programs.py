"""A run whose reward is whether the programs that its policy writes pass their tests."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from rollway.config import deep_merge
from workflow.project import TINY, Project

PROGRAMS: dict[str, Any] = {
    "tasks": {
        "spell": {
            "source": {"kind": "jsonl", "path": "programs.jsonl"},
            "answer": None,
            "demonstration": "{code}",
            "meta": ["tests"],
        }
    },
    "warmups": {"tiny": {"policy": {"tokenizer": {"kind": "char", "alphabet": "abcdefghijklmnopqrstuvwxyz>()'"}}}},
    "defaults": {
        "rounds": 1,
        "rollout": {"sampling": {"max_tokens": 12}},
        "score": {
            "scorers": {
                "code": {"kind": "program", "format": "stdio", "code": "all", "cpu": 2, "parallel": 2, "recheck": 0.5}
            },
            "reward": {"code": 1.0},
            "correct": "code",
        },
        "evaluate": {"k": [1]},
    },
}


def test_programs_of_a_policy_are_scored_and_evaluated(tmp_path: Path) -> None:
    project = Project(tmp_path / "p", deep_merge(TINY, PROGRAMS))
    words = [f"{a}{b}" for a in "abcdefgh" for b in "abcdefgh"]
    rows = [{"word": w, "code": f"print('{w}')", "tests": [{"input": "", "output": w}]} for w in words]
    (project.folder / "programs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    project.snakemake()
    folder = project.folder / "results/grpo-s0/r0000"
    scores = pq.read_table(next(folder.rglob("scores/code-*.parquet"))).to_pylist()
    assert len(scores) == 16
    assert [row["error"] for row in scores] == [None] * 16
    for row in scores:
        components = dict(row["components"])
        assert row["reward"] == components["passed"]
    evals = pq.read_table(folder / "evals.parquet").to_pylist()
    assert len(evals) == 16
