"""Which cache a model decodes right with: tried on a few tokens before anything is sampled.

Architectures differ in what they cache and in what they ignore without a word: a state-space model that is not handed
its state samples from one token of context. So the states of two short rows, decoded token by token, are compared with
those of the same rows read at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rollway.engines.kv_cache import EqualCache, SlotCache, may_share_slots
from rollway.errors import RollwayError, is_out_of_memory
from rollway.policies.causal_lm import context_length
from rollway.policies.logprobs import decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STEPS = 4
SHORT, LONG = 3, 12
"""Tokens of the two prompts."""
WINDOWS = ("sliding_window", "window_size", "attention_chunk_size")
"""Settings of attention that sees a part of the row alone; the longer prompt is longer than such a window."""
LONGEST = 1100
"""Most tokens of a prompt: windows that are wider are not tried."""
FULL, HALF = 1e-3, 0.1
"""Largest norm of a difference, relative to the state's own, in float32 and float64, and in half precision. A cache
that is not read is wrong by a third and more."""


def takes_slots(model: PreTrainedModel) -> bool:
    """Whether rows of different lengths may share a batch (SlotCache); else the model's own cache decodes (EqualCache).

    Raises RollwayError where neither gives the states of the row read at once, and what torch does when memory runs
    out. The model is in evaluation mode.
    """
    rows = _rows(model)
    if may_share_slots(model) and _differs(model, rows, _by_slots) is None:
        return True
    # Rows of one length: the longer one, and the same with another first token.
    long = max(rows, key=len)
    why = _differs(model, [long, [long[1], *long[1:]]], _by_own_cache)
    if why is not None:
        raise RollwayError(
            f"rollout.engine: transformers does not decode {model.config.model_type} token by token as rollway asks it "
            f"to ({why}); use `rollout.engine: {{kind: vllm}}` if vLLM knows this architecture, or another model"
        )
    return False


def _rows(model: PreTrainedModel) -> list[list[int]]:
    """Prompts of two lengths with STEPS tokens each behind them."""
    settings = model.config.get_text_config().to_dict()
    windows = [size for name in WINDOWS if isinstance(size := settings.get(name), int) and size < LONGEST - 8]
    long = max([LONG, *(size + 6 for size in windows)])
    most = context_length(model)
    sizes = (long if most is None else max(SHORT + 1, min(long, most - STEPS)), SHORT)
    return [[(7 * n + 3 * k + 1) % settings["vocab_size"] for k in range(size + STEPS)] for n, size in enumerate(sizes)]


def _differs(
    model: PreTrainedModel, rows: list[list[int]], decoded: Callable[[PreTrainedModel, list[Tensor]], list[Tensor]]
) -> str | None:
    """What is wrong with the states of the rows as `decoded` gives them; None where nothing is."""
    ids = [torch.tensor(row, device=model.device) for row in rows]
    try:
        found = decoded(model, ids)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        first = str(error).strip().partition("\n")[0]
        return f"{type(error).__name__}: {first}"[:200]
    limit = FULL if model.dtype in (torch.float32, torch.float64) else HALF
    for row, states in zip(ids, found, strict=True):
        whole = decoder(model)(input_ids=row[None], use_cache=False).last_hidden_state[0, -STEPS - 1 :].float()
        off = float((states.float() - whole).norm() / whole.norm())
        if not off <= limit:
            return f"after {STEPS} tokens its states are {off:.0%} away from those of the row read at once"
    return None


def _by_slots(model: PreTrainedModel, rows: list[Tensor]) -> list[Tensor]:
    """States [STEPS + 1, H] of each row, side by side in one batch."""
    cache = SlotCache(model, max(map(len, rows)), max(map(len, rows)), None)
    first = []
    for n, row in enumerate(rows):
        slot = torch.tensor([n], device=row.device)
        first.append(cache.prefill(row[None, :-STEPS], torch.zeros_like(slot), slot, len(rows)))
    lengths = np.array([len(row) - STEPS for row in rows])
    states = [torch.cat(first)]
    for step in range(STEPS):
        tokens = torch.stack([row[len(row) - STEPS + step] for row in rows])
        states.append(cache.step(tokens, lengths + step))
    return list(torch.stack(states, dim=1))


def _by_own_cache(model: PreTrainedModel, rows: list[Tensor]) -> list[Tensor]:
    cache = EqualCache(model)
    ids = torch.stack(rows)
    every = torch.arange(len(rows), device=ids.device)
    states = [cache.prefill(ids[:, :-STEPS], every, every, len(rows))]
    lengths = np.full(len(rows), ids.shape[1] - STEPS)
    states += [cache.step(ids[:, ids.shape[1] - STEPS + step], lengths + step) for step in range(STEPS)]
    return list(torch.stack(states, dim=1))
