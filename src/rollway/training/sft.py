"""Supervised training on demonstrations: the warm-up that gives rewards something to teach."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rollway.config.policies import DemonstrationNoise, SftConfig
from rollway.config.training import OptimizerConfig
from rollway.errors import RollwayError
from rollway.policies.layout import Layout
from rollway.policies.logprobs import Row, forward_logprobs, micro_batches
from rollway.policies.tokenizers import encode_completions
from rollway.runtime.notice import tick
from rollway.training.guards import UpdateRefused, worst_first
from rollway.training.metrics import Metric
from rollway.training.optimizer import Adam, adam, clear, gradient_norm, step

MICRO_TOKENS = 16384
WINDOW = 8
"""Batches drawn together and sorted by length among themselves, so that little is padding."""
REPORT_EVERY = 10
_ORDER, _BUCKETS, _NOISE = 0, 1, 2


@dataclass(frozen=True)
class Demonstration:
    """A prompt as token ids and the full solution as text."""

    prompt_id: str
    prompt_tokens: Sequence[int]
    text: str
    noisy: bool = True
    """Whether `SftConfig.noise` may put mistakes into it."""


def sft(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Demonstration],
    config: SftConfig,
    *,
    seed: int,
    context: int | None = None,
    progress: Callable[[int, str], None] = lambda steps, info: None,
) -> list[Metric]:
    """Trains `model` in place for `config.steps` steps: -log p, mean over completion tokens and end token.

    What step s sees is a function of (seed, s) alone. `context`: longest row in tokens, checked. Returns the loss (nats
    per token), gradient norm and learning rate, each a mean over REPORT_EVERY steps.
    Raises RollwayError for an empty or overlong demonstration, and UpdateRefused when a loss or gradient is not finite.
    """
    encoded = _encode(tokenizer, demonstrations, context)
    alphabet = letters(d.text for d in demonstrations)
    optimizer = adam(model, OptimizerConfig(weight_decay=config.weight_decay), {})
    metrics: list[Metric] = []
    recent: list[tuple[float, float, float]] = []
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for number, chosen in enumerate(order([row.length for row in encoded], config, seed)):
            rows = [encoded[n] for n in chosen]
            if config.noise.wrong_share > 0.0:
                rng = np.random.default_rng([seed, _NOISE, number])
                shown = [demonstrations[n] for n in chosen]
                made = [corrupt(d.text, alphabet, config.noise, rng) for d in shown]
                texts = [text if d.noisy else d.text for d, text in zip(shown, made, strict=True)]
                again = encode_completions(tokenizer, texts)
                rows = [Row(row.prompt_tokens, tokens) for row, tokens in zip(rows, again, strict=True)]
            lr = config.lr * min(1.0, (number + 1) / (config.lr_warmup_steps + 1))
            loss = _accumulate(model, rows)
            norm = gradient_norm(optimizer)
            if not (np.isfinite(loss) and np.isfinite(norm)):
                seen = _inspect(model, optimizer, rows)
                ids = [demonstrations[n].prompt_id for n in chosen]
                told = [{"prompt_id": name, **row} for name, row in zip(ids, seen, strict=True)]
                raise UpdateRefused(
                    f"warm-up step {number}: loss {loss}, gradient norm {norm}; lower sft.lr, or look at the "
                    f"demonstrations of prompts {', '.join(ids[:3])}, ...",
                    {"what": "loss" if not np.isfinite(loss) else "gradient norm", "loss": loss, "update": number},
                    sorted(told, key=worst_first),
                )
            step(optimizer, lr, norm, config.max_grad_norm)
            recent.append((loss, norm, lr))
            tick(0, tokens=sum(row.length for row in rows))
            if len(recent) == REPORT_EVERY or number + 1 == config.steps:
                means = np.mean(recent, axis=0)
                names = ("loss", "grad_norm", "lr")
                metrics += [Metric(number + 1, n, float(v)) for n, v in zip(names, means, strict=True)]
                progress(len(recent), f"loss {means[0]:.4f}")
                recent = []
    model.eval()
    return metrics


def letters(texts: Iterable[str]) -> str:
    """Every character of `texts` once, in order."""
    return "".join(sorted({character for text in texts for character in text}))


def corrupt(text: str, alphabet: str, noise: DemonstrationNoise, rng: np.random.Generator) -> str:
    """With probability `noise.wrong_share`, `text` with one character replaced by another of `alphabet`."""
    wrong, place, pick = rng.random(3)
    others = [c for c in alphabet if c != text[int(place * len(text))]]
    if wrong >= noise.wrong_share or not others:
        return text
    at = int(place * len(text))
    return text[:at] + others[int(pick * len(others))] + text[at + 1 :]


def order(lengths: Sequence[int], config: SftConfig, seed: int) -> Iterator[NDArray[np.int64]]:
    """Demonstrations of each step: every one once per epoch, rows of similar length together within WINDOW steps."""
    size, left, epoch, window = config.batch, config.steps, 0, 0
    queue = np.empty(0, dtype=np.int64)
    while left > 0:
        wanted = size * min(WINDOW, left)
        while len(queue) < wanted:
            queue = np.concatenate([queue, np.random.default_rng([seed, _ORDER, epoch]).permutation(len(lengths))])
            epoch += 1
        drawn, queue = queue[:wanted], queue[wanted:]
        drawn = drawn[np.argsort(np.asarray(lengths)[drawn], kind="stable")]
        batches = drawn.reshape(-1, size)
        yield from batches[np.random.default_rng([seed, _BUCKETS, window]).permutation(len(batches))]
        left -= len(batches)
        window += 1


def _accumulate(model: PreTrainedModel, rows: list[Row]) -> float:
    """Gradient of the mean loss over all the rows' completion tokens; returns that loss."""
    total = sum(len(row.tokens) for row in rows)
    loss = 0.0
    layout = Layout.of(model, MICRO_TOKENS)
    for micro in micro_batches(rows, layout):
        seen = forward_logprobs(model, [rows[n] for n in micro], temperature=1.0, packed=layout.packed)
        part = -seen.logp.sum() / total
        part.backward()
        loss += float(part.detach())
    return loss


def _inspect(model: PreTrainedModel, optimizer: Adam, rows: list[Row]) -> list[dict[str, Any]]:
    """Of each row alone: its tokens, loss (nats per token) and gradient norm. Gradients are cleared."""
    told = []
    for row in rows:
        clear(optimizer)
        loss = _accumulate(model, [row])
        told.append({"tokens": len(row.tokens), "loss": loss, "gradient_norm": gradient_norm(optimizer)})
    clear(optimizer)
    return told


def _encode(
    tokenizer: PreTrainedTokenizerBase, demonstrations: Sequence[Demonstration], context: int | None
) -> list[Row]:
    if not demonstrations:
        raise RollwayError("warm-up: the task's train split has no demonstrations; set tasks.*.demonstration or answer")
    out = []
    for d, tokens in zip(demonstrations, encode_completions(tokenizer, [d.text for d in demonstrations]), strict=True):
        if not d.text:
            raise RollwayError(f"warm-up: the demonstration of prompt {d.prompt_id} is empty; mend or drop it")
        row = Row(d.prompt_tokens, tokens)
        if context is not None and row.length > context:
            raise RollwayError(
                f"warm-up: prompt {d.prompt_id} and its demonstration have {row.length} tokens, "
                f"the policy's context is {context}; raise policy.context or shorten the demonstration"
            )
        out.append(row)
    return out
