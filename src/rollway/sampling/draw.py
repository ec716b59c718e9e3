"""Draws tokens from logits, with the log-probability of the distribution that was really sampled."""

import math

import torch
from torch import Tensor

from rollway.config.rollouts import Sampling

ELEMENTS = {"cpu": 2**22, "cuda": 2**25}
"""Most numbers of an array that is made on the way (32 MiB and 256 MiB in float64): a large vocabulary is drawn from in
slices of rows. Two such arrays exist at a time, under top-k or top-p up to eight, with a teacher's share up to six."""


def draw(
    logits: Tensor, uniforms: Tensor, sampling: Sampling, teacher: tuple[Tensor, float] | None = None
) -> tuple[Tensor, Tensor]:
    """Inverse-CDF sampling in float64. logits [B, V], uniforms [B] in (0, 1) -> tokens [B], logp [B] float64 (nats).

    `logp` is the log-probability at the sampling temperature, after top-k and top-p truncation and renormalisation.
    Temperature 0 takes the argmax; its `logp` is that of temperature 1 without truncation. Where logits hold NaN or
    +inf, `logp` is NaN. teacher: logits [B, W] of another model and its share; both are then drawn from (`mixture`),
    and `logp` is the mixture's.
    """
    if teacher is not None:
        other, share = teacher
        parts = [
            _draw(mixture(a, b, share, sampling.temperature), u, sampling)
            for a, b, u in zip(*(x.split(_rows(logits)) for x in (logits, other, uniforms)), strict=True)
        ]
        return torch.cat([tokens for tokens, _ in parts]), torch.cat([logp for _, logp in parts])
    rows = _rows(logits)
    if len(logits) <= rows:
        return _draw(logits, uniforms, sampling)
    parts = [_draw(*part, sampling) for part in zip(logits.split(rows), uniforms.split(rows), strict=True)]
    return torch.cat([tokens for tokens, _ in parts]), torch.cat([logp for _, logp in parts])


def mixture(logits: Tensor, other: Tensor, share: float, temperature: float) -> Tensor:
    """Logits [B, V] float64 of which the softmax at `temperature` is share x other's + (1 - share) x the first's.

    logits [B, V], other [B, W]: rows of padding that one output layer has and the other has not hold no token, so what
    `other` has beyond V is left out, and what it lacks is impossible to it.
    """
    vocabulary = logits.shape[-1]
    own = (logits.double() / temperature).log_softmax(dim=-1)
    theirs = (other[:, :vocabulary].double() / temperature).log_softmax(dim=-1)
    theirs = torch.nn.functional.pad(theirs, (0, vocabulary - theirs.shape[-1]), value=-torch.inf)
    return temperature * torch.logaddexp(theirs + math.log(share), own + math.log1p(-share))


def _rows(logits: Tensor) -> int:
    """Rows of a slice."""
    return max(1, ELEMENTS.get(logits.device.type, ELEMENTS["cuda"]) // logits.shape[-1])


def _draw(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    if sampling.temperature == 0.0:
        tokens = logits.argmax(dim=-1)
        return tokens, logits.double().log_softmax(dim=-1).gather(1, tokens[:, None]).squeeze(1)
    if _truncates(sampling, logits.shape[-1]):
        scores = log_distribution(logits, sampling)
    else:
        scores = logits.double() / sampling.temperature
    largest = scores.amax(dim=-1, keepdim=True)
    cumulative = (scores - largest).exp_().cumsum_(dim=-1)
    total = cumulative[:, -1:]
    # Thresholds scaled by the total never fall beyond the end, whatever the rounding; NaN does, and is to come out as a
    # log-prob, not as an index that a GPU never recovers from.
    tokens = torch.searchsorted(cumulative, uniforms[:, None].double() * total, right=True)
    tokens.clamp_(max=logits.shape[-1] - 1)
    return tokens.squeeze(1), (scores.gather(1, tokens) - largest - total.log()).squeeze(1)


def _truncates(sampling: Sampling, vocabulary: int) -> bool:
    return sampling.top_p < 1.0 or 0 < sampling.top_k < vocabulary


def log_distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """Log-probabilities [B, V] float64 of the sampled distribution at temperature > 0; -inf outside its support.

    Order as in the field's engines: temperature, top-k, then top-p (the smallest set of most likely tokens whose mass
    reaches top_p; ties go to the smaller token id).
    """
    scaled = logits.double() / sampling.temperature
    vocabulary = logits.shape[-1]
    if not _truncates(sampling, vocabulary):
        return scaled.log_softmax(dim=-1)
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    if 0 < sampling.top_k < vocabulary:
        ordered[:, sampling.top_k :] = -torch.inf
    if sampling.top_p < 1.0:
        mass = ordered.softmax(dim=-1)
        ordered = ordered.masked_fill(mass.cumsum(dim=-1) - mass >= sampling.top_p, -torch.inf)
    return torch.full_like(scaled, -torch.inf).scatter(1, order, ordered.log_softmax(dim=-1))


def entropy(logits: Tensor) -> Tensor:
    """Entropy of the full distribution at temperature 1. logits [B, V] -> [B], nats."""
    parts = []
    for part in logits.split(_rows(logits)):
        logp = part.float().log_softmax(dim=-1)
        parts.append(-(logp.exp() * logp).sum(dim=-1))
    return parts[0] if len(parts) == 1 else torch.cat(parts)
