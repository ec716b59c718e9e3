"""ExPO (arXiv 2507.02834): GRPO among a group's own rollouts beside its explanation's likelihood, and its pairs."""

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pyarrow as pa
import pytest
import torch
from pydantic import ValidationError

from objectives.rows import padded, parse
from rollway.config import CurateConfig, load_recipe
from rollway.config.objectives import Objective
from rollway.config.recipes import Recipe
from rollway.config.training import TrainConfig
from rollway.curation import curate, given_values
from rollway.errors import RollwayError
from rollway.objectives import TokenBatch, loss, prepare, route_codes, totals
from rollway.objectives.imitation import imitation_weight
from rollway.training.signal import has_signal, rows_with_signal

RHO = [(1.1, 0.9), (1.5,), (0.7, 1.0, 1.3), (1.0,)]
EXPLAINED = (-0.5, -1.0, -1.2, -0.8)
"""Log-probs of the explanation under the plain prompt: E = -3.5."""


def exactly(numbers: str) -> list[Fraction]:
    return [Fraction(number) for number in numbers.split()]


def table(groups: list[tuple[list[float], list[dict[str, Any]]]]) -> pa.Table:
    """Scored rows: rewards of a group's own rollouts, then its explanations (`correct` and 9 tokens unless given)."""
    rows: list[dict[str, Any]] = []
    for g, (rewards, explanations) in enumerate(groups):
        own = [{"source": "policy", "reward": float(r), "correct": r >= 1.0, "length": 5} for r in rewards]
        made = [
            {"source": "explanation", "reward": 1.0, "correct": True, "length": 9} | given for given in explanations
        ]
        for sample, row in enumerate([*own, *made]):
            rows.append({"rollout_id": f"r{g}-{sample}", "group_id": f"g{g}", "sample": sample, **row})
    return pa.Table.from_pylist(rows)


def curated(recipe: Recipe, scored: pa.Table) -> list[dict[str, Any]]:
    return curate(scored, recipe.curate, given=given_values(recipe.curate, round=0, seed=0)).to_pylist()


def batch_of(
    rows: list[dict[str, Any]], ratio: list[tuple[float, ...]], explained: list[tuple[float, ...]]
) -> TokenBatch:
    """Own rows at these ratios to old log-probs of -1; explanations at these log-probs, old ones far from them."""
    own, copied = iter(ratio), iter(explained)
    logp = [tuple(math.log(r) - 1.0 for r in next(own)) if row["route"] == "policy" else next(copied) for row in rows]
    now = padded(logp)
    old = torch.full_like(now, -1.0)
    old[[row["route"] == "imitate" for row in rows]] = -4.0
    return TokenBatch(
        logp=now.requires_grad_(),
        logp_old=old,
        mask=~now.isnan(),
        advantage=torch.tensor([row["advantage"] for row in rows], dtype=torch.float64),
        route=route_codes([row["route"] for row in rows]),
        group=torch.tensor([int(row["group_id"][1:]) for row in rows]),
    )


def one_group(rewards: list[float], **over: Any) -> tuple[TokenBatch, Objective]:
    recipe = load_recipe("expo", over)
    return batch_of(curated(recipe, table([(rewards, [{}])])), RHO, [EXPLAINED]), recipe.train.objective


def test_worked() -> None:
    batch, objective = one_group([1, 0, 0, 0])
    assert batch.advantage.tolist()[:4] == pytest.approx([1.732047, -0.577349, -0.577349, -0.577349], abs=1e-6)
    found = loss(batch, objective)
    per_row = [-float(found.token_loss[n].sum()) / len(r) for n, r in enumerate(RHO)]
    assert per_row == pytest.approx([1.732047, -0.866023, -0.596594, -0.577349], abs=1e-6)
    assert -float(found.metrics["loss/policy"]) == pytest.approx(-0.076980, abs=1e-6)
    assert float(found.metrics["loss/imitate"]) == pytest.approx(0.14, abs=1e-12)
    assert float(found.loss.detach()) == pytest.approx(0.216980, abs=1e-6)
    assert float(found.metrics["imitate/nll"]) == pytest.approx(3.5 / 4)
    assert float(found.metrics["imitate/share"]) == 1.0
    assert float(found.metrics["max/imitate_beta"]) == pytest.approx(0.04)


