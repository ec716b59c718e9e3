"""The distillation loss of each token, [N, T], from what a batch holds of teacher and policy."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rollway.config.distillation import (
    ClippedImportance,
    Distill,
    EntropyAbove,
    EntropyWeight,
    Exact,
    RatioImportance,
    Sampled,
    TopK,
    TruncatedImportance,
)
from rollway.config.divergences import Divergence
from rollway.config.objectives import ROUTES, Objective
from rollway.errors import RollwayError
from rollway.objectives.aggregation import ratio_or_zero
from rollway.objectives.batch import TokenBatch
from rollway.objectives.divergences import advantage, divergence, renormalised, sampled_value, terms, with_tail
from rollway.objectives.gates import clipped_tokens, dual_clip_gate
from rollway.objectives.imitation import imitated_rows
from rollway.objectives.ratios import log_ratio


@dataclass(frozen=True)
class Distilled:
    """[N, T] each, meaningful where `keep` is true."""

    loss: Tensor
    """Of the token, importance, emphasis and the part's weight included."""
    divergence: Tensor
    """Its divergence, or the sampled estimate of it; a constant."""
    keep: Tensor
    """bool: valid tokens of distilled rows whose teacher entropy counts."""
    logged: dict[str, Tensor] = field(default_factory=dict)
    """Constants whose mean over these tokens is a metric `distill/...`: `teacher_entropy`; with a clip `raw_divergence`
    and `clipped_entries` (OPSD, arXiv 2601.18734); with importance `clipped` `clip_share`, of tokens without a
    gradient."""


def distill_needs(part: Distill) -> frozenset[str]:
    """TokenBatch fields that the part reads."""
    match part.estimate:
        case Sampled(at="rollouts"):
            needs = {"teacher_logp"}
        case Sampled():
            needs = {"topk_logp", "teacher_topk_logp"}
        case TopK():
            needs = {"topk_logp", "teacher_topk_logp"}
        case Exact():
            needs = {"divergence"}
    needs |= {"logp_old"} if part.importance.kind != "none" else set()
    needs |= {"teacher_entropy"} if part.emphasis.kind != "none" else set()
    return frozenset(needs | ({"route"} if part.rows == "routed" or part.experts is not None else set()))


def gets_policy_loss(batch: TokenBatch, objective: Objective) -> Tensor:
    """bool [N, 1]: rows that are routed neither to distillation alone nor to imitation."""
    return ~_routed(batch, objective, "distill") & ~imitated_rows(batch, objective)


def gets_distilled(batch: TokenBatch, objective: Objective) -> Tensor:
    """bool [N, 1]: rows that the teacher acts on."""
    part = objective.distill
    if part is None or part.rows == "all":
        return torch.full((batch.n_rows, 1), part is not None, device=batch.logp.device) & ~imitated_rows(
            batch, objective
        )
    return _routed(batch, objective, "distill") | _routed(batch, objective, "both")


def _routed(batch: TokenBatch, objective: Objective, name: str) -> Tensor:
    part = objective.distill
    if part is None or part.rows == "all" or batch.route is None:
        return torch.zeros(batch.n_rows, 1, dtype=torch.bool, device=batch.logp.device)
    return (batch.route == ROUTES.index(name))[:, None]


