"""The worked numbers of the methods' specs, to 6 decimals."""

from collections.abc import Callable, Sequence

import pyarrow as pa
import pytest

from curation.tables import column, scored_table

Run = Callable[..., pa.Table]
BASELINE = [[1, 0, 0], [1, 1, 0]]


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({"sql": "grpo"}, (1.154699, -0.577349, -0.577349, 0.577349, 0.577349, -1.154699)),
        ({"sql": "dr_grpo"}, (0.666667, -0.333333, -0.333333, 0.333333, 0.333333, -0.666667)),
        ({"sql": "group_mean"}, (0.666667, -0.333333, -0.333333, 0.333333, 0.333333, -0.666667)),
        ({"sql": "rloo"}, (1, -0.5, -0.5, 0.5, 0.5, -1)),
        ({"sql": "reinforce"}, (1, 0, 0, 1, 1, 0)),
        ({"sql": "reinforce", "baseline": "batch"}, (0.5, -0.5, -0.5, 0.5, 0.5, -0.5)),
        ({"sql": "psr_nsr", "positive": 0.1}, (0.1, -1, -1, 0.1, 0.1, -1)),
    ],
)
def test_baselines(run: Run, part: dict, expected: Sequence[float]) -> None:
    assert column(run(scored_table(BASELINE), advantage=part), "advantage") == pytest.approx(expected, abs=1e-6)


def test_psr_and_nsr_keep_their_rows(run: Run) -> None:
    scored = scored_table(BASELINE)
    psr = run(scored, filter={"sql": "correct_only"}, advantage={"sql": "psr_nsr"})
    nsr = run(scored, filter={"sql": "wrong_only"}, advantage={"sql": "psr_nsr"})
    assert column(psr, "rollout_id") == ["r00-0", "r01-0", "r01-1"]
    assert column(psr, "advantage") == [1, 1, 1]
    assert column(nsr, "rollout_id") == ["r00-1", "r00-2", "r01-2"]
    assert column(nsr, "advantage") == [-1, -1, -1]


def test_dcpo_and_capo_constants(run: Run) -> None:
    dcpo = run(scored_table([[1, 0, 0, 1]]), advantage={"sql": "grpo"})
    assert column(dcpo, "advantage") == pytest.approx([0.866024, -0.866024, -0.866024, 0.866024], abs=1e-6)
    capo = run(scored_table([[1, 0]]), advantage={"sql": "grpo", "eps": 1e-4})
    assert column(capo, "advantage") == pytest.approx([0.707007, -0.707007], abs=1e-6)


@pytest.mark.parametrize(
    ("rewards", "ddof", "expected"),
    [
        ([0] * 8, 1, [-0.333332] * 8),
        ([0] * 8, 0, [-0.353552] * 8),
        ([0] * 3, 1, [-0.499999] * 3),
        ([1] + [0] * 7, 1, [1.763830] + [-0.503951] * 7),
        ([1] * 7 + [0], 1, [0.333332] * 7 + [-2.666659]),
        ([1] * 8, 1, [0.0] * 8),
        ([0.2, 0.8, 0.5, 0.0], 1, [-0.727605, 0.727605, 0.0, -1.212675]),
    ],
)
def test_ngrpo(run: Run, rewards: list[float], ddof: int, expected: list[float]) -> None:
    batch = run(scored_table([rewards]), advantage={"sql": "ngrpo", "ddof": ddof})
    assert column(batch, "advantage") == pytest.approx(expected, abs=1e-6)


def test_ngrpo_drops_solved_groups_only(run: Run) -> None:
    batch = run(scored_table([[1, 1], [0, 0], [1, 0]]), filter={"sql": "drop_all_correct"}, advantage={"sql": "ngrpo"})
    assert set(column(batch, "group_id")) == {"g01", "g02"}


def test_dapo_keeps_mixed_groups(run: Run) -> None:
    batch = run(scored_table([[1, 1], [0, 0], [1, 0], [0]]), filter={"sql": "informative_groups"})
    assert set(column(batch, "group_id")) == {"g02"}


DAGRPO = {"judge": [8.0, 5.0, 4.0, 2.0, 6.0, 10.0]}


def test_dagrpo(run: Run) -> None:
    scored = scored_table([[1, 1, 0, 0, 0, 1]], **DAGRPO)
    plain = column(run(scored, advantage={"sql": "dagrpo"}), "advantage")
    assert plain == pytest.approx([0, 0, 0, -0.5, 0, 0.5], abs=1e-12)
    standard = column(run(scored, advantage={"sql": "dagrpo", "std": True}), "advantage")
    assert standard == pytest.approx([0, 0, 0, -0.912869, 0, 0.912869], abs=2e-6)
    everything = column(run(scored, advantage={"sql": "dagrpo", "delta": float("-inf")}), "advantage")
    assert everything == pytest.approx([0.5, 0.5, -0.5, -0.5, -0.5, 0.5])
    assert column(run(scored, advantage={"sql": "dagrpo", "delta": 9.5}), "advantage") == [0] * 6


