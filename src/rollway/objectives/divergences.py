"""Divergences of a policy Q from a teacher P over a vocabulary, from log-probs lp = ln P and lq = ln Q, in nats.

D_f(P || Q) = sum_v Q_v f(u_v), u = P / Q, f convex, f(1) = 0 (arXiv 2604.00626, eq. 2). Everything stays in log space;
log-probs may be -inf. 0 ln 0 = 0, and a divergence that the supports make infinite is +inf. Gradients go to lq; P is a
constant.
"""

import math

import torch
from torch import Tensor

from rollway.config.divergences import (
    Akl,
    Amari,
    Divergence,
    ForwardKl,
    Hellinger2,
    Jeffreys,
    Jsd,
    NeymanChi2,
    PearsonChi2,
    ReverseKl,
    SkewForward,
    SkewReverse,
    ToDi,
    TotalVariation,
)
from rollway.objectives.ratios import LOG_RATIO_CLAMP

TAIL_CLAMP = 1e-7
"""Least probability of the tail: a sum of rounded top-k probabilities may reach 1 or pass it."""


def divergence(lp: Tensor, lq: Tensor, kind: Divergence, clip: float | None = None) -> Tensor:
    """D(P || Q), [..., V] -> [...].

    clip: cap tau on each entry's term; negative terms stay, so that the sum may be negative, and clipped entries have
    no gradient (OPSD, arXiv 2601.18734).
    """
    if isinstance(kind, Akl):
        return _adaptive(lp.detach(), lq, kind.head)
    return clipped_terms(lp, lq, kind, clip).sum(-1)


def clipped_terms(lp: Tensor, lq: Tensor, kind: Divergence, clip: float | None) -> Tensor:
    """min(term, clip) of each entry, [..., V], or the term where clip is None; where the clip acts, 0 is the gradient,
    of an infinite term too."""
    if clip is None:
        return terms(lp, lq, kind)
    with torch.no_grad():
        over = terms(lp, lq, kind) > clip
    # A clamp behind the term would multiply its infinite slope by 0: such entries take no part in the arithmetic.
    return torch.where(over, clip, terms(lp.masked_fill(over, 0.0), lq.masked_fill(over, 0.0), kind))


def terms(lp: Tensor, lq: Tensor, kind: Divergence) -> Tensor:
    """Q f(P / Q) of each entry, [..., V]; of `todi` its two weighted terms. Their gradient sums to that of D."""
    lp = lp.detach()
    # Entries that neither has give 0, and must not put NaN into the gradient.
    dead = (lp == -math.inf) & (lq == -math.inf)
    return torch.where(dead, 0.0, _terms(lp.masked_fill(dead, 0.0), lq.masked_fill(dead, 0.0), kind))


def _terms(lp: Tensor, lq: Tensor, kind: Divergence) -> Tensor:
    match kind:
        case ForwardKl() | Jsd(beta=0.0) | Amari(alpha=1.0):
            return _relative(lp, lq)
        case ReverseKl() | Jsd(beta=1.0) | Amari(alpha=0.0):
            return _relative(lq, lp)
        case Jeffreys():
            return _relative(lp, lq) + _relative(lq, lp)
        case Jsd(beta=b):
            mean = torch.logaddexp(lq + math.log1p(-b), lp + math.log(b))
            return b * _relative(lp, mean) + (1 - b) * _relative(lq, mean)
        case SkewForward(alpha=a):
            return _relative(lp, torch.logaddexp(lp + math.log(a), lq + math.log1p(-a)))
        case SkewReverse(alpha=a):
            return _relative(lq, torch.logaddexp(lp + math.log1p(-a), lq + math.log(a)))
        case Amari(alpha=a):
            return _amari(lp, lq, a)
        case TotalVariation():
            return 0.5 * (lp.exp() - lq.exp()).abs()
        case PearsonChi2():
            return _square(lp, lq)
        case NeymanChi2():
            return _square(lq, lp)
        case Hellinger2():
            return ((0.5 * lp).exp() - (0.5 * lq).exp()).square()
        case ToDi():
            share = torch.sigmoid(lp - lq).detach()
            return share * _relative(lp, lq) + (1 - share) * _relative(lq, lp)
    raise ValueError(f"divergence {kind.kind} has no term per entry")


def advantage(d: Tensor, kind: Divergence) -> Tensor:
    """a(u) = u f'(u) - f(u) - f'(1) of sampled tokens with ln u = d, any shape; a constant for the gradient.

    grad D = -E_{y ~ Q}[a(u(y)) grad ln Q(y)] (eq. 2). The constant f'(1) is a baseline: it makes a(1) = 0, so that
    equal models give no noise. d is clamped to +-20.
    """
    d = d.detach().clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
    match kind:
        case ForwardKl() | Jsd(beta=0.0) | Amari(alpha=1.0):
            return d.expm1()
        case ReverseKl() | Jsd(beta=1.0) | Amari(alpha=0.0):
            return d
        case Jeffreys():
            return d.expm1() + d
        case Jsd(beta=b):
            return (1 - b) * torch.log1p(b * d.expm1())
        case SkewForward(alpha=a):
            return (1 - a) * (d.exp() / (1 + a * d.expm1()) - 1)
        case SkewReverse(alpha=a):
            w = 1 + (1 - a) * d.expm1()
            return w.log() - (1 - a) * (d.exp() / w - 1)
        case Amari(alpha=a):
            return (a * d).expm1() / a
        case TotalVariation():
            return 0.5 * d.sign()
        case PearsonChi2():
            return (2 * d).expm1()
        case NeymanChi2():
            return -2 * (-d).expm1()
        case Hellinger2():
            return (0.5 * d).expm1()
        case ToDi():
            share = torch.sigmoid(d)
            return share * d.exp() - (1 - share) * (1 - d)
    raise ValueError(f"divergence {kind.kind} is not known from sampled tokens")