def with_divergence(batch: TokenBatch, objective: Objective) -> TokenBatch:
    """Where the batch holds all logits of both models [N, T, V], what the part reads is taken from them."""
    part = objective.distill
    if part is None or batch.logits is None or batch.teacher_logits is None:
        return batch
    lq = (batch.logits / part.temperature).log_softmax(-1)
    lp = (batch.teacher_logits.detach() / part.temperature).log_softmax(-1)
    made: dict[str, Tensor] = {}
    if part.emphasis.kind != "none" and batch.teacher_entropy is None:
        plain = batch.teacher_logits.detach().log_softmax(-1)
        made["teacher_entropy"] = -torch.where(plain.isinf(), 0.0, plain.exp() * plain).sum(-1)
    match part.estimate:
        case Exact() if batch.divergence is None:
            made["divergence"] = divergence(lp, lq, part.divergence, part.clip)
            if part.clip is not None:
                made |= unclipped(lp, lq, part, part.clip)
        case TopK(k=k, of=of) if batch.topk_logp is None and batch.teacher_topk_logp is None:
            # Stable: of equal ones the lower id first.
            ranked = (lp if of == "teacher" else lq.detach()).sort(dim=-1, descending=True, stable=True).indices
            ids = ranked[..., : lp.shape[-1] if k is None else k]
            made |= {"topk_ids": ids, "topk_logp": lq.gather(-1, ids), "teacher_topk_logp": lp.gather(-1, ids)}
        case Sampled(at="rollouts") if batch.teacher_logp is None and batch.token_ids is not None:
            made["teacher_logp"] = lp.gather(-1, batch.token_ids[..., None])[..., 0]
        case Sampled(at="distill") if batch.topk_logp is None and batch.token_ids is not None:
            ids = batch.token_ids[..., None]
            made |= {"topk_ids": ids, "topk_logp": lq.gather(-1, ids), "teacher_topk_logp": lp.gather(-1, ids)}
    return replace(batch, **made)  # type: ignore[arg-type]


def distilled(batch: TokenBatch, objective: Objective, totals: dict[str, Tensor]) -> Distilled | None:
    """The token losses of a batch that is `ready`; None without distillation.

    totals: of the whole optimiser batch, of which `distill/emphasis` is read.
    """
    part = objective.distill
    if part is None:
        return None
    keep = distilled_tokens(batch, objective)
    rows = batch.mask & gets_distilled(batch, objective)
    logged = {"teacher_entropy": batch.teacher_entropy, "raw_divergence": batch.raw_divergence}
    logged |= {"clipped_entries": batch.clipped_entries}
    match part.estimate:
        case Sampled() if isinstance(part.importance, ClippedImportance):
            each, value, logged["clip_share"] = _surrogate(batch, part.importance, part.divergence, rows)
        case Sampled(granularity=granularity):
            each, value = _sampled(batch, part, rows, granularity)
        case TopK(outside=outside):
            each = _by_source(batch, part, rows, outside)
            value = each.detach()
            if part.clip is not None and part.experts is None:
                logged |= unclipped(*_entries(batch, rows, outside), part, part.clip)
        case Exact():
            assert batch.divergence is not None
            each = batch.divergence
            value = each.detach()
    if isinstance(part.importance, TruncatedImportance):
        assert batch.logp_old is not None
        each = log_ratio(batch.logp, batch.logp_old).detach().exp().clamp(max=part.importance.cap) * each
    if isinstance(part.emphasis, EntropyWeight):
        each = ratio_or_zero(_weights(batch, part.emphasis), totals["distill/emphasis"]) * each
    return Distilled(part.weight * each, value, keep, {name: x.detach() for name, x in logged.items() if x is not None})


@torch.no_grad()
def unclipped(lp: Tensor, lq: Tensor, part: Distill, clip: float) -> dict[str, Tensor]:
    """[..., V] -> [...]: `raw_divergence` without the clip, and `clipped_entries`, the share of entries above it."""
    each = terms(lp, lq, part.divergence)
    return {"raw_divergence": each.sum(-1), "clipped_entries": (each > clip).to(each.dtype).mean(-1)}


def distilled_tokens(batch: TokenBatch, objective: Objective) -> Tensor:
    """bool [N, T]: valid tokens of distilled rows, without those whose teacher is too sure of itself to count."""
    rows = batch.mask & gets_distilled(batch, objective)
    if objective.distill is not None and isinstance(objective.distill.emphasis, EntropyAbove):
        assert batch.teacher_entropy is not None
        rows = rows & (batch.teacher_entropy > objective.distill.emphasis.threshold)
    return rows


def distill_totals(batch: TokenBatch, objective: Objective) -> dict[str, Tensor]:
    """Of a whole batch: `distill/tokens` [], and the mean weight `distill/emphasis` [] (SRPO, arXiv 2604.02288)."""
    part = objective.distill
    if part is None:
        return {}
    if part.emphasis.kind != "none" and batch.teacher_entropy is None:
        raise RollwayError("the objective needs `teacher_entropy`, and the batch has none: it weighs the whole batch")
    keep = distilled_tokens(batch, objective)
    found = {"distill/tokens": keep.sum()}
    if isinstance(part.emphasis, EntropyWeight):
        weights = torch.where(keep, _weights(batch, part.emphasis), 0.0).sum(dtype=torch.float64)
        found["distill/emphasis"] = ratio_or_zero(weights, keep.sum())
    return found


