"""The worked numbers of the methods' specs, to 6 decimals."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pytest

from curation.tables import column, scored_table
from rollway.config.curation import CurateConfig
from rollway.curation import curate

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


OVERLONG = [10, 16, 17, 19, 20, 25]


@pytest.mark.parametrize("signed", [False, True])
def test_overlong_punishment(run: Run, signed: bool) -> None:
    """DAPO, eq. 13, with a cap of 20 and a cache of 4 tokens; signed: 1 and -1 in place of 1 and 0."""
    scored = scored_table(BASELINE, length=OVERLONG)
    part = {"sql": "overlong", "limit": 20, "signed": signed}
    shaped = column(run(scored, reward=part), "reward")
    penalty = [0.0, 0.0, -0.25, -0.75, -1.0, -1.0]
    plain = [1.0 if c else (-1.0 if signed else 0.0) for group in BASELINE for c in group]
    assert shaped == pytest.approx([p + r for p, r in zip(penalty, plain, strict=True)], abs=1e-12)
    wide = column(run(scored, reward=part | {"cache_share": 0.5}), "reward")
    assert wide[1] - plain[1] == pytest.approx(-0.6)


def test_signed_rewards_are_right_rollouts_counted_twice(run: Run) -> None:
    """Within a group only differences count, so that 2 and 0 beside the penalty are 1 and -1 beside it."""
    signed = scored_table(BASELINE, length=OVERLONG)
    double = scored_table([[2 * r for r in group] for group in BASELINE], length=OVERLONG)
    advantages = [
        column(run(table, reward={"sql": "overlong", "limit": 20, "signed": s}, advantage={"sql": "grpo"}), "advantage")
        for table, s in ((signed, True), (double, False))
    ]
    assert advantages[0] == pytest.approx(advantages[1], abs=1e-12)


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


SQL_DAGRPO = {"advantage": {"sql": "dagrpo"}}


def test_dagrpo_without_a_margin_is_dr_grpo_on_the_mixed_group(run: Run) -> None:
    rng = np.random.default_rng(0)
    rewards = rng.integers(0, 2, (40, 5)).tolist()
    source = (["policy"] * 4 + ["expert"]) * 40
    mixed = scored_table(rewards, judge=rng.uniform(1, 10, 200).tolist(), source=source)
    everything = column(run(mixed, advantage={"sql": "dagrpo", "delta": float("-inf")}), "advantage")
    assert everything == column(run(mixed, advantage={"sql": "dr_grpo"}), "advantage")
    assert column(run(mixed, advantage={"sql": "dagrpo", "delta": 9.01}), "advantage") == [0.0] * 200


def test_dagrpo_masks_agree_with_all_pairs(run: Run) -> None:
    """An independent form of eq. 2 and 3: a row is kept if its margin holds against each row of the other side."""
    rng = np.random.default_rng(1)
    rewards, judge = rng.integers(0, 2, (60, 6)), rng.integers(1, 11, (60, 6))
    scored = scored_table(rewards.tolist(), judge=judge.ravel().astype(float).tolist())
    got = column(run(scored, **SQL_DAGRPO), "advantage")
    for n, a in enumerate(got):
        g, i = divmod(n, 6)
        own, other = rewards[g] - rewards[g].mean(), judge[g][rewards[g] != rewards[g][i]]
        margins = (judge[g][i] - other) * np.sign(own[i])
        assert a == pytest.approx(own[i] if len(other) and (margins >= 3).all() else 0.0, abs=1e-12)


def test_dagrpo_anchor_of_a_group_that_fails(run: Run) -> None:
    failing = {"source": ["policy"] * 4 + ["expert"], "judge": [2.0, 7.0, 7.5, 6.0, 10.0]}
    kept = column(run(scored_table([[0, 0, 0, 0, 1]], **failing), **SQL_DAGRPO), "advantage")
    assert kept == pytest.approx([-0.2, -0.2, 0, -0.2, 0], abs=1e-12)  # 10 - 7.5 < 3 masks the anchor and that failure
    failing["judge"][2] = 7.0
    kept = column(run(scored_table([[0, 0, 0, 0, 1]], **failing), **SQL_DAGRPO), "advantage")
    assert kept == pytest.approx([-0.2, -0.2, -0.2, -0.2, 1 - 1 / 5], abs=1e-12)
    wide = {"sql": "dagrpo", "delta": 4.0}
    failing["judge"] = [2.0, 5.0, 5.0, 6.0, 10.0]
    kept = column(run(scored_table([[0, 0, 0, 0, 1]], **failing), advantage=wide), "advantage")
    assert kept == pytest.approx([-0.2, -0.2, -0.2, -0.2, 0.8], abs=1e-12)


def test_dagrpo_wrong_anchor_single_rollout_and_equal_rewards_count_for_nothing(run: Run) -> None:
    wrong = scored_table([[0, 0, 0]], judge=[1.0, 2.0, 10.0], source=["policy", "policy", "expert"])
    assert column(run(wrong, **SQL_DAGRPO), "advantage") == [0, 0, 0]
    assert column(run(scored_table([[1]], judge=[9.0]), **SQL_DAGRPO), "advantage") == [0]
    assert column(run(scored_table([[1, 1]], judge=[9.0, 1.0]), **SQL_DAGRPO), "advantage") == [0, 0]


def test_dagrpo_does_not_renormalise_what_is_kept(run: Run) -> None:
    kept = column(run(scored_table([[1, 0, 0]], judge=[6.0, 1.0, 5.0]), **SQL_DAGRPO), "advantage")
    assert kept == pytest.approx([0, -1 / 3, 0], abs=1e-12)
    assert sum(kept) != 0


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


def test_gkd_takes_one_source_per_group() -> None:
    """Either the policy's rows or the expert's: shares as lam says, other coins in another round or seed."""
    groups = 400
    scored = scored_table([[1, 0, 1]] * groups, source=["policy", "policy", "expert"] * groups)

    def kept(lam: float, round: int = 0, seed: int = 0) -> list[str]:
        config = CurateConfig.model_validate({"filter": {"sql": "gkd", "lam": lam}})
        return sorted(column(curate(scored, config, given={"round": round, "seed": seed}), "rollout_id"))

    everything = sorted(column(scored, "rollout_id"))
    assert kept(1.0) == [name for name in everything if not name.endswith("-2")]
    assert kept(0.0) == [name for name in everything if name.endswith("-2")]
    mixed = kept(0.3)
    by_policy = {name.rsplit("-", 1)[0] for name in mixed if not name.endswith("-2")}
    by_data = {name.rsplit("-", 1)[0] for name in mixed if name.endswith("-2")}
    assert not by_policy & by_data
    assert len(by_policy) + len(by_data) == groups
    # Four standard deviations of a binomial.
    assert abs(len(by_policy) - 0.3 * groups) < 4 * (groups * 0.3 * 0.7) ** 0.5
    assert len(mixed) == 2 * len(by_policy) + len(by_data)
    assert kept(0.3) == mixed
    assert kept(0.3, round=1) != mixed
    assert kept(0.3, seed=1) != mixed


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
    assert run(scored, given=given, select={"sql": "replay", "share": 0.05}).num_rows == 6
    assert run(scored, given=given, select={"sql": "replay", "share": 0.9, "max_age": 5}).num_rows == 20
    picks = {
        tuple(column(run(scored, given={"seed": seed, "round": 7}, select={"sql": "replay"}), "rollout_id"))
        for seed in range(8)
    }
    assert len(picks) > 1


SCOPE = {"mean_logprob": [-0.3, -1.0, -0.6, -0.6], "teacher": [-0.3, -2.6 / 3, -0.3, -1.5]}


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, (0.331812, 0.668188, 0.768525, 0.231475)),
        ({"mean_one": True}, (0.663624, 1.336376, 1.537050, 0.462950)),
        ({"student_sign": -1}, (0.668188, 0.331812, 0.768525, 0.231475)),
        ({"tau": 1e8}, (0.5, 0.5, 0.5, 0.5)),
        ({"tau": 1e-3}, (0, 1, 1, 0)),
    ],
)
def test_scope(run: Run, params: dict, expected: Sequence[float]) -> None:
    """Perplexities of the spec: the student's 1.349859 and 2.718282, the teacher's 1.349859 and 4.481689."""
    batch = run(
        scored_table([[1, 1, 0, 0]], **SCOPE), weight={"sql": "scope", **params}, route={"sql": "wrong_to_teacher"}
    )
    assert column(batch, "weight") == pytest.approx(expected, abs=1e-6)
    assert column(batch, "route") == ["policy", "policy", "distill", "distill"]


def test_scope_in_groups_of_one_kind_and_of_one(run: Run) -> None:
    table = scored_table([[1, 1], [0, 0], [1]], mean_logprob=[-1.0] * 5, teacher=[-2.0] * 5)
    assert column(run(table, weight={"sql": "scope"}), "weight") == [0.5, 0.5, 0.5, 0.5, 1.0]


def test_a_rollout_without_tokens_has_perplexity_1_for_scope(run: Run) -> None:
    table = scored_table([[1, 1]], mean_logprob=[None, -1.0], teacher=[0.0, -2.0])
    assert column(run(table, weight={"sql": "scope"}), "weight") == pytest.approx(
        [1 / (1 + math.e), math.e / (1 + math.e)]
    )


def test_srpo_routes_wrong_ones_that_have_a_right_sibling(run: Run) -> None:
    told = [False, True, True, False, False, True, True]
    batch = run(scored_table([[1, 0, 0], [0, 0], [1, 1]], has_teacher=told), route={"sql": "srpo"})
    assert column(batch, "route") == ["policy", "distill", "distill", *["policy"] * 4]


def test_sdpo_keeps_what_has_a_teacher(run: Run) -> None:
    told = [False, True, True, False, False, True, True]
    batch = run(scored_table([[1, 0, 0], [0, 0], [1, 1]], has_teacher=told), filter={"sql": "has_teacher"})
    assert column(batch, "rollout_id") == ["r00-1", "r00-2", "r02-0", "r02-1"]


def test_kepos_gate(run: Run) -> None:
    table = scored_table([[0, 1, 2, 1]])
    assert column(run(table, route={"sql": "gate"}), "route") == ["policy", "both", "both", "both"]
    assert column(run(table, route={"sql": "gate", "tau": 2.5}), "route") == ["policy"] * 4
    assert column(run(table, route={"sql": "gate", "tau": 0.0}), "route") == ["both"] * 4
