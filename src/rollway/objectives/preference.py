"""Losses over pairs or groups of completions. d [N]: sum over a row's tokens of logp - logp_ref, nats."""

import torch
from torch import Tensor


def implied_reward(logp: Tensor, logp_ref: Tensor, mask: Tensor, average: bool = False) -> Tensor:
    """d [N] from log-probs [N, T]; `average` divides by the row's tokens."""
    d = torch.where(mask, logp - logp_ref, 0.0).sum(1)
    return d / mask.sum(1).clamp(min=1) if average else d


def dpo_loss(h: Tensor, beta: float) -> Tensor:
    """log(1 + exp(-beta h)) [P] (arXiv 2305.18290, eq. 7). h [P]: d of the chosen minus d of the rejected row.

    With d from the policy's own old log-probs in place of a reference's it is SPIN's (arXiv 2401.01335;
    2604.00626, eq. 11).
    """
    return torch.nn.functional.softplus(-beta * h)


def ipo_loss(h: Tensor, beta: float) -> Tensor:
    """(h - 1 / (2 beta))^2 [P] (arXiv 2310.12036, eq. 17)."""
    return (h - 1 / (2 * beta)).square()


def copg_pair_loss(reward: Tensor, reward_other: Tensor, d: Tensor, d_other: Tensor, beta: float) -> Tensor:
    """-l(y, y') [P] (CoPG, arXiv 2406.19185, eqs. 2-4): -(DR D - beta/2 D^2), symmetric. Nothing is detached."""
    gap = d - d_other
    return -((reward - reward_other) * gap - 0.5 * beta * gap.square())


def copg_group_loss(reward: Tensor, d: Tensor, group: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Each group's loss [Q], and whether it has the two completions it needs [Q] bool (CoPG for k completions, eq. 7).

    sum_{i>j} (R_i - R_j)^2 / (2 beta (k - 1)) with R = reward - beta d; reward, d, group [N]; Q in ascending order.
    The sum over pairs is taken as k times the squared deviations from the group's mean, which is the same number.
    """
    ids, of = torch.unique(group, return_inverse=True)
    regularised = reward - beta * d
    k = torch.bincount(of, minlength=len(ids))
    mean = regularised.new_zeros(len(ids)).index_add(0, of, regularised) / k.clamp(min=1)
    spread = regularised.new_zeros(len(ids)).index_add(0, of, (regularised - mean[of]).square())
    return spread * k / (2 * beta * (k - 1).clamp(min=1)), k >= 2
