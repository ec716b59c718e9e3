"""Key-value caches of a batch whose rows come and go.

`SlotCache` lets rows of different lengths share a batch without left padding: row b's keys lie at 0 .. length[b] - 1,
so positions are those of the row alone. `EqualCache` serves architectures that the first cannot: its rows are of one
length.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from rollway.engines.fused_qwen3 import fused
from rollway.policies.logprobs import decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GROWTH = 1.5
FIRST_TOKENS = 256
"""Tokens of completion that the first allocation has room for."""


def make(model: PreTrainedModel, capacity: int) -> SlotCache | EqualCache:
    """A cache for `model`; `capacity` (tokens per row) is a first guess."""
    layers = DynamicCache(config=model.config).layers
    mixed = (
        all(type(layer) is DynamicLayer for layer in layers)
        and model.config._attn_implementation in ("sdpa", "eager")
        and "position_ids" in inspect.signature(decoder(model).forward).parameters
    )
    return SlotCache(model, capacity) if mixed else EqualCache(model)


class SlotCache:
    """Preallocated keys and values [B, H, C, D] per layer, written in place."""

    mixed = True

    def __init__(self, model: PreTrainedModel, capacity: int) -> None:
        self.model = model
        self.capacity = capacity
        self.layers: list[_SlotLayer] = []
        self.fused = fused(model)

    def prefill(self, prompts: Tensor, source: Tensor, slots: Tensor, batch: int) -> Tensor:
        """Encodes prompts [U, P] once each and puts prompt source[k] into slot slots[k] of `batch` slots.

        Returns the states [U, H] of the last prompt tokens.
        """
        cache = DynamicCache(config=self.model.config)
        output = decoder(self.model)(input_ids=prompts, past_key_values=cache, use_cache=True)
        if not self.layers:
            self.layers = [_SlotLayer(layer.keys, layer.values, batch, self.capacity) for layer in cache.layers]
            self.cache = Cache(layers=self.layers)
        for slot_layer, layer in zip(self.layers, cache.layers, strict=True):
            slot_layer.put(layer.keys, layer.values, source, slots)
        return output.last_hidden_state[:, -1]

    def step(self, tokens: Tensor, lengths: np.ndarray) -> Tensor:
        """Feeds one token per row: tokens [B], lengths [B] of the rows before it. Returns states [B, H]."""
        longest = int(lengths.max())
        if longest >= self.capacity:
            self.capacity = max(longest + 1, int(self.capacity * GROWTH))
            for layer in self.layers:
                layer.grow(self.capacity)
        device, dtype = tokens.device, self.layers[0].keys.dtype
        if longest == int(lengths.min()):
            mask = None
            where: int | Tensor = longest
            positions = torch.full((1,), longest, device=device)
        else:
            where = torch.from_numpy(lengths).to(device)
            positions = where
            beyond = torch.arange(longest + 1, device=device) > positions[:, None]
            mask = torch.zeros(beyond.shape, dtype=dtype, device=device)
            mask = mask.masked_fill_(beyond, torch.finfo(dtype).min)[:, None, None]
        for layer in self.layers:
            layer.where, layer.view = where, longest + 1
        if self.fused is not None:
            return self.fused(tokens, positions, mask, self.layers)
        output = decoder(self.model)(
            input_ids=tokens[:, None],
            position_ids=positions[:, None],
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.last_hidden_state[:, 0]

    def select(self, rows: Tensor) -> None:
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]


class EqualCache:
    """The model's own cache (sliding windows, linear attention, flash attention); all rows have the same length."""

    mixed = False

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def prefill(self, prompts: Tensor, source: Tensor, slots: Tensor, batch: int) -> Tensor:
        """As `SlotCache.prefill`, for a batch that starts anew: `slots` are all of it, in order."""
        self.cache = DynamicCache(config=self.model.config)
        output = decoder(self.model)(input_ids=prompts, past_key_values=self.cache, use_cache=True)
        self.select(source)
        return output.last_hidden_state[:, -1]

    def step(self, tokens: Tensor, lengths: np.ndarray) -> Tensor:
        output = decoder(self.model)(input_ids=tokens[:, None], past_key_values=self.cache, use_cache=True)
        return output.last_hidden_state[:, 0]

    def select(self, rows: Tensor) -> None:
        self.cache.reorder_cache(rows)


class _SlotLayer(CacheLayerMixin):
    def __init__(self, keys: Tensor, values: Tensor, batch: int, capacity: int) -> None:
        super().__init__()
        # Zeros, not empty memory: a NaN that the mask hides would still spoil the product with the attention weights.
        self.keys = keys.new_zeros(batch, keys.shape[1], capacity, keys.shape[3])
        self.values = values.new_zeros(batch, values.shape[1], capacity, values.shape[3])
        self.is_initialized = True
        self.where: int | Tensor = 0
        self.view = 0

    def put(self, keys: Tensor, values: Tensor, source: Tensor, slots: Tensor) -> None:
        length = keys.shape[2]
        self.keys[slots, :, :length] = keys[source]
        self.values[slots, :, :length] = values[source]

    def grow(self, capacity: int) -> None:
        extra = capacity - self.keys.shape[2]
        self.keys = torch.nn.functional.pad(self.keys, (0, 0, 0, extra))
        self.values = torch.nn.functional.pad(self.values, (0, 0, 0, extra))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if isinstance(self.where, int):
            self.keys[:, :, self.where] = key_states[:, :, 0]
            self.values[:, :, self.where] = value_states[:, :, 0]
        else:
            rows = torch.arange(len(self.where), device=self.where.device)
            self.keys[rows, :, self.where] = key_states[:, :, 0]
            self.values[rows, :, self.where] = value_states[:, :, 0]
        return self.keys[:, :, : self.view], self.values[:, :, : self.view]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("slots are allocated before the first update")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.view, 0

    def get_seq_length(self) -> int:
        return self.view - 1

    def get_max_length(self) -> int:
        return self.keys.shape[2]
