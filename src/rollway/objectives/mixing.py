"""Distribution-centric advantages (DCPO, arXiv 2601.12730): entropy held by a virtual hotter or colder policy."""

import torch
from torch import Tensor

from rollway.objectives.ratios import LOG_RATIO_CLAMP


def target_temperature(last_entropy: float, entropy: float, hot: float, cold: float) -> float:
    """Temperature of the virtual policy: hot while the last entropy is at or below the target (eq. 1)."""
    return hot if last_entropy <= entropy else cold


def mixing_weight(last_entropy: Tensor, correct_share: Tensor, entropy: float, gap: float) -> Tensor:
    """alpha = a / (1 + a), a = min(|H0 - H|, gap) / p (eq. 2); 0 where nothing is correct (reconstructed guard)."""
    distance = (entropy - last_entropy).abs().clamp(max=gap)
    return torch.where(correct_share > 0, distance / (correct_share + distance), 0.0)


def mixed_advantage(
    advantage: Tensor, correct: Tensor, logp_old: Tensor, logp_old_temp: Tensor, alpha: Tensor
) -> tuple[Tensor, Tensor]:
    """(1 - alpha) A + alpha b rho [N, T] and rho = exp(logp_old_temp - logp_old) [N, T] (eq. 3); rho is not clipped.

    advantage [N] or [N, T]; correct [N] 0/1. The log-ratio is clamped to +-20.
    """
    rho = (logp_old_temp - logp_old).clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).exp()
    spread = advantage[:, None] if advantage.dim() == 1 else advantage
    return (1 - alpha) * spread + alpha * correct.to(rho.dtype)[:, None] * rho, rho
