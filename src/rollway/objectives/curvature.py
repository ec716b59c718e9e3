"""Predicted change of objective and policy by a token's step in the last layer (CAPO, arXiv 2510.00819, official code).

For a token with hidden state h [H], the k largest logits K of W h, pi their softmax, e the sampled token's place in K
(zero outside), v = e - pi, advantage A: gradient g = A v h^T of the rows W_K, direction G (g itself, or Adam's step),
u = G h, d = v.u, F = diag(pi) - pi pi^T. Everything is a constant.

A token is judged by its own step, or a sentence (a whole completion) or a batch by the step of its mean gradient.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Adam's moments per token id, not bias-corrected. ids [J] ascending, first and second [J, H], steps so far."""

    ids: Tensor
    first: Tensor
    second: Tensor
    steps: int
    beta1: float
    beta2: float
    eps: float


@dataclass(frozen=True)
class LastLayer:
    """Of S tokens: the k largest logits' ids [S, k], and v [S, k], probabilities [S, k]."""

    ids: Tensor
    v: Tensor
    probability: Tensor

    def at(self, tokens: Tensor | slice) -> "LastLayer":
        """Of some of the tokens."""
        return LastLayer(self.ids[tokens], self.v[tokens], self.probability[tokens])


def last_layer(hidden: Tensor, lm_head: Tensor, token_ids: Tensor, k: int) -> LastLayer:
    """hidden [S, H], lm_head [V, H], token_ids [S]. Ties of logits go to the lower id."""
    logits = hidden @ lm_head.T
    k = min(k, logits.shape[1])
    values, ids = logits.topk(k, dim=1)
    tied = (logits >= values[:, -1:]).sum(1) > k
    if bool(tied.any()):
        ids[tied] = torch.sort(logits[tied], dim=1, descending=True, stable=True).indices[:, :k]
    probability = logits.gather(1, ids).softmax(1)
    return LastLayer(ids, (ids == token_ids[:, None]).to(probability.dtype) - probability, probability)


def last_layer_in_chunks(hidden: Tensor, lm_head: Tensor, token_ids: Tensor, k: int, chunk: int) -> LastLayer:
    """`last_layer` of any number of tokens, holding the logits [chunk, V] of no more than `chunk` of them at once."""
    parts = [last_layer(h, lm_head, i, k) for h, i in zip(hidden.split(chunk), token_ids.split(chunk), strict=True)]
    return LastLayer(
        torch.cat([p.ids for p in parts]), torch.cat([p.v for p in parts]), torch.cat([p.probability for p in parts])
    )


def predicted_changes(
    layer: LastLayer, hidden: Tensor, advantage: Tensor, lr: float, moments: Moments | None
) -> tuple[Tensor, Tensor]:
    """m_H [S], change of the objective (eq. 4), and m_F [S], of the policy (eq. 5). hidden [S, H], advantage [S].

    moments None, or without a step taken: the direction is the gradient.
    """
    v = layer.v
    if moments is None or moments.steps == 0:
        size = hidden.square().sum(1)
        u = advantage[:, None] * v * size[:, None]
        along = advantage.square() * v.square().sum(1) * size
    else:
        g = (advantage[:, None] * v)[:, :, None] * hidden[:, None, :]
        direction = adam_direction(g, layer.ids, moments)
        u = (direction * hidden[:, None, :]).sum(2)
        along = (g * direction).sum((1, 2))
    square, fisher = _second_order(layer, u)
    m_h = lr * along + 0.5 * lr**2 * advantage * (square - fisher)
    return m_h, 0.5 * lr**2 * square


