"""What an objective needs of its batch, and which rows it must see together."""

from typing import Literal

from torch import Tensor

from rollway.config.objectives import (
    CurvatureTrust,
    FibreDomainRatio,
    GroupMeanTokenSum,
    Objective,
    OneTokenGate,
    SeqMeanTokenMean,
    SeqMeanTokenSum,
    SeqSumConst,
    SequenceRatio,
    SequenceTokenRatio,
    TokenRatio,
    VarianceGate,
)
from rollway.errors import RollwayError
from rollway.objectives.batch import TokenBatch
from rollway.objectives.distillation import distill_needs


def requirements(objective: Objective) -> frozenset[str]:
    """Names of the TokenBatch fields needed beyond logp and mask."""
    needs: set[str] = {"advantage"} if advantage_needed(objective) else set()
    match objective.ratio:
        case TokenRatio(denominator="behavior") | SequenceRatio(denominator="behavior"):
            needs.add("logp_behavior")
        case SequenceTokenRatio(denominator="behavior"):
            needs.add("logp_behavior")
        case FibreDomainRatio():
            needs |= {"logp_old", "domain", "group"}
        case None:
            pass
        case ratio:
            needs |= {"logp_old"} if ratio.kind != "none" else set()
    if isinstance(objective.gate, OneTokenGate):
        needs |= {"hit", "missed", "entropy"}
    if objective.kl.kind != "none":
        needs.add("logp_ref")
    if objective.correction.kind != "none":
        needs |= {"logp_old", "logp_behavior"}
    if objective.select.kind in ("entropy_top", "signal_top") or objective.entropy_bonus > 0.0:
        needs.add("entropy")
    if objective.select.kind == "curvature":
        needs |= {"hidden", "lm_head", "token_ids", "lr"}
    if objective.mixing.kind != "none":
        needs |= {"logp_old", "logp_old_temp", "correct"}
    if objective.anchors.kind != "none":
        needs.add("route")
    if (
        isinstance(objective.gate, VarianceGate)
        and objective.gate.dual.kind == "ascent"
        and objective.gate.dual.versions > 1
    ):
        needs.add("age")
    if objective.value is not None:
        needs |= {"value", "returns"} | ({"value_old"} if objective.value.clip is not None else set())
    if objective.distill is not None:
        needs |= distill_needs(objective.distill)
    if objective.imitate is not None:
        needs |= {"route", "group"}
    means = (objective.aggregate, None if objective.distill is None else objective.distill.aggregate)
    if any(isinstance(mean, GroupMeanTokenSum) for mean in means):
        needs.add("group")
    match objective.preference.kind:
        case "spin":
            needs |= {"logp_old", "pair_chosen", "pair_rejected"}
        case "dpo" | "ipo":
            needs |= {"logp_ref", "pair_chosen", "pair_rejected"}
        case "copg":
            needs |= {"logp_ref", "reward"}
            needs |= {"group"} if objective.preference.form == "group" else {"pair_chosen", "pair_rejected"}
    return frozenset(needs)


def unit(objective: Objective) -> Literal["row", "pair", "group", "batch"]:
    """Smallest set of rows whose loss, given the batch's totals, does not depend on other rows' current outputs."""
    match objective.preference.kind:
        case "dpo" | "ipo" | "spin":
            return "pair"
        case "copg":
            return "group" if objective.preference.form == "group" else "pair"
    if isinstance(objective.ratio, FibreDomainRatio) or _centred(objective):
        return "batch"
    if isinstance(objective.select, CurvatureTrust) and (
        objective.select.level == "batch" or not _counts_all_rows(objective)
    ):
        return "batch"
    return "row"


def separable(objective: Objective) -> bool:
    """Whether micro-batches of any rows, given the batch's totals, add up to the whole batch's loss and gradient.

    Where not, differentiate the whole batch's loss with respect to the per-token inputs and backpropagate those per
    micro-batch; for `unit` pair or group, micro-batches that keep these together add up too.
    """
    return unit(objective) == "row"


