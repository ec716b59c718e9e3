"""Losses of rows that no policy with known log-probs wrote: expert solutions in a group. [N, T]; A is a constant."""

from torch import Tensor


def unit_anchor(logp: Tensor, advantage: Tensor) -> Tensor:
    """-A pi / sg(pi): value -A, gradient -A grad logp (DaGRPO, arXiv 2512.06337; reconstructed)."""
    return -advantage * (logp - logp.detach()).exp()


def shaped_anchor(logp: Tensor, advantage: Tensor, gamma: float) -> Tensor:
    """-A f(pi), f = pi / (pi + gamma), differentiated (LUFFY, arXiv 2504.14945, eq. 8)."""
    probability = logp.exp()
    return -advantage * probability / (probability + gamma)
