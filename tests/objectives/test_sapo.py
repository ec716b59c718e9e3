"""SAPO: the soft gate."""

import math

import pytest
import torch

from objectives.rows import at_ratio, parse
from rollway.config import load_recipe
from rollway.objectives import loss, whole_batch_metrics
from rollway.objectives.gates import soft_gate, soft_weight

SAPO = parse(ratio="token", gate={"kind": "soft", "tau_pos": 1.0, "tau_neg": 1.05}, aggregate="seq_mean_token_mean")
A = (1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 0.0)
R = (1.0, 1.0, 1.5, 1.5, 0.5, 0.5, 2.0)


def near(expected: object) -> object:
    return pytest.approx(expected, abs=6e-7)


def test_the_recipe_is_what_is_tested_here() -> None:
    assert load_recipe("sapo").train.objective == SAPO


def test_worked_values_of_the_gate() -> None:
    """f of every worked token, the one without an advantage included: its sharpness is that of negative ones."""
    sign = torch.tensor([[a if a != 0.0 else -1.0 for a in A]], dtype=torch.float64)
    f = -soft_gate(torch.tensor([R], dtype=torch.float64), sign, 1.0, 1.05) / sign
    assert f[0].tolist() == near([2, 1.904762, 2.489837, 2.393585, 1.510163, 1.415938, 2.822000])


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
    rows = (result.token_loss.sum(1) / result.kept.sum(1)).tolist()
    assert rows == near([-2.0, 2.649339])
    assert float(result.loss.detach()) == near(0.324670)


def test_weight_at_a_ratio_of_1_2_is_symmetric() -> None:
    r = torch.tensor([[1.2, 0.8]], dtype=torch.float64)
    weight = soft_weight(r, torch.ones_like(r), 1.0, 1.05)
    assert weight[0].tolist() == near([0.990066, 0.990066])


@pytest.mark.parametrize("tau", [0.3, 1.0, 1.05, 7.0])
def test_weight_is_symmetric_around_one_and_the_surrogates_slope(tau: float) -> None:
    """w(1 + x) = w(1 - x), in (0, 1], and w = f': the gate has no other gradient, and no jump anywhere."""
    x = torch.linspace(0.0, 1.0, 101, dtype=torch.float64)
    one = torch.ones_like(x)
    assert torch.allclose(soft_weight(1 + x, one, tau, 9.0), soft_weight(1 - x, one, tau, 9.0), atol=1e-14, rtol=0)
    r = torch.linspace(0.0, 6.0, 6001, dtype=torch.float64, requires_grad=True)
    value = -soft_gate(r, torch.ones_like(r), tau, 9.0)
    weight = soft_weight(r.detach(), torch.ones_like(r), tau, 9.0)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), r)[0], weight, atol=1e-12, rtol=0)
    assert bool(((weight > 0) & (weight <= 1)).all())
    assert float(value.detach().diff().abs().max()) <= 1.01e-3


@pytest.mark.parametrize(("tau_pos", "tau_neg"), [(1.0, 1.05), (0.2, 5.0)])
def test_on_policy_the_slope_is_one_and_the_value_is_not(tau_pos: float, tau_neg: float) -> None:
    gate = {"kind": "soft", "tau_pos": tau_pos, "tau_neg": tau_neg}
    batch = at_ratio([(1.0,), (1.0,)], [2.0, -3.0])
    result = loss(batch, parse(ratio="token", gate=gate, aggregate="token_mean"))
    assert result.token_loss[:, 0].tolist() == near([-2 / tau_pos * 2.0, 2 / tau_neg * 3.0])
    assert (2 * torch.autograd.grad(result.loss, batch.logp)[0])[:, 0].tolist() == near([-2.0, 3.0])


def test_swapped_sharpness_changes_the_weight_and_never_the_sign() -> None:
    r, a = torch.tensor([[0.2, 0.7, 1.6, 4.0]] * 2, dtype=torch.float64), torch.tensor([[1.0], [-1.0]])
    a = a.double().expand_as(r)
    one, other = soft_weight(r, a, 1.0, 1.05), soft_weight(r, a, 1.05, 1.0)
    assert bool((one != other).all())
    assert bool(((one > 0) & (other > 0)).all())
    assert torch.equal(one[0], other[1])


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
    """The mean gate of a row is that of its mean log-ratio, up to tau^2 / 4 of the variance (eq. 7)."""
    generator = torch.Generator().manual_seed(seed)
    z = 0.2 * torch.randn(12, dtype=torch.float64, generator=generator)
    tau = 1.5

    def g(x: torch.Tensor) -> torch.Tensor:
        return soft_weight(1 + x, torch.ones_like(x), tau, tau)

    gap = (g(z).mean() - g(z.mean())).abs()
    assert float(gap) <= float(tau**2 / 4 * z.var(correction=0)) + 1e-15


def test_what_is_logged() -> None:
    """Mean weight by the sign of A, its first percentile, and what GRPO's clip would have dropped."""
    batch = at_ratio([R, (1.3, 0.9, 1.1)], [A, (1.0, 1.0, -1.0, 0.0, 0.0, 0.0, 0.0)])
    found = whole_batch_metrics(batch, SAPO)
    r, a = [*R, 1.3, 0.9, 1.1], [*A, 1.0, 1.0, -1.0]
    w = [1 / math.cosh((1.0 if s > 0 else 1.05) * (x - 1) / 2) ** 2 for x, s in zip(r, a, strict=True)]
    up = [x for x, s in zip(w, a, strict=True) if s > 0]
    down = [x for x, s in zip(w, a, strict=True) if s < 0]
    clipped = [(s > 0 and x > 1.2) or (s < 0 and x < 0.8) for x, s in zip(r, a, strict=True)]
    assert found == pytest.approx(
        {
            "soft/weight_positive": sum(up) / len(up),
            "soft/weight_negative": sum(down) / len(down),
            "soft/weight_p01": min(w),
            "soft/grpo_clip_share": sum(clipped) / len(w),
        },
        abs=1e-12,
    )
    many = at_ratio([tuple(1 + 0.001 * n for n in range(300))], [1.0])
    assert whole_batch_metrics(many, SAPO)["soft/weight_p01"] == near(1 / math.cosh(0.297 / 2) ** 2)
    assert "soft/weight_negative" not in whole_batch_metrics(many, SAPO)
