"""D3S's choice of rows and NGRPO's advantages: figures, theorems, and forms of the recipes."""

from math import sqrt
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.tables import column, scored_table
from rollway.config import load_recipe
from rollway.config.curation import CurateConfig
from rollway.curation import curate, given_values

FEW = settings(max_examples=10, deadline=None)
WORKED = [[1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0], [0] * 6, [1, 1, 1, 0, 0, 0]]


def run(scored: pa.Table, **parts: Any) -> pa.Table:
    return curate(scored, CurateConfig.model_validate(parts))


def by_recipe(
    scored: pa.Table, overrides: dict[str, Any] | None = None, *, name: str = "d3s", round: int = 0
) -> pa.Table:
    part = load_recipe(name, overrides).curate
    return curate(scored, part, given=given_values(part, round=round, seed=0))


def d3s(n: float, keep_share: float = 1.0, **params: Any) -> dict[str, Any]:
    return {"sql": "d3s", "progress": 0.0, "n_init": n, "n_final": n, "keep_share": keep_share, **params}


# D3S


def test_variances_of_the_worked_rows() -> None:
    scored = scored_table(WORKED)
    pool = run(scored, advantage={"sql": "grpo"}, select=d3s(4.0))
    a = np.array(column(pool, "advantage")).reshape(4, 4)
    assert a.var(axis=1) == pytest.approx([1.124994, 1.124994, 0.0, 0.833330], abs=1e-6)
    assert a.var() == pytest.approx(0.791663, abs=1e-6)
    kept = run(scored, advantage={"sql": "grpo"}, select=d3s(4.0, 0.5))
    assert np.var(column(kept, "advantage")) == pytest.approx(1.499993, abs=1e-6)
    assert "g02" not in column(kept, "group_id")
    whole = dict(zip(column(pool, "rollout_id"), column(pool, "advantage"), strict=True))
    assert all(whole[r] == x for r, x in zip(column(kept, "rollout_id"), column(kept, "advantage"), strict=True))


