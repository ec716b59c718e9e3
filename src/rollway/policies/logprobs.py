"""Log-probabilities and entropies of given tokens under a causal language model.

Rows are right-padded, or packed (see `layout`). Under a causal mask a position sees nothing to its right, so padding
needs no mask of its own and position ids are the usual 0, 1, 2, ...; tests compare with rows one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rollway.errors import RollwayError
from rollway.policies.head import Head
from rollway.policies.layout import Layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Row:
    """A prompt of at least one token, and the tokens whose log-probs are wanted."""

    prompt_tokens: Sequence[int]
    tokens: Sequence[int]

    @property
    def length(self) -> int:
        return len(self.prompt_tokens) + len(self.tokens)


@dataclass
class TokenLogprobs:
    """Per-token quantities in the order of the rows, float32, 0 beyond a row's end."""

    logp: Tensor
    """[N, T] log-probability of the token at `temperature`, nats."""
    entropy: Tensor | None = None
    """[N, T] full-vocabulary entropy at temperature 1, nats."""
    extra: Tensor | None = None
    """[N, T] log-probability at `extra_temperature`, nats."""
    hidden: Tensor | None = None
    """[N, T, H] hidden state that the token was predicted from (after the final norm), in the model's dtype."""
    at: Tensor | None = None
    """[N, T, J] log-probabilities of other tokens, `Others`, nats."""
    observed: dict[str, Tensor] = field(default_factory=dict)
    """[N, T, ...] what `observe` made."""


@dataclass(frozen=True)
class Others:
    """Tokens [N, T, J] whose log-probs are wanted beside the row's own, and at which temperature."""

    ids: Tensor
    temperature: float = 1.0


Observe = Callable[[Head, Tensor, Tensor], dict[str, Tensor]]
"""From the output layer, hidden states [K, H] and tokens [K] of a pass, in the rows' order, to tensors [K, ...]."""


def micro_batches(rows: Sequence[Row], layout: Layout) -> list[list[int]]:
    """Cuts rows into forward passes of at most `layout.tokens` tokens; indices refer to `rows`."""
    return layout.cut([_fed(len(row.prompt_tokens), len(row.tokens)) for row in rows])


def _fed(prompt: int, tokens: int) -> int:
    """Tokens of a row that the model reads: nothing follows from the last one."""
    return max(1, prompt + tokens - 1)


def token_logprobs(
    model: PreTrainedModel,
    rows: Sequence[Row],
    *,
    temperature: float,
    micro_tokens: int,
    entropy: bool = False,
    extra_temperature: float | None = None,
    hidden: bool = False,
    grad: bool = False,
    packed: bool | None = None,
) -> TokenLogprobs:
    """`forward_logprobs` over micro-batches, in the rows' own order; T is the longest completion.

    Without `grad` in evaluation mode (no dropout) and without gradients. With `grad` in the model's own mode, and the
    graphs of all micro-batches are kept: for small batches; otherwise loop over `micro_batches` and `forward_logprobs`.
    `packed`: None leaves it to `Layout.of`, which takes what is faster.
    """
    width = max((len(row.tokens) for row in rows), default=0)
    layout = Layout.of(model, micro_tokens)
    if packed is not None:
        layout = replace(layout, packed=packed)
    was_training = model.training
    model.train(was_training and grad)
    try:
        with nullcontext() if grad else torch.no_grad():
            parts, order = [], []
            for indices in micro_batches(rows, layout):
                parts.append(
                    forward_logprobs(
                        model,
                        [rows[i] for i in indices],
                        temperature=temperature,
                        entropy=entropy,
                        extra_temperature=extra_temperature,
                        hidden=hidden,
                        packed=layout.packed,
                        width=width,
                    )
                )
                order += indices
            return _concatenate(parts, order, model.device)
    finally:
        model.train(was_training)


