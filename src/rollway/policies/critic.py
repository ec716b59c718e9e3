"""A value function: a copy of the policy's backbone with a scalar head, saved as the named policy `critic`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rollway.errors import RollwayError
from rollway.policies import causal_lm
from rollway.policies.layout import Layout
from rollway.policies.logprobs import Row, hidden_states, micro_batches
from rollway.policies.manifest import NamedPolicy, folder_files, named, verify

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEAD = "value_head.safetensors"


class Critic(nn.Module):
    """V(s_t): the value of prompt and completion before token t."""

    def __init__(self, backbone: PreTrainedModel, spec: NamedPolicy) -> None:
        super().__init__()
        self.backbone = backbone
        self.value_head = nn.Linear(backbone.config.get_text_config().hidden_size, 1)
        self.spec = spec

    def forward(self, rows: Sequence[Row], width: int | None = None) -> Tensor:
        """[N, T] float32, 0 beyond a row's end; T is `width` or the longest completion."""
        states = hidden_states(self.backbone, rows, width=width)
        lengths = torch.tensor([len(row.tokens) for row in rows], device=states.device)
        mask = torch.arange(states.shape[1], device=states.device) < lengths[:, None]
        return self.value_head(states.float()).squeeze(-1) * mask


def build_critic(policy: causal_lm.CausalPolicy, seed: int) -> Critic:
    """A trainable copy of the policy's weights (a LoRA folded in) under a new head.

    The head's weights are normal with standard deviation 1 / (H + 1), drawn from `seed`: first values are near 0.
    """
    own = causal_lm.merged(copy.deepcopy(policy))
    spec = replace(own.spec, kind="critic", base=None, revision=None, folder=None, files={})
    critic = Critic(own.model, spec)
    size = critic.value_head.in_features
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        critic.value_head.weight.copy_(torch.randn(1, size, generator=generator) / (size + 1))
        critic.value_head.bias.zero_()
    return _trainable(critic, True)


def save_critic(folder: Path, critic: Critic, name: str = "critic") -> NamedPolicy:
    """Writes `folder`/weights/`name` and returns its entry for policy.json in `folder`."""
    target = folder / "weights" / name
    with causal_lm.whole_folder(target) as temporary:
        causal_lm.save_model(temporary, critic.backbone)
        save_file(critic.value_head.state_dict(), temporary / HEAD, metadata={"format": "pt"})
    return replace(critic.spec, folder=f"weights/{name}", files=folder_files(target))


def load_critic(policy_json: Path, name: str = "critic", *, train: bool = False, device: str | None = None) -> Critic:
    """Loads a critic after checking the digests of its files. Raises RollwayError as `causal_lm.load` does."""
    spec = named(policy_json, verify(policy_json, name), name)
    if spec.kind != "critic" or spec.folder is None:
        raise RollwayError(f"{policy_json}: policy {name!r} is a language model, not a critic")
    folder = policy_json.parent / spec.folder
    critic = Critic(causal_lm.load_model(folder, spec), spec)
    critic.value_head.load_state_dict(
        causal_lm.read_tensors(folder / HEAD, {n: tuple(t.shape) for n, t in critic.value_head.state_dict().items()})
    )
    critic.to(device or causal_lm.default_device())
    return _trainable(critic, train)


def values(critic: Critic, rows: Sequence[Row], *, micro_tokens: int) -> Tensor:
    """[N, T] values without gradients, in the rows' order."""
    width = max((len(row.tokens) for row in rows), default=0)
    result = torch.zeros(len(rows), width, device=critic.value_head.weight.device)
    with torch.no_grad():
        for indices in micro_batches(rows, replace(Layout.of(critic.backbone, micro_tokens), packed=False)):
            result[torch.tensor(indices, device=result.device)] = critic([rows[i] for i in indices], width)
    return result


def _trainable(critic: Critic, train: bool) -> Critic:
    critic.value_head.to(critic.backbone.device)
    critic.requires_grad_(train)
    backbone = critic.backbone
    if backbone.get_output_embeddings().weight is not backbone.get_input_embeddings().weight:
        # The language-model head has no part in values: without a gradient it costs no optimiser state.
        backbone.get_output_embeddings().requires_grad_(False)
    if train and critic.spec.gradient_checkpointing:
        backbone.gradient_checkpointing_enable({"use_reentrant": False})
    return critic.train(train)
