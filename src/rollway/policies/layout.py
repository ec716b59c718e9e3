"""How rows share a forward pass: in buckets of like length, or one after another in a single packed sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CPU_TOKENS = 2048
"""Most tokens of a pass on the CPU. More gain nothing there: their activations leave the cache, and the allocator gives
blocks of more than 32 MiB back to the system and has them cleared again."""
OVERHEAD = {"cpu": 128, "cuda": 1024}
"""What a pass costs beside its tokens, in tokens: kernel launches and Python. It decides how fine buckets are cut."""
BLOCKWISE = ("flash_attention_2", "flex_attention")
"""Attention that skips what a packed sequence masks out. Others would compute, and hold, a mask of all pairs of tokens:
there buckets are faster (docs/training.md)."""


@dataclass(frozen=True)
class Layout:
    """Chosen for a model by `of`; both forms give the same log-probs and gradients."""

    packed: bool
    tokens: int
    """Most tokens of one pass, padding included; a longer row has one by itself."""
    overhead: int = OVERHEAD["cpu"]

    @staticmethod
    def of(model: PreTrainedModel, micro_tokens: int) -> Layout:
        """Packed where the attention skips other rows' tokens and the model was seen to keep rows apart."""
        device = model.device.type
        most = min(micro_tokens, CPU_TOKENS) if device == "cpu" else micro_tokens
        return Layout(keeps_rows_apart(model), most, OVERHEAD.get(device, OVERHEAD["cuda"]))

    def cut(self, lengths: Sequence[int]) -> list[list[int]]:
        """Row numbers of each pass, longest rows first: the most memory is asked for at once."""
        order = sorted(range(len(lengths)), key=lambda n: (-lengths[n], n))
        widths = [lengths[n] for n in order]
        ends = _filled(widths, self.tokens) if self.packed else _buckets(widths, self.tokens, self.overhead)
        return [order[a:b] for a, b in zip([0, *ends], ends, strict=False)]


def keeps_rows_apart(model: PreTrainedModel) -> bool:
    """Whether rows may be packed: block-wise attention in every layer, and a trial in which no row saw another.

    Sliding windows and linear attention go to buckets, whatever the architecture promises of packed sequences.
    """
    settings: dict[str, Any] = model.config.get_text_config().to_dict()
    if model.config._attn_implementation not in BLOCKWISE or settings.get("sliding_window"):
        return False
    if set(settings.get("layer_types") or ["full_attention"]) != {"full_attention"}:
        return False
    return _trial(model)


@torch.no_grad()
def _trial(model: PreTrainedModel) -> bool:
    """The hidden states of a short row behind another one, against those of the row alone."""
    was_training = model.training
    model.eval()
    ids = torch.arange(1, 13, device=model.device)[None] % model.config.get_text_config().vocab_size
    positions = torch.tensor([[*range(7), *range(5)]], device=model.device)
    run = model.get_decoder()
    behind = run(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state[:, 7:].float()
    alone = run(input_ids=ids[:, 7:], use_cache=False).last_hidden_state.float()
    model.train(was_training)
    tolerance = 1e-4 if model.dtype == torch.float32 else 0.03
    return bool((behind - alone).norm() <= tolerance * alone.norm())


def _filled(lengths: Sequence[int], most: int) -> list[int]:
    """Ends of runs of rows that hold at most `most` tokens together."""
    ends, used = [], 0
    for n, length in enumerate(lengths):
        if used and used + length > most:
            ends.append(n)
            used = 0
        used += length
    return [*ends, len(lengths)] if lengths else []


def _buckets(lengths: Sequence[int], most: int, overhead: int) -> list[int]:
    """Ends of the buckets that cost least: rows times the longest of them, plus `overhead` for each (exact, by dynamic
    programming over `lengths`, which fall)."""
    count = len(lengths)
    best = np.zeros(count + 1, dtype=np.int64)
    ends = np.zeros(count, dtype=np.int64)
    for start in range(count - 1, -1, -1):
        width = max(1, lengths[start])
        last = min(count, start + max(1, most // width))
        costs = width * np.arange(1, last - start + 1) + best[start + 1 : last + 1]
        # Of equal costs the fullest bucket first.
        chosen = len(costs) - 1 - int(costs[::-1].argmin())
        best[start], ends[start] = costs[chosen] + overhead, start + 1 + chosen
    out, at = [], 0
    while at < count:
        at = int(ends[at])
        out.append(at)
    return out
