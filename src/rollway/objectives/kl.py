"""Per-token estimators of KL(policy || reference), nats, from log-probs of the sampled tokens [N, T] (Schulman 2020).

As losses their gradients differ: k1 -> grad logp (mean zero), k2 -> (logp - ref) grad logp (the KL's, on-policy),
k3 -> (1 - exp(ref - logp)) grad logp.
"""

from torch import Tensor

from rollway.objectives.ratios import LOG_RATIO_CLAMP


def k1(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """logp - ref: unbiased, any sign."""
    return logp - logp_ref


def k2(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """(logp - ref)^2 / 2: biased, never negative."""
    return 0.5 * (logp - logp_ref).square()


def k3(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """exp(ref - logp) - (ref - logp) - 1: unbiased, never negative. The log-ratio is clamped to +-20."""
    x = (logp_ref - logp).clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
    return x.exp() - x - 1


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}
