"""The value function."""

import pytest
import torch

from rollway.errors import RollwayError
from rollway.policies import causal_lm
from rollway.policies.critic import build_critic, load_critic, save_critic, values
from rollway.policies.logprobs import Row, hidden_states
from rollway.policies.manifest import PolicyManifest, write_manifest

ROWS = [Row([6, 7, 8], [9, 10]), Row([6], [7, 8, 9, 10])]


def test_values_are_of_the_state_before_the_token(policy):
    critic = build_critic(policy, seed=0)
    result = values(critic, ROWS, micro_tokens=5)
    assert result.shape == (2, 4)
    assert not result[0, 2:].any()
    with torch.no_grad():
        states = hidden_states(policy.model, ROWS)
        expected = critic.value_head(states).squeeze(-1)
    assert torch.allclose(result[1], expected[1], atol=1e-6)
    changed = values(critic, [Row([6, 7, 8], [9, 55]), ROWS[1]], micro_tokens=5)
    assert torch.allclose(changed[0], result[0], atol=1e-6)


def test_training_it_leaves_the_policy_alone(policy):
    before = {n: p.clone() for n, p in policy.model.named_parameters()}
    critic = build_critic(policy, seed=0)
    optimizer = torch.optim.SGD([p for p in critic.parameters() if p.requires_grad], lr=0.1)
    critic(ROWS).square().sum().backward()
    assert all(p.grad is not None for p in critic.parameters() if p.requires_grad)
    optimizer.step()
    assert all(torch.equal(before[n], p) for n, p in policy.model.named_parameters())


def test_save_and_load_bitwise(tmp_path, policy):
    critic = build_critic(policy, seed=4)
    named = save_critic(tmp_path, critic)
    write_manifest(tmp_path / "policy.json", PolicyManifest("causal_lm", {"critic": named}))
    loaded = load_critic(tmp_path / "policy.json", device="cpu")
    assert torch.equal(values(critic, ROWS, micro_tokens=100), values(loaded, ROWS, micro_tokens=100))
    assert not any(p.requires_grad for p in loaded.parameters())
    with pytest.raises(RollwayError, match="is a critic"):
        causal_lm.load(tmp_path / "policy.json", "critic")


def test_seed_decides_the_head(policy):
    assert torch.equal(build_critic(policy, 1).value_head.weight, build_critic(policy, 1).value_head.weight)
    assert not torch.equal(build_critic(policy, 1).value_head.weight, build_critic(policy, 2).value_head.weight)
