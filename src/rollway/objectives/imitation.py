"""Log-likelihood of rows that are routed to `imitate`, beside a policy's loss (ExPO, arXiv 2507.02834, eq. 3).

Such rows get no ratio, no advantage and no penalty, and count in no other denominator: with the term's weight at 0 the
objective is that of the other rows alone.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rollway.config.objectives import ROUTES, Imitation, Objective
from rollway.objectives.aggregation import ratio_or_zero
from rollway.objectives.batch import TokenBatch
from rollway.objectives.selection import scheduled_share


@dataclass(frozen=True)
class Imitated:
    """What the imitated rows of a batch add to its loss."""

    loss: Tensor
    """-beta times the mean over groups of E_q, a scalar."""
    token_loss: Tensor
    """[N, T] -beta logp, meaningful where `mask` is true; a constant."""
    mask: Tensor
    """[N, T] bool: valid tokens of imitated rows."""
    metrics: dict[str, Tensor]


def imitated_rows(batch: TokenBatch, objective: Objective) -> Tensor:
    """bool [N, 1]: rows that are imitated and get nothing else."""
    if objective.imitate is None or batch.route is None:
        return torch.zeros(batch.n_rows, 1, dtype=torch.bool, device=batch.logp.device)
    return (batch.route == ROUTES.index("imitate"))[:, None]


def without_imitated(batch: TokenBatch, objective: Objective) -> TokenBatch:
    """The batch with imitated rows masked out: what every other part of the objective sees."""
    if objective.imitate is None:
        return batch
    return replace(batch, mask=batch.mask & ~imitated_rows(batch, objective))


def imitation_weight(part: Imitation, progress: float) -> float:
    """beta, annealed in a line to `final` as progress goes from 0 to 1 (eq. 4; the line is reconstructed)."""
    return scheduled_share(part.beta, part.final, progress)


def at_progress(batch: TokenBatch, objective: Objective, progress: float) -> TokenBatch:
    """A prepared batch with the weight that its optimiser step has: beta falls over updates, not over rounds."""
    if objective.imitate is None:
        return batch
    beta = torch.tensor(imitation_weight(objective.imitate, progress), dtype=torch.float64)
    return replace(batch, extra=batch.extra | {"imitate/beta": beta})


def imitation_totals(batch: TokenBatch, objective: Objective) -> dict[str, Tensor]:
    """Of a whole batch: groups with a valid token, `imitate/groups` [], and imitated tokens, `imitate/tokens` []."""
    if objective.imitate is None:
        return {}
    assert batch.group is not None
    groups = torch.unique(batch.group[batch.mask.any(1)])
    own = batch.mask & imitated_rows(batch, objective)
    return {"imitate/groups": torch.tensor(len(groups), device=batch.logp.device), "imitate/tokens": own.sum()}


def imitated(batch: TokenBatch, objective: Objective, weight: Tensor, totals: dict[str, Tensor]) -> Imitated | None:
    """The term of a batch that is `ready` and prepared; None for objectives without.

    E_q is the sum (or, with `tokens: mean`, the mean) of a row's log-probs, times its `weight` [N]; its mean is over
    all groups of the batch, those without such a row included.
    """
    part = objective.imitate
    if part is None:
        return None
    beta = batch.extra["imitate/beta"].to(batch.logp)
    mask = batch.mask & imitated_rows(batch, objective)
    logp = torch.where(mask, batch.logp, 0.0)
    each = logp.sum(1)
    if part.tokens == "mean":
        each = each / mask.sum(1).clamp(min=1)
    mean = ratio_or_zero((weight * each).sum(), totals["imitate/groups"])
    rows = mask.any(1).sum().to(batch.logp.dtype)
    metrics = {
        "loss/imitate": (-beta * mean).detach(),
        "imitate/nll": ratio_or_zero(-logp.detach().sum(), totals["imitate/tokens"]),
        "imitate/share": ratio_or_zero(rows, totals["imitate/groups"]),
        "max/imitate_beta": beta,
    }
    return Imitated(-beta * mean, -beta * logp.detach(), mask, metrics)
