"""CoPG: pairs and groups of scored completions, and the bandit."""

import pytest
import torch

from objectives.rows import parse
from rollway.errors import RollwayError
from rollway.objectives import TokenBatch, loss, unit
from rollway.objectives.preference import copg_pair_loss


def near(expected: object) -> object:
    return pytest.approx(expected, abs=1e-6)


def rows(
    logp: list[float], ref: list[float], reward: list[float], *, pairs: bool = True, group: list[int] | None = None
) -> TokenBatch:
    """Completions of two tokens, the first one -1 under both policies."""
    n = len(logp)
    whole = torch.tensor(logp, dtype=torch.float64)
    reference = torch.tensor(ref, dtype=torch.float64)
    ones = torch.ones(n, dtype=torch.float64)
    return TokenBatch(
        logp=torch.stack([-ones, whole + 1, float("nan") * ones], 1).requires_grad_(),
        logp_ref=torch.stack([-ones, reference + 1, 7 * ones], 1),
        mask=torch.tensor([[True, True, False]] * n),
        reward=torch.tensor(reward, dtype=torch.float64),
        pair_chosen=torch.arange(0, n - 1, 2) if pairs else None,
        pair_rejected=torch.arange(1, n, 2) if pairs else None,
        group=torch.tensor(group or [0] * n),
    )


PAIR = parse(preference={"kind": "copg", "beta": 0.5})
GROUP = parse(preference={"kind": "copg", "beta": 0.5, "form": "group"})
WORKED = ([-5.2, -4.0], [-5.0, -4.5], [1.2, 0.3])


def row_gradient(batch: TokenBatch, objective: object) -> list[float]:
    g = torch.autograd.grad(loss(batch, objective).loss, batch.logp)[0]
    assert torch.equal(g[:, 0], g[:, 1])
    assert torch.equal(g[:, 2], torch.zeros(batch.n_rows, dtype=torch.float64))
    return g[:, 0].tolist()


def test_worked_pair() -> None:
    batch = rows(*WORKED)
    assert float(loss(batch, PAIR).loss.detach()) == near(0.752500)
    assert row_gradient(batch, PAIR) == near([-1.25, 1.25])


def test_worked_group_of_three() -> None:
    batch = rows([-5.2, -4.0, -3.0], [-5.0, -4.5, -3.0], [1.2, 0.3, 0.0], pairs=False)
    assert float(loss(batch, GROUP).loss.detach()) == near(1.627500)
    assert row_gradient(batch, GROUP) == near([-1.275, 0.6, 0.675])


def test_two_completions_as_group_or_pair_differ_by_a_constant() -> None:
    a, b = float(loss(rows(*WORKED), PAIR).loss.detach()), float(loss(rows(*WORKED), GROUP).loss.detach())
    assert b - a == near(0.9**2 / (2 * 0.5))


def test_groups_of_one_are_skipped() -> None:
    batch = rows([-5.2, -4.0, -3.0], [-5.0, -4.5, -3.0], [1.2, 0.3, 0.0], pairs=False, group=[3, 3, 5])
    assert float(loss(batch, GROUP).loss.detach()) == near(0.7525 + 0.81)
    assert row_gradient(batch, GROUP)[2] == 0.0
    alone = rows([-1.5], [-1.0], [1.0], pairs=False)
    assert float(loss(alone, GROUP).loss.detach()) == 0.0


def test_definition_equals_the_closed_form() -> None:
    g = torch.Generator().manual_seed(3)
    r, r2, d, d2 = torch.randn(4, 50, dtype=torch.float64, generator=g)
    beta = 0.3
    half, half2 = r - beta / 2 * d, r2 - beta / 2 * d2
    ell = (half - half2) * d + (half2 - half) * d2
    torch.testing.assert_close(copg_pair_loss(r, r2, d, d2, beta), -ell, atol=1e-10, rtol=0)


def test_equal_completions_give_nothing() -> None:
    batch = rows([-2.0, -2.0], [-1.5, -1.5], [0.7, 0.7])
    assert float(loss(batch, PAIR).loss.detach()) == 0.0
    assert row_gradient(batch, PAIR) == [0.0, 0.0]


