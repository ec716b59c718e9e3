"""Rows of unequal length as padded tensors, and the worked batch of the baselines."""

from typing import Any

import torch
from torch import Tensor

from rollway.config.objectives import Objective
from rollway.objectives import TokenBatch


def padded(rows: list[tuple[float, ...]], width: int = 0, fill: float = float("nan")) -> Tensor:
    """[N, T] float64; positions beyond a row hold `fill`."""
    width = max(width, *(len(r) for r in rows))
    return torch.tensor([[*r, *[fill] * (width - len(r))] for r in rows], dtype=torch.float64)


def lengths_mask(rows: list[tuple[float, ...]], width: int = 0) -> Tensor:
    return ~padded(rows, width).isnan()


def parse(**parts: Any) -> Objective:
    return Objective.model_validate(parts)


def at_ratio(ratio: list[tuple[float, ...]], advantage: Any, **fields: Any) -> TokenBatch:
    """A batch whose token ratios are these; old log-probs are -1."""
    r = padded(ratio)
    old = torch.full_like(r, -1.0)
    return TokenBatch(
        logp=(old + r.log()).requires_grad_(),
        logp_old=old,
        mask=~r.isnan(),
        advantage=torch.tensor(advantage, dtype=torch.float64),
        **fields,
    )


OLD = [
    (-0.5, -1.0, -0.2, -0.7),
    (-1.2, -0.3),
    (-0.8, -0.4, -1.5),
    (-0.6,),
    (-0.9, -0.1, -0.3, -2.0),
    (-0.4, -1.1, -0.6),
]
NOW = [
    (-0.4, -1.3, -0.2, -0.5),
    (-1.0, -0.6),
    (-0.5, -0.4, -1.9),
    (-0.3,),
    (-0.9, -0.2, -0.2, -1.6),
    (-0.7, -1.0, -0.6),
]
REF = [
    (-0.6, -1.1, -0.3, -0.9),
    (-1.0, -0.5),
    (-0.9, -0.6, -1.2),
    (-0.8,),
    (-1.0, -0.2, -0.4, -1.8),
    (-0.5, -1.3, -0.4),
]
ENGINE = [
    (-0.5, -1.2, -0.2, -0.9),
    (-1.3, -0.3),
    (-0.8, -1.4, -1.5),
    (-0.6,),
    (-0.9, -0.1, -0.4, -2.1),
    (-0.4, -1.1, -0.7),
]
V_OLD = [(0.2, 0.3, 0.4, 0.5), (0.1, 0.2), (0.3, 0.1, 0.0), (0.6,), (0.5, 0.4, 0.6, 0.7), (0.2, 0.1, 0.2)]
V_NOW = [(0.3, 0.3, 0.9, 0.6), (0.0, 0.1), (0.2, 0.4, -0.3), (0.8,), (0.5, 0.5, 0.7, 1.4), (0.1, 0.0, 0.1)]
CORRECT = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0]
GROUP = [0, 0, 0, 1, 1, 1]


def worked(advantage: Tensor | list[float] | None = None, **fields: Any) -> TokenBatch:
    """The worked batch of the baselines: two prompts x 3 rows; log-probs beyond a row are NaN."""
    if isinstance(advantage, list):
        advantage = torch.tensor(advantage, dtype=torch.float64)
    return TokenBatch(
        logp=padded(NOW).requires_grad_(),
        logp_old=padded(OLD),
        logp_ref=padded(REF),
        logp_behavior=padded(ENGINE),
        mask=lengths_mask(OLD),
        advantage=advantage,
        reward=torch.tensor(CORRECT, dtype=torch.float64),
        correct=torch.tensor(CORRECT, dtype=torch.float64),
        group=torch.tensor(GROUP),
        **fields,
    )


def group_relative(reward: list[float], group: list[int], *, std: bool, eps: float = 1e-6) -> Tensor:
    """(R - mean) / (std + eps), std with ddof=1 [N]; R - mean without `std`."""
    r, g = torch.tensor(reward, dtype=torch.float64), torch.tensor(group)
    out = torch.zeros_like(r)
    for key in g.unique():
        own = r[g == key]
        centred = own - own.mean()
        out[g == key] = centred / (own.std() + eps) if std else centred
    return out