def test_dagrpo_margin_is_inclusive_and_equal_scores_mask_all(run: Run) -> None:
    edge = scored_table([[1, 0]], judge=[7.0, 4.0])
    assert column(run(edge, advantage={"sql": "dagrpo"}), "advantage") == [0.5, -0.5]
    same = scored_table([[1, 0]], judge=[7.0, 7.0])
    assert column(run(same, advantage={"sql": "dagrpo"}), "advantage") == [0, 0]


def test_dagrpo_anchors(run: Run) -> None:
    source = ["policy"] * 3 + ["expert"] + ["policy"] * 3 + ["expert"]
    scored = scored_table([[0, 0, 0, 1], [1, 1, 0, 1]], judge=[2.0, 5, 7, 9, 9, 9, 1, 10], source=source)
    batch = run(scored, filter={"sql": "anchors_where_failing"}, advantage={"sql": "dagrpo"})
    by_id = dict(zip(column(batch, "rollout_id"), column(batch, "advantage"), strict=True))
    assert [by_id[f"r00-{i}"] for i in range(4)] == [-0.25, -0.25, 0.0, 0.0]
    assert "r01-3" not in by_id
    again = run(scored, filter={"sql": "anchors_where_failing"}, advantage={"sql": "dagrpo", "delta": 2.0})
    assert column(again, "advantage")[3] == 1 - 1 / 4


PF_PPO = [[0.1, 0.7, -0.4, 0.7, -0.9]]


@pytest.mark.parametrize(
    ("part", "expected", "mean"),
    [
        ({"sql": "pf_ppo", "keep": "none"}, (0.2, 0.2, 0.2, 0.2, 0.2), 0.04),
        ({"sql": "pf_ppo", "keep": "bon"}, (0, 1, 0, 0, 0), 0.7),
        ({"sql": "pf_ppo", "keep": "br"}, (0.125, 0.5, 0.125, 0.125, 0.125), 0.2875),
        ({"sql": "pf_ppo", "keep": "bw"}, (0, 0.5, 0, 0, 0.5), -0.1),
        ({"sql": "power", "k": 2}, (0.005102, 0.25, 0.081633, 0.25, 0.413265), None),
        ({"sql": "threshold", "keep": "top", "high": 0.7}, (0, 0.5, 0, 0.5, 0), 0.7),
        ({"sql": "threshold", "keep": "top_random", "high": 0.7}, (1 / 7, 2 / 7, 1 / 7, 2 / 7, 1 / 7), None),
        ({"sql": "threshold", "keep": "top_bottom", "high": 0.7, "low": -0.9}, (0, 1 / 3, 0, 1 / 3, 1 / 3), None),
        ({"sql": "threshold", "keep": "top", "high": 2.0}, (0.2,) * 5, None),
    ],
)
def test_pf_ppo_weights(run: Run, part: dict, expected: Sequence[float], mean: float | None) -> None:
    weights = column(run(scored_table(PF_PPO), weight=part), "weight")
    assert weights == pytest.approx(expected, abs=1e-6)
    if mean is not None:
        assert sum(w * r for w, r in zip(weights, PF_PPO[0], strict=True)) == pytest.approx(mean, abs=1e-9)


def test_pf_ppo_edges(run: Run) -> None:
    two = scored_table([[0.3, 0.1], [0.2]])
    for keep in ("br", "bw", "none"):
        assert column(run(two, weight={"sql": "pf_ppo", "keep": keep}), "weight") == [0.5, 0.5, 1.0]
    equal = scored_table([[0.6] * 4])
    assert column(run(equal, weight={"sql": "pf_ppo", "keep": "bon"}), "weight") == [1, 0, 0, 0]
    assert column(run(equal, weight={"sql": "pf_ppo", "keep": "bw"}), "weight") == [0.5, 0, 0, 0.5]
    assert column(run(scored_table([[0.0] * 4]), weight={"sql": "power", "k": 2}), "weight") == [0.25] * 4


def test_resampling_follows_the_weights(run: Run) -> None:
    scored = scored_table(PF_PPO * 400)
    batch = run(
        scored, given={"seed": 3, "round": 1}, weight={"sql": "pf_ppo", "keep": "br"}, select={"sql": "resample"}
    )
    assert batch.num_rows == 2000
    assert set(column(batch, "weight")) == {1.0}
    drawn = [int(name.split("-")[1]) for name in column(batch, "rollout_id")]
    shares = [drawn.count(sample) / 2000 for sample in range(5)]
    assert shares == pytest.approx([0.125, 0.5, 0.125, 0.125, 0.125], abs=0.04)
    keys = list(zip(column(batch, "rollout_id"), column(batch, "slot"), strict=True))
    assert len(set(keys)) == 2000
    assert max(column(batch, "slot")) > 0
    other = run(
        scored, given={"seed": 4, "round": 1}, weight={"sql": "pf_ppo", "keep": "br"}, select={"sql": "resample"}
    )
    assert column(other, "rollout_id") != column(batch, "rollout_id")