@FEW
@given(
    values=st.lists(st.floats(-3, 3), min_size=3, max_size=14).filter(lambda v: np.std(v) > 1e-3),
    half=st.integers(1, 7),
)
def test_an_even_choice_never_varies_less_than_its_pool(values: list[float], half: int) -> None:
    """So a standardised pool (population std) always holds a choice of variance at least 1."""
    n = 2 * min(half, len(values) // 2)
    standard = ((np.array(values) - np.mean(values)) / np.std(values)).tolist()
    kept = run(scored_table([standard]), advantage={"sql": "reinforce"}, select=d3s(float(n)))
    assert kept.num_rows == n
    assert np.var(column(kept, "advantage")) >= 1 - 1e-9


@pytest.mark.parametrize("n", [2, 3, 4])
def test_a_mixed_group_keeps_both_signs_and_a_dead_one_its_last_rows(n: int) -> None:
    for right in range(1, 8):
        kept = run(scored_table([[1] * right + [0] * (8 - right)]), advantage={"sql": "grpo"}, select=d3s(float(n)))
        signs = np.sign(column(kept, "advantage"))
        assert {-1.0, 1.0} == set(signs)
    dead = run(scored_table([[1] * 8]), advantage={"sql": "grpo"}, select=d3s(float(n)))
    assert column(dead, "rollout_id") == [f"r00-{i}" for i in range(8 - n, 8)]


def test_usefulness_rises_towards_one() -> None:
    """Share of kept rows with an advantage: dead rows go first where the pool's mean is near 0."""
    scored = scored_table([[1, 1, 1, 1, 0, 0, 0, 0]] * 4 + [[0] * 8] * 2 + [[1] * 8] * 2)
    full = run(scored, advantage={"sql": "grpo"})
    kept = run(scored, advantage={"sql": "grpo"}, select=d3s(4.0, 0.5))
    share = [np.mean(np.array(column(t, "advantage")) != 0) for t in (full, kept)]
    assert share == [0.5, 1.0]


@pytest.mark.parametrize(("share", "expected"), [(0.75, 12), (0.5, 8), (0.53, 8), (0.5313, 9), (0.01, 2), (1.0, 16)])
def test_size_of_the_batch_is_rounded_half_up_and_at_least_two(share: float, expected: int) -> None:
    assert run(scored_table(WORKED), advantage={"sql": "grpo"}, select=d3s(4.0, share)).num_rows == expected


def test_recipe_keeps_a_quarter_then_half_of_each_group() -> None:
    scored = scored_table([[1, 0, 0, 0, 1, 0, 0, 0]] * 4)
    for round, per_group in ((0, 2), (12, 2), (13, 3), (25, 3), (50, 4), (80, 4)):
        assert by_recipe(scored, round=round).num_rows == round_half_up(0.75 * 4 * per_group)


def round_half_up(x: float) -> int:
    return int(np.floor(x + 0.5))


D1S = {
    "curate": {"select": {"keep_share": 1.0}},
    "train": {"objective": {"select": "all"}, "objective_horizon": None},
}
D1S_CROSS = {"train": {"objective": {"select": "all"}, "objective_horizon": None}}
D2S = {
    "curate": {"select": {"progress": 0.0}, "horizon": None},
    "train": {"objective": {"select": {"final": None}}, "objective_horizon": None},
}


def test_ablations_are_overrides_of_the_recipe() -> None:
    scored = scored_table([[1, 0, 0, 0, 1, 0, 0, 0]] * 4)
    for over, early, late in (
        (D1S, 8, 16),
        (D1S_CROSS, 6, 12),
        (D2S, 6, 6),
        ({"curate": {"select": {"pool": "all"}}}, 24, 24),
    ):
        assert [by_recipe(scored, over, round=r).num_rows for r in (0, 50)] == [early, late]
    for name in ("d3s", "d3s-gspo"):
        assert load_recipe(name, D1S).train.objective.select.kind == "all"
        assert load_recipe(name, D2S).train.objective.select.model_dump() == {
            "kind": "signal_top",
            "share": 0.1,
            "final": None,
        }


def test_keeping_everything_is_grpo() -> None:
    scored = scored_table(WORKED)
    over = {"curate": {"select": {"n_init": 6, "n_final": 6, "keep_share": 1.0}}}
    assert by_recipe(scored, over).equals(by_recipe(scored, name="grpo"))


# NGRPO


@pytest.mark.parametrize(
    ("right", "expected"), [(1, (2.474867, -0.353552)), (7, (0.353552, -2.474867)), (0, (None, 0.0)), (8, (0.0, None))]
)
def test_grpo_beside_it(right: int, expected: tuple[float | None, float | None]) -> None:
    values = column(run(scored_table([[1] * right + [0] * (8 - right)]), advantage={"sql": "grpo"}), "advantage")
    assert values == pytest.approx([expected[0]] * right + [expected[1]] * (8 - right), abs=1e-6)


@FEW
@given(size=st.integers(1, 24), data=st.data())
def test_closed_form_of_binary_rewards(size: int, data: st.DataObject) -> None:
    """Eq. 4 and 5: of c right ones, and a sum that is never positive."""
    right = data.draw(st.integers(0, size))
    scored = scored_table([[1] * right + [0] * (size - right)])
    values = np.array(column(run(scored, advantage={"sql": "ngrpo"}), "advantage"))
    mean = (right + 1) / (size + 1)
    std = sqrt((right + 1) * (size - right) / ((size + 1) * size))
    expected = [(1 - mean) / (std + 1e-6)] * right + [-mean / (std + 1e-6)] * (size - right)
    assert values == pytest.approx(expected if right < size else [0.0] * size, abs=1e-9)
    assert values.sum() == 0 if right == size else values.sum() < 0
    if right == 0:
        assert values == pytest.approx([-1 / sqrt(size + 1)] * size, abs=3e-6)


@FEW
@given(rewards=st.lists(st.floats(0, 1), min_size=1, max_size=12), virtual=st.integers(1, 3))
def test_advantages_never_add_up_to_more_than_zero(rewards: list[float], virtual: int) -> None:
    values = column(run(scored_table([rewards]), advantage={"sql": "ngrpo", "virtual": virtual}), "advantage")
    assert sum(values) <= 1e-9
    if min(rewards) < 1 - 1e-3:
        assert sum(values) < 0


def test_graded_rewards_and_groups_of_one() -> None:
    graded = column(run(scored_table([[0.2, 0.8, 0.5, 0.0]]), advantage={"sql": "ngrpo"}), "advantage")
    assert sum(graded) == pytest.approx(-1.212675, abs=1e-6)
    alone = column(run(scored_table([[0], [1], [0.5]]), advantage={"sql": "ngrpo"}), "advantage")
    assert alone == pytest.approx([-0.5 / (sqrt(0.5) + 1e-6), 0.0, -0.25 / (sqrt(0.125) + 1e-6)], abs=1e-9)


def test_recipe_drops_solved_groups_and_pushes_unsolved_ones_down() -> None:
    batch = by_recipe(scored_table([[1] * 8, [0] * 8, [1] + [0] * 7]), name="ngrpo")
    values = np.array(column(batch, "advantage")).reshape(2, 8)
    assert column(batch, "group_id") == ["g01"] * 8 + ["g02"] * 8
    assert values[0] == pytest.approx([-0.333332] * 8, abs=1e-6)
    assert values[1] == pytest.approx([1.763830] + [-0.503951] * 7, abs=1e-6)
