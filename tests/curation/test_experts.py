"""Experts' solutions in a group are no rollouts of the policy: what is counted, and what a mask leaves."""

import pyarrow as pa
import pytest

from curation.tables import scored_table
from rollway.config.curation import CurateConfig
from rollway.curation import count_groups, curate, summary

EXPERT = ["policy"] * 3 + ["expert"]


def scored() -> pa.Table:
    """Two groups of three and an expert: one that fails, one that is mixed."""
    lengths = [2, 2, 2, 90, 4, 4, 4, 90]
    finish = ["length", "stop", "stop", "stop"] * 2
    judge = [2.0, 5.0, 7.0, 9.0, 9.0, 8.0, 5.0, 10.0]
    return scored_table(
        [[0, 0, 0, 1], [1, 1, 0, 1]], source=EXPERT * 2, length=lengths, finish=finish, judge=judge, age=[0] * 8
    )


def figures(rows: pa.Table, **parts: object) -> dict[str, float]:
    return summary(rows, curate(rows, CurateConfig.model_validate(parts)))


def test_figures_of_a_round_are_those_of_the_policy() -> None:
    found = figures(scored(), advantage={"sql": "dagrpo"}, route={"sql": "source"})
    assert found["rollouts"] == 6
    assert found["groups"] == 2
    assert found["reward_mean"] == found["correct_share"] == pytest.approx(2 / 6)
    assert found["length_mean"] == 3
    assert found["truncated_share"] == pytest.approx(2 / 6)
    assert found["groups_with_signal_share"] == 0.5
    assert found["groups_none_correct"] == 1
    assert found["score_judge_mean"] == 6
    assert found["experts"] == 2
    assert found["expert_reward_mean"] == 1
    assert found["batch_rows"] == 8
    assert found["kept_share"] == 1
    assert found["route_expert_share"] == 0.25


def test_without_experts_nothing_is_said_of_them() -> None:
    own = scored_table([[1, 0, 0]], source=["policy"] * 3)
    assert not {name for name in figures(own, advantage={"sql": "dr_grpo"}) if "expert" in name}


def test_what_a_mask_leaves_is_logged() -> None:
    found = figures(scored(), advantage={"sql": "dagrpo"}, route={"sql": "source"})
    # Failing group: 9 - 7 < 3 masks the expert and the last failure. Mixed group: 8 - 5 = 3 holds for all.
    assert found["zero_advantage_above_share"] == pytest.approx(1 / 4)
    assert found["zero_advantage_below_share"] == pytest.approx(1 / 4)
    assert found["zero_advantage_expert_share"] == pytest.approx(1 / 2)
    assert found["zero_advantage_groups_share"] == 0
    strict = figures(scored(), advantage={"sql": "dagrpo", "delta": 4.0}, route={"sql": "source"})
    assert strict["zero_advantage_groups_share"] == 0
    strictest = figures(scored(), advantage={"sql": "dagrpo", "delta": 9.0}, route={"sql": "source"})
    assert strictest["zero_advantage_groups_share"] == strictest["zero_advantage_above_share"] == 1
    plain = figures(scored(), advantage={"sql": "dr_grpo"})
    assert plain["zero_advantage_above_share"] == plain["zero_advantage_below_share"] == 0


def test_groups_without_signal_are_no_masked_groups() -> None:
    found = figures(scored_table([[0, 0], [1, 0]]), advantage={"sql": "dr_grpo"})
    assert found["zero_advantage_groups_share"] == 0
    assert "zero_advantage_above_share" not in figures(scored_table([[0, 0]]), advantage={"sql": "dr_grpo"})


def test_a_group_with_only_its_expert_left_is_refilled() -> None:
    assert count_groups(scored(), CurateConfig.model_validate({"filter": {"sql": "correct_only"}})) == 1
    assert count_groups(scored(), CurateConfig.model_validate({"filter": {"sql": "anchors_where_failing"}})) == 2


def test_the_groups_view_leaves_experts_out() -> None:
    import duckdb

    from rollway.config.assets import folder

    rows = scored().append_column("run", pa.array(["a"] * 8)).append_column("round", pa.array([0] * 8))
    rows = rows.append_column("pass", pa.array([0] * 8)).append_column("prompt_id", pa.array(["p"] * 4 + ["q"] * 4))
    rows = rows.append_column("parent_id", pa.nulls(8, pa.string()))
    with duckdb.connect() as con:
        con.register("scored", rows)
        con.execute((folder("sql") / "views" / "groups.sql").read_text())
        query = "SELECT samples, right_samples, reward, signal, length FROM groups ORDER BY group_id"
        found = con.execute(query).fetchall()
    assert found == [(3, 0, 0.0, False, 2.0), (3, 2, pytest.approx(2 / 3), True, 4.0)]
