"""Trains a reward model on preference pairs (Bradley-Terry), and says how good and how well calibrated it is."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from rollway.config.pair_training import PairTraining
from rollway.config.training import LrSchedule, OptimizerConfig
from rollway.errors import RollwayError
from rollway.policies.reward_model import RewardModel, check_ids, encode, measure, outputs
from rollway.runtime.notice import tick
from rollway.training.guards import UpdateRefused, worst_first
from rollway.training.metrics import Metric
from rollway.training.optimizer import Adam, adam, clear, gradient_norm, learning_rate, step
from rollway.training.pairs import Pair

MEASURE_BATCH = 64


@dataclass(frozen=True)
class EncodedPair:
    """Token ids of prompt and completion together, of both completions."""

    chosen: list[int]
    rejected: list[int]
    pair_id: str = ""

    @property
    def width(self) -> int:
        return max(len(self.chosen), len(self.rejected))


def bradley_terry(chosen: Tensor, rejected: Tensor, centre: float = 0.0) -> Tensor:
    """Loss of each pair [P] from the model's outputs [P]: -log sigmoid(r_c - r_r) + centre (r_c + r_r)^2, in nats.

    Bradley-Terry as in arXiv 1706.03741, eq. 1; the centring term is that of arXiv 2312.09244.
    """
    return functional.softplus(rejected - chosen) + centre * (chosen + rejected) ** 2


def encoded(who: str, model: RewardModel, pairs: Sequence[Pair]) -> tuple[list[EncodedPair], Counter[str]]:
    """The pairs that the model can learn from or be tested on, and how many others there are, by reason.

    Raises RollwayError when chats meet a tokenizer without a chat template, or ids are beyond the model's embeddings.
    """
    used, skipped = [], Counter[str]()
    for pair in pairs:
        chosen, rejected = (
            encode(who, model.tokenizer, pair.messages, pair.format, text) for text in (pair.chosen, pair.rejected)
        )
        if not chosen or not rejected:
            skipped["a completion and its prompt have no token"] += 1
        elif chosen == rejected:
            skipped["chosen and rejected are the same tokens"] += 1
        elif model.longest is not None and max(len(chosen), len(rejected)) > model.longest:
            skipped[f"longer than the {model.longest} tokens that the model reads"] += 1
        else:
            used.append(EncodedPair(chosen, rejected, pair.pair_id))
    check_ids(who, model, [row for pair in used for row in (pair.chosen, pair.rejected)])
    return used, skipped


def updates(pairs: int, config: PairTraining) -> int:
    """Number of optimiser steps."""
    return config.epochs * -(-pairs // config.batch)


def train(
    who: str,
    model: RewardModel,
    pairs: Sequence[EncodedPair],
    config: PairTraining,
    progress: Callable[[int, str], None] = lambda steps, info: None,
) -> list[Metric]:
    """Trains in place; the loss is the mean over an update's pairs. What step s sees is a function of (seed, s) alone.

    Dropout is off, as in all training on a loss: what a step does depends on its pairs, not on their micro-batches.
    Returns loss (nats), gradient norm and learning rate of every step. Raises UpdateRefused, whose sentence begins with
    `who`, when a loss or gradient is not finite.
    """
    schedule = LrSchedule(warmup=config.lr_warmup_steps)
    settings = OptimizerConfig(lr=config.lr, weight_decay=config.weight_decay, schedule=schedule)
    model.model.requires_grad_(True)
    model.model.eval()
    optimizer = adam(model.model, settings, {})
    metrics: list[Metric] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        for number, chosen in enumerate(_order(len(pairs), config)):
            loss = accumulate(model, [pairs[n] for n in chosen], config)
            norm, lr = gradient_norm(optimizer), learning_rate(settings, number)
            if not math.isfinite(loss) or not math.isfinite(norm):
                told = _inspect(model, optimizer, [pairs[n] for n in chosen], config)
                raise UpdateRefused(
                    f"{who}: step {number + 1}: loss {loss}, gradient norm {norm}; lower `lr`",
                    {"what": "loss" if not math.isfinite(loss) else "gradient norm", "loss": loss, "update": number},
                    told,
                )
            step(optimizer, lr, norm, config.max_grad_norm)
            figures = {"loss": loss, "grad_norm": norm, "lr": lr}
            metrics += [Metric(number + 1, name, value) for name, value in figures.items()]
            tick(0, tokens=sum(len(pairs[n].chosen) + len(pairs[n].rejected) for n in chosen))
            progress(1, f"loss {loss:.4f}")
    model.model.requires_grad_(False)
    return metrics


def _order(count: int, config: PairTraining) -> Iterator[NDArray[np.int64]]:
    """Pairs of each step: every one once per epoch, the last batch of an epoch as it is."""
    for epoch in range(config.epochs):
        order = np.random.default_rng([config.seed, epoch]).permutation(count)
        yield from (order[start : start + config.batch] for start in range(0, count, config.batch))


def accumulate(model: RewardModel, pairs: Sequence[EncodedPair], config: PairTraining) -> float:
    """Adds the gradient of the mean loss over `pairs`, in micro-batches of whole pairs; returns that loss."""
    loss = 0.0
    for part in _micro_batches(pairs, config.micro_tokens):
        rewards = outputs(model, [row for pair in part for row in (pair.chosen, pair.rejected)])
        rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
        mean = bradley_terry(rewards[0::2], rewards[1::2], config.centre).sum() / len(pairs)
        mean.backward()
        loss += float(mean.detach())
    return loss


def _inspect(
    model: RewardModel, optimizer: Adam, pairs: Sequence[EncodedPair], config: PairTraining
) -> list[dict[str, Any]]:
    """Of each pair alone: its tokens, loss (nats) and gradient norm, the worst first. Gradients are cleared."""
    told = []
    for pair in pairs:
        clear(optimizer)
        loss, tokens = accumulate(model, [pair], config), len(pair.chosen) + len(pair.rejected)
        row = {"pair_id": pair.pair_id, "tokens": tokens, "loss": loss, "gradient_norm": gradient_norm(optimizer)}
        told.append(row)
    clear(optimizer)
    return sorted(told, key=worst_first)


def margins(who: str, model: RewardModel, pairs: Sequence[EncodedPair]) -> list[float]:
    """Output for chosen minus output for rejected, by pair, as the scorer would compute them.

    Raises RollwayError, whose sentence begins with `who`, where an output is not finite.
    """
    rewards = _finite(who, model, [row for pair in pairs for row in (pair.chosen, pair.rejected)])
    return [c - r for c, r in zip(rewards[0::2], rewards[1::2], strict=True)]


def moments(who: str, model: RewardModel, pairs: Sequence[EncodedPair]) -> tuple[float, float]:
    """Mean and standard deviation (ddof 1) of the outputs over the pairs' distinct rows; raises as `margins` does."""
    rows = sorted({tuple(row) for pair in pairs for row in (pair.chosen, pair.rejected)})
    rewards = np.asarray(_finite(who, model, rows))
    return float(rewards.mean()), float(rewards.std(ddof=1))


def _finite(who: str, model: RewardModel, rows: Sequence[Sequence[int]]) -> list[float]:
    rewards = measure(model, rows, MEASURE_BATCH)
    if not np.isfinite(rewards).all():
        raise RollwayError(f"{who}: after training its outputs are not finite; lower `lr`")
    return rewards


def _micro_batches(pairs: Sequence[EncodedPair], micro_tokens: int) -> list[list[EncodedPair]]:
    """Pairs of like length together, longest first; a pair that is too long by itself is one by itself."""
    batches: list[list[EncodedPair]] = []
    for pair in sorted(pairs, key=lambda pair: -pair.width):
        if batches and 2 * batches[-1][0].width * (len(batches[-1]) + 1) <= micro_tokens:
            batches[-1].append(pair)
        else:
            batches.append([pair])
    return batches
