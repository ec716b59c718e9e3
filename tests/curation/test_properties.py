"""Advantages, weights and selections against independent numpy references on random groups."""

from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from curation.tables import column, scored_table
from rollway.config.curation import CurateConfig
from rollway.curation import curate

FEW = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
rewards = st.one_of(st.sampled_from([0.0, 1.0, 0.6, -0.4]), st.floats(-5, 5, allow_nan=False, width=32))
groups_of_rewards = st.lists(st.lists(rewards, min_size=1, max_size=9), min_size=1, max_size=14)
Reference = Callable[[np.ndarray], np.ndarray]


def run(scored: pa.Table, known: dict[str, Any] | None = None, **parts: Any) -> pa.Table:
    return curate(scored, CurateConfig.model_validate(parts), given=known)


def zero_if_equal(reference: Reference) -> Reference:
    return lambda r: np.zeros(len(r)) if np.ptp(r) == 0 else reference(r)


def ngrpo(r: np.ndarray) -> np.ndarray:
    augmented = np.append(r, [1.0, 1.0])
    if np.all(r == 1.0):
        return np.zeros(len(r))
    return (r - augmented.mean()) / (augmented.std(ddof=1) + 1e-6)


def ranked(r: np.ndarray) -> np.ndarray:
    w = np.full(len(r), 0.5 / max(1, len(r) - 1))
    w[np.lexsort((np.arange(len(r)), -r))[0]] = 0.5
    return w if len(r) > 1 else np.ones(1)


REFERENCES: dict[str, tuple[str, dict[str, Any], Reference]] = {
    "grpo": ("advantage", {"sql": "grpo"}, zero_if_equal(lambda r: (r - r.mean()) / (r.std(ddof=1) + 1e-6))),
    "grpo0": ("advantage", {"sql": "grpo", "ddof": 0}, zero_if_equal(lambda r: (r - r.mean()) / (r.std() + 1e-6))),
    "dr_grpo": ("advantage", {"sql": "dr_grpo"}, zero_if_equal(lambda r: r - r.mean())),
    "group_mean": ("advantage", {"sql": "group_mean"}, zero_if_equal(lambda r: r - r.mean())),
    "rloo": (
        "advantage",
        {"sql": "rloo"},
        zero_if_equal(lambda r: np.array([r[i] - np.delete(r, i).mean() for i in range(len(r))])),
    ),
    "ngrpo": ("advantage", {"sql": "ngrpo", "virtual": 2}, ngrpo),
    "br": ("weight", {"sql": "pf_ppo", "keep": "br"}, ranked),
}


@pytest.mark.parametrize("name", REFERENCES)
@FEW
@given(groups=groups_of_rewards, seed=st.integers(0, 99))
def test_per_group_sql_equals_numpy_in_any_row_order(name: str, groups: list[list[float]], seed: int) -> None:
    step, part, reference = REFERENCES[name]
    scored = scored_table(groups)
    shuffled = scored.take(np.random.default_rng(seed).permutation(scored.num_rows))
    values = column(run(shuffled, **{step: part}), step)
    expected = np.concatenate([reference(np.array(group, dtype=np.float64)) for group in groups])
    # Near-equal rewards are divided by a standard deviation that is itself rounding error plus eps.
    np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", REFERENCES)
@FEW
@given(groups=groups_of_rewards, data=st.data())
def test_groups_do_not_see_each_other(name: str, groups: list[list[float]], data: st.DataObject) -> None:
    """Dropping a whole group, or giving two groups the same prompt, changes nobody else's value (incident 14)."""
    step, part, _ = REFERENCES[name]
    scored = scored_table(groups, prompt_id=["same"] * sum(map(len, groups)))
    full = {row["rollout_id"]: row[step] for row in run(scored, **{step: part}).to_pylist()}
    gone = f"g{data.draw(st.integers(0, len(groups) - 1)):02d}"
    mask = [group != gone for group in column(scored, "group_id")]
    for row in run(scored.filter(pa.array(mask)), **{step: part}).to_pylist():
        assert row[step] == full[row["rollout_id"]]


@pytest.mark.parametrize("sql", ["grpo", "dr_grpo", "rloo", "group_mean", "dagrpo"])
@pytest.mark.parametrize("value", [0.6, 0.1, 1e-9, 1e9, 1 / 3])
def test_equal_rewards_give_exactly_zero(sql: str, value: float) -> None:
    """Incident 15: rounding in the mean of equal rewards must not be divided by eps."""
    scored = scored_table([[value] * n for n in (1, 2, 3, 7, 10)], judge=[5.0] * 23)
    assert column(run(scored, advantage={"sql": sql}), "advantage") == [0.0] * 23


