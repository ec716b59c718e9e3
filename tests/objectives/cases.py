"""Every objective the property suite runs on, and random batches for them."""

from dataclasses import replace

import torch
from torch import Tensor

from objectives.rows import parse
from rollway.config.objectives import Objective
from rollway.objectives import TokenBatch, requirements

CLIP = {"kind": "clip", "low": 0.2, "high": 0.2}
NARROW = {"kind": "clip", "low": 0.1, "high": 0.1}
K3 = {"kind": "k3", "beta": 0.04}

CASES: dict[str, Objective] = {
    "reinforce": parse(ratio="none", gate="none", aggregate="seq_mean_token_sum"),
    "grpo": parse(ratio="token", gate=CLIP, aggregate="seq_mean_token_mean"),
    "grpo_k3": parse(ratio="token", gate=CLIP, aggregate="seq_mean_token_mean", kl=K3),
    "grpo_k2_token_mean": parse(ratio="token", gate=CLIP, aggregate="token_mean", kl={"kind": "k2", "beta": 0.1}),
    "dapo": parse(ratio="token", gate={"kind": "clip", "low": 0.2, "high": 0.28}, aggregate="token_mean"),
    "dr_grpo": parse(ratio="token", gate=CLIP, aggregate={"kind": "seq_sum_const", "l_max": 9}),
    "ppo": parse(
        ratio="token",
        gate="dual_clip",
        aggregate="token_mean",
        entropy_bonus=0.01,
        value={"clip": 0.2, "coefficient": 0.5},
    ),
    "gspo": parse(ratio="sequence", gate=NARROW, aggregate="seq_mean_token_mean"),
    "gspo_token": parse(ratio="sequence_token", gate=NARROW, aggregate="seq_mean_token_mean"),
    "cispo": parse(ratio="token", gate="cispo", aggregate="token_mean"),
    "tis": parse(ratio="token", gate=CLIP, aggregate="token_mean", correction="tis", kl=K3),
    "tis_sequence": parse(
        ratio="token", gate=CLIP, aggregate="seq_mean_token_mean", correction={"kind": "tis", "level": "sequence"}
    ),
    "mis": parse(ratio="token", gate=CLIP, aggregate="token_mean", correction="mis"),
    "sft": parse(ratio="none", gate="sft", aggregate="token_mean"),
    "dft": parse(ratio="none", gate="dft", aggregate="token_mean"),
    "one_token": parse(
        ratio="none", gate="one_token", aggregate={"kind": "seq_mean_token_mean", "empty": "zero"}, kl=K3
    ),
    "entropy_top": parse(ratio="token", gate=CLIP, aggregate="token_mean", select="entropy_top"),
    "ngrpo": parse(ratio="token", gate={"kind": "clip", "low": 0.16, "high": 0.24}, aggregate="token_mean"),
    "sapo": parse(ratio="token", gate="soft", aggregate="seq_mean_token_mean"),
    "r2vpo": parse(ratio="token", gate="variance", aggregate="token_mean"),
    "r2vpo_replay": parse(
        ratio={"kind": "token", "denominator": "behavior"},
        gate={"kind": "variance", "dual": {"kind": "ascent", "versions": 3}},
        aggregate="seq_mean_token_mean",
    ),
    "r2vpo_centred": parse(ratio="token", gate={"kind": "variance", "centre": "mean"}, aggregate="token_mean"),
    "dagrpo": parse(
        ratio="token",
        gate=CLIP,
        aggregate={"kind": "seq_sum_const", "l_max": 9, "weights": "numerator"},
        anchors="unit",
    ),
    "dagrpo_shaped": parse(
        ratio="token",
        gate=CLIP,
        aggregate={"kind": "seq_mean_token_mean", "weights": "numerator", "empty": "zero"},
        anchors="shaped",
    ),
    "dcpo": parse(ratio="token", gate="dual_clip", aggregate="token_mean", mixing="target_entropy"),
    "d3s": parse(ratio="token", gate=CLIP, aggregate="token_mean", select={"kind": "signal_top", "share": 0.3}, kl=K3),
    "d3s_gspo": parse(
        ratio="sequence",
        gate=NARROW,
        aggregate="seq_mean_token_mean",
        select={"kind": "signal_top", "share": 0.3, "final": None},
    ),
    "capo": parse(
        ratio="token",
        gate=CLIP,
        aggregate={"kind": "seq_mean_token_mean", "empty": "zero"},
        select={"kind": "curvature", "tau_f": 3e-3, "tau_h": 0.3, "k": 4},
    ),
    "capo_adam": parse(
        ratio="token",
        gate=CLIP,
        aggregate={"kind": "seq_sum_const", "l_max": 9},
        select={"kind": "curvature", "tau_f": 3e-3, "tau_h": 0.3, "k": 4, "direction": "adam", "chunk": 5},
    ),
    "capo_token_mean": parse(
        ratio="token",
        gate=CLIP,
        aggregate="token_mean",
        select={"kind": "curvature", "tau_f": 3e-3, "tau_h": 0.3, "k": 4},
    ),
    "capo_sequence": parse(
        ratio="token",
        gate=CLIP,
        aggregate={"kind": "seq_mean_token_mean", "empty": "zero"},
        select={"kind": "curvature", "level": "sequence", "tau_f": 6e-4, "tau_h": 0.1, "k": 4, "direction": "adam"},
    ),
    "capo_batch": parse(
        ratio="token",
        gate=CLIP,
        aggregate="token_mean",
        select={"kind": "curvature", "level": "batch", "tau_f": 3e-3, "tau_h": 0.3, "k": 4, "chunk": 5},
    ),
    "fiberpo": parse(ratio="fibre", gate="none", aggregate="seq_mean_token_mean"),
    "fiberpo_domain": parse(ratio="fibre_domain", gate="none", aggregate="seq_mean_token_mean"),
    "total_variation": parse(ratio="total_variation", gate="none", aggregate="seq_mean_token_mean"),
    "distill_sampled": parse(distill={}, aggregate="token_mean"),
    "distill_sequence": parse(
        distill={"divergence": "forward_kl", "estimate": {"kind": "sampled", "granularity": "sequence"}},
        aggregate="seq_mean_token_sum",
    ),
    "distill_topk": parse(distill={"divergence": "jsd", "estimate": "topk", "clip": 0.1}, aggregate="token_mean"),
    "distill_renormalised": parse(
        distill={"divergence": "akl", "estimate": {"kind": "topk", "outside": "renormalise"}},
        aggregate="seq_mean_token_mean",
        kl=K3,
    ),
    "distill_by_source": parse(
        distill={"divergence": "skew_reverse", "experts": "skew_forward", "estimate": "topk"},
        aggregate="seq_mean_token_mean",
    ),
    "distill_exact": parse(distill={"estimate": "exact"}, aggregate={"kind": "seq_sum_const", "l_max": 9}),
    "distill_scope": parse(
        ratio="token",
        gate="none",
        aggregate="group_mean_token_sum",
        distill={"importance": "ratio", "rows": "routed"},
    ),
    "distill_srpo": parse(
        ratio="token",
        gate=CLIP,
        aggregate="token_mean",
        correction="tis",
        distill={
            "divergence": "jsd",
            "estimate": "topk",
            "rows": "routed",
            "importance": "truncated",
            "emphasis": "entropy_weight",
        },
    ),
    "distill_kepo": parse(
        ratio="token",
        gate=CLIP,
        aggregate="seq_mean_token_mean",
        distill={"divergence": "jsd", "estimate": "exact", "rows": "routed", "aggregate": "token_mean", "weight": 0.7},
    ),
    "distill_eopd": parse(
        ratio="token",
        gate=CLIP,
        aggregate="token_mean",
        distill={
            "divergence": "forward_kl",
            "estimate": "topk",
            "emphasis": {"kind": "entropy_above", "threshold": 0.7},
        },
    ),
    "distill_interacting": parse(
        ratio="token",
        gate={"kind": "variance", "centre": "mean"},
        aggregate="token_mean",
        distill={"divergence": "hellinger2", "estimate": "topk"},
    ),
    "expo": parse(ratio="token", gate=CLIP, aggregate="seq_mean_token_mean", kl=K3, imitate={"beta": 0.3}),
    "expo_dr_grpo": parse(
        ratio="token",
        gate=CLIP,
        aggregate={"kind": "seq_sum_const", "l_max": 9, "weights": "numerator"},
        entropy_bonus=0.01,
        imitate={"beta": 0.3, "tokens": "mean"},
    ),
    "expo_interacting": parse(
        ratio="token", gate={"kind": "variance", "centre": "mean"}, aggregate="token_mean", imitate={"beta": 0.3}
    ),
    "dpo": parse(preference="dpo"),
    "ipo": parse(preference="ipo"),
    "spin": parse(preference="spin"),
    "copg": parse(preference="copg"),
    "copg_group": parse(preference={"kind": "copg", "form": "group"}),
}

