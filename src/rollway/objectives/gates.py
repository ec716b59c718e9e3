"""From ratio and advantage to a token's loss, all [N, T]. The advantage is a constant; losses are minimised."""

import torch
from torch import Tensor


def plain_gate(ratio: Tensor, advantage: Tensor) -> Tensor:
    """-A r: the importance-weighted policy gradient."""
    return -advantage * ratio


def reinforce_gate(logp: Tensor, advantage: Tensor) -> Tensor:
    """-A logp (Williams 1992)."""
    return -advantage * logp


def dft_gate(logp: Tensor) -> Tensor:
    """-sg(pi) logp (DFT, arXiv 2508.05629): the gradient of likelihood, times the probability that there is."""
    return -logp.detach().exp() * logp


def one_token_gate(logp: Tensor, hit: Tensor, missed: Tensor, beta: float) -> Tensor:
    """-(hit logp + beta missed) (OTR, arXiv 2509.26313, its loss in terms of counts).

    hit: share of the candidates that are the row's own token, a constant; missed: mean over all candidates of the
    log-prob of those that are not, 0 for the others. Both of drawn candidates, or of all tokens at once.
    """
    return -(hit.detach() * logp + beta * missed)


def clip_gate(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """Pessimistic clipped surrogate, negated (PPO, arXiv 1707.06347, eq. 7)."""
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high))


def dual_clip_gate(ratio: Tensor, advantage: Tensor, low: float, high: float, c: float) -> Tensor:
    """The clipped surrogate, bounded by -c A where A < 0 (arXiv 1912.09729, eq. 5)."""
    clipped = clip_gate(ratio, advantage, low, high)
    return torch.where(advantage < 0, torch.minimum(clipped, -c * advantage), clipped)


def soft_gate(ratio: Tensor, advantage: Tensor, tau_pos: float, tau_neg: float) -> Tensor:
    """-A (4 / tau) sigmoid(tau (r - 1)), tau by the sign of A, 0 being negative (SAPO, arXiv 2511.20347, eq. 5)."""
    tau = _sharpness(ratio, advantage, tau_pos, tau_neg)
    return -advantage * (4 / tau) * torch.sigmoid(tau * (ratio - 1))


def soft_weight(ratio: Tensor, advantage: Tensor, tau_pos: float, tau_neg: float) -> Tensor:
    """SAPO's gradient weight sech^2(tau (r - 1) / 2), in (0, 1]."""
    tau = _sharpness(ratio, advantage, tau_pos, tau_neg)
    p = torch.sigmoid(tau * (ratio - 1))
    return 4 * p * (1 - p)


def cispo_gate(ratio: Tensor, logp: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """-sg[clip(r)] A logp (CISPO, arXiv 2506.13585, eq. 4)."""
    return -ratio.clamp(1 - low, 1 + high).detach() * advantage * logp


def variance_gate(ratio: Tensor, advantage: Tensor, lam: Tensor, centre: Tensor | float = 1.0) -> Tensor:
    """-(r A - lam (r - centre)^2) (R2VPO, arXiv 2601.03320). lam: constant, broadcast to [N, T]."""
    return -advantage * ratio + lam * (ratio - centre).square()


def clipped_tokens(ratio: Tensor, advantage: Tensor, low: float, high: float, c: float = float("inf")) -> Tensor:
    """bool [N, T]: tokens whose gradient the (dual) clip sets to zero."""
    risen, fallen = (advantage > 0) & (ratio > 1 + high), (advantage < 0) & (ratio < 1 - low)
    return risen | fallen | ((advantage < 0) & (ratio > c))


def _sharpness(ratio: Tensor, advantage: Tensor, tau_pos: float, tau_neg: float) -> Tensor:
    # Tensors of the ratio's type: of two Python numbers `where` would make a float32.
    return torch.where(advantage > 0, ratio.new_tensor(tau_pos), ratio.new_tensor(tau_neg))