def test_constant_rewards_and_order_change_nothing() -> None:
    lp, ref, reward = WORKED
    assert row_gradient(rows(lp, ref, [x + 5 for x in reward]), PAIR) == near([-1.25, 1.25])
    assert row_gradient(rows(lp[::-1], ref[::-1], reward[::-1]), PAIR) == near([1.25, -1.25])


def test_at_the_reference_it_is_leave_one_out_policy_gradient() -> None:
    batch = rows([-5.0, -4.5], [-5.0, -4.5], [1.2, 0.3])
    assert row_gradient(batch, PAIR) == near([-0.9, 0.9])


def test_quarter_rewards_are_ipo() -> None:
    lp, ref, _ = WORKED
    ours = row_gradient(rows(lp, ref, [0.25, -0.25]), PAIR)
    batch = rows(lp, ref, [0.25, -0.25])
    ipo = row_gradient(batch, parse(preference={"kind": "ipo", "beta": 0.5}))
    # (1/2 - beta D)^2 / (2 beta) = beta/2 (D - 1/(2 beta))^2
    assert ours == near([0.5 / 2 * g for g in ipo])


def test_bandit_optimum() -> None:
    """Exact population losses of the three-armed bandit: CoPG's minimiser is the regularised optimum."""
    reward = torch.tensor([2.5, 2.0, 1.0], dtype=torch.float64)
    mu1, mu2 = torch.tensor([0.1, 0.2, 0.7]).double(), torch.tensor([0.05, 0.05, 0.9]).double()
    beta, ref = 0.5, torch.full((3,), 1 / 3, dtype=torch.float64).log()
    joint = (mu1[:, None] * mu2[None]).flatten()
    first, second = torch.arange(3).repeat_interleave(3), torch.arange(3).repeat(3)
    theta = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    for _ in range(40):
        theta = _newton_step(theta, reward, ref, joint, first, second, beta)
    pi = theta.softmax(0)
    optimum = (reward / beta).softmax(0)
    assert optimum.tolist() == near([0.705385, 0.259496, 0.035119])
    assert float((optimum * (reward - beta * (optimum.log() - ref))).sum()) == near(2.125200)
    assert pi.tolist() == near(optimum.tolist())


def _newton_step(
    theta: torch.Tensor,
    reward: torch.Tensor,
    ref: torch.Tensor,
    joint: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    beta: float,
) -> torch.Tensor:
    def population(t: torch.Tensor) -> torch.Tensor:
        logp = t.log_softmax(0)[torch.cat([first, second])][:, None]
        batch = TokenBatch(
            logp=logp,
            logp_ref=ref[torch.cat([first, second])][:, None],
            mask=torch.ones(18, 1, dtype=torch.bool),
            reward=reward[torch.cat([first, second])],
            weight=torch.cat([joint, torch.ones(9, dtype=torch.float64)]),
            pair_chosen=torch.arange(9),
            pair_rejected=torch.arange(9, 18),
        )
        return loss(batch, parse(preference={"kind": "copg", "beta": beta})).loss

    gradient = torch.autograd.functional.jacobian(population, theta.detach())
    hessian = torch.autograd.functional.hessian(population, theta.detach())
    return theta.detach() - torch.linalg.pinv(hessian) @ gradient


def test_pairs_stay_together() -> None:
    batch = rows([-1.0, -2.0, -3.0, -4.0], [-1.0] * 4, [1.0, 0.0, 1.0, 0.0])
    assert unit(PAIR) == "pair"
    assert unit(GROUP) == "group"
    second = batch.rows([3, 2])
    assert second.pair_chosen.tolist() == [1]
    assert second.pair_rejected.tolist() == [0]
    with pytest.raises(RollwayError, match="pair"):
        batch.rows([0, 1, 2])
    assert batch.rows([0, 1, 2], split_pairs=True).pair_chosen.tolist() == [0]
