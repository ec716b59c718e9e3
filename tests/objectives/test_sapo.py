"""SAPO: the soft gate."""

import pytest
import torch

from objectives.rows import at_ratio, parse
from rollway.objectives import loss
from rollway.objectives.gates import soft_gate, soft_weight

SAPO = parse(ratio="token", gate={"kind": "soft", "tau_pos": 1.0, "tau_neg": 1.05}, aggregate="seq_mean_token_mean")
A = (1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 0.0)
R = (1.0, 1.0, 1.5, 1.5, 0.5, 0.5, 2.0)


def near(expected: object) -> object:
    return pytest.approx(expected, abs=6e-7)


def test_worked_tokens() -> None:
    batch = at_ratio([R], [A])
    result = loss(batch, SAPO)
    assert result.token_loss[0].tolist() == near([-2, 1.904762, -2.489837, 2.393585, -1.510163, 1.415938, 0])
    weight = soft_weight(torch.tensor([R]), torch.tensor([A]), 1.0, 1.05)
    assert weight[0].tolist() == near([1, 1, 0.940015, 0.934140, 0.940015, 0.934140, 0.768110])
    coefficient = 7 * torch.autograd.grad(result.loss, batch.logp)[0][0]
    assert coefficient.tolist() == near([-1, 1, -1.410022, 1.401210, -0.470007, 0.467070, 0])


def test_worked_batch() -> None:
    result = loss(at_ratio([(1.0, 1.5, 0.5), (1.0, 3.0)], [1.0, -1.0]), SAPO)
    assert result.token_loss[0].tolist() == near([-2, -2.489837, -1.510163])
    assert result.token_loss[1, :2].tolist() == near([1.904762, 3.393917])
    assert float(result.loss.detach()) == near(0.324670)


def test_weight_at_a_ratio_of_1_2_is_symmetric() -> None:
    r = torch.tensor([[1.2, 0.8]], dtype=torch.float64)
    weight = soft_weight(r, torch.ones_like(r), 1.0, 1.05)
    assert weight[0].tolist() == near([0.990066, 0.990066])


def test_small_and_large_sharpness() -> None:
    r = torch.tensor([[0.3, 1.0, 2.0]], dtype=torch.float64)
    one = torch.ones_like(r)
    assert (-soft_gate(r, one, 1e-3, 1.0) - 2e3)[0].tolist() == pytest.approx((r - 1)[0].tolist(), abs=6e-7)
    assert soft_weight(r, one, 200.0, 1.0)[0].tolist() == near([0, 1, 0])


def test_an_outlier_leaves_the_other_tokens_alone() -> None:
    batch, calm = at_ratio([(20.0, 1.1, 0.9)], [1.0]), at_ratio([(1.0, 1.1, 0.9)], [1.0])
    g = torch.autograd.grad(loss(batch, SAPO).loss, batch.logp)[0][0]
    h = torch.autograd.grad(loss(calm, SAPO).loss, calm.logp)[0][0]
    torch.testing.assert_close(g[1:], h[1:], atol=1e-15, rtol=0)
    assert abs(float(g[0])) < 1e-6


@pytest.mark.parametrize("seed", range(20))
def test_low_dispersion_bound(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    z = 0.2 * torch.randn(12, dtype=torch.float64, generator=generator)
    tau = 1.5

    def g(x: torch.Tensor) -> torch.Tensor:
        return 1 / torch.cosh(tau * x / 2).square()

    gap = (g(z).mean() - g(z.mean())).abs()
    assert float(gap) <= float(tau**2 / 4 * z.var(correction=0)) + 1e-15