def joint_changes(
    layer: LastLayer,
    hidden: Tensor,
    advantage: Tensor,
    lr: float,
    moments: Moments | None,
    total: Tensor,
    count: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """m_H [] and m_F [] of S >= 1 tokens that step together: a sentence or a batch (eq. 12; reconstructed).

    The gradient of a row is its mean over the tokens whose K contains it: total / count, the `gradient_sums` of these
    tokens (as in eq. 7). G is made of that, u_t = G[K_t] h_t, d_t = v_t.u_t; the terms of second order are means:
    m_H = lr <g, G> + (lr^2/2) mean_t A_t (d_t^2 - u_t^T F_t u_t), m_F = (lr^2/2) mean_t d_t^2. hidden [S, H],
    advantage [S]. One token gives `predicted_changes`.
    """
    total, count = total.coalesce(), count.coalesce()
    ids, g = total.indices()[0], total.values() / count.values()[:, None]
    direction = g
    if moments is not None and moments.steps > 0:
        direction = adam_direction(g[None], ids[None], moments)[0]
    squares, curved = hidden.new_zeros(()), hidden.new_zeros(())
    for start in range(0, len(hidden), chunk):
        part = slice(start, start + chunk)
        rows = direction[torch.searchsorted(ids, layer.ids[part])]
        square, fisher = _second_order(layer.at(part), (rows * hidden[part, None, :]).sum(2))
        squares = squares + square.sum()
        curved = curved + (advantage[part] * (square - fisher)).sum()
    n = len(hidden)
    m_h = lr * (g * direction).sum() + 0.5 * lr**2 * curved / n
    return m_h, 0.5 * lr**2 * squares / n


def trusted(m_h: Tensor, m_f: Tensor, tau_h: float, tau_f: float, sided: str) -> Tensor:
    """bool: m_F < tau_f and |m_H| < tau_h, or 0 <= m_H < tau_h when one-sided (eq. 6). Strict."""
    inside = m_h.abs() < tau_h if sided == "two" else (m_h >= 0) & (m_h < tau_h)
    return (m_f < tau_f) & inside


def gradient_sums(layer: LastLayer, hidden: Tensor, advantage: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Per token id, the sum of its gradient rows over the tokens given and their number: sparse [V, H] and [V]."""
    ids, of = torch.unique(layer.ids.flatten(), return_inverse=True)
    rows = (advantage[:, None] * layer.v)[:, :, None] * hidden[:, None, :]
    total = hidden.new_zeros(len(ids), hidden.shape[1]).index_add(0, of, rows.flatten(0, 1))
    count = torch.bincount(of, minlength=len(ids)).to(hidden.dtype)
    at = ids[None]
    return (
        torch.sparse_coo_tensor(at, total, (vocabulary, hidden.shape[1]), check_invariants=False),
        torch.sparse_coo_tensor(at, count, (vocabulary,), check_invariants=False),
    )


def next_moments(moments: Moments, total: Tensor, count: Tensor) -> Moments:
    """Moments after a step with the sums of `gradient_sums` over the whole batch (eq. 7); only seen ids decay."""
    total, count = total.coalesce(), count.coalesce()
    seen = total.indices()[0]
    mean = total.values() / count.values()[:, None]
    ids = torch.unique(torch.cat([moments.ids.to(seen.device), seen]))
    first, second = mean.new_zeros(len(ids), mean.shape[1]), mean.new_zeros(len(ids), mean.shape[1])
    if len(moments.ids):
        old = torch.searchsorted(ids, moments.ids.to(seen.device))
        first[old], second[old] = moments.first.to(first), moments.second.to(second)
    new = torch.searchsorted(ids, seen)
    first[new] = moments.beta1 * first[new] + (1 - moments.beta1) * mean
    second[new] = moments.beta2 * second[new] + (1 - moments.beta2) * mean.square()
    return Moments(ids, first, second, moments.steps + 1, moments.beta1, moments.beta2, moments.eps)


def _second_order(layer: LastLayer, u: Tensor) -> tuple[Tensor, Tensor]:
    """d^2 and u^T F u, both [S], for u [S, k]."""
    pi = layer.probability
    fisher = (pi * u.square()).sum(1) - (pi * u).sum(1).square()
    return (layer.v * u).sum(1).square(), fisher


def adam_direction(g: Tensor, ids: Tensor, moments: Moments) -> Tensor:
    """m' / (sqrt(q') + eps) [S, k, H] for gradients g [S, k, H] of the rows ids [S, k] (eq. 2)."""
    first, second = torch.zeros_like(g), torch.zeros_like(g)
    if len(moments.ids):
        known = moments.ids.to(ids.device)
        at = torch.searchsorted(known, ids).clamp(max=len(known) - 1)
        seen = (known[at] == ids)[:, :, None]
        first = torch.where(seen, moments.first.to(g)[at], 0.0)
        second = torch.where(seen, moments.second.to(g)[at], 0.0)
    power = moments.steps + 1
    m = (moments.beta1 * first + (1 - moments.beta1) * g) / (1 - moments.beta1**power)
    q = (moments.beta2 * second + (1 - moments.beta2) * g.square()) / (1 - moments.beta2**power)
    return m / (q.sqrt() + moments.eps)
