"""The critic's loss (PPO)."""

import torch
from torch import Tensor


def value_error(value: Tensor, value_old: Tensor | None, returns: Tensor, clip: float | None) -> Tensor:
    """Half the larger squared error of the value and of the value held within `clip` of its old one, [N, T]."""
    error = (value - returns).square()
    if clip is None or value_old is None:
        return 0.5 * error
    held = value_old + (value - value_old).clamp(-clip, clip)
    return 0.5 * torch.maximum(error, (held - returns).square())
