"""What gate `one_token` asks of every forward pass: candidates of the policy as it is now, and what is counted of them.

A candidate is a function of seed, step, rollout, position and its number, whatever micro-batch the row is in.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rollway.config.objectives import OneTokenGate
from rollway.policies.candidates import draw, of_all, of_drawn
from rollway.policies.head import Head
from rollway.policies.logprobs import Observe
from rollway.sampling import noise
from rollway.training.batch import TrainingRow


def observer(rows: Sequence[TrainingRow], gate: OneTokenGate, temperature: float, seed: int, step: int) -> Observe:
    """For a pass over `rows`: `hit` and `missed` [n] of the batch, with log-probs at logits / temperature.

    seed, step: of the run, and the optimiser step that the pass belongs to.
    """

    def observe(head: Head, states: Tensor, targets: Tensor) -> dict[str, Tensor]:
        if gate.candidates is None:
            counted = of_all(head, states, targets, temperature, gate.kappa)
        else:
            uniform = torch.from_numpy(numbers(rows, gate.candidates, seed, step)).to(states.device)
            ids = draw(head, states.detach(), temperature * gate.kappa, uniform)
            counted = of_drawn(head, states, targets, ids, temperature)
        return {"hit": counted.hit, "missed": counted.missed}

    return observe


def numbers(rows: Sequence[TrainingRow], count: int, seed: int, step: int) -> np.ndarray:
    """Uniform numbers [n, count] in (0, 1), float64, of the rows' tokens one after the other."""
    keys = noise.keys(seed, [f"candidates/{step}/{row.rollout_id}/{row.slot}" for row in rows])
    lengths = [len(row.tokens) for row in rows]
    position = np.concatenate([np.arange(length) for length in lengths]) if rows else np.zeros(0, dtype=np.int64)
    return noise.uniform(np.repeat(keys, lengths)[:, None], position[:, None] * count + np.arange(count))
