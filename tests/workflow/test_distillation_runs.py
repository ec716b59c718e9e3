"""SCOPE and DistiLLM in real runs of several rounds, read from the files that the stages leave and by SQL."""

import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from rollway.config import deep_merge
from rollway.store.catalog import run_sql
from workflow.project import TINY, Project

ROUNDS = 3
SMALL = TINY["warmups"]["tiny"]
TEACHER = deep_merge(SMALL, {"policy": {"hidden": 48}, "sft": {"steps": 200}})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of some rounds of both, from a policy half taught, with a larger teacher that was taught longer."""
    runs = {
        "scope": {"recipe": "scope", "rollout": {"prompts": 12}},
        # phi starts at 1/2: whatever the losses do, either source is there.
        "distillm": {
            "recipe": "distillm",
            "rollout": {"prompts": 12, "group": 1},
            "curate": {"horizon": 3, "filter": {"start": 0.5}},
        },
    }
    warmups = {"teacher": TEACHER, "tiny": deep_merge(SMALL, {"sft": {"steps": 50}})}
    config = deep_merge(TINY, {"warmups": warmups, "defaults": {"rounds": ROUNDS}}) | {"runs": runs}
    project = Project(tmp_path_factory.mktemp("distillation"), config)
    project.snakemake(*[f"results/{name}-s0/r{ROUNDS:04d}/policy.json" for name in runs], timeout=900)
    return project.folder / "results"


def metrics(results: Path, run: str, stage: str, round: int) -> dict[str, float]:
    folder = results / f"{run}-s0" / f"r{round + (stage == 'train'):04d}"
    path = folder / {"train": "metrics.json", "curate": "curate.json"}[stage]
    return {row["name"]: row["value"] for row in json.loads(path.read_text())["metrics"]}


def ask(results: Path, query: str) -> list[dict[str, Any]]:
    return json.loads(run_sql(results, query, "json"))


def test_scope_routes_by_the_verifier_and_sql_shows_the_shares(finished: Path) -> None:
    shown = ask(finished, "SELECT round, route, row_count, share FROM routes WHERE run = 'scope-s0' ORDER BY ALL")
    shares = {(row["round"], row["route"]): row["share"] for row in shown}
    for r in range(ROUNDS):
        rows = pq.read_table(finished / f"scope-s0/r{r:04d}/batch.parquet").to_pylist()
        assert len(rows) == 12 * 4
        assert all(row["route"] == ("policy" if row["correct"] else "distill") for row in rows)
        right = sum(row["correct"] for row in rows) / len(rows)
        logged = metrics(finished, "scope", "curate", r)
        assert 0.0 < right < 1.0
        assert logged["route_policy_share"] == pytest.approx(right)
        assert shares[r, "policy"] == pytest.approx(right)
        assert shares[r, "distill"] == pytest.approx(1 - right)


def test_scope_weighs_within_group_and_path_by_the_two_perplexities(finished: Path) -> None:
    for r in range(ROUNDS):
        folder = finished / f"scope-s0/r{r:04d}"
        rows = pq.read_table(folder / "batch.parquet").to_pylist()
        rollouts = pq.read_table(folder / "p0/rollouts-000.parquet", columns=["rollout_id", "logprobs"]).to_pylist()
        own = {row["rollout_id"]: sum(row["logprobs"]) / len(row["logprobs"]) for row in rollouts}
        sets: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for row in rows:
            said = row["teacher_logprob"]
            z = -own[row["rollout_id"]] if row["correct"] else sum(said) / len(said)
            sets.setdefault((row["group_id"], row["route"]), []).append((z, row["weight"]))
        entropies: dict[str, list[float]] = {"policy": [], "distill": []}
        for (_, route), members in sets.items():
            total = sum(math.exp(z) for z, _ in members)
            assert [w for _, w in members] == pytest.approx([math.exp(z) / total for z, _ in members], rel=1e-4)
            entropies[route].append(-sum(w * math.log(w) for _, w in members))
        logged = metrics(finished, "scope", "curate", r)
        for route, each in entropies.items():
            assert logged[f"route_{route}_weight_entropy"] == pytest.approx(sum(each) / len(each), abs=1e-6)


def test_scope_logs_the_share_of_wrong_tokens_and_the_teachers_divergence(finished: Path) -> None:
    for r in range(ROUNDS):
        rows = pq.read_table(finished / f"scope-s0/r{r:04d}/batch.parquet").to_pylist()
        lengths = [(len(row["teacher_logprob"]), row["correct"]) for row in rows]
        wrong = sum(n for n, right in lengths if not right) / sum(n for n, _ in lengths)
        logged = metrics(finished, "scope", "train", r)
        assert logged["distill/share"] == pytest.approx(wrong, abs=1e-6)
        assert logged["distill/divergence"] > 0.0
        assert logged["kl_teacher"] > 0.0
        assert logged["loss"] == pytest.approx(logged["loss/policy"] + logged["loss/distill"], abs=1e-5)


def test_distillm_takes_both_sources_and_older_rounds(finished: Path) -> None:
    replayed = []
    for r in range(ROUNDS):
        rows = pq.read_table(finished / f"distillm-s0/r{r:04d}/batch.parquet").to_pylist()
        groups = [row["group_id"] for row in rows]
        assert len(groups) == len(set(groups)) == 12
        assert all(len(row["teacher_topk_logprobs"][0]) == 20 for row in rows)
        replayed.append(sum(row["age"] > 0 for row in rows))
        logged = metrics(finished, "distillm", "curate", r)
        assert logged["batch_replayed_share"] == pytest.approx(replayed[-1] / 12)
        assert metrics(finished, "distillm", "train", r)["distill/share"] == 1.0
    assert replayed[0] == 0
    assert replayed[-1] > 0
    query = "SELECT DISTINCT source FROM scored WHERE run = 'distillm-s0' AND slots > 0 ORDER BY source"
    assert [row["source"] for row in ask(finished, query)] == ["expert", "policy"]
