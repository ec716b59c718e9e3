"""What is measured at each optimiser step, as the metrics files hold it."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rollway.objectives import TokenBatch
from rollway.objectives.corrections import effective_sample_size
from rollway.objectives.kl import k3
from rollway.training.gradients import Gathered
from rollway.training.precompute import Round
from rollway.training.teacher_gap import OVERLAP

QUANTILES = (0.5, 0.9, 0.99)
MOST_REJECTED = 5
"""Token ids that a step names."""


class Metric(NamedTuple):
    """One number. `step`: optimiser steps done since the warm-up, the one it is measured at included."""

    step: int
    name: str
    value: float

    def row(self) -> dict[str, Any]:
        """The JSON form; what is not finite (a ratio of nothing) is null."""
        return {"step": self.step, "name": self.name, "value": self.value if math.isfinite(self.value) else None}


def step_metrics(step: int, tokens: TokenBatch, got: Gathered, norms: dict[str, float], lr: float) -> list[Metric]:
    """Of one step, over its valid tokens, with the policy as it was before the step. KL in nats per token, by k3.

    `kl_old` is KL(old || current), `kl_reference` KL(current || reference): the first is what samples of the old policy
    estimate without bias. `kl_teacher` is KL(current || teacher), over tokens whose log-prob the teacher has given;
    where it gave its likeliest tokens alone, of these and the rest (`teacher_metrics`).
    """
    assert tokens.logp_old is not None
    mask = tokens.mask
    new, old = got.logp[mask], tokens.logp_old[mask]
    found = {f"{name}": value for name, value in got.metrics.items()}
    found |= {f"grad_norm{'' if name == 'policy' else '_' + name}": norm for name, norm in norms.items()}
    found |= {
        "lr": lr,
        "tokens": float(mask.sum()),
        "kl_old": _mean(k3(old, new)),
        "logp": _mean(new),
    }
    if tokens.logp_ref is not None:
        found["kl_reference"] = _mean(k3(new, tokens.logp_ref[mask]))
    if "distill/kept" in got.per_token:
        found |= teacher_metrics(got.per_token)
    if tokens.teacher_logp is not None:
        heard = mask & tokens.teacher_logp.isfinite()
        found["kl_teacher"] = _mean(k3(got.logp[heard], tokens.teacher_logp[heard]))
    if "curvature/kept" in got.per_token:
        found |= curvature_metrics(tokens, got.per_token)
    if "distill/kept" in got.per_token:
        found |= by_position(got.per_token["distill/divergence"], got.per_token["distill/kept"])
    return [Metric(step, name, value) for name, value in found.items()]


def teacher_metrics(per_token: dict[str, Tensor]) -> dict[str, float]:
    """Of a step that reads a teacher's k likeliest tokens, over its distilled tokens: `kl_teacher`, KL(current ||
    teacher), and `kl_teacher_forward`, KL(teacher || current), of these and the rest as one, lower bounds in nats per
    token; `top_k_overlap`, the share of them among the policy's k likeliest (at most 256 tokens of each pass)."""
    kept, found = per_token["distill/kept"], {}
    names = {"kl_teacher": "kl/reverse", "kl_teacher_forward": "kl/forward", "top_k_overlap": OVERLAP}
    for name, key in names.items():
        if key in per_token:
            values = per_token[key][kept]
            found[name] = _mean(values[~values.isnan()])
    return found


def by_position(divergence: Tensor, kept: Tensor) -> dict[str, float]:
    """`distill/divergence_from_{n}`: its mean over the kept tokens of positions n to 2 n - 1, n = 1, 2, 4, ... from the
    completion's first token on (OPSD's divergence per position). [N, T] each; ranges without a token are left out."""
    found: dict[str, float] = {}
    first = 1
    while first <= divergence.shape[1]:
        part = slice(first - 1, 2 * first - 1)
        if bool(kept[:, part].any()):
            found[f"distill/divergence_from_{first}"] = _mean(divergence[:, part][kept[:, part]])
        first *= 2
    return found


