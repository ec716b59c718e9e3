"""SRPO and OPSD through the real Snakemake: a warm-up that reads as a teacher reads, live teachers, routes by SQL."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from rollway.config import deep_merge, load_experiment
from rollway.runtime.plan import Plan
from rollway.runtime.plan_checks import check
from rollway.store.catalog import run_sql
from workflow.project import TINY, Project

VOCABULARY = 34
TOLD: dict[str, Any] = {
    "policy": {"tokenizer": {"alphabet": "abcdefghijklmnopqrstuvwxyz><"}},
    "sft": {"steps": 60, "privileged": {"share": 0.4, "context": [{"prompt": "{sibling}<{prompt}"}]}},
}


def config() -> dict[str, Any]:
    sibling = {"scorers": {"teacher": {"kind": "teacher", "context": [{"prompt": "{sibling}<{prompt}"}]}}}
    solution = {"scorers": {"teacher": {"kind": "teacher", "context": [{"prompt": "{meta.demonstration}<{prompt}"}]}}}
    quick = {"optimizer": {"lr": 1.0e-3, "schedule": {"warmup": 0}}}
    runs = {
        "srpo": {
            "recipe": "srpo",
            "score": sibling,
            "train": {**quick, "objective": {"distill": {"estimate": {"k": VOCABULARY}}}},
        },
        # A clip below what so short a training makes of the recipe's 0.05 nats, so that it does cut.
        "opsd": {
            "recipe": "opsd",
            "score": solution,
            "rollout": {"prompts": 8, "group": 1},
            "train": {**quick, "objective": {"distill": {"clip": 1.0e-4}}},
        },
    }
    defaults = {"rounds": 2, "rollout": {"prompts": 8}, "evaluate": {"every": 9}}
    return deep_merge(TINY, {"warmups": {"tiny": TOLD}, "defaults": defaults}) | {"runs": runs}


def test_the_plan() -> None:
    """Scores of a live teacher wait for no teacher; the trainer of OPSD reads the warm-up's policy."""
    plan = Plan(load_experiment(config()))
    check(plan)
    assert plan.config_of("srpo-s0").rounds == 2


@pytest.mark.slow
def test_routes_contexts_and_clips_of_real_rounds(tmp_path: Path) -> None:
    project = Project(tmp_path, config())
    project.snakemake(*[f"results/{run}-s0/r0002/policy.json" for run in ("srpo", "opsd")], timeout=600)
    results = tmp_path / "results"
    routes = json.loads(
        run_sql(results, "SELECT round, route, row_count, share FROM routes WHERE run = 'srpo-s0'", "json")
    )
    assert {row["round"] for row in routes} == {0, 1}
    for round in (0, 1):
        batch = pq.read_table(results / f"srpo-s0/r{round:04d}/batch.parquet").to_pylist()
        told = [row for row in batch if row["route"] == "distill"]
        shares = {row["route"]: row["share"] for row in routes if row["round"] == round}
        assert shares.get("distill", 0.0) == pytest.approx(len(told) / len(batch))
        assert sum(shares.values()) == pytest.approx(1.0)
        right = {row["group_id"] for row in batch if row["correct"]}
        for row in batch:
            wrong_with_sibling = not row["correct"] and row["group_id"] in right
            assert (row["route"] == "distill") == wrong_with_sibling
            assert row["teacher_prompt_tokens"] or not wrong_with_sibling
    manifest = json.loads((results / "srpo-s0/r0002/policy.json").read_text())
    assert set(manifest["policies"]) == {"main", "ema"}
    query = "SELECT name, value FROM metrics WHERE run = 'opsd-s0' AND round = 1 AND stage = 'train'"
    found = {row["name"]: row["value"] for row in json.loads(run_sql(results, query, "json"))}
    assert found["distill/share"] == 1.0
    assert found["distill/raw_divergence"] > found["distill/divergence"]
    assert 0.0 < found["distill/clipped_entries"] < 1.0
    assert {"distill/divergence_from_1", "distill/divergence_from_2"} <= found.keys()
