"""Completions drawn the slow way, to compare with."""

import numpy as np
import torch

from rollway.engines import Request
from rollway.sampling.draw import draw
from rollway.sampling.noise import keys, uniform


def requests(count=64, group=4, longest=20):
    """Prompts of many lengths, `group` samples each."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(6, 30, rng.integers(1, longest)).tolist() for _ in range(-(-count // group))]
    return [Request(f"r{i}", prompts[i // group]) for i in range(count)]


def slow(policy, request, sampling, seed):
    """The same completion, one forward over everything per token."""
    tokens, logprobs = [], []
    for position in range(sampling.max_tokens):
        ids = torch.tensor([[*request.prompt_tokens, *tokens]])
        with torch.no_grad():
            logits = policy.model(input_ids=ids).logits[:, -1]
        u = uniform(keys(seed, [request.rollout_id]), np.array([position]))
        token, logp = draw(logits, torch.from_numpy(u), sampling)
        tokens.append(token.item())
        logprobs.append(logp.item())
        if tokens[-1] == policy.tokenizer.eos_token_id:
            break
    return tokens, logprobs


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        assert (a.tokens, a.finish) == (b.tokens, b.finish)
        assert np.allclose(a.logprobs, b.logprobs, atol=1e-4)