def curvature_metrics(tokens: TokenBatch, per_token: dict[str, Tensor]) -> dict[str, float]:
    """What CAPO's masks did in one step (arXiv 2510.00819), over the valid tokens of rows whose weight is not 0.

    Quantiles of m_H, |m_H| and m_F, `curvature/m_f/p99` say; `curvature/rejected_share/positive` and `/negative`: of
    tokens by the sign of their advantage; `curvature/rejected_token/{token id}`: how often, of those rejected most.
    """
    assert tokens.advantage is not None
    assert tokens.token_ids is not None
    mask = tokens.mask if tokens.weight is None else tokens.mask & (tokens.weight != 0)[:, None]
    spread = tokens.advantage if tokens.advantage.dim() == 2 else tokens.advantage[:, None].expand_as(mask)
    advantage, rejected = spread[mask], ~per_token["curvature/kept"][mask]
    m_h, m_f = per_token["curvature/m_h"][mask], per_token["curvature/m_f"][mask]
    found: dict[str, float] = {}
    for name, x in (("m_h", m_h), ("m_h_abs", m_h.abs()), ("m_f", m_f)):
        values = np.quantile(x.double().cpu().numpy(), QUANTILES) if x.numel() else [math.nan] * len(QUANTILES)
        found |= {f"curvature/{name}/p{100 * q:g}": float(v) for q, v in zip(QUANTILES, values, strict=True)}
    found["curvature/rejected_share/positive"] = _mean(rejected[advantage > 0])
    found["curvature/rejected_share/negative"] = _mean(rejected[advantage < 0])
    ids, counts = torch.unique(tokens.token_ids[mask][rejected], return_counts=True)
    for place in torch.sort(counts, descending=True, stable=True).indices[:MOST_REJECTED].tolist():
        found[f"curvature/rejected_token/{int(ids[place])}"] = float(counts[place])
    return found


def engine_gap(step: int, fixed: Round) -> list[Metric]:
    """Once a round, before its first step: entropy, and how far the engine's log-probs are from the trainer's.

    The entropy is that of the policy's own states, without those of experts' solutions.
    `gap_*`: |behaviour - old| in nats; `ess`: (sum w)^2 / (n sum w^2) of w = exp(old - behaviour), over the
    tokens whose behaviour log-prob is known.
    """
    tokens = fixed.tokens
    out = []
    if tokens.entropy is not None:
        sampled = torch.tensor([row.source != "expert" for row in fixed.rows], device=tokens.mask.device)
        out.append(Metric(step, "entropy_old", _mean(tokens.entropy[tokens.mask & sampled[:, None]])))
    known = tokens.mask & fixed.behaviour.isfinite()
    assert tokens.logp_old is not None
    difference = (tokens.logp_old - fixed.behaviour)[known].double()
    if difference.numel():
        weight = difference.clamp(-20, 20).exp()
        out += [
            Metric(step, "gap_mean", float(difference.abs().mean())),
            Metric(step, "gap_max", float(difference.abs().max())),
            Metric(step, "ess", float(effective_sample_size(weight))),
        ]
    return out


def critic_fit(step: int, fixed: Round) -> list[Metric]:
    """Once a round, of the critic as it came: `value_explained`, the share of its targets' variance that it explains.

    1 is all, 0 no better than a constant; over valid tokens. Nothing without a critic, or where targets are equal.
    """
    tokens = fixed.tokens
    if tokens.returns is None or tokens.value_old is None:
        return []
    target = tokens.returns[tokens.mask].double()
    error = target - tokens.value_old[tokens.mask].double()
    if target.numel() < 2 or bool(target.max() == target.min()):
        return []
    return [Metric(step, "value_explained", 1.0 - float(error.var() / target.var()))]


def _mean(x: Tensor) -> float:
    return float(x.double().mean()) if x.numel() else math.nan