def sampled_value(d: Tensor, kind: Divergence) -> Tensor:
    """f(u) - f'(1) (u - 1) of sampled tokens with ln u = d: its mean over y ~ Q is D, and it is never negative.

    Of the reverse KL this is k3. A value to look at, not a loss: differentiated directly k1 has a gradient of mean 0,
    and k3 that of the forward KL (eq. 3). d is clamped to +-20.
    """
    d = d.detach().clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
    each = _terms(d, torch.zeros_like(d), kind)
    return each - _slope_at_one(kind) * d.expm1()


def with_tail(logp: Tensor, tail: Tensor | None = None) -> Tensor:
    """[..., K] -> [..., K + 1]: what the K entries leave of the probability, as one more (eq. 4).

    tail: that probability [...], where it is known without the rounding of 1 - sum.
    """
    total = logp.logsumexp(-1, keepdim=True) if tail is None else torch.log1p(-tail)[..., None]
    return torch.cat([logp, (-total.clamp(max=-TAIL_CLAMP).expm1()).log()], dim=-1)


def renormalised(logp: Tensor) -> Tensor:
    """[..., K] -> [..., K]: as if nothing else existed (eq. 4)."""
    return logp - logp.logsumexp(-1, keepdim=True)


def _relative(la: Tensor, lb: Tensor) -> Tensor:
    """a ln(a / b): 0 where a = 0, +inf where b = 0 < a."""
    none = la == -math.inf
    return torch.where(none, 0.0, la.exp() * (la.masked_fill(none, 0.0) - lb.masked_fill(none, 0.0)))


def _square(la: Tensor, lb: Tensor) -> Tensor:
    """(a - b)^2 / b: without cancellation where a is close to b, +inf where b = 0 < a."""
    d = la - lb
    near = d.abs() < 1.0
    close = lb.exp() * torch.where(near, d, 0.0).expm1().square()
    return torch.where(near, close, (2 * la - torch.where(near, 0.0, lb)).exp() - 2 * la.exp() + lb.exp())


def _amari(lp: Tensor, lq: Tensor, a: float) -> Tensor:
    """(P^a Q^(1-a) - a P - (1-a) Q) / (a (a-1)), exact also where a is close to 0 or 1, or P to Q."""
    p, q, d = lp.exp(), lq.exp(), lp - lq
    product = (a * lp + (1 - a) * lq).exp()
    if a <= 0.5:
        near = (a * d).abs() < 0.5
        excess = torch.where(near, q * torch.where(near, a * d, 0.0).expm1(), product - q)
        return (excess - a * (p - q)) / (a * (a - 1))
    b = 1 - a
    near = (b * d).abs() < 0.5
    excess = torch.where(near, p * torch.where(near, -b * d, 0.0).expm1(), product - p)
    return (excess + b * (p - q)) / (a * (a - 1))


def _adaptive(lp: Tensor, lq: Tensor, head: float) -> Tensor:
    """[G_h FKL + G_t RKL] / (G_h + G_t), G the sums of |P - Q| on the teacher's head and tail, constants (eq. 12).

    Where one G is 0 its divergence does not count, be it infinite.
    """
    p = lp.exp()
    order = p.sort(dim=-1, descending=True, stable=True).indices
    sorted_p = p.gather(-1, order)
    # An entry belongs to the head while the mass before it has not reached the bound.
    before = sorted_p.cumsum(-1) - sorted_p
    inside = torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, before < head)
    gap = (p - lq.detach().exp()).abs()
    of_head, of_tail = torch.where(inside, gap, 0.0).sum(-1), torch.where(inside, 0.0, gap).sum(-1)
    forward = divergence(lp, lq, ForwardKl())
    backward = divergence(lp, lq, ReverseKl())
    total = of_head + of_tail
    same = total == 0
    share = of_head / torch.where(same, 1.0, total)
    counted = torch.where(of_head > 0, share * forward, 0.0) + torch.where(of_tail > 0, (1 - share) * backward, 0.0)
    return torch.where(same, 0.0, counted)


def _slope_at_one(kind: Divergence) -> float:
    """f'(1)."""
    match kind:
        case ForwardKl() | Jsd(beta=0.0) | Amari(alpha=1.0):
            return 1.0
        case ReverseKl() | Jsd(beta=1.0) | Amari(alpha=0.0):
            return -1.0
        case SkewForward(alpha=a):
            return 1 - a
        case SkewReverse(alpha=a):
            return -(1 - a)
    return 0.0
