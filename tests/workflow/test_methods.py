"""Mechanisms of methods in real runs of several rounds, read from the files that the stages leave."""

import json
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from rollway.config import deep_merge
from workflow.project import TINY, Project

ROUNDS = {"r2vpo": 3, "dcpo": 2, "d3s": 2, "ngrpo": 2}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of some rounds of each recipe, the last one made by another call than those before."""
    # Half taught: whatever the machine's rounding makes of it, some groups hold no right answer.
    half = deep_merge(TINY["warmups"]["tiny"], {"sft": {"steps": 50}})
    runs = {name: {"recipe": name, "rounds": rounds} for name, rounds in ROUNDS.items()}
    runs["ngrpo"] |= {"warmup": "half", "rollout": {"prompts": 16}}
    defaults = {"evaluate": {"every": 9, "samples": 8, "k": [1, 2, 4, 8]}, "rollout": {"prompts": 6}}
    config = deep_merge(TINY, {"defaults": defaults, "warmups": {"half": half}}) | {"runs": runs}
    project = Project(tmp_path_factory.mktemp("methods"), config)
    project.snakemake(*[f"results/{n}-s0/r{r - 1:04d}/policy.json" for n, r in ROUNDS.items()], timeout=900)
    project.snakemake("all_evals", *[f"results/{n}-s0/r{r:04d}/policy.json" for n, r in ROUNDS.items()], timeout=900)
    return project.folder / "results"


def metrics(results: Path, run: str, name: str, round: int) -> list[float]:
    """Values of a metric in one round, in the order of steps."""
    stage, name = name.split("/", 1)
    folder = results / f"{run}-s0" / f"r{round + (stage == 'train'):04d}"
    path = folder / {"train": "metrics.json", "curate": "curate.json", "evaluate": "evals.json"}[stage]
    rows = json.loads(path.read_text())["metrics"]
    return [row["value"] for row in rows if row["name"] == name or row["name"] == f"{stage}/{name}"]


def state(results: Path, run: str, round: int) -> dict[str, float]:
    """What the objective remembers beside the policy of a round."""
    tensors = load_file(results / f"{run}-s0" / f"r{round:04d}" / "state/objective.safetensors")
    return {name: float(x.reshape(-1)[0]) for name, x in tensors.items()}


def test_half_of_each_batch_is_replayed_with_the_advantages_and_log_probs_of_its_own_round(finished: Path) -> None:
    shares = [metrics(finished, "r2vpo", "curate/batch_replayed_share", r)[0] for r in range(ROUNDS["r2vpo"])]
    assert shares == [0.0, 0.5, 0.5]
    batches = [pq.read_table(finished / f"r2vpo-s0/r{r:04d}/batch.parquet").to_pylist() for r in range(ROUNDS["r2vpo"])]
    fresh = {row["rollout_id"]: row["advantage"] for batch in batches for row in batch if row["age"] == 0}
    replayed = [row for batch in batches for row in batch if row["age"] > 0]
    assert len(replayed) == 2 * 6 * 4
    assert all(row["advantage"] == fresh[row["rollout_id"]] for row in replayed)
    assert {row["age"] for row in batches[2]} == {0, 1, 2}
    query = (
        f"SELECT b.age, r.round, r.policy_round FROM '{finished}/r2vpo-s0/r0002/batch.parquet' b "
        f"JOIN read_parquet('{finished}/r2vpo-s0/r*/p0/rollouts-*.parquet', hive_partitioning=false) r "
        "USING (rollout_id)"
    )
    assert all(made == by == 2 - age for age, made, by in duckdb.sql(query).fetchall())
    assert metrics(finished, "r2vpo", "train/ess", 0)[0] == pytest.approx(1.0, abs=1e-4)
    assert metrics(finished, "r2vpo", "train/ess", 2)[0] < 1.0 - 1e-4


def test_the_dual_variable_goes_on_across_rounds_and_calls(finished: Path) -> None:
    lam = 1.0
    for r in range(ROUNDS["r2vpo"]):
        seen, variance = metrics(finished, "r2vpo", "train/variance/lam", r), None
        variance = metrics(finished, "r2vpo", "train/ratio/variance", r)
        assert len(seen) == len(variance) == 4
        for now, v in zip(seen, variance, strict=True):
            assert now == pytest.approx(lam, abs=1e-6)
            lam = min(100.0, max(0.0, lam + v - 0.04))
        assert state(finished, "r2vpo", r + 1)["variance/lam"] == pytest.approx(lam, abs=1e-6)
        for name in ("variance/reversed_share", "variance/would_clip_share"):
            assert all(0.0 <= share <= 1.0 for share in metrics(finished, "r2vpo", f"train/{name}", r))


def test_dcpo_aims_by_the_entropy_of_the_round_before(finished: Path) -> None:
    last = 0.0
    for r in range(ROUNDS["dcpo"]):
        assert metrics(finished, "dcpo", "train/mixing/last_entropy", r)[0] == pytest.approx(last, abs=1e-9)
        assert metrics(finished, "dcpo", "train/mixing/temperature", r)[0] == (1.2 if last <= 0.25 else 0.8)
        share = metrics(finished, "dcpo", "curate/correct_share", r)[0]
        gap = min(abs(0.25 - last), 0.1)
        alpha = gap / (share + gap) if share else 0.0
        assert metrics(finished, "dcpo", "train/mixing/correct_share", r)[0] == pytest.approx(share, abs=1e-6)
        assert metrics(finished, "dcpo", "train/mixing/alpha", r)[0] == pytest.approx(alpha, abs=1e-6)
        assert metrics(finished, "dcpo", "train/max/mixing_rho", r)[0] > 0
        last = state(finished, "dcpo", r + 1)["mixing/entropy"]
        tokens, logp = (metrics(finished, "dcpo", f"train/{name}", r) for name in ("tokens", "logp"))
        assert last == pytest.approx(-sum(n * x for n, x in zip(tokens, logp, strict=True)) / sum(tokens), abs=1e-6)
    assert last > 0


def test_d3s_trains_on_the_rows_and_tokens_with_the_most_signal(finished: Path) -> None:
    for r in range(ROUNDS["d3s"]):
        rows = metrics(finished, "d3s", "curate/batch_rows", r)
        assert rows == [9.0]
        assert metrics(finished, "d3s", "curate/select_pool_rows", r) == [24.0]
        before = metrics(finished, "d3s", "curate/select_pool_advantage_variance", r)[0]
        assert metrics(finished, "d3s", "curate/advantage_variance", r)[0] >= before
        if metrics(finished, "d3s", "train/skipped", r) == [0.0]:
            kept, tokens = (metrics(finished, "d3s", f"train/{name}", r)[0] for name in ("kept_tokens", "tokens"))
            assert 1 <= kept <= 0.12 * tokens + 1


def test_ngrpo_drops_solved_groups_keeps_unsolved_ones_and_counts_them(finished: Path) -> None:
    signs = []
    for r in range(ROUNDS["ngrpo"]):
        batch = pq.read_table(finished / f"ngrpo-s0/r{r:04d}/batch.parquet").to_pylist()
        groups: dict[str, list[dict]] = {}
        for row in batch:
            groups.setdefault(row["group_id"], []).append(row)
        assert all(min(row["reward"] for row in rows) < 1.0 for rows in groups.values())
        unsolved = [rows for rows in groups.values() if not any(row["correct"] for row in rows)]
        signs += [row["advantage"] for rows in unsolved for row in rows]
        counts = [metrics(finished, "ngrpo", f"curate/groups_{n}_correct", r)[0] for n in ("all", "none", "any")]
        total = metrics(finished, "ngrpo", "curate/groups", r)[0]
        assert counts[1] + counts[2] == total
        assert counts[0] <= counts[2]
        assert len(groups) <= 16
        assert sum(row["advantage"] for row in batch) < 0
    assert signs
    assert all(a == pytest.approx(-1 / 5**0.5, abs=1e-5) for a in signs)


def test_evaluations_hold_the_area_under_pass_at_k(finished: Path) -> None:
    values = [metrics(finished, "ngrpo", f"evaluate/pass{name}", ROUNDS["ngrpo"])[0] for name in ("@1", "_auc", "@8")]
    assert values == sorted(values)
