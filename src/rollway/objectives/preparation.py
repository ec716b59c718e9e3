"""What is settled over a whole batch before it is cut into micro-batches: selected tokens, mixed advantages."""

from dataclasses import replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from rollway.config.objectives import CurvatureTrust, EntropyTop, Objective, SignalTop, TargetEntropy
from rollway.errors import RollwayError
from rollway.objectives.batch import TokenBatch
from rollway.objectives.curvature import (
    Moments,
    gradient_sums,
    joint_changes,
    last_layer,
    last_layer_in_chunks,
    predicted_changes,
    trusted,
)
from rollway.objectives.distillation import with_divergence
from rollway.objectives.imitation import at_progress, without_imitated
from rollway.objectives.mixing import mixed_advantage, mixing_weight
from rollway.objectives.needs import check_fields
from rollway.objectives.selection import scheduled_share, signal_key, top_share
from rollway.objectives.states import State, curvature_moments, initial_state


def prepare(
    batch: TokenBatch, objective: Objective, *, state: State | None = None, progress: float = 0.0
) -> TokenBatch:
    """The batch of a whole round, cleaned, with what the objective decides over all of it.

    Selections over the batch put `keep` [N, T] bool into `extra`; a mixed advantage becomes `advantage` [N, T], its
    rho, alpha and p `mixing/rho` [N, T], `mixing/alpha` [] and `mixing/correct_share` [] in `extra`. `progress` in
    [0, 1]: share of training done.
    `loss` does this itself for a batch that is whole, and takes a prepared batch as it is.
    """
    return prepare_ready(ready(batch, objective, forward=False), objective, state or initial_state(objective), progress)


def select_tokens(batch: TokenBatch, objective: Objective, progress: float = 0.0) -> Tensor:
    """bool [N, T]: tokens of the whole batch that entropy_top and signal_top keep; otherwise the valid tokens."""
    return _selected(without_imitated(ready(batch, objective, forward=False), objective), objective, progress)


def ready(batch: TokenBatch, objective: Objective, *, forward: bool = True) -> TokenBatch:
    """The batch checked, with absent rows masked out and 0 wherever the mask is false. Raises RollwayError."""
    batch = with_divergence(batch, objective)
    check_fields(batch, objective, forward=forward)
    mask = batch.mask.bool()
    if batch.weight is not None and (objective.aggregate is None or objective.aggregate.weights == "denominator"):
        mask = mask & (batch.weight != 0)[:, None]
    return replace(batch, mask=mask).cleaned()


def prepare_ready(
    batch: TokenBatch, objective: Objective, state: State, progress: float, correct_share: Tensor | None = None
) -> TokenBatch:
    """`prepare` for a batch that is `ready`; correct_share: of the whole batch where this one is a part."""
    if objective.imitate is not None:
        made = _prepare_own(without_imitated(batch, objective), objective, state, progress, correct_share)
        made = replace(made, mask=batch.mask)
        return made if "imitate/beta" in made.extra else at_progress(made, objective, progress)
    return _prepare_own(batch, objective, state, progress, correct_share)


def _prepare_own(
    batch: TokenBatch, objective: Objective, state: State, progress: float, correct_share: Tensor | None
) -> TokenBatch:
    """`prepare_ready` of the rows that are not imitated."""
    if isinstance(objective.select, EntropyTop | SignalTop) and "keep" not in batch.extra:
        batch = replace(batch, extra=batch.extra | {"keep": _selected(batch, objective, progress)})
    mixing = objective.mixing
    if isinstance(mixing, TargetEntropy) and "mixing/alpha" not in batch.extra:
        assert batch.advantage is not None
        assert batch.correct is not None
        assert batch.logp_old is not None
        assert batch.logp_old_temp is not None
        share = correct_share_of(batch) if correct_share is None else correct_share
        last = state["mixing/entropy"].to(share)
        alpha = mixing_weight(last, share, mixing.entropy, mixing.gap)
        mixed, rho = mixed_advantage(
            batch.advantage, batch.correct, batch.logp_old.detach(), batch.logp_old_temp.detach(), alpha
        )
        made = {"mixing/alpha": alpha, "mixing/rho": rho, "mixing/correct_share": share}
        batch = replace(batch, advantage=mixed, extra=batch.extra | made)
    return batch


def correct_share_of(batch: TokenBatch) -> Tensor:
    """p [] of DCPO: share of correct rows, rows of weight 0 left out."""
    assert batch.correct is not None
    correct = batch.correct.to(batch.logp.dtype)
    present = torch.ones_like(correct) if batch.weight is None else (batch.weight != 0).to(correct)
    return (present * correct).sum() / present.sum().clamp(min=1)


