"""KEPO (arXiv 2602.00400, its code): trigger, accepted hints, advantages of the new group, the gate, both losses."""

from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest
import torch

from objectives.test_distillation import of_distributions
from rollway.config import CurateConfig, load_recipe
from rollway.config.distillation import Exact
from rollway.config.objectives import Objective
from rollway.curation import curate, given_values
from rollway.objectives import TokenBatch, loss, prepare, route_codes
from rollway.scorers.exact import judge as exact_judge
from rollway.scorers.pattern import judge as format_judge
from rollway.training.signal import has_signal

G = 4


def table(groups: list[tuple[list[float], list[list[float]]]]) -> pa.Table:
    """Scored rows: rewards of the group's own rollouts; then, where there are attempts, a hint and their rewards.

    Reward is acc + fmt; right means acc = 1, so that 1 is a wrong answer in the right format unless it is given as 1.5.
    """
    rows: list[dict[str, Any]] = []
    for g, (rewards, attempts) in enumerate(groups):
        made = [("policy", 0, r) for r in rewards]
        made += [("hint", 1, 0.0)] if attempts else []
        made += [("hinted", 2 + n, r) for n, attempt in enumerate(attempts) for r in attempt]
        for sample, (source, number, reward) in enumerate(made):
            row = {"rollout_id": f"r{g}-{sample}", "group_id": f"g{g}", "sample": sample, "source": source}
            rows.append(row | {"pass": number, "reward": float(reward), "correct": reward > 1.0})
    return pa.Table.from_pylist(rows)


def curated(scored: pa.Table, seed: int = 0, **over: Any) -> list[dict[str, Any]]:
    config = load_recipe("kepo", {"curate": over}).curate.model_copy(update={"teacher": None})
    return curate(scored, config, given=given_values(config, round=0, seed=seed)).to_pylist()


def objective(exact: bool = True) -> Objective:
    """The recipe's; `exact` over the whole vocabulary, which stored columns of K = V tokens are."""
    found = load_recipe("kepo").train.objective
    assert found.distill is not None
    return (
        found.model_copy(update={"distill": found.distill.model_copy(update={"estimate": Exact()})}) if exact else found
    )


def on_policy(p: Any, q: Any, rows: list[dict[str, Any]]) -> TokenBatch:
    """Rows of these distributions before the batch's one update, where old and current policy are the same."""
    batch = of_distributions(
        p,
        q,
        advantage=torch.tensor([row["advantage"] for row in rows], dtype=torch.float64),
        route=route_codes([row["route"] for row in rows]),
    )
    return replace(batch, logp_old=batch.logp.detach())


Q = [[(0.5, 0.5), (0.5, 0.5)], [(0.3, 0.7), (0.8, 0.2)]]
P = [[(0.9, 0.1), (0.9, 0.1)], [(0.9, 0.1), (0.5, 0.5)]]


def test_advantages_of_the_sample_standard_deviation() -> None:
    rows = curated(table([([0, 1, 2, 1], [])]))
    assert [row["advantage"] for row in rows] == pytest.approx([-1.224595, 0, 1.224595, 0], abs=1e-6)
    rows = curated(table([([0, 2], [])]))
    assert [row["advantage"] for row in rows] == pytest.approx([-0.707057, 0.707057], abs=1e-6)
    assert [row["advantage"] for row in curated(table([([2], [])]))] == [0.0]


@pytest.mark.parametrize(
    ("completion", "acc", "fmt"),
    [
        ("<think>because\nof it</think>\n<answer> B </answer>", 1, 1),
        ("<think>so</think><answer>C</answer>", 0, 1),
        ("<answer>B</answer>", 1, 0),
        ("Well. <think>so</think><answer>B</answer>", 1, 0),
        ("B", 0, 0),
    ],
)
def test_rewards_of_the_recipe(completion: str, acc: int, fmt: int) -> None:
    """The format must be that of the whole completion; the answer is what stands in its tag."""
    score = load_recipe("kepo").score
    exact, pattern = score.scorers["exact"], score.scorers["format"]
    assert exact.kind == "exact" and pattern.kind == "format"
    assert exact_judge(exact)(("B", completion)).reward == acc
    assert format_judge(pattern)(completion).reward == fmt
    assert score.reward == {"exact": 1.0, "format": 1.0}
    assert score.correct == "exact"


@pytest.mark.parametrize("seed", range(4))
def test_accepted_rollouts_take_the_place_of_failed_ones(seed: int) -> None:
    """Two of four slots of an all-zero group, drawn without replacement; rewards and advantages of the new group."""
    rows = curated(table([([0] * G, [[2, 2]])]), seed)
    assert [row["rollout_id"] for row in rows][2:] == ["r0-5", "r0-6"]
    assert len({row["rollout_id"] for row in rows}) == G
    assert [row["advantage"] for row in rows] == pytest.approx([-0.865950] * 2 + [0.865950] * 2, abs=1e-6)
    assert [row["route"] for row in rows] == ["policy"] * 2 + ["both"] * 2


def test_which_rollouts_are_replaced_is_drawn() -> None:
    scored = table([([0] * G, [[2, 2]])])
    kept = {tuple(row["rollout_id"] for row in curated(scored, seed))[:2] for seed in range(24)}
    assert len(kept) == 6


