"""The three-armed bandit of CoPG (arXiv 2406.19185, section 4.1): where each method's population update comes to rest.

Every gradient is that of `rollway.objectives.loss`, on rows weighted by their probability under the behaviours.
"""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from objectives.rows import parse
from rollway.config.objectives import Objective
from rollway.objectives import TokenBatch, loss

BETA = 0.5
REWARD = torch.tensor([2.5, 2.0, 1.0], dtype=torch.float64)
MU1 = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)
MU2 = torch.tensor([0.05, 0.05, 0.9], dtype=torch.float64)
REFERENCE = torch.full((3,), 1 / 3, dtype=torch.float64).log()
OPTIMUM = (REWARD / BETA + REFERENCE).softmax(0)
FIRST, SECOND = torch.arange(3).repeat_interleave(3), torch.arange(3).repeat(3)
BOTH = (MU1[:, None] * MU2[None]).flatten()
"""[9] probability of the pair (FIRST, SECOND)."""

COPG = parse(preference={"kind": "copg", "beta": BETA})
IPO = parse(preference={"kind": "ipo", "beta": BETA})
POLICY_GRADIENT = parse(ratio="none", gate="none", aggregate="seq_mean_token_sum", kl={"kind": "k2", "beta": BETA})
"""-A logp + beta k2, whose gradient is -(A - beta d) grad logp: the regularised reward minus the baseline in A."""

Field = Callable[[Tensor], Tensor]
"""Gradient of a population loss [3] at logits [3]."""


def near(expected: object) -> object:
    return pytest.approx(expected, abs=1e-6)


def value(pi: Tensor) -> float:
    """J(pi) = E_pi[R - beta (ln pi - ln pi_ref)]."""
    return float((pi * (REWARD - BETA * (pi.log() - REFERENCE))).sum())


def regret(pi: Tensor) -> float:
    return value(OPTIMUM) - value(pi)


def actions(logits: Tensor, arms: Tensor, **fields: Tensor) -> TokenBatch:
    """One row of one token for each arm pulled."""
    return TokenBatch(
        logp=logits.log_softmax(0)[arms][:, None],
        logp_ref=REFERENCE[arms][:, None],
        mask=torch.ones(len(arms), 1, dtype=torch.bool),
        reward=REWARD[arms],
        **fields,
    )


def slope(logits: Tensor, batch_at: Callable[[Tensor], TokenBatch], objective: Objective) -> Tensor:
    leaf = logits.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(batch_at(leaf), objective).loss, leaf)[0]


def pairs(logits: Tensor, chosen: Tensor, rejected: Tensor, weight: Tensor) -> TokenBatch:
    half = len(chosen)
    return actions(
        logits,
        torch.cat([chosen, rejected]),
        weight=torch.cat([weight, torch.ones(half, dtype=torch.float64)]),
        pair_chosen=torch.arange(half),
        pair_rejected=torch.arange(half, 2 * half),
    )


def copg(logits: Tensor) -> Tensor:
    return slope(logits, lambda at: pairs(at, FIRST, SECOND, BOTH), COPG)


def ipo(logits: Tensor) -> Tensor:
    """Preferences of Bradley-Terry: y beats y' with probability sigmoid(R - R')."""
    beats = BOTH * (REWARD[FIRST] - REWARD[SECOND]).sigmoid()
    chosen, rejected = torch.cat([FIRST, SECOND]), torch.cat([SECOND, FIRST])
    return slope(logits, lambda at: pairs(at, chosen, rejected, torch.cat([beats, BOTH - beats])), IPO)


def policy_gradient(logits: Tensor, *, baseline: bool) -> Tensor:
    """(E_mu1 + E_mu2)[(R_beta - b) grad ln pi], b = E_pi R or 0 (eq. 6)."""
    b = (logits.softmax(0) * REWARD).sum() if baseline else torch.zeros(())
    return slope(
        logits, lambda at: actions(at, torch.arange(3), advantage=REWARD - b, weight=MU1 + MU2), POLICY_GRADIENT
    )