def advantage_needed(objective: Objective) -> bool:
    """Whether the objective reads `advantage`."""
    return objective.reads_advantage()


FORWARD = frozenset({"value", "hidden", "lm_head", "lr", "topk_logp", "divergence", "hit", "missed"}) | {
    *("teacher_logp", "teacher_topk_logp", "teacher_entropy")
}
"""Fields that exist only once the current models, a live teacher among them, have run; `prepare` and most `totals` do
without."""


def check_fields(batch: TokenBatch, objective: Objective, *, forward: bool = True) -> None:
    """Raises RollwayError that names what the batch lacks, or has in the wrong shape, for this objective.

    forward: whether the fields of the current models' forward pass are needed too.
    """
    for name in sorted(requirements(objective) - (frozenset() if forward else FORWARD)):
        if getattr(batch, name) is None:
            raise RollwayError(
                f"the objective needs `{name}`, and the batch has none: {_MENDS.get(name, 'fill it before the loss')}"
            )
    n, t = batch.logp.shape
    for name in (*_TOKEN_FIELDS, "mask"):
        x = getattr(batch, name)
        if x is not None and x.shape != (n, t):
            raise RollwayError(f"batch field `{name}` has shape {tuple(x.shape)}, not [N, T] = ({n}, {t}) of logp")
    for name in ("topk_ids", "topk_logp", "teacher_topk_logp"):
        x = getattr(batch, name)
        if x is not None and (x.dim() != 3 or x.shape[:2] != (n, t)):
            raise RollwayError(f"batch field `{name}` has shape {tuple(x.shape)}, not [N, T, K] = ({n}, {t}, ...)")
    if batch.mask.dtype.is_floating_point or batch.mask.dtype.is_complex:
        raise RollwayError("batch field `mask` must be bool")
    if batch.advantage is not None and batch.advantage.shape not in ((n,), (n, t)):
        raise RollwayError(f"batch field `advantage` has shape {tuple(batch.advantage.shape)}, neither [N] nor [N, T]")
    if advantage_needed(objective) and isinstance(objective.ratio, SequenceRatio) and _token_level(batch.advantage):
        raise RollwayError("ratio sequence takes one advantage per row, not per token: use `ratio: sequence_token`")


_TOKEN_FIELDS = (
    *("logp_old", "logp_ref", "logp_behavior", "logp_old_temp", "entropy", "value", "value_old", "returns"),
    *("token_ids", "teacher_logp", "teacher_entropy", "teacher_tail", "divergence", "hit", "missed"),
    *("raw_divergence", "clipped_entries"),
)
_MENDS = {
    "logp_old": "compute the trainer's log-probs before the first update; the current ones would make every ratio 1",
    "logp_ref": "compute the reference policy's log-probs",
    "logp_behavior": "use rollouts that hold the engine's log-probs",
    "logp_old_temp": "make a second pass with logits / dcpo_temperature(objective, state)",
    "entropy": "compute the policy's entropy at each token",
    "advantage": "set curate.advantage or train.advantage",
    "pair_chosen": "set curate.pair",
    "pair_rejected": "set curate.pair",
    "teacher_logp": "score the rollouts with a teacher",
    "teacher_entropy": "score the rollouts with a teacher that also gives its entropy",
    "teacher_topk_logp": "score the rollouts with a teacher that also gives its top k",
    "topk_logp": "compute the policy's log-probs at the teacher's top k",
    "divergence": "compute it with a live teacher, or give `logits` and `teacher_logits`",
    "hit": "draw candidates of the current policy at each token",
    "missed": "draw candidates of the current policy at each token",
    "correct": "use a scorer that says which rollouts are correct",
}


def _token_level(advantage: Tensor | None) -> bool:
    return advantage is not None and advantage.dim() == 2


def _centred(objective: Objective) -> bool:
    return isinstance(objective.gate, VarianceGate) and objective.gate.centre == "mean"


def _counts_all_rows(objective: Objective) -> bool:
    match objective.aggregate:
        case SeqMeanTokenMean(empty="zero") | SeqMeanTokenSum(empty="zero") | SeqSumConst():
            return True
    return False
