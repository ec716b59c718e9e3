"""PF-PPO's weight mode: row weights in numerator and denominator."""

import pytest
import torch

from objectives.rows import CORRECT, GROUP, group_relative, parse, worked
from rollway.objectives import loss

PPO = parse(ratio="token", gate={"kind": "clip", "low": 0.2, "high": 0.2}, aggregate="token_mean")
A = group_relative(CORRECT, GROUP, std=True)


def test_weighted_token_mean() -> None:
    weight = torch.tensor([0.5, 0.25, 0.25, 0.0, 0.5, 0.5], dtype=torch.float64)
    result = loss(worked(A, weight=weight), PPO)
    token = loss(worked(A), PPO).token_loss
    n = worked().mask.sum(1)
    expected = (weight * token.sum(1)).sum() / (weight * n).sum()
    assert float(result.loss.detach()) == pytest.approx(float(expected), abs=1e-12)


def test_equal_weights_are_plain_ppo() -> None:
    weight = torch.full((6,), 1 / 3, dtype=torch.float64)
    assert float(loss(worked(A, weight=weight), PPO).loss.detach()) == pytest.approx(-0.085597, abs=1e-6)


def test_integer_weights_are_repeated_rows() -> None:
    """Drawing a row w times gives the loss and the gradient of weight w."""
    counts = [2, 0, 1, 3, 1, 0]
    weighted, repeated = worked(A, weight=torch.tensor(counts, dtype=torch.float64)), worked(A)
    index = torch.tensor([n for n, c in enumerate(counts) for _ in range(c)])
    one, other = loss(weighted, PPO).loss, loss(repeated.rows(index), PPO).loss
    torch.testing.assert_close(one, other, atol=1e-14, rtol=0)
    g, h = torch.autograd.grad(one, weighted.logp)[0], torch.autograd.grad(other, repeated.logp)[0]
    torch.testing.assert_close(g, h, atol=1e-14, rtol=0)
