"""DaGRPO from prompts to policy through the real Snakemake: experts in the groups, masks, figures, views, report."""

import json
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq
import pytest

from report.page import Page
from rollway.config import deep_merge
from workflow.project import TINY, Project

JUDGE = '''
def closeness(row):
    """1 to 10: 1 + 9 x share of the demonstration's letters that stand in their place."""
    true, text = row["meta"]["demonstration"], row["completion"]
    return 1 + 9 * sum(a == b for a, b in zip(text, true)) / max(len(true), len(text))
'''
RUN: dict[str, Any] = {
    "recipe": "dagrpo",
    "rounds": 2,
    "rollout": {"prompts": 8},
    "curate": {"filter": {"sql": "anchors_where_failing", "at_most": 0.5}},
    "score": {
        "scorers": {"exact": {"kind": "exact"}, "judge": {"kind": "python", "function": "judges.py:closeness"}},
        "reward": {"exact": 1.0},
        "correct": "exact",
    },
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project(tmp_path_factory.mktemp("dagrpo"), {**TINY, "runs": {"dagrpo": RUN}})
    (project.folder / "judges.py").write_text(JUDGE)
    project.snakemake()
    return project


def table(project: Project, name: str, folder: str = "r0000") -> list[dict[str, Any]]:
    return pq.read_table(project.folder / f"results/dagrpo-s0/{folder}/{name}.parquet").to_pylist()


def metrics(project: Project, name: str) -> dict[str, float]:
    text = (project.folder / f"results/dagrpo-s0/{name}.json").read_text()
    return {m["name"]: m["value"] for m in reversed(json.loads(text)["metrics"])}


def test_experts_are_sampled_by_nobody_judged_and_trained_on(finished: Project) -> None:
    rollouts = {row["rollout_id"]: row for row in table(finished, "p0/rollouts-000")}
    judged = {row["rollout_id"]: row["reward"] for row in table(finished, "p0/scores/judge-000")}
    exact = {row["rollout_id"]: row["reward"] for row in table(finished, "p0/scores/exact-000")}
    batch = {row["rollout_id"]: row for row in table(finished, "batch")}
    experts = [name for name, row in rollouts.items() if row["source"] == "expert"]
    assert len(experts) == 8
    assert len(rollouts) == 8 * 5
    assert {judged[name] for name in experts} == {10.0}
    assert {exact[name] for name in experts} == {1.0}
    groups: dict[str, list[str]] = {}
    for name, row in rollouts.items():
        groups.setdefault(row["group_id"], []).append(name)
    for members in groups.values():
        own = [name for name in members if name not in experts]
        (expert,) = set(members) - set(own)
        failing = sum(exact[name] for name in own) / len(own) <= 0.5
        assert (expert in batch) == failing
        mixed = members if failing else own
        mean = sum(exact[name] for name in mixed) / len(mixed)
        for name in mixed:
            other = [judged[m] for m in mixed if exact[m] != exact[name]]
            sign = 1 if exact[name] > mean else -1
            kept = bool(other) and all(sign * (judged[name] - score) >= 3 for score in other)
            assert batch[name]["advantage"] == pytest.approx(exact[name] - mean if kept else 0.0, abs=1e-12)
            assert batch[name]["route"] == rollouts[name]["source"]
    assert any(batch[name]["advantage"] > 0 for name in experts if name in batch)


def test_figures_are_those_of_the_policy(finished: Project) -> None:
    found = metrics(finished, "r0000/curate")
    assert (found["rollouts"], found["groups"], found["experts"]) == (32, 8, 8)
    exact = {row["rollout_id"]: row["reward"] for row in table(finished, "p0/scores/exact-000")}
    own = [row["rollout_id"] for row in table(finished, "p0/rollouts-000") if row["source"] == "policy"]
    assert found["reward_mean"] == pytest.approx(sum(exact[name] for name in own) / 32)
    assert {"zero_advantage_above_share", "zero_advantage_below_share"} <= found.keys()
    assert {"zero_advantage_expert_share", "zero_advantage_groups_share"} <= found.keys()
    trained = metrics(finished, "r0001/metrics")
    assert trained["skipped"] == 0.0
    assert trained["grad_norm"] > 0.0


def test_views_report_and_comparison_say_whose_a_rollout_is(finished: Project) -> None:
    with duckdb.connect(str(finished.folder / "results/rollway.duckdb"), read_only=True) as con:
        groups = con.execute("SELECT DISTINCT samples FROM groups").fetchall()
        tokens = con.execute("SELECT sum(length) FROM rollouts WHERE source <> 'expert'").fetchall()[0][0]
    assert groups == [(4,)]
    shown = Page(finished.folder / "results/report.html").parts
    assert all("expert" in part["rollouts"]["source"] for part in shown.values())
    shown = finished.rollway("compare", "--format", "json").stdout
    assert f'"tokens_per_seed": {float(tokens)}' in shown or f'"tokens_per_seed":{float(tokens)}' in shown


def test_shards_change_no_rollout(finished: Project, tmp_path: Path) -> None:
    config = deep_merge(finished.config, {"runs": {"dagrpo": {"rounds": 1, "rollout": {"shards": 3}}}})
    other = Project(tmp_path, config)
    (tmp_path / "judges.py").write_text(JUDGE)
    other.snakemake("results/dagrpo-s0/r0000/batch.parquet")
    shards = [row for n in range(3) for row in table(other, f"p0/rollouts-{n:03d}")]
    apart = {"logprobs": None}
    assert [row | apart for row in shards] == [row | apart for row in table(finished, "p0/rollouts-000")]
    assert table(other, "batch") == table(finished, "batch")