def kept(batch: TokenBatch, objective: Objective, state: State) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Tokens that enter the loss, bool [N, T], per-token quantities to log, and additive partials of the next state."""
    if isinstance(objective.select, CurvatureTrust):
        return _curvature_keep(batch, objective, objective.select, state)
    keep = batch.extra["keep"].bool() & batch.mask if "keep" in batch.extra else batch.mask
    return keep, {}, {}


def _selected(batch: TokenBatch, objective: Objective, progress: float) -> Tensor:
    match objective.select:
        case EntropyTop(share=share):
            assert batch.entropy is not None
            return top_share(batch.entropy.detach(), batch.mask, share)
        case SignalTop(share=share, final=final):
            assert batch.entropy is not None
            assert batch.advantage is not None
            if not 0.0 <= progress <= 1.0:
                raise RollwayError(f"progress {progress} is not in [0, 1]: give the share of training that is done")
            key = signal_key(batch.advantage.detach(), batch.entropy.detach())
            return top_share(key, batch.mask, scheduled_share(share, final, progress))
    return batch.mask


@torch.no_grad()
def _curvature_keep(
    batch: TokenBatch, objective: Objective, select: CurvatureTrust, state: State
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    assert batch.hidden is not None
    assert batch.lm_head is not None
    assert batch.token_ids is not None
    assert batch.advantage is not None
    assert batch.lr is not None
    dtype = batch.logp.dtype
    moments = curvature_moments(objective, state)
    lm_head, lr = batch.lm_head.to(dtype), float(batch.lr)
    spread = batch.advantage[:, None] if batch.advantage.dim() == 1 else batch.advantage
    advantage = spread.expand_as(batch.logp)[batch.mask].to(dtype)
    hidden, ids = batch.hidden[batch.mask].to(dtype), batch.token_ids[batch.mask]
    keep, m_h, m_f = (batch.mask.clone(), torch.zeros_like(batch.logp), torch.zeros_like(batch.logp))
    parts = []
    partials: dict[str, Tensor] = {}
    for at in _pieces(batch.mask, select):
        if select.level == "token":
            layer = last_layer(hidden[at], lm_head, ids[at], select.k)
            h, f = predicted_changes(layer, hidden[at], advantage[at], lr, moments)
            ok = trusted(h, f, select.tau_h, select.tau_f, select.sided)
            sums = (
                None
                if moments is None
                else gradient_sums(layer.at(ok), hidden[at][ok], advantage[at][ok], len(lm_head))
            )
        else:
            ok, h, f, sums = _together(hidden[at], ids[at], advantage[at], lm_head, lr, moments, select)
        parts.append((ok, h, f))
        if moments is not None and sums is not None:
            partials = _added(partials, {"curvature/sum": sums[0], "curvature/count": sums[1]})
    if parts:
        ok, h, f = (torch.cat(x) for x in zip(*parts, strict=True))
        keep[batch.mask], m_h[batch.mask], m_f[batch.mask] = ok, h, f
    if moments is not None and not partials:
        layer = last_layer(hidden[:0], lm_head, ids[:0], select.k)
        total, count = gradient_sums(layer, hidden[:0], advantage[:0], len(lm_head))
        partials = {"curvature/sum": total, "curvature/count": count}
    return keep, {"curvature/m_h": m_h, "curvature/m_f": m_f}, partials


def _pieces(mask: Tensor, select: CurvatureTrust) -> list[slice]:
    """Of the valid tokens in order of their rows: chunks of tokens, the tokens of each row, or all of them at once."""
    tokens = int(mask.sum())
    match select.level:
        case "token":
            sizes = [min(select.chunk, tokens - start) for start in range(0, tokens, select.chunk)]
        case "sequence":
            sizes = [n for n in mask.sum(1).tolist() if n > 0]
        case "batch":
            sizes = [tokens] if tokens > 0 else []
    ends = [0, *accumulate(sizes)]
    return [slice(a, b) for a, b in pairwise(ends)]


def _together(
    hidden: Tensor,
    ids: Tensor,
    advantage: Tensor,
    lm_head: Tensor,
    lr: float,
    moments: Moments | None,
    select: CurvatureTrust,
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Whether these S tokens, which step together, are kept, their m_H and m_F, all [S]; their gradient sums if so."""
    layer = last_layer_in_chunks(hidden, lm_head, ids, select.k, select.chunk)
    sums: dict[str, Tensor] = {}
    for start in range(0, len(hidden), select.chunk):
        part = slice(start, start + select.chunk)
        total, count = gradient_sums(layer.at(part), hidden[part], advantage[part], len(lm_head))
        sums = _added(sums, {"total": total, "count": count})
    h, f = joint_changes(layer, hidden, advantage, lr, moments, **sums, chunk=select.chunk)
    ok = trusted(h, f, select.tau_h, select.tau_f, select.sided)
    shape = (len(hidden),)
    return ok.expand(shape), h.expand(shape), f.expand(shape), (sums["total"], sums["count"]) if bool(ok) else None


def _added(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: a[k] + b[k] if k in a else b[k] for k in a | b}
