"""Token-level advantages against the worked batch of methods/baselines and against naive loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, tensor

from rollway.training.advantages import broadcast, gae, leave_one_out, returns, whiten

LENGTHS = (4, 2, 3, 1, 4, 3)
REWARD = tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
LO = [(-0.5, -1.0, -0.2, -0.7), (-1.2, -0.3), (-0.8, -0.4, -1.5), (-0.6,), (-0.9, -0.1, -0.3, -2.0), (-0.4, -1.1, -0.6)]
LP = [(-0.4, -1.3, -0.2, -0.5), (-1.0, -0.6), (-0.5, -0.4, -1.9), (-0.3,), (-0.9, -0.2, -0.2, -1.6), (-0.7, -1.0, -0.6)]
LR = [(-0.6, -1.1, -0.3, -0.9), (-1.0, -0.5), (-0.9, -0.6, -1.2), (-0.8,), (-1.0, -0.2, -0.4, -1.8), (-0.5, -1.3, -0.4)]
V_OLD = [(0.2, 0.3, 0.4, 0.5), (0.1, 0.2), (0.3, 0.1, 0.0), (0.6,), (0.5, 0.4, 0.6, 0.7), (0.2, 0.1, 0.2)]


def pad(rows: list[tuple[float, ...]]) -> Tensor:
    return tensor([[*row, *[float("nan")] * (4 - len(row))] for row in rows], dtype=torch.float64)


def worked_mask() -> Tensor:
    return torch.arange(4) < tensor(LENGTHS)[:, None]


def clipped_token_mean(advantage: Tensor, dual: float | None = None) -> float:
    mask = worked_mask()
    ratio = (pad(LP) - pad(LO)).exp()[mask]
    a = advantage[mask]
    loss = torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.2))
    if dual is not None:
        loss = torch.where(a < 0, torch.minimum(loss, -dual * a), loss)
    return float(loss.mean())


def close(x: Tensor, expected: tuple[float, ...]) -> None:
    assert x.tolist() == pytest.approx(expected, abs=6e-7)


def test_reinforce_plus_plus_worked_numbers() -> None:
    g = returns(REWARD, pad(LO), pad(LR), worked_mask(), gamma=1.0, kl=0.01)
    close(g[0], (0.995, 0.996, 0.997, 0.998))
    a = whiten(g, worked_mask())
    close(a[0], (0.907945, 0.909892, 0.911840, 0.913787))
    assert clipped_token_mean(a) == pytest.approx(-0.020010, abs=6e-7)


def test_reinforce_plus_plus_baseline_worked_numbers() -> None:
    centred = REWARD - tensor([1 / 3] * 3 + [2 / 3] * 3, dtype=torch.float64)
    a = whiten(broadcast(centred, worked_mask()), worked_mask())
    close(a[:, 0], (1.225231, -0.727481, -0.727481, 0.574327, 0.574327, -1.378385))
    assert clipped_token_mean(a) == pytest.approx(-0.017526, abs=6e-7)


def test_gae_worked_numbers() -> None:
    a, target = gae(REWARD, pad(V_OLD).nan_to_num(9.0), worked_mask(), gamma=1.0, lam=0.95)
    close(a[0], (0.713937, 0.646250, 0.575, 0.5))
    close(a[4], (0.437462, 0.565750, 0.385, 0.3))
    close(target[0], (0.913937, 0.946250, 0.975, 1.0))
    white = whiten(a, worked_mask())
    close(white[0], (1.467148, 1.274736, 1.072197, 0.858999))
    assert clipped_token_mean(white, dual=3.0) == pytest.approx(0.004445, abs=6e-7)


def test_values_that_are_masked_never_matter() -> None:
    mask = tensor([[True, False, True, True, False]])
    old, ref = torch.full((1, 5), -1.0), torch.full((1, 5), -1.5)
    old[~mask], ref[~mask] = float("nan"), float("inf")
    g = returns(tensor([2.0]), old, ref, mask, gamma=0.5, kl=0.1)
    # Holes are skipped: the observation at 1 neither gets a penalty nor costs a factor gamma.
    close(g[0], (-0.05 + 0.5 * (-0.05 + 0.5 * 1.95), 0.0, -0.05 + 0.5 * 1.95, 1.95, 0.0))


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float, float, float]:
    n, t = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    mask = torch.rand(n, t, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    shape = {"generator": generator, "dtype": torch.float64}
    reward, old, ref = torch.randn(n, **shape), torch.randn(n, t, **shape), torch.randn(n, t, **shape)
    value = torch.randn(n, t, **shape)
    unit = st.floats(0.0, 1.0)
    return reward, old, ref, value, mask, draw(unit), draw(unit), draw(st.floats(0.0, 0.5))


@settings(max_examples=80, deadline=None)
@given(problems())
def test_returns_and_gae_equal_naive_loops(problem: tuple) -> None:
    reward, old, ref, value, mask, gamma, lam, kl = problem
    g = returns(reward, old, ref, mask, gamma=gamma, kl=kl)
    a, target = gae(reward, value, mask, gamma=gamma, lam=lam, kl=kl, logp_old=old, logp_ref=ref)
    for i in range(len(reward)):
        valid = [t for t in range(mask.shape[1]) if mask[i, t]]
        rho = [float(-kl * (old[i, t] - ref[i, t])) for t in valid]
        if valid:
            rho[-1] += float(reward[i])
        values = [float(value[i, t]) for t in valid] + [0.0]
        delta = [r + gamma * values[k + 1] - values[k] for k, r in enumerate(rho)]
        for k, t in enumerate(valid):
            assert float(g[i, t]) == pytest.approx(
                sum(gamma ** (j - k) * rho[j] for j in range(k, len(rho))), abs=1e-12
            )
            expected = sum((gamma * lam) ** (j - k) * delta[j] for j in range(k, len(rho)))
            assert float(a[i, t]) == pytest.approx(expected, abs=1e-12)
            assert float(target[i, t]) == pytest.approx(expected + values[k], abs=1e-12)
    for x in (g, a, target):
        assert not x[~mask].any()


@settings(max_examples=50, deadline=None)
@given(problems())
def test_whiten_is_standardisation_over_the_mask(problem: tuple) -> None:
    x, mask = problem[1], problem[4]
    inside = x[mask].tolist()
    white = whiten(x, mask)
    assert not white[~mask].any()
    if len(inside) < 2:
        assert not white.any()
        return
    mean = sum(inside) / len(inside)
    spread = math.sqrt(sum((v - mean) ** 2 for v in inside) / (len(inside) - 1) + 1e-8)
    assert white[mask].tolist() == pytest.approx([(v - mean) / spread for v in inside], abs=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_equal_values_whiten_to_exactly_zero(dtype: torch.dtype) -> None:
    assert not whiten(torch.full((3, 5), 0.6, dtype=dtype), torch.ones(3, 5, dtype=torch.bool)).any()


def test_undiscounted_gae_without_critic_is_reward_to_go() -> None:
    mask = worked_mask()
    a, _ = gae(
        REWARD,
        torch.zeros(6, 4, dtype=torch.float64),
        mask,
        gamma=1.0,
        lam=1.0,
        kl=0.02,
        logp_old=pad(LO),
        logp_ref=pad(LR),
    )
    assert torch.allclose(a, returns(REWARD, pad(LO), pad(LR), mask, gamma=1.0, kl=0.02))


def test_value_targets_at_lambda_one_are_the_reward_to_go_whatever_the_critic_says() -> None:
    """lam = gamma = 1: A + V telescopes to the sum of the rewards that follow."""
    mask = worked_mask()
    _, target = gae(REWARD, pad(V_OLD).nan_to_num(), mask, lam=1.0, kl=0.02, logp_old=pad(LO), logp_ref=pad(LR))
    torch.testing.assert_close(target, returns(REWARD, pad(LO), pad(LR), mask, gamma=1.0, kl=0.02))


def test_leave_one_out_equals_a_naive_loop() -> None:
    group = tensor([5, 5, 5, 2, 2, 9])
    found = leave_one_out(REWARD, pad(LO), pad(LR), worked_mask(), group, 0.1)
    own = [
        float(r) - 0.1 * sum(a - b for a, b in zip(lo, lr, strict=True))
        for r, lo, lr in zip(REWARD, LO, LR, strict=True)
    ]
    for i in range(6):
        others = [own[j] for j in range(6) if j != i and group[j] == group[i]]
        expected = own[i] - sum(others) / len(others) if others else 0.0
        assert float(found[i]) == pytest.approx(expected, abs=1e-12)


def test_leave_one_out_at_the_reference_is_that_of_the_rewards() -> None:
    """Without a gap to the reference it is workflow/sql/advantages/rloo.sql; rows without tokens keep their reward."""
    mask = worked_mask().clone()
    mask[3] = False
    found = leave_one_out(REWARD, pad(LO), pad(LO), mask, tensor([0, 0, 0, 1, 1, 1]), 0.5)
    close(found, (1.0, -0.5, -0.5, 0.5, 0.5, -1.0))


def test_penalty_without_reference_is_refused() -> None:
    with pytest.raises(ValueError, match="reference"):
        returns(REWARD, pad(LO), None, worked_mask(), kl=0.01)


def test_weighted_whitening_equals_repeating_rows() -> None:
    """A row of weight 3 counts as three rows of weight 1 (PF-PPO's weight mode; population moments)."""
    x = tensor([[0.1, 0.7, -0.3], [1.5, -2.0, 0.4], [0.9, 0.2, 0.6]], dtype=torch.float64)
    mask = tensor([[True, True, False], [True, True, True], [True, False, False]])
    white = whiten(x, mask, tensor([3.0, 1.0, 2.0], dtype=torch.float64))
    repeated = torch.cat([x[0][mask[0]].repeat(3), x[1][mask[1]], x[2][mask[2]].repeat(2)])
    expected = (x - repeated.mean()) / (repeated.std(correction=0) + 1e-8)
    torch.testing.assert_close(white, expected.where(mask, torch.zeros_like(x)), rtol=1e-12, atol=1e-12)


def test_rows_of_weight_zero_are_as_if_absent() -> None:
    x = tensor([[1.0, 2.0], [50.0, -70.0], [4.0, 8.0]], dtype=torch.float64)
    mask = torch.ones(3, 2, dtype=torch.bool)
    white = whiten(x, mask, tensor([1.0, 0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(white[[0, 2]], whiten(x[[0, 2]], mask[:2]), rtol=1e-12, atol=1e-12)
