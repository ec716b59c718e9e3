"""DistiLLM's share of the student's outputs and its buffer, and DistiLLM-2's curriculum, as SQL."""

from typing import Any

import pyarrow as pa
import pytest

from curation.tables import column, scored_table
from rollway.config import load_recipe
from rollway.config.curation import CurateConfig
from rollway.curation import check_method, curate, given_values
from rollway.errors import RollwayError

GROUPS = 60
"""Of each round: one rollout of the policy and one of the data."""


def rounds(*losses: float) -> pa.Table:
    """The newest first. A round's loss is its mean of mean_logprob - teacher over the policy's rollouts."""
    groups = GROUPS * len(losses)
    of = [loss for loss in losses for _ in range(GROUPS)]
    return scored_table(
        [[1, 1]] * groups,
        source=["policy", "expert"] * groups,
        age=[age for age in range(len(losses)) for _ in range(2 * GROUPS)],
        # Experts' rows have no log-prob of the policy; nothing may be made of them.
        mean_logprob=[x for loss in of for x in (-1.0, float("nan"))],
        teacher=[x for loss in of for x in (-1.0 - loss, -9.0)],
    )


def kept(table: pa.Table, round: int = 7, **given: Any) -> dict[tuple[int, str], int]:
    """How many rows of each age and source are trained on."""
    config = CurateConfig.model_validate({"filter": {"sql": "distillm", "progress": 0.0, "max_age": 4} | given})
    batch = curate(table, config, given={"round": round, "seed": 0})
    source = dict(zip(column(table, "rollout_id"), column(table, "source"), strict=True))
    counts: dict[tuple[int, str], int] = {}
    for name, age in zip(column(batch, "rollout_id"), column(batch, "age"), strict=True):
        counts[age, source[name]] = counts.get((age, source[name]), 0) + 1
    return counts


def test_the_share_rises_with_each_loss_that_rose() -> None:
    shares = []
    # From older to newer: falling throughout; one rise; two; three. Newest first here.
    for losses in ((1.0, 2.0, 3.0, 4.0), (1.0, 2.0, 3.0, 2.5), (1.0, 2.0, 1.5, 1.0), (4.0, 3.0, 2.0, 1.0)):
        found = kept(rounds(*losses), step=0.25)
        assert set(found) <= {(0, "policy"), (0, "expert")}
        assert sum(found.values()) == GROUPS
        shares.append(found.get((0, "policy"), 0) / GROUPS)
    assert shares[0] == 0.0
    assert shares == sorted(shares)
    for share, phi in zip(shares, (0.0, 0.25, 0.5, 0.75), strict=True):
        # Four standard deviations of a binomial.
        assert abs(share - phi) <= 4 * (phi * (1 - phi) / GROUPS) ** 0.5


def test_a_rise_within_the_margin_does_not_count_and_the_share_ends_at_one() -> None:
    table = rounds(1.2, 1.1, 1.0)
    assert kept(table, margin=0.15, step=1.0) == {(0, "expert"): GROUPS}
    assert kept(table, margin=0.05, step=1.0) == {(0, "policy"): GROUPS}
    assert kept(rounds(1.0), start=1.0) == {(0, "policy"): GROUPS}


def test_groups_of_earlier_rounds_take_the_place_of_new_ones() -> None:
    table = rounds(1.0, 1.0, 1.0)
    some = kept(table, start=1.0, progress=0.4)
    old = some.get((1, "policy"), 0) + some.get((2, "policy"), 0)
    assert sum(some.values()) == GROUPS
    assert abs(old / GROUPS - 0.4) <= 4 * (0.24 / GROUPS) ** 0.5
    assert some[1, "policy"] > 0
    assert some[2, "policy"] > 0
    assert kept(table, start=1.0, progress=1.0).get((0, "policy"), 0) == 0
    # The first round has no buffer, and keeps its own; the data's groups are never replayed.
    assert kept(rounds(1.0), start=1.0, progress=1.0) == {(0, "policy"): GROUPS}
    assert kept(table, start=0.0, progress=1.0) == {(0, "expert"): GROUPS}
    assert kept(table, start=1.0, progress=1.0, max_age=1) == {(1, "policy"): GROUPS}


def test_the_draw_depends_on_round_and_seed_alone() -> None:
    table = rounds(1.0, 2.0)
    config = CurateConfig.model_validate({"filter": {"sql": "distillm", "start": 0.5, "progress": 0.5}, "replay": 4})
    draws = {
        (round, seed): tuple(column(curate(table, config, given={"round": round, "seed": seed}), "rollout_id"))
        for round in (3, 4)
        for seed in (0, 1)
    }
    assert len(set(draws.values())) == 4
    again = curate(table.take(list(range(table.num_rows))[::-1]), config, given={"round": 3, "seed": 0})
    assert tuple(column(again, "rollout_id")) == draws[3, 0]


def test_replay_reaches_as_far_as_the_rounds_that_are_shown() -> None:
    recipe = load_recipe("distillm", {"curate": {"replay": 1}})
    with pytest.raises(RollwayError, match=r"shows 1 earlier rounds, and .*distillm.sql draws from 4"):
        check_method(recipe, given_values(recipe.curate, round=3, seed=0))


@pytest.mark.parametrize(("progress", "own"), [(0.0, 0.3), (0.5, 0.5), (1.0, 0.7)])
def test_the_curriculum_shifts_weight_from_experts_to_the_policy(progress: float, own: float) -> None:
    table = scored_table([[1, 0]], source=["policy", "expert"])
    part = {"sql": "by_source", "start": 0.3, "end": 0.7, "progress": progress}
    found = column(curate(table, CurateConfig.model_validate({"weight": part})), "weight")
    assert found == pytest.approx([2 * own, 2 * (1 - own)])
