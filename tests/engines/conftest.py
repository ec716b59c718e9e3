"""A small policy whose distribution is not flat, so that wrong sampling shows."""

import pytest
import torch

from rollway.config.policies import CharTokenizer, ScratchPolicy
from rollway.policies import causal_lm

torch.set_num_threads(1)

ALPHABET = "0123456789+-=abcdefghij\n"


def _peaked(config: ScratchPolicy) -> causal_lm.CausalPolicy:
    policy = causal_lm.build(config, [], seed=0, device="cpu")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.dim() == 2:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return policy


@pytest.fixture(scope="session")
def config():
    return ScratchPolicy(
        layers=2,
        hidden=32,
        heads=4,
        kv_heads=2,
        intermediate=64,
        context=96,
        tokenizer=CharTokenizer(alphabet=ALPHABET),
    )


@pytest.fixture(scope="session")
def policy(config):
    return _peaked(config)


@pytest.fixture
def peaked():
    """Builds another such policy, to be changed at will."""
    return _peaked
