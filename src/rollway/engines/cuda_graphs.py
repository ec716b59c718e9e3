"""Decoding steps recorded as CUDA graphs: the hundreds of kernels of a step are then started by one call.

A graph holds addresses and shapes, so there is one per number of rows and of tokens looked at. The caller keeps both
few: it drops rows by halves and looks at multiples of `TOKENS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Step = Callable[[Tensor, Tensor, int], Tensor]
"""tokens [B], lengths [B], tokens looked at -> states [B, H]; writes to the cache in place."""

TOKENS = 256
DENSE = ("llama", "qwen2", "qwen3")
"""Architectures whose step asks the GPU for no number: of a mixture of experts, say, it could not be recorded."""
PLAIN_ROPE = ("default", "linear", "llama3", "yarn")


def recordable(model: PreTrainedModel) -> bool:
    if model.device.type != "cuda" or model.config.model_type not in DENSE:
        return False
    # A LoRA's modules are as dense as what they wrap.
    return model.config.rope_parameters["rope_type"] in PLAIN_ROPE


@dataclass(frozen=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    tokens: Tensor
    lengths: Tensor
    states: Tensor


class GraphedSteps:
    """Records a step the first time its shapes are seen and replays it from then on."""

    def __init__(self) -> None:
        self.graphs: dict[tuple[int, int], _Graph] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step, tokens: Tensor, lengths: Tensor, view: int) -> Tensor:
        """The states are overwritten by the next call of the same shapes."""
        key = (len(tokens), view)
        if key not in self.graphs:
            self.graphs[key] = self._record(step, tokens, lengths, view)
        recorded = self.graphs[key]
        recorded.tokens.copy_(tokens)
        recorded.lengths.copy_(lengths)
        recorded.graph.replay()
        return recorded.states

    def forget(self) -> None:
        """To be called when the cache has moved."""
        self.graphs.clear()

    def _record(self, step: Step, tokens: Tensor, lengths: Tensor, view: int) -> _Graph:
        tokens, lengths = tokens.clone(), lengths.clone()
        # Libraries allocate their workspaces in a first run, which must not be recorded. It writes what the replay
        # writes again.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step(tokens, lengths, view)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            states = step(tokens, lengths, view)
        return _Graph(graph, tokens, lengths, states)
