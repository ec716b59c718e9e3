"""What a step logs of a teacher, and whose log-probs a teacher's reward is taken against."""

from typing import Any

import torch

from rollway.config.training import TrainConfig
from rollway.training.precompute import precompute
from training.test_teacher import taught
from training.tiny import random_batch, tiny


def reward_form(**ratio: Any) -> TrainConfig:
    objective = {"ratio": {"kind": "token", **ratio}, "gate": "none", "aggregate": "token_mean"}
    return TrainConfig.model_validate({"objective": objective, "advantage": {"kind": "teacher", "kappa": 2.0}})


def test_the_reward_and_the_ratio_are_of_one_mu() -> None:
    """arXiv 2604.00626, eq. 6: A = -kappa (ln mu - ln P), rho = Q / mu; mu is the trainer's old policy, or with
    `denominator: behavior` whoever sampled."""
    policy, batch = tiny(), taught(random_batch(5), tiny(seed=5))
    old = precompute(policy, None, None, batch, reward_form(), {}, 1.0).tokens
    sampler = precompute(policy, None, None, batch, reward_form(denominator="behavior"), {}, 1.0)
    for n, row in enumerate(batch.rows):
        assert row.said.logprob is not None
        width = len(row.tokens)
        said = torch.tensor(row.said.logprob.tolist(), dtype=torch.float64)
        own = 2.0 * (said - old.logp_old[n, :width])
        torch.testing.assert_close(old.advantage[n, :width], own)
        by_mu = 2.0 * (said - torch.tensor(row.logprobs.tolist(), dtype=torch.float64))
        torch.testing.assert_close(sampler.tokens.advantage[n, :width], by_mu)
        assert float((own - by_mu).abs().max()) > 0.1, "the two policies differ here"