def test_batch_baseline_of_equal_rewards_is_exactly_zero() -> None:
    scored = scored_table([[0.6] * 3, [0.6] * 4])
    assert column(run(scored, advantage={"sql": "reinforce", "baseline": "batch"}), "advantage") == [0.0] * 7


def test_float32_rewards_are_computed_in_float64() -> None:
    scored = scored_table([[0.6] * 3, [1, 0, 0]])
    single = scored.set_column(3, "reward", scored["reward"].cast(pa.float32()))
    batch = run(single, advantage={"sql": "grpo"})
    assert column(batch, "advantage")[:3] == [0, 0, 0]
    assert batch.schema.field("advantage").type == pa.float64()


@FEW
@given(groups=groups_of_rewards, power=st.sampled_from([1.0, 2.0, 3.0]))
def test_power_weights_are_normalised_over_the_buffer(groups: list[list[float]], power: float) -> None:
    flat = np.concatenate([np.array(group, dtype=np.float64) for group in groups])
    raw = np.abs(flat) ** power
    expected = raw / raw.sum() if raw.sum() > 0 else np.full(len(flat), 1 / len(flat))
    values = column(run(scored_table(groups), weight={"sql": "power", "k": power}), "weight")
    np.testing.assert_allclose(values, expected, rtol=1e-9)


@FEW
@given(groups=st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=6), min_size=1, max_size=8))
def test_dynamic_sampling_keeps_mixed_groups(groups: list[list[float]]) -> None:
    mixed = {f"g{i:02d}" for i, group in enumerate(groups) if 0 < sum(group) < len(group)}
    kept = run(scored_table(groups), filter={"sql": "informative_groups"})
    assert set(column(kept, "group_id")) == mixed
    unsolved = {f"g{i:02d}" for i, group in enumerate(groups) if min(group) < 1}
    assert set(column(run(scored_table(groups), filter={"sql": "drop_all_correct"}), "group_id")) == unsolved


D3S = [[1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0], [0] * 6, [1, 1, 1, 0, 0, 0]]


def d3s(groups: list[list[float]], advantage: str = "grpo", **params: Any) -> list[tuple[int, int]]:
    part = {"sql": "d3s", "progress": 0.0, **params}
    batch = run(scored_table(groups), advantage={"sql": advantage}, select=part)
    return [(int(name[1:3]), int(name[4:])) for name in column(batch, "rollout_id")]


def test_d3s_worked_rows() -> None:
    pool = d3s(D3S, n_init=4.0, n_final=8.0, keep_share=1.0)
    assert pool == [(g, i) for g, kept in enumerate(["0345", "2345", "2345", "0145"]) for i in map(int, kept)]
    assert d3s(D3S, n_init=4.0, n_final=8.0, keep_share=0.5) == [
        (g, i) for g, kept in ((0, "05"), (1, "25"), (3, "0145")) for i in map(int, kept)
    ]


def test_d3s_schedule() -> None:
    group = [[float(i) for i in range(12)]]
    for progress, expected in ((0.0, 4), (0.25, 5), (0.5, 6), (1.0, 8)):
        assert len(d3s(group, progress=progress, n_init=4.0, n_final=8.0, keep_share=1.0)) == expected
    assert len(d3s([[1, 0, 0]], n_init=50.0, n_final=50.0, keep_share=1.0)) == 3
    assert len(d3s([[1.0]], n_init=4.0, n_final=4.0)) == 1


def test_d3s_skewed_pool_and_odd_sizes() -> None:
    pairs = [2.041236, -0.408247, 0.912869, -0.912869, 0.0, 0.0] * 10
    kept = d3s([pairs], "reinforce", pool="all", n_init=2.0, n_final=2.0, keep_share=23 / 60)
    values = sorted({pairs[i] for _, i in kept})
    assert len(kept) == 23
    assert 0.912869 not in values
    odd = d3s([[1, 1, -1, -1]], "reinforce", n_init=3.0, n_final=3.0, keep_share=1.0)
    assert np.var([[1, 1, -1, -1][i] for _, i in odd]) == pytest.approx(0.888889, abs=1e-6)


@FEW
@given(
    values=st.lists(st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.3, 1.0, 3.0]), min_size=2, max_size=10), data=st.data()
)
def test_d3s_finds_the_largest_variance(values: list[float], data: st.DataObject) -> None:
    n = data.draw(st.integers(2, len(values)))
    best = max(np.var(subset) for subset in combinations(values, n))
    within = d3s([values], "reinforce", n_init=float(n), n_final=float(n), keep_share=1.0)
    assert len(within) == n
    assert np.var([values[i] for _, i in within]) == pytest.approx(best, abs=1e-9)
    over = d3s([[v] for v in values], "reinforce", n_init=2.0, n_final=2.0, keep_share=n / len(values))
    assert len(over) == n
    assert np.var([values[g] for g, _ in over]) == pytest.approx(best, abs=1e-9)
