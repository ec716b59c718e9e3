"""How far the policy is from a teacher whose likeliest tokens a step reads: what is logged of it, whatever the loss is.

arXiv 2604.00626 asks for both KLs and the overlap of the two models' top k (its procedure, step 7).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rollway.config.distillation import Distill, TopK
from rollway.config.divergences import ForwardKl, ReverseKl
from rollway.objectives import TokenBatch
from rollway.objectives.divergences import divergence, with_tail
from rollway.policies.head import Head
from rollway.policies.logprobs import Observe, Row
from rollway.policies.top_k import top_k

OVERLAP = "overlap"
TOKENS = 256
"""Of a micro-batch, evenly spread, whose overlap is looked at: the policy's own top k takes a pass over the vocabulary
that the loss does without, and so costs a bounded share of the step."""


def overlap_observer(part: Distill | None, rows: Sequence[Row], own: TokenBatch) -> Observe | None:
    """Beside the policy's pass over `rows`: the share [K] of the teacher's k tokens among the policy's k likeliest, NaN
    at tokens that are not looked at. None where no teacher's top k is read."""
    if part is None or not isinstance(part.estimate, TopK) or part.estimate.of != "teacher" or own.topk_ids is None:
        return None
    lengths = [len(row.tokens) for row in rows]
    theirs = torch.cat([own.topk_ids[n, :length] for n, length in enumerate(lengths)])

    @torch.no_grad()
    def observe(head: Head, states: Tensor, targets: Tensor) -> dict[str, Tensor]:
        every = max(1, -(-len(states) // TOKENS))
        at = torch.arange(0, len(states), every, device=states.device)
        mine = top_k(head, states.detach()[at], targets[at], theirs.shape[1]).ids
        shared = (theirs[at][:, :, None] == mine[:, None, :]).any(2)
        found = torch.full((len(states),), torch.nan, device=states.device)
        found[at] = shared.to(found).mean(1)
        return {OVERLAP: found}

    return observe


@torch.no_grad()
def kl_over_top_k(part: Distill | None, batch: TokenBatch, live: bool) -> dict[str, Tensor]:
    """[N, T] reverse KL(policy || teacher) and forward KL(teacher || policy) over the k tokens that the loss reads and
    the rest as one more: lower bounds of those over the vocabulary, at the distillation's temperature. NaN where the
    teacher said nothing.

    Nothing where no top k is read, and of stored ones that are renormalised: those may have been taken to another
    temperature, at which the rest is unknown.
    """
    if (
        part is None
        or not isinstance(part.estimate, TopK)
        or batch.topk_logp is None
        or batch.teacher_topk_logp is None
    ):
        return {}
    if part.estimate.outside != "tail" and not live:
        return {}
    lp, lq = with_tail(batch.teacher_topk_logp), with_tail(batch.topk_logp.detach())
    return {"kl/reverse": divergence(lp, lq, ReverseKl()), "kl/forward": divergence(lp, lq, ForwardKl())}