@pytest.mark.parametrize("rewards", [[0, 0, 0, 0], [1, 1, 1, 1]])
def test_groups_without_contrast_pull_through_the_explanation_alone(rewards: list[float]) -> None:
    """J_q = 0, and the gradient is beta grad E_q."""
    batch, objective = one_group(rewards)
    found = loss(batch, objective)
    assert float(found.loss.detach()) == pytest.approx(0.14, abs=1e-12)
    slope = torch.autograd.grad(found.loss, batch.logp)[0]
    expected = torch.zeros_like(slope)
    expected[4, :4] = -0.04
    torch.testing.assert_close(slope, expected, atol=1e-15, rtol=0)
    assert rows_with_signal(objective, prepare(batch, objective)).tolist() == [False] * 4 + [True]


def test_the_explanation_is_neither_clipped_nor_weighed() -> None:
    """Whatever its old log-probs say, its advantage or its reward."""
    batch, objective = one_group([1, 0, 0, 0])
    other = replace(batch, logp_old=torch.where(batch.mask[:, :1] & (batch.route == 4)[:, None], -9.0, batch.logp_old))
    advantage = batch.advantage.clone()
    advantage[4] = 7.0
    other = replace(other, advantage=advantage)
    slopes = [torch.autograd.grad(loss(b, objective).loss, batch.logp)[0] for b in (batch, other)]
    assert torch.equal(*slopes)


def test_without_weight_it_is_grpo() -> None:
    """beta 0: annealed to the end, the batch's loss and gradient are GRPO's of the own rows, with any aggregation."""
    recipe = load_recipe("expo")
    rows = curated(recipe, table([([1, 0, 0, 0], [{}])]))
    batch = batch_of(rows, RHO, [EXPLAINED])
    own = batch.rows([0, 1, 2, 3])
    for aggregate in ("seq_mean_token_mean", "token_mean", {"kind": "seq_sum_const", "l_max": 7}):
        parts = {"ratio": "token", "gate": "clip", "aggregate": aggregate}
        grpo = parse(**parts)
        annealed = parse(**parts, imitate={"beta": 0.04, "final": 0.0})
        prepared = prepare(batch, annealed, progress=1.0)
        ours, theirs = loss(prepared, annealed), loss(own, grpo)
        assert float(ours.loss.detach()) == pytest.approx(float(theirs.loss.detach()), abs=1e-15)
        assert float(ours.metrics["loss/policy"]) == pytest.approx(float(theirs.metrics["loss/policy"]), abs=1e-15)
        slope = torch.autograd.grad(ours.loss, batch.logp, retain_graph=True)[0]
        grpos = torch.autograd.grad(theirs.loss, batch.logp, retain_graph=True)[0]
        torch.testing.assert_close(slope, grpos, atol=1e-15, rtol=0)
        assert not bool(slope[4].any())
        assert rows_with_signal(annealed, prepared).tolist() == [True] * 4 + [False]
    alone = batch_of(curated(recipe, table([([0, 0, 0, 0], [{}])])), RHO, [EXPLAINED])
    assert not has_signal(annealed, prepare(alone, annealed, progress=1.0))
    assert has_signal(annealed, prepare(alone, annealed, progress=0.5))


def test_the_recipe_has_grpos_advantages_and_denominators() -> None:
    """c~ is not part of the group: not of its mean reward, nor of the mean over rows."""
    with_it, objective = one_group([1, 0, 0, 0])
    grpo = load_recipe("grpo", {"curate": {"advantage": {"ddof": 0}}})
    scored = table([([1, 0, 0, 0], [])])
    plain = curate(scored, grpo.curate).to_pylist()
    assert with_it.advantage.tolist()[:4] == [row["advantage"] for row in plain]
    own = with_it.rows([0, 1, 2, 3])
    assert float(loss(with_it, objective).metrics["loss/policy"]) == pytest.approx(
        float(loss(own, grpo.train.objective).loss.detach()), abs=1e-15
    )


def test_the_mean_is_over_all_groups() -> None:
    """Two groups, of which one has no usable explanation: it contributes 0 to the second term."""
    recipe = load_recipe("expo")
    rows = curated(recipe, table([([0, 0, 0, 0], [{}]), ([0, 0, 0, 0], [{"correct": False}])]))
    assert [row["route"] for row in rows].count("imitate") == 1
    batch = batch_of(rows, RHO + RHO, [EXPLAINED])
    found = loss(batch, recipe.train.objective)
    assert float(found.loss.detach()) == pytest.approx(0.07, abs=1e-12)
    assert float(found.metrics["imitate/share"]) == 0.5
    parts = [batch.rows(at) for at in ([4], [0, 1], [5, 8, 2, 3, 6, 7])]
    whole = totals(batch, recipe.train.objective)
    split = sum(float(loss(part, recipe.train.objective, totals=whole).loss.detach()) for part in parts)
    assert split == pytest.approx(0.07, abs=1e-12)