def forward_logprobs(
    model: PreTrainedModel,
    rows: Sequence[Row],
    *,
    temperature: float,
    entropy: bool = False,
    extra_temperature: float | None = None,
    hidden: bool = False,
    packed: bool = False,
    width: int | None = None,
    others: Others | None = None,
    observe: Observe | None = None,
) -> TokenLogprobs:
    """One forward over `rows`; gradients flow where they are enabled. Result [N, `width` or the longest completion].

    `others` asks for more log-probs per position, in the same pass over the vocabulary; `observe` for anything else
    that follows from the hidden states. Logits are float32 whatever the model's dtype, only those of completion
    positions are computed, and never more than `head.LOGIT_ELEMENTS` at once. Temperature divides logits. `packed` puts
    the rows one after another into a single sequence whose attention is block-diagonal.
    Raises RollwayError when a prompt is empty.
    """
    width = max((len(row.tokens) for row in rows), default=0) if width is None else width
    states, targets, place = completion_states(model, rows, packed, width)
    temperatures = (temperature,) if extra_temperature is None else (temperature, extra_temperature)
    head, shape = Head.of(model), (len(rows), width)
    ids = targets.new_empty(len(targets), 0) if others is None else others.ids.flatten(0, 1)[place]
    at_temperature = 1.0 if others is None else others.temperature
    logps, spread, at = head.values_at(states, targets, temperatures, entropy, ids, at_temperature)
    seen = {} if observe is None else observe(head, states, targets)
    return TokenLogprobs(
        _scatter(logps[0], place, shape),
        None if spread is None else _scatter(spread, place, shape),
        None if extra_temperature is None else _scatter(logps[1], place, shape),
        _scatter(states, place, shape) if hidden else None,
        None if others is None else _scatter(at, place, shape),
        {name: _scatter(x, place, shape) for name, x in seen.items()},
    )


def hidden_states(model: PreTrainedModel, rows: Sequence[Row], *, width: int | None = None) -> Tensor:
    """[N, T, H]: the hidden state that each completion token is predicted from, 0 beyond a row's end."""
    width = max((len(row.tokens) for row in rows), default=0) if width is None else width
    states, _, place = completion_states(model, rows, False, width)
    return _scatter(states, place, (len(rows), width))


def decoder(model: PreTrainedModel) -> torch.nn.Module:
    """The model without its output layer."""
    return model.get_decoder()


def completion_states(
    model: PreTrainedModel, rows: Sequence[Row], packed: bool, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [K, H] that predict the K completion tokens, these tokens [K], their flat places in [N, width]."""
    prompts = np.array([len(row.prompt_tokens) for row in rows], dtype=np.int64)
    counts = np.array([len(row.tokens) for row in rows], dtype=np.int64)
    if (prompts == 0).any():
        raise RollwayError(
            f"row {int(prompts.argmin())} has an empty prompt: its first token has nothing to follow from"
        )
    lengths = prompts + counts
    fed = np.maximum(1, lengths - 1)
    parts = [part for row in rows for part in (row.prompt_tokens, row.tokens)]
    flat = np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])
    starts = np.cumsum(lengths) - lengths
    row_of = np.repeat(np.arange(len(rows)), counts)
    offset = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    targets = flat[starts[row_of] + prompts[row_of] + offset]
    own = np.arange(fed.sum()) - np.repeat(np.cumsum(fed) - fed, fed)
    read = flat[np.repeat(starts, fed) + own]
    if packed:
        # A sequence starts anew where positions do: transformers masks by that in every implementation of attention.
        output = decoder(model)(input_ids=_to(read[None], model), position_ids=_to(own[None], model), use_cache=False)
        source = (np.cumsum(fed) - fed)[row_of] + prompts[row_of] + offset - 1
    else:
        longest = int(fed.max())
        padded = np.zeros((len(rows), longest), dtype=np.int64)
        padded[np.arange(longest) < fed[:, None]] = read
        output = decoder(model)(input_ids=_to(padded, model), use_cache=False)
        source = row_of * longest + prompts[row_of] + offset - 1
    states = output.last_hidden_state
    states = states.reshape(-1, states.shape[-1])[_to(source, model)]
    return states, _to(targets, model), _to(row_of * width + offset, model)


def _scatter(values: Tensor, place: Tensor, shape: tuple[int, int]) -> Tensor:
    flat = values.new_zeros((math.prod(shape), *values.shape[1:]))
    return flat.index_copy(0, place, values).reshape(*shape, *values.shape[1:])


def _concatenate(parts: list[TokenLogprobs], order: list[int], device: torch.device) -> TokenLogprobs:
    if not parts:
        return TokenLogprobs(torch.zeros(0, 0, device=device))
    inverse = torch.empty(len(order), dtype=torch.long, device=device)
    inverse[torch.tensor(order, device=device)] = torch.arange(len(order), device=device)

    def joined(values: list[Tensor | None]) -> Tensor | None:
        present = [value for value in values if value is not None]
        return torch.cat(present)[inverse] if present else None

    return TokenLogprobs(
        torch.cat([p.logp for p in parts])[inverse],
        joined([p.entropy for p in parts]),
        joined([p.extra for p in parts]),
        joined([p.hidden for p in parts]),
    )


def _to(array: np.ndarray, model: PreTrainedModel) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(model.device)