def test_one_wrong_hinted_rollout_rejects_its_attempt_and_the_first_accepted_one_counts() -> None:
    """acc must be 1 in all m; reward 1.5 is right in the wrong format. Other prompts do not reject it."""
    groups = [([0] * G, [[2, 1], [2, 1.5], [2, 2]]), ([0] * G, [[2, 0]]), ([0, 1, 2, 0], [])]
    rows = curated(table(groups))
    by_group = {g: [row["rollout_id"] for row in rows if row["group_id"] == g] for g in ("g0", "g1", "g2")}
    assert by_group["g0"][2:] == ["r0-7", "r0-8"]
    assert by_group["g1"] == [f"r1-{n}" for n in range(G)]
    assert by_group["g2"] == [f"r2-{n}" for n in range(G)]


def parents(name: str, scored: pa.Table, **params: Any) -> list[str]:
    part = {"sql": f"workflow/sql/parents/{name}.sql", **params}
    found = curate(scored, CurateConfig.model_validate({"filter": part}))
    return sorted(found.column("rollout_id").to_pylist())


def test_trigger() -> None:
    """Every reward of every rollout is 0; success in format alone (fmt = 1, acc = 0) is no trigger, but passes tau."""
    scored = table([([0, 0], []), ([0, 1], []), ([2, 0], [])])
    assert parents("first_of_group", scored, groups="unrewarded", round=0) == ["r0-0"]
    assert parents("first_of_group", scored, round=0) == ["r0-0", "r1-0", "r2-0"]
    assert [row["route"] for row in curated(scored)] == ["policy", "policy", "policy", "both", "both", "policy"]
    derive = load_recipe("kepo").rollout.derive
    assert derive[0].parents.params["groups"] == "unrewarded"


def test_further_attempts_are_for_hints_that_nothing_came_of() -> None:
    scored = table([([0, 0], [[2, 1]]), ([0, 0], [[1, 1], [2, 2]]), ([0, 0], []), ([0, 0], [[2, 2]])])
    assert parents("not_accepted", scored) == ["r0-2"]
    first = table([([0, 0], [[2]])])
    hints = first.filter(pa.array([s != "hinted" for s in first.column("source").to_pylist()]))
    assert parents("not_accepted", hints) == ["r0-2"]


def test_worked_loss() -> None:
    """Two rollouts, R = (0, 2): L_RL 0 at w = 1, JSD .205038 and .050672 on the gated one."""
    rows = curated(table([([0, 2], [])]))
    found = loss(on_policy(P, Q, rows), objective())
    assert float(found.loss.detach()) == pytest.approx(0.127855, abs=1e-6)
    assert float(found.metrics["loss/policy"]) == pytest.approx(0.0, abs=1e-12)
    assert float(found.metrics["loss/distill"]) == pytest.approx((0.205038 + 0.050672) / 2, abs=1e-6)
    assert float(found.metrics["distill/share"]) == 0.5
    stored = loss(on_policy(P, Q, rows), objective(exact=False))
    assert float(stored.loss.detach()) == pytest.approx(0.127855, abs=2e-6)


@pytest.mark.parametrize(("tau", "share"), [(0.0, 1.0), (1.0, 0.5), (2.0, 0.5), (2.5, 0.0)])
def test_gate(tau: float, share: float) -> None:
    """tau 0: every token is distilled beside GRPO; above 2: none, and no division by nothing."""
    rows = curated(table([([0, 2], [])]), route={"tau": tau})
    found = loss(on_policy(P, Q, rows), objective())
    assert float(found.metrics["distill/share"]) == share
    assert (float(found.metrics["loss/distill"]) == 0.0) == (share == 0.0)
    if share == 1.0:
        each = of_distributions(P, Q)
        plain = replace(each, route=route_codes(["both", "both"]), logp_old=each.logp.detach())
        everywhere = loss(replace(plain, advantage=torch.zeros(2, dtype=torch.float64)), objective())
        torch.testing.assert_close(found.metrics["loss/distill"], everywhere.metrics["loss/distill"])


def test_equal_rewards_leave_the_teacher_alone() -> None:
    rows = curated(table([([2, 2], [])]))
    assert [row["advantage"] for row in rows] == [0.0, 0.0]
    batch = on_policy(P, Q, rows)
    found = loss(batch, objective())
    assert float(found.loss.detach()) == float(found.metrics["loss/distill"]) > 0.0
    assert has_signal(objective(), prepare(batch, objective()))


def test_a_failing_group_without_accepted_hint_has_no_gradient() -> None:
    rows = curated(table([([0, 0], [[2, 0], [0, 0]])]))
    batch = on_policy(P, Q, rows)
    found = loss(batch, objective())
    assert float(found.loss.detach()) == 0.0
    assert not bool(torch.autograd.grad(found.loss, batch.logits)[0].any())
    assert not has_signal(objective(), prepare(batch, objective()))


def test_a_teacher_that_agrees_teaches_nothing() -> None:
    rows = curated(table([([0, 2], [])]))
    found = loss(on_policy(Q, Q, rows), objective())
    assert float(found.metrics["loss/distill"]) == pytest.approx(0.0, abs=1e-15)


def test_the_gradient_of_the_policys_term_is_that_of_its_log_probs() -> None:
    """At w = 1: mean over rows of -A times the mean of grad log pi over the row's tokens; no clip."""
    rows = curated(table([([0, 2], [])]), route={"tau": 3.0})
    batch = on_policy(P, Q, rows)
    slope = torch.autograd.grad(loss(batch, objective()).loss, batch.logp)[0]
    expected = -batch.advantage[:, None].expand(2, 2) / 2 / 2
    torch.testing.assert_close(slope, expected, atol=1e-15, rtol=0)
    found = objective()
    assert found.gate is not None and found.gate.kind == "none"
