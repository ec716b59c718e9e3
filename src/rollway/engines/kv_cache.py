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

from rollway.engines import cuda_graphs
from rollway.engines.fused_qwen3 import FusedQwen3
from rollway.policies.logprobs import decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GROWTH = 1.25
FIRST_TOKENS = 16
"""Tokens of completion that the first allocation has room for: few rows may get further."""
DROP = 32
"""Ended rows are dropped when they are 1/DROP of the batch: moving others into their places costs a row's step."""
SHARED_PREFIX = 16
"""Tokens that all prompts must begin with for their common beginning to be encoded once."""


def make(
    model: PreTrainedModel, prompt: int, completion: int, fused: FusedQwen3 | None, *, slots: bool
) -> SlotCache | EqualCache:
    """A cache for `model`, for rows of at most so many tokens. `fused` takes the steps in the model's place.

    slots: whether rows of different lengths may share a batch (`decoding_trial.takes_slots`).
    """
    if not slots:
        return EqualCache(model)
    return SlotCache(model, prompt + min(completion, FIRST_TOKENS), prompt + completion, fused)


def may_share_slots(model: PreTrainedModel) -> bool:
    """Whether a model looks as if a SlotCache could serve it."""
    return (
        all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)
        and model.config._attn_implementation in ("sdpa", "eager")
        and "position_ids" in inspect.signature(decoder(model).forward).parameters
    )


class SlotCache:
    """Preallocated keys and values [B, H, C, D] per layer, written in place."""

    mixed = True

    def __init__(self, model: PreTrainedModel, capacity: int, most: int, fused: FusedQwen3 | None) -> None:
        self.model, self.capacity, self.most, self.fused = model, capacity, most, fused
        self.layers: list[_SlotLayer] = []
        self.graphs = cuda_graphs.GraphedSteps() if cuda_graphs.recordable(model) else None
        # Every number of rows is a graph of its own.
        self.drop = DROP if self.graphs is None else 2

    def prefill(self, prompts: Tensor, source: Tensor, slots: Tensor, batch: int) -> Tensor:
        """Encodes prompts [U, P] once each and puts prompt source[k] into slot slots[k] of `batch` slots.

        Returns the states [U, H] of the last prompt tokens.
        """
        states, cache = encode(self.model, prompts)
        if not self.layers:
            self.layers = [_SlotLayer(layer.keys, layer.values, batch, self.capacity) for layer in cache.layers]
            self.cache = Cache(layers=self.layers)
        for slot_layer, layer in zip(self.layers, cache.layers, strict=True):
            keys = layer.keys if self.fused is None else layer.keys[..., self.fused.paired]
            slot_layer.put(keys, layer.values, source, slots)
        return states

    def step(self, tokens: Tensor, lengths: np.ndarray) -> Tensor:
        """Feeds one token per row: tokens [B], lengths [B] of the rows before it. Returns states [B, H]."""
        view = int(lengths.max()) + 1
        if self.graphs is not None:
            view = -(-view // cuda_graphs.TOKENS) * cuda_graphs.TOKENS
        self._reserve(view)
        where = torch.from_numpy(lengths).to(tokens.device)
        if self.graphs is not None:
            for layer in self.layers:
                # A replay runs no Python, and `keep` copies as many tokens as were looked at last.
                layer.view = view
            return self.graphs(self._masked_step, tokens, where, view)
        if lengths.min() == lengths.max():
            for layer in self.layers:
                layer.where, layer.view = view - 1, view
            return self._forward(tokens, where[:1], None)
        return self._masked_step(tokens, where, view)

    def keep(self, rows: np.ndarray) -> None:
        """Slot j takes what slot rows[j] holds; the slots beyond are given up."""
        moved = np.flatnonzero(rows != np.arange(len(rows)))
        for layer in self.layers:
            layer.keep(len(rows), moved, rows[moved])

    def _reserve(self, tokens: int) -> None:
        if tokens <= self.capacity:
            return
        self.capacity = max(tokens, min(self.most, int(self.capacity * GROWTH)))
        for layer in self.layers:
            layer.grow(self.capacity)
        if self.graphs is not None:
            self.graphs.forget()

    def _masked_step(self, tokens: Tensor, lengths: Tensor, view: int) -> Tensor:
        """A step of rows of different lengths [B], less than `view`."""
        dtype = self.layers[0].keys.dtype
        beyond = torch.arange(view, device=lengths.device) > lengths[:, None]
        mask = torch.zeros(beyond.shape, dtype=dtype, device=lengths.device)
        mask = mask.masked_fill_(beyond, torch.finfo(dtype).min)[:, None, None]
        for layer in self.layers:
            layer.where, layer.view = lengths, view
        return self._forward(tokens, lengths, mask)

    def _forward(self, tokens: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
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


class EqualCache:
    """The model's own cache (sliding windows, linear attention, flash attention); all rows have the same length."""

    mixed = False
    drop = 8
    """Every row is copied when some are dropped."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        # State-space models call it so; what they are not asked for by name they ignore.
        taken = inspect.signature(decoder(model).forward).parameters
        self._name = "cache_params" if "cache_params" in taken else "past_key_values"

    def prefill(self, prompts: Tensor, source: Tensor, slots: Tensor, batch: int) -> Tensor:
        """As `SlotCache.prefill`, for a batch that starts anew: `slots` are all of it, in order."""
        self.cache = DynamicCache(config=self.model.config)
        output = decoder(self.model)(input_ids=prompts, use_cache=True, **{self._name: self.cache})
        self.cache.reorder_cache(source)
        return output.last_hidden_state[:, -1]

    def step(self, tokens: Tensor, lengths: np.ndarray) -> Tensor:
        output = decoder(self.model)(input_ids=tokens[:, None], use_cache=True, **{self._name: self.cache})
        return output.last_hidden_state[:, 0]

    def keep(self, rows: np.ndarray) -> None:
        self.cache.reorder_cache(torch.from_numpy(rows).to(self.model.device))


def encode(model: PreTrainedModel, prompts: Tensor) -> tuple[Tensor, DynamicCache]:
    """Prompts [U, P] of one length -> states [U, H] of their last tokens, and their keys and values.

    What they all begin with is encoded once.
    """
    cache = DynamicCache(config=model.config)
    begin = _common(prompts)
    if begin >= SHARED_PREFIX:
        decoder(model)(input_ids=prompts[:1, :begin], past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(prompts))
        prompts = prompts[:, begin:]
    output = decoder(model)(input_ids=prompts, past_key_values=cache, use_cache=True)
    return output.last_hidden_state[:, -1], cache


def _common(prompts: Tensor) -> int:
    """Tokens that all the prompts begin with, at most all but their last one."""
    if len(prompts) == 1:
        return 0
    same = (prompts[:, :-1] == prompts[:1, :-1]).all(dim=0)
    return int(same.long().cumprod(dim=0).sum())


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
        self.view = max(self.view, length)

    def grow(self, capacity: int) -> None:
        extra = capacity - self.keys.shape[2]
        self.keys = torch.nn.functional.pad(self.keys, (0, 0, 0, extra))
        self.values = torch.nn.functional.pad(self.values, (0, 0, 0, extra))

    def keep(self, rows: int, moved: np.ndarray, source: np.ndarray) -> None:
        """Rows go into the places of those that are left out: copying all of them would cost as much as a step."""
        if len(moved):
            to, origin = (torch.from_numpy(places).to(self.keys.device) for places in (moved, source))
            for tensor in (self.keys, self.values):
                used = tensor[:, :, : self.view]
                used[to] = used[origin]
        self.keys, self.values = self.keys[:rows], self.values[:rows]

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