def test_mean_per_token() -> None:
    batch, objective = one_group([0, 0, 0, 0], train={"objective": {"imitate": {"tokens": "mean"}}})
    assert float(loss(batch, objective).loss.detach()) == pytest.approx(0.14 / 4, abs=1e-12)


@pytest.mark.parametrize(("progress", "expected"), [(0.0, 0.04), (0.25, 0.03), (1.0, 0.0)])
def test_beta_falls_in_a_line(progress: float, expected: float) -> None:
    part = load_recipe("expo").train.objective.imitate
    assert part is not None
    assert imitation_weight(part, progress) == pytest.approx(expected, abs=1e-15)
    batch, objective = one_group([0, 0, 0, 0])
    found = loss(prepare(batch, objective, progress=progress), objective)
    assert float(found.loss.detach()) == pytest.approx(3.5 * expected, abs=1e-12)


def test_usable_explanations() -> None:
    """Right, longer than a restated answer, the first of several; where asked, only for groups without a right one."""
    recipe = load_recipe("expo")
    scored = table(
        [
            ([0, 0], [{"correct": False}, {}, {}]),
            ([1, 0], [{"length": 3}]),
            ([1, 0], [{}]),
            ([0, 0], [{"correct": None}]),
            ([0, 0], []),
        ]
    )
    copied = [row["rollout_id"] for row in curated(recipe, scored) if row["route"] == "imitate"]
    assert copied == ["r0-3", "r2-2"]
    failing = load_recipe("expo", {"curate": {"filter": {"failing": True}}})
    assert [row["rollout_id"] for row in curated(failing, scored) if row["route"] == "imitate"] == ["r0-3"]
    assert sum(row["route"] == "policy" for row in curated(recipe, scored)) == 10


@pytest.mark.parametrize(
    ("groups", "round", "expected"),
    [("all", 3, ["r0-0", "r1-0", "r2-0"]), ("failing", 3, ["r1-0", "r2-0"]), ("unrewarded", 3, ["r1-0"])],
)
def test_one_parent_per_group(groups: str, round: int, expected: list[str]) -> None:
    part = {"sql": "workflow/sql/parents/first_of_group.sql", "groups": groups, "round": round}
    scored = table([([0, 1], [{}]), ([0, 0], []), ([0.0, 0.5], [])])
    config = CurateConfig.model_validate({"filter": part})
    assert curate(scored, config).column("rollout_id").to_pylist() == expected
    rarely = CurateConfig.model_validate({"filter": part | {"every": 2}})
    assert curate(scored, rarely).num_rows == 0


CHAINS = [
    (exactly(".6 .3 .1"), exactly(".05 .2 .9"), Fraction("0.18"), Fraction("0.525")),
    (exactly(".5 .5"), exactly(".4 .4"), Fraction("0.4"), Fraction("0.4")),
    (exactly(".9 .1"), exactly("0 1"), Fraction("0.1"), Fraction(1)),
]
"""pi(c|q), p(a*|q, c), and the means of p over the prior and over the posterior."""


def test_posterior_chains_are_better_than_prior_ones() -> None:
    """Lemma (7): explanations that pass the verifier are samples of the posterior, pi(c) p(c) / E[p].

    Every outcome (chain, right or wrong) is in the table as often as its probability says, of the spec's three chains
    (.18 and .525) and of others. The filter keeps what is right: chains in proportion to the posterior, whose mean of p
    is E[p^2] / E[p], never below E[p].
    """
    for pi, p, prior, posterior in CHAINS:
        times = math.lcm(*(x.denominator for x in (*pi, *(a * b for a, b in zip(pi, p, strict=True)))))
        outcomes = [(c, n < times * pi[c] * p[c]) for c in range(len(pi)) for n in range(int(times * pi[c]))]
        scored = table([([0, 0], [{"correct": right}]) for _, right in outcomes])
        kept = [row for row in curated(load_recipe("expo"), scored) if row["route"] == "imitate"]
        chains = [outcomes[int(row["group_id"][1:])][0] for row in kept]
        expected = sum(a * b for a, b in zip(pi, p, strict=True))
        for c in range(len(pi)):
            assert Fraction(chains.count(c), len(chains)) == pi[c] * p[c] / expected
        assert expected == prior
        assert sum(p[c] for c in chains) / len(chains) == posterior >= prior