def jacobian(field: Field, logits: Tensor) -> Tensor:
    steps = torch.eye(3, dtype=torch.float64) * 1e-6
    return torch.stack([(field(logits + s) - field(logits - s)) / 2e-6 for s in steps], 1)


def at_rest(field: Field) -> Tensor:
    """The policy at which gradient descent from the uniform one comes to rest: it must get there and stay."""
    logits = torch.zeros(3, dtype=torch.float64)
    for _ in range(500):
        logits = logits - field(logits)
    for _ in range(20):
        logits = logits - torch.linalg.pinv(jacobian(field, logits), rtol=1e-4) @ field(logits)
        logits = logits - logits.mean()
    assert field(logits).abs().max() < 1e-12
    curvature = torch.linalg.eigvals(jacobian(field, logits)).real.sort().values
    assert curvature[1] > 1e-3, "descent is stable there in every direction but the logits' common shift"
    return logits.softmax(0)


def test_the_optimum_and_the_uniform_start() -> None:
    assert OPTIMUM.tolist() == near([0.705385, 0.259496, 0.035119])
    assert value(OPTIMUM) == near(2.125200)
    assert regret(REFERENCE.exp()) == near(0.291867)


def test_copg_has_no_regret() -> None:
    pi = at_rest(copg)
    assert pi.tolist() == near(OPTIMUM.tolist())
    assert regret(pi) == pytest.approx(0.0, abs=1e-12)


def test_a_value_baseline_is_biased_off_policy() -> None:
    pi = at_rest(lambda logits: policy_gradient(logits, baseline=True))
    assert pi.tolist() == near([0.811548, 0.167525, 0.020927])
    assert regret(pi) == near(0.014817)


def test_ipo_finds_another_policy() -> None:
    pi = at_rest(ipo)
    assert pi.tolist() == near([0.424169, 0.352706, 0.223125])
    assert regret(pi) == near(0.152531)


def test_without_a_baseline_it_gets_worse_than_the_uniform_start() -> None:
    logits = torch.zeros(3, dtype=torch.float64)
    regrets = [regret(logits.softmax(0))]
    for _ in range(50):
        logits = logits - policy_gradient(logits, baseline=False)
        regrets.append(regret(logits.softmax(0)))
    assert regrets[0] == near(0.291867)
    assert all(b > a for a, b in pairwise(regrets)), "every step makes it worse"
    assert regret(at_rest(lambda logits: policy_gradient(logits, baseline=False))) > 2 * regrets[0]


def test_population_gradient_with_two_behaviours() -> None:
    """Eq. 6: each behaviour's own samples, centred by the regularised reward under the other."""
    generator = torch.Generator().manual_seed(4)
    for _ in range(5):
        logits = torch.randn(3, dtype=torch.float64, generator=generator)
        pi = logits.softmax(0)
        regularised = REWARD - BETA * (pi.log() - REFERENCE)
        score = torch.eye(3, dtype=torch.float64) - pi
        centred = MU1 * (regularised - MU2 @ regularised) + MU2 * (regularised - MU1 @ regularised)
        torch.testing.assert_close(-copg(logits), centred @ score, atol=1e-12, rtol=0)


def test_the_sampled_bandit_learns_from_scored_pairs() -> None:
    """The paper's numbers: 10,000 pairs, batches of 512, Adam at 1e-3, 100 epochs."""
    generator = torch.Generator().manual_seed(0)
    arms = torch.stack([torch.multinomial(mu, 10_000, replacement=True, generator=generator) for mu in (MU1, MU2)])
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([logits], lr=1e-3)
    ones = torch.ones(512, dtype=torch.float64)
    for _ in range(100):
        for rows in torch.randperm(10_000, generator=generator).split(512)[:19]:
            adam.zero_grad()
            loss(pairs(logits, *arms[:, rows], ones), COPG).loss.backward()
            adam.step()
    assert regret(logits.detach().softmax(0)) < 0.291867 / 10
