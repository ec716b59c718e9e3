"""Which of a batch's valid tokens are trained on: constants for the gradient, chosen over the whole batch at once."""

import math

import torch
from torch import Tensor


def top_share(key: Tensor, candidates: Tensor, share: float) -> Tensor:
    """bool [N, T]: the ceil(share x candidates) candidates with the largest key; ties go to the lower (row, position).

    At least one token is kept where there is a candidate (D3S, arXiv 2509.22115, eq. 3).
    """
    keep = torch.zeros_like(candidates)
    places = candidates.flatten().nonzero()[:, 0]
    count = min(len(places), math.ceil(share * len(places) - 1e-9))
    order = torch.sort(key.flatten()[places], descending=True, stable=True).indices
    keep.view(-1)[places[order[:count]]] = True
    return keep


def signal_key(advantage: Tensor, entropy: Tensor) -> Tensor:
    """|A| H [N, T] (D3S, eq. 3). advantage [N] or [N, T], entropy [N, T] in nats."""
    spread = advantage[:, None] if advantage.dim() == 1 else advantage
    return spread.abs() * entropy


def scheduled_share(share: float, final: float | None, progress: float) -> float:
    """Linear from `share` to `final` as progress goes from 0 to 1 (D3S, eq. 4)."""
    return share if final is None else (1 - progress) * share + progress * final
