"""Curation from Parquet files of rollouts and scores: the same batch, and no token column read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.tables import column
from rollway.config.curation import CurateConfig
from rollway.config.scorers import ScoreConfig
from rollway.curation import count_groups_in_files, curate, curate_files, given_values, sql_paths, summary
from rollway.errors import RollwayError
from rollway.store.parquet import write

SCORE = ScoreConfig.model_validate(
    {
        "scorers": {"exact": {"kind": "exact"}, "overlong": {"kind": "length", "limit": 20, "cache": 4}},
        "reward": {"overlong": 0.5, "exact": 2.0},
    }
)
GRPO = CurateConfig.model_validate({"advantage": {"sql": "grpo"}})


def rollouts(round: int, rewards: list[list[float]]) -> list[dict[str, Any]]:
    return [
        {
            "rollout_id": f"{round}-{g}-{s}",
            "round": round,
            "pass": 0,
            "policy": "p",
            "policy_round": round,
            "group_id": f"{round}-{g}",
            "prompt_id": "same",
            "sample": s,
            "source": "policy",
            "finish": "length" if s == 1 else "stop",
            "length": 4 + s,
            "engine": "test",
            "sampling": "{}",
            "prompt_tokens": [1],
            "tokens": [2] * (4 + s),
            "logprobs": [-0.5] * (4 + s),
            "train_mask": [True] * (4 + s),
            "segments": [],
            "text": f"text {s % 2}",
        }
        for g, group in enumerate(rewards)
        for s, _ in enumerate(group)
    ]


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., tuple[list[Path], dict[str, list[Path]]]]:
    """Writes rounds of rewards ([round][group][sample]) and returns rollout files and score files of both scorers."""

    def make(rounds: list[list[list[float]]], lose: int = 0) -> tuple[list[Path], dict[str, list[Path]]]:
        paths, scores = [], {"exact": [], "overlong": []}
        for number, rewards in enumerate(rounds):
            rows = rollouts(number, rewards)
            path = tmp_path / f"rollouts-{number}.parquet"
            write(path, pa.Table.from_pylist(rows), "rollouts")
            paths.append(path)
            flat = [r for group in rewards for r in group]
            for scorer, values in (("exact", flat), ("overlong", [-0.1 * (i % 3) for i in range(len(flat))])):
                table = pa.table(
                    {
                        "rollout_id": [row["rollout_id"] for row in rows],
                        "scorer": [scorer] * len(rows),
                        "reward": pa.array(values, pa.float64()),
                        "components": pa.array([[]] * len(rows), pa.map_(pa.string(), pa.float64())),
                    }
                )
                keep = len(rows) - (lose if scorer == "overlong" else 0)
                where = tmp_path / f"{scorer}-{number}.parquet"
                write(where, table.slice(0, keep), "scores")
                scores[scorer].append(where)
        return paths, scores

    return make


def test_the_weighted_sum_and_the_rest_of_the_relation(files: Callable) -> None:
    paths, scores = files([[[1, 0, 0], [1, 1, 0]]])
    curated = curate_files(paths, scores, SCORE, GRPO, round=0)
    expected = np.array([2.0, -0.05, -0.1, 2.0, 1.95, -0.1])
    assert column(curated.batch, "reward") == pytest.approx(expected.tolist())
    assert column(curated.batch, "correct") == [True, False, False, True, True, False]
    reference = [(r - g.mean()) / (g.std(ddof=1) + 1e-6) for g in np.split(expected, 2) for r in g]
    assert column(curated.batch, "advantage") == pytest.approx(reference, abs=1e-9)
    table = pa.table({name: curated.batch[name] for name in ("rollout_id", "group_id", "reward", "correct", "age")})
    table = table.append_column("sample", pa.array([0, 1, 2] * 2))
    assert curate(table, GRPO).equals(curated.batch)


def test_metrics(files: Callable) -> None:
    paths, scores = files([[[1, 0, 0], [1, 1, 1]]])
    score = ScoreConfig()
    part = CurateConfig.model_validate({"filter": {"sql": "informative_groups"}, "advantage": {"sql": "dr_grpo"}})
    curated = curate_files(paths, scores, score, part, round=0)
    assert curated.metrics == pytest.approx(
        {
            "rollouts": 6,
            "reward_mean": 4 / 6,
            "reward_std": np.std([1, 0, 0, 1, 1, 1], ddof=1),
            "correct_share": 4 / 6,
            "length_mean": 5,
            "truncated_share": 2 / 6,
            "groups": 2,
            "score_exact_mean": 4 / 6,
            "groups_with_signal_share": 0.5,
            "groups_all_correct": 1,
            "groups_none_correct": 0,
            "groups_any_correct": 2,
            "batch_rows": 3,
            "batch_rollouts": 3,
            "batch_groups": 1,
            "batch_replayed_share": 0,
            "batch_reward_mean": 1 / 3,
            "advantage_mean": 0,
            "advantage_std": np.std([2 / 3, -1 / 3, -1 / 3], ddof=1),
            "advantage_variance": np.var([2 / 3, -1 / 3, -1 / 3]),
            "advantage_abs_mean": 4 / 9,
            "advantage_nonzero_share": 1,
            "kept_share": 0.5,
            "passes": 1,
            "groups_missing": 1,
            "groups_surplus": 0,
            "zero_advantage_above_share": 0,
            "zero_advantage_below_share": 0,
            "zero_advantage_groups_share": 0,
        }
    )
    assert count_groups_in_files(paths, scores, score, part, round=0) == 1


def test_metrics_of_what_a_select_step_chose_from(files: Callable) -> None:
    """D3S: the variance of advantages before and after, kept rows, and the share of them that teach something."""
    paths, scores = files([[[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]])
    part = {
        "advantage": {"sql": "grpo"},
        "select": {"sql": "d3s", "progress": 0.0, "n_init": 2, "n_final": 2, "keep_share": 0.5},
    }
    config = CurateConfig.model_validate(part)
    metrics = curate_files(paths, scores, ScoreConfig(), config, round=0).metrics
    before = [[1.5, -0.5, -0.5, -0.5], [0.0] * 8, [0.8660254, 0.8660254, -0.8660254, -0.8660254]]
    after = [1.5, -0.5, 0.8660254, -0.8660254]
    wanted = {
        "select_pool_rows": 16,
        "select_pool_advantage_variance": np.var(np.concatenate(before)),
        "batch_rows": 4,
        "advantage_variance": np.var(after),
        "advantage_nonzero_share": 1.0,
        "groups_all_correct": 1,
        "groups_none_correct": 1,
        "groups_any_correct": 3,
    }
    assert {name: metrics[name] for name in wanted} == pytest.approx(wanted, abs=1e-5)


def test_summary_of_arrow_tables_with_routes() -> None:
    scored = pa.table({"rollout_id": ["a", "b"], "reward": [1.0, 0.0], "correct": [True, False], "exact": [1.0, 0.0]})
    batch = curate(scored, CurateConfig.model_validate({"route": {"sql": "correctness"}}))
    metrics = summary(scored, batch)
    assert metrics["route_right_share"] == 0.5
    assert metrics["score_exact_mean"] == 0.5
    assert "groups" not in metrics
    assert "advantage_mean" not in metrics
    empty = summary(scored.slice(0, 0), batch.slice(0, 0))
    assert empty == {"rollouts": 0, "batch_rows": 0, "batch_rollouts": 0, "batch_groups": 0}


def test_replay_over_rounds(files: Callable) -> None:
    paths, scores = files([[[1, 0]] * 3, [[0, 1]] * 3, [[1, 0], [0, 1]]])
    part = CurateConfig.model_validate(
        {"advantage": {"sql": "grpo"}, "select": {"sql": "replay", "share": 0.5, "max_age": 1}, "replay": 1}
    )
    curated = curate_files(paths, scores, SCORE, part, round=2, given=given_values(part, round=2, seed=0))
    assert sorted(column(curated.batch, "age")) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert curated.metrics["rollouts"] == 4
    assert curated.metrics["batch_replayed_share"] == 0.5
    assert curated.metrics["kept_share"] == 1.0
    alone = curate_files(paths[:1], {k: v[:1] for k, v in scores.items()}, SCORE, GRPO, round=0).batch
    everything = curate_files(paths, scores, SCORE, GRPO, round=2).batch
    early = {row["rollout_id"]: row["advantage"] for row in everything.to_pylist() if row["age"] == 2}
    assert early == {row["rollout_id"]: row["advantage"] for row in alone.to_pylist()}


def test_gdpo_normalises_every_scorer_on_its_own(files: Callable, tmp_path: Path) -> None:
    """Incident 33: per-objective advantages, computed by hand."""
    groups = [[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]]
    paths, scores = files([groups])
    part = CurateConfig.model_validate({"advantage": {"sql": "gdpo", "whiten": False}})
    values = column(curate_files(paths, scores, SCORE, part, round=0).batch, "advantage")
    exact = np.array(groups)
    overlong = np.array([-0.1 * (i % 3) for i in range(8)]).reshape(2, 4)

    def standard(group: np.ndarray) -> np.ndarray:
        return (group - group.mean()) / (group.std(ddof=1) + 1e-6) if np.ptp(group) else np.zeros(4)

    expected = np.concatenate([0.5 * standard(overlong[g]) + 2.0 * standard(exact[g]) for g in range(2)])
    assert values == pytest.approx(expected.tolist(), abs=1e-9)
    whitened = CurateConfig.model_validate({"advantage": {"sql": "gdpo"}})
    values = column(curate_files(paths, scores, SCORE, whitened, round=0).batch, "advantage")
    assert values == pytest.approx(((expected - expected.mean()) / (expected.std(ddof=1) + 1e-6)).tolist(), abs=1e-9)


def test_rft_hashes_texts_and_domains_come_from_prompts(files: Callable, tmp_path: Path) -> None:
    paths, scores = files([[[1, 1, 1], [0, 1, 1]]])
    rft = CurateConfig.model_validate({"filter": {"sql": "rft"}})
    assert column(curate_files(paths, scores, SCORE, rft, round=0).batch, "rollout_id") == ["0-0-0", "0-0-1"]
    prompts = tmp_path / "prompts.parquet"
    row = {"prompt_id": "same", "task": "t", "split": "train", "messages": "[]", "meta": '{"domain": "maze"}'}
    write(prompts, pa.Table.from_pylist([row]), "prompts")
    route = CurateConfig.model_validate({"route": {"sql": "domain"}})
    batch = curate_files(paths, scores, SCORE, route, round=0, prompts=[prompts]).batch
    assert column(batch, "route") == ["maze"] * 6
    with pytest.raises(RollwayError, match="meta"):
        curate_files(paths, scores, SCORE, route, round=0)


def test_only_narrow_columns_are_read(files: Callable, tmp_path: Path) -> None:
    paths, scores = files([[[1, 0], [0, 1]]])
    narrow = tmp_path / "narrow.parquet"
    whole = pq.read_table(paths[0])
    wide = ("prompt_tokens", "tokens", "logprobs", "train_mask", "segments", "entropy", "sampling")
    pq.write_table(whole.drop_columns(list(wide)), narrow)
    assert curate_files([narrow], scores, SCORE, GRPO, round=0).batch.num_rows == 4


def test_missing_broken_and_repeated_files(files: Callable, tmp_path: Path) -> None:
    paths, scores = files([[[1, 0], [0, 1]]], lose=1)
    with pytest.raises(RollwayError, match=r"scorer overlong: 1 rollouts have no score .*0-1-1"):
        curate_files(paths, scores, SCORE, GRPO, round=0)
    with pytest.raises(RollwayError, match="scorer overlong: no score files"):
        curate_files(paths, {"exact": scores["exact"]}, SCORE, GRPO, round=0)
    twice = {"exact": scores["exact"]}
    with pytest.raises(RollwayError, match="occurs 2 times"):
        curate_files(paths * 2, twice, ScoreConfig(), GRPO, round=0)
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(paths[0].read_bytes()[:-40])
    with pytest.raises(RollwayError, match=r"broken\.parquet"):
        curate_files([broken], scores, SCORE, GRPO, round=0)
    with pytest.raises(RollwayError, match="no rollout files"):
        curate_files([], scores, SCORE, GRPO, round=0)
    with pytest.raises(ValueError, match="'length', which is a column of `scored`"):
        ScoreConfig.model_validate({"scorers": {"length": {"kind": "exact"}}, "reward": {}, "correct": None})


def test_an_empty_pass_adds_nothing(files: Callable, tmp_path: Path) -> None:
    paths, scores = files([[[1, 0], [0, 1]]])
    empty = tmp_path / "empty.parquet"
    write(empty, pq.read_table(paths[0]).slice(0, 0), "rollouts")
    with_empty = curate_files([*paths, empty], scores, SCORE, GRPO, round=0).batch
    assert with_empty.equals(curate_files(paths, scores, SCORE, GRPO, round=0).batch)
    nothing = curate_files([empty], scores, SCORE, GRPO, round=0)
    assert nothing.batch.num_rows == 0
    assert nothing.metrics["rollouts"] == 0


def test_progress_and_the_stage_inputs() -> None:
    part = CurateConfig.model_validate(
        {"advantage": {"sql": "grpo"}, "select": {"sql": "d3s", "n_init": 2.0, "n_final": 4.0}, "horizon": 8}
    )
    assert given_values(part, round=2, seed=1) == {"round": 2, "seed": 1, "progress": 0.25}
    assert given_values(part, round=80, seed=1)["progress"] == 1.0
    assert [path.name for path in sql_paths(part)] == ["grpo.sql", "d3s.sql"]
