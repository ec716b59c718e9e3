"""Sampling against enumeration over a tiny vocabulary (INCIDENTS 8, 9)."""

import itertools

import pytest
import torch

from rollway.config.rollouts import Sampling
from rollway.sampling.draw import draw, entropy, log_distribution

LOGITS = torch.tensor([[2.0, 1.0, 0.5, -1.0, 1.0, -30.0]])
SETTINGS = [
    Sampling(temperature=t, top_k=k, top_p=p) for t, k, p in itertools.product([0.5, 1, 2], [0, 1, 3, 9], [1, 0.7, 0.2])
]


def by_hand(logits: list[float], sampling: Sampling) -> dict[int, float]:
    """Support and probabilities, written out."""
    weights = {
        i: torch.tensor(z, dtype=torch.float64).div(sampling.temperature).exp().item() for i, z in enumerate(logits)
    }
    order = sorted(weights, key=lambda i: (-weights[i], i))
    if sampling.top_k:
        order = order[: sampling.top_k]
    total = sum(weights[i] for i in order)
    kept, mass = [], 0.0
    for i in order:
        if mass >= sampling.top_p:
            break
        kept.append(i)
        mass += weights[i] / total
    total = sum(weights[i] for i in kept)
    return {i: weights[i] / total for i in kept}


@pytest.mark.parametrize("sampling", SETTINGS, ids=lambda s: f"t{s.temperature}-k{s.top_k}-p{s.top_p}")
def test_frequencies_and_logprobs_by_enumeration(sampling):
    expected = by_hand(LOGITS[0].tolist(), sampling)
    grid = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    tokens, logp = draw(LOGITS.expand(len(grid), -1), grid, sampling)
    for token, probability in expected.items():
        chosen = tokens == token
        assert abs(chosen.double().mean().item() - probability) < 2e-5
        assert torch.allclose(logp[chosen].exp(), torch.tensor(probability, dtype=torch.float64), atol=1e-12)
    assert set(tokens.tolist()) <= set(expected)
    assert log_distribution(LOGITS, sampling).exp().sum().item() == pytest.approx(1.0, abs=1e-12)


def test_extreme_uniforms_stay_in_the_support():
    sampling = Sampling(top_k=2)
    for u in (2.0**-53, 1 - 2.0**-53):
        token, logp = draw(LOGITS, torch.tensor([u], dtype=torch.float64), sampling)
        assert token.item() in (0, 1)
        assert torch.isfinite(logp).all()


def test_greedy_takes_the_argmax_with_the_logprob_of_temperature_one():
    token, logp = draw(LOGITS, torch.tensor([0.99]), Sampling(temperature=0.0, top_k=1))
    assert token.item() == 0
    assert logp.item() == pytest.approx(LOGITS.double().log_softmax(-1)[0, 0].item())


def test_rows_are_independent():
    logits = torch.randn(7, 30, generator=torch.Generator().manual_seed(0))
    u = torch.rand(7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for sampling in (Sampling(), Sampling(top_k=5, top_p=0.8, temperature=0.6)):
        tokens, logp = draw(logits, u, sampling)
        for i in range(7):
            token, single = draw(logits[i : i + 1], u[i : i + 1], sampling)
            assert (token.item(), single.item()) == (tokens[i].item(), logp[i].item())


def test_entropy_closed_forms():
    assert entropy(torch.zeros(1, 8)).item() == pytest.approx(torch.log(torch.tensor(8.0)).item())
    assert entropy(torch.tensor([[0.0, -200.0]])).item() == pytest.approx(0.0, abs=1e-6)
