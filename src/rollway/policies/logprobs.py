"""Log-probabilities and entropies of given tokens under a causal language model.

Rows are right-padded. Under a causal mask a position sees nothing to its right, so padding needs no mask of its own and
position ids are the usual 0, 1, 2, ...; a test compares with rows one by one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from rollway.errors import RollwayError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGIT_ELEMENTS = 2**25
"""Most logits in memory at once (128 MiB in float32)."""


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


def micro_batches(rows: Sequence[Row], micro_tokens: int, *, packed: bool = False) -> list[list[int]]:
    """Cuts rows into micro-batches of at most `micro_tokens` tokens, padding included; a longer row is one by itself.

    Rows of like length go together, longest first (the most memory is asked for at once). Indices refer to `rows`.
    """
    order = sorted(range(len(rows)), key=lambda i: (-rows[i].length, i))
    batches: list[list[int]] = []
    used = 0
    for i in order:
        if packed:
            fits = bool(batches) and used + rows[i].length <= micro_tokens
        else:
            fits = bool(batches) and rows[batches[-1][0]].length * (len(batches[-1]) + 1) <= micro_tokens
        if fits:
            batches[-1].append(i)
            used += rows[i].length
        else:
            batches.append([i])
            used = rows[i].length
    return batches


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
    packed: bool = False,
) -> TokenLogprobs:
    """`forward_logprobs` over micro-batches, in the rows' own order; T is the longest completion.

    Without `grad` in evaluation mode (no dropout) and without gradients. With `grad` in the model's own mode, and the
    graphs of all micro-batches are kept: for small batches; otherwise loop over `micro_batches` and `forward_logprobs`.
    """
    width = max((len(row.tokens) for row in rows), default=0)
    was_training = model.training
    model.train(was_training and grad)
    try:
        with nullcontext() if grad else torch.no_grad():
            parts, order = [], []
            for indices in micro_batches(rows, micro_tokens, packed=packed):
                parts.append(
                    forward_logprobs(
                        model,
                        [rows[i] for i in indices],
                        temperature=temperature,
                        entropy=entropy,
                        extra_temperature=extra_temperature,
                        hidden=hidden,
                        packed=packed,
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
) -> TokenLogprobs:
    """One forward over `rows`; gradients flow where they are enabled. Result [N, `width` or the longest completion].

    Logits are float32 whatever the model's dtype, only those of completion positions are computed, and never more than
    LOGIT_ELEMENTS at once: larger ones are recomputed in the backward pass. Temperature divides logits. `packed` puts
    the rows one after another into a single sequence whose attention is block-diagonal.
    Raises RollwayError when a prompt is empty.
    """
    width = max((len(row.tokens) for row in rows), default=0) if width is None else width
    states, targets, place = _completion_states(model, rows, packed, width)
    head = Head.of(model)
    chunk = max(1, LOGIT_ELEMENTS // head.weight.shape[0])
    temperatures = (temperature, extra_temperature)
    arguments = [(states[i : i + chunk], targets[i : i + chunk]) for i in range(0, len(targets), chunk)]
    if len(arguments) > 1 and torch.is_grad_enabled():
        parts = [
            checkpoint(_token_values, s, t, head, temperatures, entropy, use_reentrant=False) for s, t in arguments
        ]
    else:
        parts = [_token_values(s, t, head, temperatures, entropy) for s, t in arguments]
    shape = (len(rows), width)

    def padded(values: list[Tensor]) -> Tensor:
        joined = torch.cat(values) if values else states.new_zeros(0, dtype=torch.float32)
        return _scatter(joined, place, shape)

    return TokenLogprobs(
        padded([part["logp"] for part in parts]),
        padded([part["entropy"] for part in parts]) if entropy else None,
        padded([part["extra"] for part in parts]) if extra_temperature is not None else None,
        _scatter(states, place, shape) if hidden else None,
    )


def hidden_states(model: PreTrainedModel, rows: Sequence[Row], *, width: int | None = None) -> Tensor:
    """[N, T, H]: the hidden state that each completion token is predicted from, 0 beyond a row's end."""
    width = max((len(row.tokens) for row in rows), default=0) if width is None else width
    states, _, place = _completion_states(model, rows, False, width)
    return _scatter(states, place, (len(rows), width))


