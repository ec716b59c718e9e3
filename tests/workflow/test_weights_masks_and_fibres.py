"""PF-PPO, CAPO, SAPO and FiberPO over domains in real runs: what each does is in the files that the stages leave."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from rollway.config import deep_merge
from workflow.project import TINY, Project

ROUNDS = 2
CLOSE = '''
def closeness(row):
    """Share of the answer's letters that stand in their place."""
    return sum(a == b for a, b in zip(row["completion"], row["answer"])) / len(row["answer"])
'''
RUNS: dict[str, Any] = {
    "pf-ppo": {"recipe": "pf-ppo"},
    "capo": {"recipe": "capo"},
    "sapo": {"recipe": "sapo"},
    # One optimiser batch of all rows, twice: the second time the policy has moved.
    "fiberpo-domain": {"recipe": "fiberpo-domain", "train": {"epochs": 2, "minibatches": 1}},
}
SETTINGS = {
    "tasks": {"spell": {"meta": ["domain"]}},
    "defaults": {
        "rounds": ROUNDS,
        "rollout": {"prompts": 6},
        "score": {
            "scorers": {"exact": {"kind": "exact"}, "close": {"kind": "python", "function": "close.py:closeness"}},
            "reward": {"close": 1.0},
            "correct": "exact",
        },
    },
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    project = Project(tmp_path_factory.mktemp("methods"), {**deep_merge(TINY, SETTINGS), "runs": RUNS})
    (project.folder / "close.py").write_text(CLOSE)
    entries = [json.loads(line) for line in (project.folder / "words.jsonl").read_text().splitlines()]
    lines = [json.dumps({**e, "domain": "vowel" if e["word"][0] in "ae" else "consonant"}) for e in entries]
    (project.folder / "words.jsonl").write_text("\n".join(lines) + "\n")
    project.snakemake(*[f"results/{name}-s0/r{ROUNDS:04d}/policy.json" for name in RUNS], timeout=900)
    return project.folder / "results"


def batch(results: Path, run: str, round: int) -> list[dict[str, Any]]:
    return pq.read_table(results / f"{run}-s0/r{round:04d}/batch.parquet").to_pylist()


def trained(results: Path, run: str, round: int, name: str) -> list[float]:
    """A metric of the train stage, step after step."""
    rows = json.loads((results / f"{run}-s0/r{round + 1:04d}/metrics.json").read_text())["metrics"]
    return [row["value"] for row in rows if row["name"] == name]


def test_pf_ppo_weighs_by_rank_and_hands_its_critic_on(finished: Path) -> None:
    for r in range(ROUNDS):
        groups: dict[str, list[dict[str, Any]]] = {}
        for row in batch(finished, "pf-ppo", r):
            groups.setdefault(row["group_id"], []).append(row)
        assert len(groups) == 6
        for rows in groups.values():
            best, *others = sorted(rows, key=lambda row: -row["weight"])
            assert best["weight"] == 0.5
            assert [row["weight"] for row in others] == [0.5 / 3] * 3
            assert best["reward"] == max(row["reward"] for row in rows)
        assert trained(finished, "pf-ppo", r, "skipped") == [0.0]
        assert len(trained(finished, "pf-ppo", r, "loss/value")) == 4
        manifest = json.loads((finished / f"pf-ppo-s0/r{r + 1:04d}/policy.json").read_text())
        assert {"main", "critic"} <= manifest["policies"].keys()
    assert trained(finished, "pf-ppo", 1, "value_explained"), "the critic of round 0 goes on in round 1"


def test_capo_keeps_the_tokens_that_its_masks_leave(finished: Path) -> None:
    for r in range(ROUNDS):
        assert trained(finished, "capo", r, "skipped") == [0.0]
        share, tokens, kept = (trained(finished, "capo", r, n) for n in ("kept_share", "tokens", "kept_tokens"))
        assert len(share) == len(tokens) == len(kept) > 0
        for s, n, k in zip(share, tokens, kept, strict=True):
            assert 0.0 <= s <= 1.0
            assert s == pytest.approx(k / n, abs=1e-5)
        assert any(abs(x) > 0 for x in trained(finished, "capo", r, "curvature/m_h_abs/p99"))


def test_sapo_weighs_tokens_by_how_far_they_moved(finished: Path) -> None:
    for r in range(ROUNDS):
        for sign in ("positive", "negative"):
            weights = trained(finished, "sapo", r, f"soft/weight_{sign}")
            assert weights[0] == pytest.approx(1.0, abs=1e-3), "before the first step no ratio has moved"
            assert all(0.0 < w <= 1.0 + 1e-6 for w in weights)
        lowest = trained(finished, "sapo", r, "soft/weight_p01")
        assert len(lowest) == 4
        assert min(lowest[1:]) < 1.0 - 1e-4


def test_fiberpo_takes_domains_from_the_prompts_meta(finished: Path) -> None:
    prompts = pq.read_table(finished / "tasks/spell/train.parquet").to_pylist()
    domain_of = {row["prompt_id"]: json.loads(row["meta"])["domain"] for row in prompts}
    mixed = 0
    for r in range(ROUNDS):
        folder = finished / f"fiberpo-domain-s0/r{r:04d}"
        rollouts = pq.ParquetFile(folder / "p0/rollouts-000.parquet").read(["rollout_id", "prompt_id"]).to_pylist()
        asked = {row["rollout_id"]: row["prompt_id"] for row in rollouts}
        rows = batch(finished, "fiberpo-domain", r)
        assert all(row["route"] == domain_of[asked[row["rollout_id"]]] for row in rows)
        counts = {
            "domain": len({row["route"] for row in rows}),
            "group": len({row["group_id"] for row in rows}),
            "trajectory": len(rows),
        }
        mixed = max(mixed, counts["domain"])
        for level, count in counts.items():
            states = ("passed", "rolled_back", "zeroed")
            gates = [trained(finished, "fiberpo-domain", r, f"fibre/{level}_gates_{state}") for state in states]
            assert [sum(step) for step in zip(*gates, strict=True)] == [2.0 * count] * 2, "both channels, two epochs"
        up = trained(finished, "fiberpo-domain", r, "fibre/up")
        assert up[0] == pytest.approx(0.0, abs=1e-5)
        assert up[1] > 1e-5
    assert mixed == 2
