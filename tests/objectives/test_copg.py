"""CoPG: pairs and groups of scored completions (the bandit: test_copg_bandit.py)."""

from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import Tensor

from objectives.rows import parse
from rollway.config import load_recipe
from rollway.curation import curate
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


def test_the_closed_form_is_a_square() -> None:
    """Eq. 4: l = DR^2 / (2 beta) - (DR - beta D)^2 / (2 beta)."""
    g = torch.Generator().manual_seed(5)
    r, r2, d, d2 = torch.randn(4, 50, dtype=torch.float64, generator=g)
    beta = 0.06
    square = ((r - r2).square() - (r - r2 - beta * (d - d2)).square()) / (2 * beta)
    torch.testing.assert_close(copg_pair_loss(r, r2, d, d2, beta), -square, atol=1e-10, rtol=0)


def random_rows(n: int, seed: int, **fields: Any) -> TokenBatch:
    """Completions of 1 to 4 tokens; what lies beyond their ends is NaN."""
    g = torch.Generator().manual_seed(seed)
    logp, ref = -torch.rand(2, n, 4, dtype=torch.float64, generator=g) * 2
    mask = torch.arange(4)[None] < torch.randint(1, 5, (n, 1), generator=g)
    return TokenBatch(
        logp=torch.where(mask, logp, float("nan")).requires_grad_(),
        logp_ref=torch.where(mask, ref, float("nan")),
        mask=mask,
        reward=torch.randn(n, dtype=torch.float64, generator=g),
        **fields,
    )


def log_probs_and_regularised(batch: TokenBatch, beta: float) -> tuple[Tensor, Tensor]:
    """ln pi(y), and R_beta(y) as a constant [N]."""
    whole, ref = (torch.where(batch.mask, x, 0.0).sum(1) for x in (batch.logp, batch.logp_ref))
    return whole, (batch.reward - beta * (whole - ref)).detach()


def test_gradient_is_that_of_the_detached_weights() -> None:
    """Eqs. 3 and 5: autograd of the mean of -l is that of -sg(R_b - R_b') (ln pi - ln pi'), full beta in the weight."""
    batch = random_rows(12, 6, pair_chosen=torch.arange(0, 12, 2), pair_rejected=torch.arange(1, 12, 2))
    whole, fixed = log_probs_and_regularised(batch, 0.5)
    detached = -((fixed[::2] - fixed[1::2]) * (whole[::2] - whole[1::2])).mean()
    expected = torch.autograd.grad(detached, batch.logp)[0]
    got = torch.autograd.grad(loss(batch, PAIR).loss, batch.logp)[0]
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


def test_k_completions_are_leave_one_out_with_the_regularised_reward() -> None:
    """Eq. 7: grad of L_k with respect to ln pi(y_i) is -(R_b(y_i) - the mean of the others'); mean over prompts."""
    sizes = [2, 5, 3]
    group = torch.arange(3).repeat_interleave(torch.tensor(sizes))
    batch = random_rows(sum(sizes), 7, group=group)
    _, fixed = log_probs_and_regularised(batch, 0.5)
    got = torch.autograd.grad(loss(batch, GROUP).loss, batch.logp)[0][:, 0]
    value = 0.0
    for key, k in enumerate(sizes):
        own = fixed[group == key]
        others = (own.sum() - own) / (k - 1)
        torch.testing.assert_close(got[group == key], -(own - others) / 3, atol=1e-12, rtol=0)
        value += sum(float((a - b) ** 2) for i, a in enumerate(own) for b in own[:i]) / (2 * 0.5 * (k - 1)) / 3
    assert float(loss(batch, GROUP).loss.detach()) == pytest.approx(value, abs=1e-12)


def test_equal_rewards_pull_the_log_ratios_together() -> None:
    """DR = 0, D != 0: descent lowers the larger of d(y), d(y') and raises the other, by beta D."""
    lp, ref, _ = WORKED
    assert row_gradient(rows(lp, ref, [0.4, 0.4]), PAIR) == near([0.5 * (-0.2 - 0.5), -0.5 * (-0.2 - 0.5)])
    equal = rows(lp, ref, [0.4, 0.4], pairs=False)
    assert row_gradient(equal, GROUP) == near([-0.35, 0.35])


def test_equal_completions_give_nothing() -> None:
    batch = rows([-2.0, -2.0], [-1.5, -1.5], [0.7, 0.7])
    assert float(loss(batch, PAIR).loss.detach()) == 0.0
    assert row_gradient(batch, PAIR) == [0.0, 0.0]


def test_constant_rewards_and_order_change_nothing() -> None:
    lp, ref, reward = WORKED
    assert row_gradient(rows(lp, ref, [x + 5 for x in reward]), PAIR) == near([-1.25, 1.25])
    assert row_gradient(rows(lp[::-1], ref[::-1], reward[::-1]), PAIR) == near([1.25, -1.25])
    shifted = rows(lp, ref, [x - 3 for x in reward], pairs=False)
    assert row_gradient(shifted, GROUP) == near([-1.25, 1.25])


@pytest.mark.parametrize("k", [2, 4])
def test_at_the_reference_it_is_the_gradient_of_the_rloo_recipe(k: int) -> None:
    """On-policy, d = 0: the RLOO recipe's own advantages and loss; its mean is over rows, this one over prompts."""
    reward = [1.2, 0.3, -0.7, 2.0][:k]
    columns = {"rollout_id": list("abcd")[:k], "group_id": ["g"] * k, "sample": list(range(k)), "reward": reward}
    recipe = load_recipe("rloo")
    table = curate(pa.table(columns), recipe.curate).sort_by("rollout_id")
    logp = [-5.0, -4.5, -3.0, -2.5][:k]
    batch = rows(logp, logp, reward, pairs=False)
    advantage = torch.tensor(table["advantage"].to_pylist(), dtype=torch.float64)
    leave_one_out = row_gradient(
        replace(batch, advantage=advantage, logp_old=batch.logp.detach()), recipe.train.objective
    )
    assert row_gradient(batch, GROUP) == near([k * g for g in leave_one_out])
    if k == 2:
        assert row_gradient(rows(logp, logp, reward), PAIR) == near([k * g for g in leave_one_out])


def test_quarter_rewards_are_ipo() -> None:
    lp, ref, _ = WORKED
    ours = row_gradient(rows(lp, ref, [0.25, -0.25]), PAIR)
    batch = rows(lp, ref, [0.25, -0.25])
    ipo = row_gradient(batch, parse(preference={"kind": "ipo", "beta": 0.5}))
    # (1/2 - beta D)^2 / (2 beta) = beta/2 (D - 1/(2 beta))^2
    assert ours == near([0.5 / 2 * g for g in ipo])


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