@dataclass(frozen=True)
class Head:
    """The map from hidden states to float32 logits."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None

    @staticmethod
    def of(model: PreTrainedModel) -> Head:
        """The model's output layer, and what some architectures do to logits after it."""
        output = model.get_output_embeddings()
        settings = model.config.get_text_config().to_dict()
        scale = settings.get("logit_scale", 1.0) / settings.get("logits_scaling", 1.0)
        return Head(output.weight, output.bias, scale, settings.get("final_logit_softcapping"))

    def logits(self, states: Tensor) -> Tensor:
        """[K, H] -> [K, V] float32: the product itself is taken in float32, also when weights are half precision."""
        bias = None if self.bias is None else self.bias.float()
        logits = functional.linear(states.float(), self.weight.float(), bias)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


def check_head(model: PreTrainedModel, source: str) -> None:
    """Raises RollwayError when hidden states and `Head` do not give the model's own logits (a rare architecture)."""
    # Own logits are of the model's dtype: half precision differs by its rounding.
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    ids = torch.arange(4, device=model.device)[None] % model.config.get_text_config().vocab_size
    was_training = model.training
    model.eval()
    with torch.no_grad():
        own = model(input_ids=ids, use_cache=False).logits[0].float()
        ours = Head.of(model).logits(decoder(model)(input_ids=ids, use_cache=False).last_hidden_state[0])
    model.train(was_training)
    if own.shape != ours.shape or (own - ours).abs().max() > tolerance * own.abs().max():
        raise RollwayError(f"{source}: {type(model).__name__} changes its logits in a way that rollway does not know")


def decoder(model: PreTrainedModel) -> torch.nn.Module:
    """The model without its output layer."""
    return model.get_decoder()


def _completion_states(
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
    parts = [part for row in rows for part in (row.prompt_tokens, row.tokens)]
    flat = np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    row_of = np.repeat(np.arange(len(rows)), counts)
    offset = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    targets = flat[starts[row_of] + prompts[row_of] + offset]
    if packed:
        output = _packed_forward(model, flat, lengths)
        source = starts[row_of] + prompts[row_of] + offset - 1
    else:
        longest = int(lengths.max())
        padded = np.zeros((len(rows), longest), dtype=np.int64)
        padded[np.arange(longest) < lengths[:, None]] = flat
        output = decoder(model)(input_ids=_to(padded, model), use_cache=False).last_hidden_state
        source = row_of * longest + prompts[row_of] + offset - 1
    states = output.reshape(-1, output.shape[-1])[_to(source, model)]
    return states, _to(targets, model), _to(row_of * width + offset, model)


def _packed_forward(model: PreTrainedModel, flat: np.ndarray, lengths: np.ndarray) -> Tensor:
    positions = np.concatenate([np.arange(n) for n in lengths])
    mask = None
    match model.config._attn_implementation:
        case "sdpa" | "eager":
            # Without a mask of their own these two let every row see the rows before it.
            owner = _to(np.repeat(np.arange(len(lengths)), lengths), model)
            allowed = (owner[:, None] == owner[None, :]).tril()
            mask = torch.zeros(allowed.shape, dtype=model.dtype, device=model.device)
            mask = mask.masked_fill_(~allowed, torch.finfo(model.dtype).min)[None, None]
        case "flash_attention_2":
            pass
        case other:
            raise RollwayError(f"packing is not known to be leak-free under attention {other!r}; use sdpa or eager")
    return decoder(model)(
        input_ids=_to(flat[None], model), position_ids=_to(positions[None], model), attention_mask=mask, use_cache=False
    ).last_hidden_state


def _token_values(
    states: Tensor, targets: Tensor, head: Head, temperatures: tuple[float, float | None], entropy: bool
) -> dict[str, Tensor]:
    logits = head.logits(states)
    first, second = temperatures
    scaled = logits if first == 1.0 else logits / first
    values = {"logp": -functional.cross_entropy(scaled, targets, reduction="none")}
    if second is not None:
        values["extra"] = -functional.cross_entropy(logits / second, targets, reduction="none")
    if entropy:
        normalised = logits.log_softmax(dim=-1)
        values["entropy"] = -(normalised.exp() * normalised).sum(dim=-1)
    return values


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
