"""PF-PPO's weights: ranks are those of a prompt's own responses, and what any rewards keep true."""

from collections.abc import Callable

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.tables import column, scored_table
from rollway.config.curation import CurateConfig
from rollway.curation import curate, summary

Run = Callable[..., pa.Table]


def weights(groups: list[list[float]], keep: str) -> list[float]:
    config = CurateConfig.model_validate({"weight": {"sql": "pf_ppo", "keep": keep}})
    return column(curate(scored_table(groups), config), "weight")


def test_ranks_are_per_prompt_and_not_over_the_batch() -> None:
    """Trap 7: both the largest and the smallest reward of the batch are in the first group."""
    groups = [[0.9, -0.9, 0.0], [0.3, 0.1, 0.2], [-0.5, -0.4, -0.6]]
    assert weights(groups, "bw") == [0.5, 0.5, 0, 0.5, 0.5, 0, 0, 0.5, 0.5]
    assert weights(groups, "bon") == [1, 0, 0, 1, 0, 0, 0, 1, 0]
    assert weights(groups, "br") == [0.5, 0.25, 0.25, 0.5, 0.25, 0.25, 0.25, 0.5, 0.25]


def test_two_prompts_of_the_same_text_are_two_groups() -> None:
    """Groups are told apart by group_id, whatever the prompt."""
    scored = scored_table([[0.9, 0.8], [0.2, 0.1]], prompt_id=["p"] * 4)
    config = CurateConfig.model_validate({"weight": {"sql": "pf_ppo", "keep": "bon"}})
    assert column(curate(scored, config), "weight") == [1, 0, 1, 0]


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from([-1.0, -0.4, 0.0, 0.1, 0.7]), min_size=1, max_size=6), min_size=1, max_size=12)
)
def test_weights_of_a_prompt_sum_to_one_and_the_best_alone_has_most_reward(groups: list[list[float]]) -> None:
    mean = {}
    for keep in ("none", "br", "bw", "bon"):
        found, at, total = weights(groups, keep), 0, 0.0
        for group in groups:
            own = found[at : at + len(group)]
            at += len(group)
            assert sum(own) == pytest.approx(1.0, abs=1e-12)
            assert min(own) >= 0
            total += sum(w * r for w, r in zip(own, group, strict=True))
        mean[keep] = total
    assert mean["bon"] >= mean["br"] - 1e-12
    assert mean["br"] >= mean["none"] - 1e-12


def test_the_training_reward_is_that_of_the_filtered_policy() -> None:
    """Procedure 6: E[R] on mu beside E[R] on pi, per round."""
    scored = scored_table([[0.1, 0.7, -0.4, 0.7, -0.9]])
    for keep, expected in (("br", 0.2875), ("bw", -0.1), ("none", 0.04)):
        config = CurateConfig.model_validate({"weight": {"sql": "pf_ppo", "keep": keep}})
        found = summary(scored, curate(scored, config))
        assert found["batch_reward_weighted_mean"] == pytest.approx(expected, abs=1e-12)
        assert found["reward_mean"] == pytest.approx(0.04, abs=1e-12)
    plain = summary(scored, curate(scored, CurateConfig.model_validate({"advantage": {"sql": "grpo"}})))
    assert "batch_reward_weighted_mean" not in plain