def _weights(batch: TokenBatch, emphasis: EntropyWeight) -> Tensor:
    assert batch.teacher_entropy is not None
    return (-emphasis.beta * batch.teacher_entropy.detach()).exp()


def _sampled(batch: TokenBatch, part: Distill, rows: Tensor, granularity: str) -> tuple[Tensor, Tensor]:
    """sg(g(u)) ln Q of each token, or r sg(g(u)), with g = -a(u); and the value's estimate (eq. 3)."""
    if part.samples_at_own_temperature():
        # One token of the k, the sampled one.
        assert batch.teacher_topk_logp is not None
        assert batch.topk_logp is not None
        lp, lq = batch.teacher_topk_logp[..., 0].detach(), batch.topk_logp[..., 0]
    else:
        assert batch.teacher_logp is not None
        lp, lq = batch.teacher_logp.detach(), batch.logp
    d = torch.where(rows, lp - lq.detach(), 0.0)
    if granularity == "sequence":
        d = d.sum(1, keepdim=True).expand_as(d)
    against = -advantage(d, part.divergence)
    if isinstance(part.importance, RatioImportance):
        assert batch.logp_old is not None
        lq = log_ratio(lq, batch.logp_old.detach()).exp()
    return against * lq, sampled_value(d, part.divergence)


def _surrogate(
    batch: TokenBatch, clip: ClippedImportance, kind: Divergence, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The doubly clipped surrogate with the advantage a(u) of the policy that wrote; the value's estimate; 1 where the
    clip leaves no gradient."""
    assert batch.teacher_logp is not None
    assert batch.logp_old is not None
    old = batch.logp_old.detach()
    d = torch.where(rows, batch.teacher_logp.detach() - old, 0.0)
    towards, ratio = advantage(d, kind), log_ratio(batch.logp, old).exp()
    each = dual_clip_gate(ratio, towards, clip.low, clip.high, clip.dual)
    return each, sampled_value(d, kind), clipped_tokens(ratio, towards, clip.low, clip.high, clip.dual).to(each.dtype)


def _by_source(batch: TokenBatch, part: Distill, rows: Tensor, outside: str) -> Tensor:
    """The divergence of each token; that of experts' rows may be another one (eq. 8)."""
    if part.experts is None:
        return _over_top_k(batch, part.divergence, part.clip, rows, outside)
    assert batch.route is not None
    expert = batch.route == ROUTES.index("expert")
    each = torch.zeros_like(batch.logp)
    for kind, own in ((part.divergence, ~expert), (part.experts, expert)):
        at = own.nonzero()[:, 0]
        found = _over_top_k(batch.rows(at, split_pairs=True), kind, part.clip, rows[at], outside)
        each = each.index_copy(0, at, found.to(each.dtype))
    return each


def _over_top_k(batch: TokenBatch, kind: Divergence, clip: float | None, rows: Tensor, outside: str) -> Tensor:
    """The divergence of each token over what is known of its vocabulary (eq. 4)."""
    return divergence(*_entries(batch, rows, outside), kind, clip)


def _entries(batch: TokenBatch, rows: Tensor, outside: str) -> tuple[Tensor, Tensor]:
    """Log-probs of teacher and policy: of the k given entries and their tail, or of them alone, renormalised."""
    assert batch.topk_logp is not None
    assert batch.teacher_topk_logp is not None
    at = rows[..., None]
    lp = torch.where(at, batch.teacher_topk_logp.detach(), 0.0)
    lq = torch.where(at, batch.topk_logp, 0.0)
    if outside == "renormalise":
        return renormalised(lp), renormalised(lq)
    tail = None if batch.teacher_tail is None else torch.where(rows, batch.teacher_tail.detach(), 1.0)
    return with_tail(lp, tail), with_tail(lq)