N, T, H, V, K = 8, 6, 3, 7, 3
_LEAVES = ("logp", "entropy", "value", "topk_logp", "divergence", "missed")


def random_batch(
    objective: Objective, seed: int, *, fill: float = float("nan"), dtype: torch.dtype = torch.float64
) -> TokenBatch:
    """Eight rows of up to six tokens with holes, one without any; what the objective differentiates takes gradients."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, dtype=torch.float64, generator=g)

    mask = torch.arange(T)[None] < torch.tensor([6, 3, 1, 0, 4, 5, 2, 6])[:, None]
    mask = mask & (torch.rand(N, T, generator=g) > 0.15)
    mask[3], mask[0, 0] = False, True
    old = -normal(N, T).abs() - 0.05
    shared = {"logp_old": old, "logp": old + normal(N, T, scale=0.2)}
    shared |= {"logp_ref": old + normal(N, T, scale=0.3), "logp_behavior": old + normal(N, T, scale=0.4)}
    shared |= {"logp_old_temp": old + normal(N, T, scale=0.2), "entropy": normal(N, T).abs() + 0.01}
    value = normal(N, T)
    shared |= {"value": value, "value_old": value + normal(N, T, scale=0.3), "returns": normal(N, T)}
    shared |= {"teacher_logp": old + normal(N, T, scale=0.5), "teacher_entropy": normal(N, T).abs()}
    shared |= {"divergence": normal(N, T).abs()}
    shared |= {n: normal(N, T, V).log_softmax(-1)[..., :K] for n in ("topk_logp", "teacher_topk_logp")}
    shared |= {"hit": torch.rand(N, T, dtype=torch.float64, generator=g), "missed": -normal(N, T).abs()}
    needs = requirements(objective)
    fields = {}
    for name, x in shared.items():
        filled = torch.where(mask if x.dim() == 2 else mask[..., None], x, fill).to(dtype)
        fields[name] = filled.requires_grad_() if name in _LEAVES and _differentiated(name, objective) else filled
    batch = TokenBatch(
        mask=mask,
        advantage=normal(N).to(dtype),
        weight=torch.tensor([1.0, 0.5, 2.0, 1.0, 0.0, 1.0, 1.5, 1.0], dtype=dtype),
        group=torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]),
        reward=normal(N).to(dtype),
        correct=torch.tensor([1, 0, 0, 1, 1, 0, 0, 1]),
        route=torch.tensor(_routes(objective)),
        domain=torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]),
        age=torch.tensor([0, 1, 2, 3, 0, 1, 2, 3]),
        pair_chosen=torch.tensor([0, 2, 4, 7]),
        pair_rejected=torch.tensor([1, 3, 5, 6]),
        token_ids=torch.randint(0, V, (N, T), generator=g),
        hidden=torch.where(mask[:, :, None], normal(N, T, H), fill).to(dtype),
        lm_head=normal(V, H).to(dtype),
        lr=0.05,
        **fields,
    )
    unneeded = {n: None for n in ("route", "pair_chosen", "pair_rejected") if n not in needs}
    return replace(batch, **unneeded)


def _routes(objective: Objective) -> list[int]:
    if objective.is_distill_routed():
        return [0, 2, 3, 0, 1, 2, 2, 1]
    return [0, 0, 4, 0, 0, 4, 0, 4] if objective.imitate is not None else [0] * 4 + [1, 0, 0, 1]


def leaves(batch: TokenBatch) -> dict[str, Tensor]:
    """The per-token tensors that a loss may be differentiated with respect to."""
    return {n: getattr(batch, n) for n in _LEAVES if getattr(batch, n) is not None}


def with_leaves(batch: TokenBatch, given: dict[str, Tensor]) -> TokenBatch:
    return replace(batch, **given)


def _differentiated(name: str, objective: Objective) -> bool:
    match name:
        case "entropy":
            return objective.entropy_bonus > 0.0
        case "value":
            return objective.value is not None
        case "topk_logp" | "divergence" | "missed":
            return name in requirements(objective)
    return True