def roles(batch: pa.Table) -> dict[str, tuple[str, str]]:
    pairs: dict[str, dict[str, str]] = {}
    for row in batch.to_pylist():
        pairs.setdefault(row["pair_id"], {})[row["role"]] = row["rollout_id"]
    return {name: (pair["chosen"], pair["rejected"]) for name, pair in pairs.items()}


def test_pairs(run: Run) -> None:
    scored = scored_table(BASELINE)
    worked = {("r00-0", "r00-1"), ("r01-0", "r01-2")}
    assert set(roles(run(scored, pair={"sql": "best_worst"})).values()) == worked
    assert set(roles(run(scored, pair={"sql": "right_wrong"})).values()) == worked
    assert set(roles(run(scored, pair={"sql": "right_wrong", "per_group": 5})).values()) == worked
    assert set(roles(run(scored, pair={"sql": "two_per_prompt"})).values()) == {("r00-0", "r00-1"), ("r01-0", "r01-1")}
    everything = run(scored, pair={"sql": "all_pairs"})
    assert set(roles(everything).values()) == {
        *(("r00-0", "r00-1"), ("r00-0", "r00-2"), ("r00-1", "r00-2")),
        *(("r01-0", "r01-1"), ("r01-0", "r01-2"), ("r01-1", "r01-2")),
    }
    assert everything.num_rows == 12
    assert column(everything, "slot").count(1) == 6


def test_pairs_of_groups_without_contrast(run: Run) -> None:
    scored = scored_table([[0.6, 0.6, 0.6], [1]])
    assert run(scored, pair={"sql": "best_worst"}).num_rows == 0
    assert run(scored, pair={"sql": "right_wrong"}).num_rows == 0
    assert set(roles(run(scored, pair={"sql": "two_per_prompt"})).values()) == {("r00-0", "r00-1")}
    many = scored_table([[1, 0, 0, 1, 1]])
    assert set(roles(run(many, pair={"sql": "right_wrong", "per_group": 9})).values()) == {
        ("r00-0", "r00-1"),
        ("r00-3", "r00-2"),
    }
    assert len(roles(run(many, pair={"sql": "two_per_prompt", "per_group": 9}))) == 2


def test_overlong_rows_leave_the_loss_but_not_the_group_mean(run: Run) -> None:
    scored = scored_table(BASELINE, finish=["stop", "length", "stop", "stop", "stop", "stop"])
    full = run(scored, advantage={"sql": "grpo"})
    masked = run(scored, advantage={"sql": "grpo"}, select={"sql": "not_truncated"})
    kept = [row for row in full.to_pylist() if row["rollout_id"] != "r00-1"]
    assert masked.to_pylist() == kept
    filtered = run(scored, filter={"sql": "not_truncated"}, advantage={"sql": "dr_grpo"})
    assert column(filtered, "advantage")[:2] == [0.5, -0.5]


def test_rft(run: Run) -> None:
    scored = scored_table(
        [[1, 1, 1, 0], [1, 1, 0, 0]],
        prompt_id=["p"] * 8,
        text=["a", "a", "b", "c", "b", "d", "a", "e"],
    )
    assert column(run(scored, filter={"sql": "rft"}), "rollout_id") == ["r00-0", "r00-2", "r01-1"]
    assert column(run(scored, filter={"sql": "rft", "per_prompt": 2}), "rollout_id") == ["r00-0", "r00-2"]


def test_routes_and_reward(run: Run) -> None:
    scored = scored_table(
        [[1, 0], [0.4]],
        source=["policy", "expert", "policy"],
        meta=['{"domain": "maze"}', '{"domain": "text"}'] * 1 + ['{"domain": "maze"}'],
    )
    assert column(run(scored, route={"sql": "source"}), "route") == ["policy", "expert", "policy"]
    assert column(run(scored, route={"sql": "correctness"}), "route") == ["right", "wrong", "wrong"]
    assert column(run(scored, route={"sql": "domain"}), "route") == ["maze", "text", "maze"]
    shaped = run(scored, reward={"sql": "threshold", "threshold": 0.4, "below": -1}, advantage={"sql": "reinforce"})
    assert column(shaped, "reward") == column(shaped, "advantage") == [1, -1, 1]


def test_replay_share_and_age(run: Run) -> None:
    ages = [age for age in (0, 0, 0, 1, 1, 2, 2, 5, 5, 5) for _ in range(2)]
    scored = scored_table([[1, 0]] * 10, age=ages)
    given = {"seed": 1, "round": 7}
    batch = run(scored, given=given, advantage={"sql": "grpo"}, select={"sql": "replay", "share": 0.5})
    age = column(batch, "age")
    assert age.count(0) == 6
    assert len(age) == 12
    assert max(age) <= 2
    assert run(scored, given=given, select={"sql": "replay", "share": 0.0}).num_rows == 6
    assert run(scored, given=given, select={"sql": "replay", "share": 0.9, "max_age": 5}).num_rows == 20
    picks = {
        tuple(column(run(scored, given={"seed": seed, "round": 7}, select={"sql": "replay"}), "rollout_id"))
        for seed in range(8)
    }
    assert len(picks) > 1