def test_pairs_of_an_explanation_and_a_wrong_rollout() -> None:
    recipe = load_recipe("expo-dpo")
    scored = table([([1, 0, 0], [{}]), ([1, 1], [{}]), ([0, 0], [{"correct": False}]), ([0], [{}, {}])])
    rows = [(row["pair_id"], row["role"], row["rollout_id"]) for row in curated(recipe, scored)]
    assert sorted(rows) == [
        ("g0", "chosen", "r0-3"),
        ("g0", "rejected", "r0-1"),
        ("g3", "chosen", "r3-1"),
        ("g3", "rejected", "r3-0"),
    ]


def test_dpo_worked() -> None:
    """Implied rewards of +2 and -1 at b = .1; ln 2 where policy and reference are the same; sums over tokens."""
    objective = load_recipe("expo-dpo").train.objective
    reference = torch.tensor([[-2.0, -1.5, -0.5], [-0.5, -0.25, 0.0]], dtype=torch.float64)
    gain = torch.tensor([[1.0, 0.5, 0.5], [-0.75, -0.25, 9.0]], dtype=torch.float64)
    pair = {"pair_chosen": torch.tensor([0]), "pair_rejected": torch.tensor([1])}
    mask = torch.tensor([[True, True, True], [True, True, False]])
    moved = TokenBatch(logp=reference + gain, logp_ref=reference, mask=mask, **pair)
    assert float(loss(moved, objective).loss) == pytest.approx(0.554355, abs=1e-6)
    same = replace(moved, logp=reference)
    assert float(loss(same, objective).loss) == pytest.approx(math.log(2), abs=1e-12)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"preference": "dpo", "imitate": {}}, "imitate would do nothing"),
        ({"ratio": "none", "gate": "sft", "aggregate": "token_mean", "imitate": {}}, "imitates all rows alike"),
        ({"distill": {}, "aggregate": "token_mean", "imitate": {}}, "imitate cannot act"),
        ({"ratio": "fibre_domain", "gate": "none", "aggregate": "token_mean", "imitate": {}}, "for domains"),
        (
            {"ratio": "token", "gate": "clip", "aggregate": "token_mean", "imitate": {"beta": 0.1, "final": 0.1}},
            "no schedule",
        ),
    ],
)
def test_imitation_that_would_do_nothing_is_refused(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        parse(**parts)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"imitate": {"final": 0.0}}, "objective_horizon"),
        ({"imitate": {}, "advantage": {"kind": "whiten"}}, "over all rows"),
        ({"reference": "round"}, "nothing refers"),
        ({"reference": "round", "advantage": {"kind": "returns", "kl": 0.1}}, "penalty in the reward 0"),
        ({"reference": "round", "kl": {"kind": "k3", "beta": 0.1}}, "no gradient"),
    ],
)
def test_training_that_contradicts_itself_is_refused(train: dict[str, Any], message: str) -> None:
    parts = {key: train.pop(key) for key in ("imitate", "kl") if key in train}
    objective = {"ratio": "token", "gate": "clip", "aggregate": "token_mean", **parts}
    with pytest.raises(ValidationError, match=message):
        TrainConfig.model_validate({"objective": objective, **train})


def test_imitation_needs_routes_and_something_to_copy() -> None:
    with pytest.raises(RollwayError, match=r"curate\.route"):
        load_recipe("expo", {"curate": {"route": None}})
    with pytest.raises(RollwayError, match="the groups have nothing else"):
        load_recipe("expo", {"rollout": {"derive": []}})


def test_solutions_of_experts_in_place_of_explanations() -> None:
    """The paper's baseline, GRPO + SFT on human solutions: the same term of the demonstrations."""
    over = {
        "rollout": {"derive": [], "experts": 1},
        "curate": {"filter": {"source": "expert"}, "route": {"source": "expert"}},
    }
    scored = table([([0, 0, 0, 0], [{"source": "expert"}, {}])])
    recipe = load_recipe("expo", over)
    rows = curated(recipe, scored)
    assert [row["route"] for row in rows] == ["policy"] * 4 + ["imitate"]
    found = loss(batch_of(rows, RHO, [EXPLAINED]), recipe.train.objective)
    assert float(found.loss.detach()) == pytest.approx(0.14, abs=1e-12)
