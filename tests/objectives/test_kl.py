"""KL estimators against exact enumeration on a policy of three tokens (INCIDENTS 6, 7)."""

import pytest
import torch
from torch import Tensor

from objectives.rows import parse
from rollway.objectives import TokenBatch, loss

Z = torch.tensor([0.9, -0.3, 0.2], dtype=torch.float64)
REF = torch.tensor([0.1, 0.4, -0.6], dtype=torch.float64).log_softmax(0)


def kl(z: Tensor) -> Tensor:
    logp = z.log_softmax(0)
    return (logp.exp() * (logp - REF)).sum()


def reverse_kl(z: Tensor) -> Tensor:
    return (REF.exp() * (REF - z.log_softmax(0))).sum()


def expected(kind: str, beta: float = 1.0) -> tuple[float, Tensor]:
    """Expectation over the policy of the KL term's value and of its gradient with respect to the logits."""
    z = Z.clone().requires_grad_()
    logp = z.log_softmax(0)
    batch = TokenBatch(
        logp=logp[:, None],
        logp_ref=REF[:, None],
        mask=torch.ones(3, 1, dtype=torch.bool),
        advantage=torch.zeros(3, dtype=torch.float64),
        weight=logp.detach().exp(),
    )
    result = loss(batch, parse(ratio="none", gate="none", aggregate="token_mean", kl={"kind": kind, "beta": beta}))
    return float(result.loss.detach()), torch.autograd.grad(result.loss, z)[0]


def exact(function: object) -> Tensor:
    return torch.autograd.functional.jacobian(function, Z)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_value_is_unbiased(kind: str) -> None:
    assert expected(kind)[0] == pytest.approx(float(kl(Z)), abs=1e-12)


def test_k2_has_the_gradient_of_the_kl() -> None:
    torch.testing.assert_close(expected("k2")[1], exact(kl), atol=1e-12, rtol=0)


def test_k1_has_no_gradient_in_expectation() -> None:
    torch.testing.assert_close(expected("k1")[1], torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)


def test_k3_has_the_gradient_of_the_other_direction() -> None:
    """E[(1 - ref / pi) grad logp] = -sum ref grad logp: the gradient of KL(ref || pi), not of KL(pi || ref)."""
    torch.testing.assert_close(expected("k3")[1], exact(reverse_kl), atol=1e-12, rtol=0)
    assert not torch.allclose(expected("k3")[1], exact(kl), atol=1e-3)


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_gradient_changes_with_beta(kind: str) -> None:
    torch.testing.assert_close(expected(kind, 2.0)[1], 2 * expected(kind, 1.0)[1])
    assert bool(expected(kind)[1].any())


def test_k3_stays_finite_and_non_negative() -> None:
    batch = TokenBatch(
        logp=torch.tensor([[-900.0, -1.0, -1e-3]]).requires_grad_(),
        logp_ref=torch.tensor([[-1.0, -900.0, -1e-3]]),
        mask=torch.ones(1, 3, dtype=torch.bool),
        advantage=torch.zeros(1),
    )
    result = loss(batch, parse(ratio="none", gate="none", aggregate="token_mean", kl={"kind": "k3", "beta": 1.0}))
    assert bool((result.token_loss >= 0).all())
    assert bool(result.token_loss.isfinite().all())
    assert bool(torch.autograd.grad(result.loss, batch.logp)[0].isfinite().all())
