"""How far the policy has moved from the one that sampled. All [N, T]; log-probs are 0 where masked."""

import torch
from torch import Tensor

LOG_RATIO_CLAMP = 20.0
"""Nats; keeps exp() finite in float32 and changes nothing below."""


def log_ratio(logp: Tensor, logp_old: Tensor) -> Tensor:
    """logp - logp_old, clamped to +-20 (no gradient beyond)."""
    return (logp - logp_old).clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)


def token_ratio(x: Tensor) -> Tensor:
    """exp of each token's log-ratio x (PPO, arXiv 1707.06347, section 3)."""
    return x.exp()


def sequence_ratio(x: Tensor, mask: Tensor) -> Tensor:
    """exp of the row's mean log-ratio, on each of its tokens (GSPO, arXiv 2507.18071, eq. 7)."""
    return _row_mean(x, mask).exp()[:, None].expand_as(x)


def sequence_token_ratio(x: Tensor, mask: Tensor) -> Tensor:
    """sg[s_i] pi / sg[pi]: the sequence ratio's value, each token's own gradient (GSPO-token, eq. 14)."""
    return _row_mean(x, mask).exp()[:, None].detach() * (x - x.detach()).exp()


def _row_mean(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, x, 0.0).sum(1) / mask.sum(1).clamp(min=1)
