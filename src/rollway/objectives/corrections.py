"""Importance weights between the rollout engine and the trainer's old policy. Constants, [N, T]."""

import torch
from torch import Tensor

from rollway.objectives.ratios import LOG_RATIO_CLAMP


def correction_weights(
    logp_old: Tensor, logp_behavior: Tensor, mask: Tensor, *, kind: str, level: str, cap: float
) -> Tensor:
    """exp(old - behavior) of each token, or of the row's sum on all its tokens; 1 where masked.

    kind tis: truncated at `cap` (truncated importance sampling); mis: 0 where `cap` is exceeded. The log-ratio, at
    sequence level the sum, is clamped to +-20.
    """
    x = torch.where(mask, logp_old - logp_behavior, 0.0).detach()
    if level == "sequence":
        x = x.sum(1, keepdim=True).expand_as(x)
    ratio = x.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).exp()
    weights = ratio.clamp(max=cap) if kind == "tis" else torch.where(ratio <= cap, ratio, 0.0)
    return torch.where(mask, weights, 1.0)


def effective_sample_size(weights: Tensor) -> Tensor:
    """(sum w)^2 / (n sum w^2) of n weights (any shape), in [0, 1]; 0 for none or all zero."""
    square = weights.numel() * weights.square().sum()
    return torch.where(square > 0, weights.sum().square() / square.clamp(min=torch.finfo(weights.dtype).tiny), 0.0)
