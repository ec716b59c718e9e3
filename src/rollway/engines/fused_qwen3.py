"""One decoding step of a small Qwen3 in float32 on the CPU, with projections joined and few operations per layer.

At this size half of a step through the model's own modules is overhead. The mathematics is that of
`transformers.models.qwen3`; a test compares the two.
"""

from __future__ import annotations

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
    input_norm: Tensor
    qkv: Tensor
    qk_norm: Tensor
    output: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor


class FusedQwen3:
    """A copy of the model's weights as they are now: make one per call of `generate`."""

    def __init__(self, model: Qwen3ForCausalLM) -> None:
        config, body = model.config, model.model
        self.heads, self.kv_heads, self.size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.eps = config.rms_norm_eps
        self.embedding, self.norm = body.embed_tokens.weight, body.norm.weight
        self.layers = []
        for layer in body.layers:
            attention, mlp = layer.self_attn, layer.mlp
            q_norm = attention.q_norm.weight.expand(self.heads, -1)
            k_norm = attention.k_norm.weight.expand(self.kv_heads, -1)
            self.layers.append(
                _Layer(
                    layer.input_layernorm.weight,
                    torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]),
                    torch.cat([q_norm, k_norm]),
                    attention.o_proj.weight,
                    layer.post_attention_layernorm.weight,
                    torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
                    mlp.down_proj.weight,
                )
            )
        positions = torch.arange(config.max_position_embeddings)[None]
        cos, sin = body.rotary_emb(self.embedding, positions)
        # rotate_half(x) * sin is x rolled by half its size, times sin with its first half negated.
        sign = torch.ones(self.size)
        sign[: self.size // 2] = -1.0
        self.cos, self.sin = cos[0, :, None], sin[0, :, None] * sign

    def __call__(
        self, tokens: Tensor, positions: Tensor, mask: Tensor | None, caches: Sequence[CacheLayerMixin]
    ) -> Tensor:
        """tokens [B], positions [B] or [1], mask [B, 1, 1, L] additive -> last states [B, H] after the final norm."""
        batch, joined = len(tokens), self.heads + self.kv_heads
        cos, sin = self.cos[positions], self.sin[positions]
        states = functional.embedding(tokens, self.embedding)
        for layer, cache in zip(self.layers, caches, strict=True):
            qkv = functional.linear(self._normed(states, layer.input_norm), layer.qkv)
            qkv = qkv.view(batch, joined + self.kv_heads, self.size)
            qk = functional.rms_norm(qkv[:, :joined], (self.size,), None, self.eps) * layer.qk_norm
            qk = qk * cos + qk.roll(self.size // 2, -1) * sin
            keys, values = cache.update(qk[:, self.heads :, None], qkv[:, joined:, None])
            # The query heads that share a key-value head stand where a longer query would have its positions.
            query = qk[:, : self.heads].reshape(batch, self.kv_heads, -1, self.size)
            mixed = functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
            states = states + functional.linear(mixed.reshape(batch, -1), layer.output)
            gate, up = functional.linear(self._normed(states, layer.mlp_norm), layer.gate_up).chunk(2, dim=-1)
            states = states + functional.linear(functional.silu(gate) * up, layer.down)
        return self._normed(states, self.norm)

    def _normed(self, states: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(states, weight.shape, weight, self.eps)


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
    return None if wrapped else FusedQwen3(model)
