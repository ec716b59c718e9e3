"""Which rows can move the policy or train the critic: the others have a gradient of exactly 0, by construction."""

from torch import Tensor

from rollway.config.objectives import IMITATING, CopgPreference, Objective
from rollway.objectives import TokenBatch
from rollway.objectives.distillation import gets_distilled, gets_policy_loss
from rollway.objectives.imitation import imitated_rows


def has_signal(objective: Objective, tokens: TokenBatch) -> bool:
    """Whether any row can."""
    if objective.preference.kind != "none":
        grouped = isinstance(objective.preference, CopgPreference) and objective.preference.form == "group"
        paired = tokens.pair_chosen is not None and len(tokens.pair_chosen) > 0
        return bool(_live(tokens).any()) and (grouped or paired)
    return bool(rows_with_signal(objective, tokens).any())


def rows_with_signal(objective: Objective, tokens: TokenBatch) -> Tensor:
    """[n] bool, of an objective whose rows are separable: a token that counts, and something that pulls at it."""
    live = _live(tokens)
    pulls_back = objective.gate is not None and objective.gate.kind in ("variance", *IMITATING)
    pulls_back = pulls_back or objective.kl.kind != "none" or objective.entropy_bonus > 0.0
    if pulls_back or objective.value is not None or objective.preference.kind != "none":
        return live.any(1)
    pulled = live & (gets_distilled(tokens, objective) | _pulling_imitated(objective, tokens))
    if objective.reads_advantage():
        assert tokens.advantage is not None
        spread = tokens.advantage if tokens.advantage.dim() == 2 else tokens.advantage[:, None].expand_as(live)
        pulled = pulled | (live & gets_policy_loss(tokens, objective) & (spread != 0))
    return pulled.any(1)


def _pulling_imitated(objective: Objective, tokens: TokenBatch) -> Tensor:
    """bool [n, 1]: imitated rows, while they have a weight."""
    rows = imitated_rows(tokens, objective)
    beta = tokens.extra.get("imitate/beta")
    return rows if beta is None else rows & bool(beta > 0)


def _live(tokens: TokenBatch) -> Tensor:
    return tokens.mask if tokens.weight is None else tokens.mask & (tokens.weight != 0)[:, None]


def order_of(signal: Tensor) -> list[tuple[list[int], bool]]:
    """Row numbers that need a gradient, and those that do not (where there are both); the flag says which.

    Where none does, all are said to: an optimiser that steps on its momentum needs gradients, be they 0.
    """
    moving, still = signal.nonzero()[:, 0].tolist(), (~signal).nonzero()[:, 0].tolist()
    if not moving:
        return [(still, True)]
    return [(moving, True)] + ([(still, False)] if still else [])
