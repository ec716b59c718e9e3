"""AdamW with its moments as named tensors, the learning-rate schedule, and gradient clipping."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rollway.config.training import LrSchedule, OptimizerConfig
from rollway.errors import RollwayError

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Adam:
    """An optimiser over the trainable parameters of one module.

    `weights` are the parameters themselves where they are float32 or float64; parameters of lower precision get float32
    copies, because a step of 1e-6 vanishes in bfloat16.
    """

    names: list[str]
    parameters: list[nn.Parameter]
    weights: list[Tensor]
    adam: torch.optim.AdamW


def adam(module: nn.Module, config: OptimizerConfig, moments: Mapping[str, Tensor]) -> Adam:
    """AdamW over the module's trainable parameters, with the moments of earlier rounds; decay acts on matrices only.

    Raises RollwayError when `moments` belong to another module, or nothing is trainable.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    names, parameters = [n for n, _ in named], [p for _, p in named]
    if not named:
        raise RollwayError("no parameter of the policy is trainable; load it with train=True")
    _check(dict(named), moments)
    weights = [
        p if p.dtype in (torch.float32, torch.float64) else _copy(p, moments.get(f"{n}/weight")) for n, p in named
    ]
    groups = [
        {"params": [w for w in weights if w.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [w for w in weights if w.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=0.0, betas=config.betas, eps=config.eps, fused=True
    )
    for name, weight in zip(names, weights, strict=True):
        if f"{name}/step" in moments:
            optimizer.state[weight] = {k: moments[f"{name}/{k}"].to(weight.device, copy=True) for k in _MOMENTS}
    return Adam(names, parameters, weights, optimizer)


def _copy(parameter: nn.Parameter, kept: Tensor | None) -> Tensor:
    source = parameter.detach() if kept is None else kept
    return source.to(device=parameter.device, dtype=torch.float32, copy=True)


def _check(parameters: Mapping[str, nn.Parameter], moments: Mapping[str, Tensor]) -> None:
    for key, tensor in moments.items():
        name, kind = key.rsplit("/", 1)
        if name not in parameters or (kind != "step" and parameters[name].shape != tensor.shape):
            raise RollwayError(
                f"optimiser state {key} {list(tensor.shape)} does not fit the policy's parameters; "
                "take policy.json and its state/ folder from the same round"
            )


def gradient_norm(optimizer: Adam) -> float:
    """Euclidean norm of all gradients together; nan or inf when any gradient is."""
    gradients = [p.grad for p in optimizer.parameters if p.grad is not None]
    return float(nn.utils.get_total_norm(gradients)) if gradients else 0.0


def step(optimizer: Adam, lr: float, norm: float, max_norm: float | None) -> None:
    """One update with the gradients held by the parameters, scaled down when `norm` exceeds `max_norm`; clears them."""
    scale = 1.0 if max_norm is None or norm <= max_norm else max_norm / norm
    for parameter, weight in zip(optimizer.parameters, optimizer.weights, strict=True):
        if parameter.grad is None:
            continue
        if scale != 1.0:
            parameter.grad.mul_(scale)
        if weight is not parameter:
            weight.grad = parameter.grad.float()
    for group in optimizer.adam.param_groups:
        group["lr"] = lr
    optimizer.adam.step()
    with torch.no_grad():
        for parameter, weight in zip(optimizer.parameters, optimizer.weights, strict=True):
            if weight is not parameter:
                parameter.copy_(weight)
                weight.grad = None
            parameter.grad = None


def clear(optimizer: Adam) -> None:
    """Forgets the gradients of a step that is not taken."""
    for parameter in optimizer.parameters:
        parameter.grad = None


def tensors(optimizer: Adam) -> dict[str, Tensor]:
    """Moments (and float32 copies) as named tensors, for the checkpoint."""
    out: dict[str, Tensor] = {}
    for name, parameter, weight in zip(optimizer.names, optimizer.parameters, optimizer.weights, strict=True):
        held = optimizer.adam.state.get(weight, {})
        out.update({f"{name}/{key}": held[key].detach().clone() for key in _MOMENTS if key in held})
        if weight is not parameter:
            out[f"{name}/weight"] = weight.detach().clone()
    return out


def learning_rate(config: OptimizerConfig, update: int) -> float:
    """Learning rate of update number `update` (from 0)."""
    return config.lr * schedule_factor(config.schedule, update)


def schedule_factor(schedule: LrSchedule, update: int) -> float:
    """Share of the learning rate: (u + 1) / (warmup + 1) at first (no update is spent at 0), then the schedule's fall.

    `linear` and `cosine` fall from 1 at the end of the warm-up to `floor` at the horizon, and stay there.
    """
    if update < schedule.warmup:
        return (update + 1) / (schedule.warmup + 1)
    if schedule.kind == "constant" or schedule.horizon is None:
        return 1.0
    done = min(1.0, (update - schedule.warmup) / max(1, schedule.horizon - schedule.warmup))
    shape = 1.0 - done if schedule.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return schedule.floor + (1.0 - schedule.floor) * shape
