"""One decoding step of a small Qwen3 in float32 on the CPU, with projections joined and few passes over memory.

At this size half of a step through the model's own modules is overhead. The mathematics is that of
`transformers.models.qwen3`; a test compares the two. docs/engines.md counts what a step costs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import CacheLayerMixin

LARGEST_HIDDEN = 512
"""Beyond it matrix products dominate, and a joined copy of the weights costs memory."""


@dataclass(frozen=True)
class _Layer:
    """Weights [in, out]; those that follow a norm have its weight multiplied in."""

    qkv: Tensor
    qk_norm: Tensor
    output: Tensor
    gate_up: Tensor
    down: Tensor


class FusedQwen3:
    """A copy of the model's weights as they are now: make one per call of `generate`. Threads may share it."""

    def __init__(self, model: Qwen3ForCausalLM) -> None:
        config, body = model.config, model.model
        self.heads, self.kv_heads, self.size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.intermediate = config.intermediate_size
        self.eps = torch.tensor(config.rms_norm_eps)
        self.embedding, self.norm = body.embed_tokens.weight, body.norm.weight
        # Rotary embedding turns pairs (i, i + size / 2). Side by side a pair is a complex number and turns in one
        # product; query and key are permuted alike, so that attention is the same.
        self.paired = torch.arange(self.size).view(2, -1).t().flatten()
        self.layers = []
        for layer in body.layers:
            attention, mlp = layer.self_attn, layer.mlp
            # Attention divides products by the root of the head's size: the query's norm does.
            q_norm = attention.q_norm.weight[self.paired].expand(self.heads, -1) / math.sqrt(self.size)
            k_norm = attention.k_norm.weight[self.paired].expand(self.kv_heads, -1)
            qkv = [self._pairs(attention.q_proj), self._pairs(attention.k_proj), attention.v_proj.weight]
            self.layers.append(
                _Layer(
                    _transposed(torch.cat(qkv) * layer.input_layernorm.weight),
                    torch.cat([q_norm, k_norm]),
                    _transposed(attention.o_proj.weight),
                    _transposed(
                        torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]) * layer.post_attention_layernorm.weight
                    ),
                    _transposed(mlp.down_proj.weight),
                )
            )
        positions = torch.arange(config.max_position_embeddings)[None]
        cos, sin = body.rotary_emb(self.embedding, positions)
        half = self.size // 2
        self.turns = torch.complex(cos[0, :, None, :half].contiguous(), sin[0, :, None, :half].contiguous())

    def __call__(
        self, tokens: Tensor, positions: Tensor, mask: Tensor | None, caches: Sequence[CacheLayerMixin]
    ) -> Tensor:
        """tokens [B], positions [B] or [1], mask [B, 1, 1, L] additive -> last states [B, H] after the final norm.

        `caches` hold keys in the order of `paired`.
        """
        batch, joined, shared = len(tokens), self.heads + self.kv_heads, self.heads // self.kv_heads
        turns = self.turns[positions]
        if mask is not None:
            mask = mask.expand(batch, self.kv_heads, shared, -1).flatten(0, 1)
        states = functional.embedding(tokens, self.embedding)
        for layer, cache in zip(self.layers, caches, strict=True):
            qkv = torch.mm(self._normed(states), layer.qkv).view(batch, -1, self.size)
            qk = qkv[:, :joined]
            qk.mul_(self._scale(qk)).mul_(layer.qk_norm)
            pairs = torch.view_as_complex(qkv.view(batch, -1, self.size // 2, 2))
            # The query heads that share a key-value head stand where a longer query would have its positions.
            query = torch.view_as_real(pairs[:, : self.heads] * turns).view(-1, shared, self.size)
            key = torch.view_as_real(pairs[:, self.heads : joined] * turns).flatten(2)
            keys, values = cache.update(key[:, :, None], qkv[:, joined:, None])
            keys = keys.flatten(0, 1).transpose(1, 2)
            scores = torch.bmm(query, keys) if mask is None else torch.baddbmm(mask, query, keys)
            mixed = torch.bmm(scores.softmax(dim=-1), values.flatten(0, 1))
            states.addmm_(mixed.view(batch, -1), layer.output)
            gate_up = torch.mm(self._normed(states), layer.gate_up)
            gate, up = gate_up[:, : self.intermediate], gate_up[:, self.intermediate :]
            states.addmm_(functional.silu(gate, inplace=True).mul_(up), layer.down)
        return self._normed(states).mul_(self.norm)

    def _scale(self, states: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
        return torch.addcmul(self.eps, norm, norm, value=1 / states.shape[-1]).rsqrt_()

    def _normed(self, states: Tensor) -> Tensor:
        return states * self._scale(states)

    def _pairs(self, projection: nn.Linear) -> Tensor:
        weight = projection.weight
        return weight.view(-1, self.size, weight.shape[1])[:, self.paired].flatten(0, 1)


def _transposed(weight: Tensor) -> Tensor:
    return weight.t().contiguous()


def fused(model: PreTrainedModel) -> FusedQwen3 | None:
    """None where the model is not a plain small Qwen3 in float32 on the CPU (a LoRA wraps its linear layers, say)."""
    if not isinstance(model, Qwen3ForCausalLM) or model.dtype != torch.float32 or model.device.type != "cpu":
        return None
    config = model.config
    plain = (
        config.hidden_size <= LARGEST_HIDDEN
        and config.hidden_act == "silu"
        and not config.attention_bias
        and config.rope_parameters["rope_type"] == "default"
        and config._attn_implementation == "sdpa"
    )
    if not plain:
        return None
    wrapped = any(
        type(module) is not nn.Linear
        for layer in model.model.layers
        for part, names in ((layer.self_attn, "qkvo"), (layer.mlp, ("gate", "up", "down")))
        for module in (part.get_submodule(f"{name}_proj") for name in names)
    )
    wrapped |= type(model.model.embed_tokens) is not nn.Embedding
    return None if wrapped else FusedQwen3(model)
