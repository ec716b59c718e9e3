"""Rows that nobody sampled, through the trainer: DaGRPO's gradient, and what refuses them."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from rollway.config.training import TrainConfig
from rollway.errors import RollwayError
from rollway.training.batch import TrainingBatch
from rollway.training.gradients import Models, accumulate
from rollway.training.metrics import engine_gap
from rollway.training.precompute import precompute
from rollway.training.state import TrainState
from rollway.training.update import update
from training.tiny import gradients, largest_difference, naive_logp, random_batch, tiny

L_MAX = 8
DAGRPO = {
    "ratio": "token",
    "gate": {"kind": "clip", "low": 0.2, "high": 0.2},
    "aggregate": {"kind": "seq_sum_const", "l_max": L_MAX},
    "anchors": "unit",
}
ADVANTAGES = (0.5, 0.0, -0.5, 0.0, 0.5, -0.5)
"""Two rows are masked; row 4 is the expert's."""


def config(**parts: Any) -> TrainConfig:
    return TrainConfig.model_validate({"objective": DAGRPO | parts})


def group(seed: int = 0, **expert: Any) -> TrainingBatch:
    batch = random_batch(6, seed)
    rows = [replace(row, advantage=a) for row, a in zip(batch.rows, ADVANTAGES, strict=True)]
    lost = np.full(len(rows[4].tokens), np.nan, dtype=np.float32)
    rows[4] = replace(rows[4], **{"logprobs": lost, "source": "expert", "route": "expert"} | expert)
    return replace(batch, rows=rows)


def slopes(batch: TrainingBatch, train: TrainConfig, drift: float = 0.0) -> list[torch.Tensor]:
    """The gradient of one optimiser batch, with the policy `drift` away from the old one."""
    policy = tiny()
    tokens = precompute(policy, None, None, batch, train, {}, 1.0).tokens
    torch.manual_seed(1)
    with torch.no_grad():
        for p in policy.parameters():
            p += drift * torch.randn_like(p)
    accumulate(Models(policy, None, 1.0, 20), batch.rows, tokens, train.objective, {})
    return gradients(policy)


def test_the_gradient_is_that_of_equation_5() -> None:
    """(1 / rows) sum of lam A (1 / L_max) sum grad logp, masked rows and the expert in the denominator."""
    batch, policy = group(), tiny()
    terms = [a * naive_logp(policy, row).sum() for a, row in zip(ADVANTAGES, batch.rows, strict=True)]
    (-torch.stack(terms).sum() / (len(batch.rows) * L_MAX)).backward()
    assert largest_difference(slopes(batch, config()), gradients(policy)) < 1e-10


def test_the_expert_keeps_that_gradient_when_the_policy_has_moved() -> None:
    """Its ratio is pi / sg(pi): far from the old policy, where rollouts of A > 0 are clipped, it still pulls."""
    alone = [replace(row, advantage=row.advantage if n == 4 else 0.0) for n, row in enumerate(group().rows)]
    policy = tiny()
    torch.manual_seed(1)
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.5 * torch.randn_like(p)
    (-0.5 * naive_logp(policy, alone[4]).sum() / (6 * L_MAX)).backward()
    got = slopes(replace(group(), rows=alone), config(), drift=0.5)
    assert largest_difference(got, gradients(policy)) < 1e-10


@pytest.mark.parametrize(
    "parts",
    [
        {"correction": {"kind": "tis", "cap": 2.0}},
        {"correction": {"kind": "mis", "level": "sequence", "cap": 2.0}},
        {"ratio": {"kind": "token", "denominator": "behavior"}},
        {"ratio": {"kind": "sequence", "denominator": "behavior"}, "gate": {"kind": "clip", "low": 0.01, "high": 0.01}},
    ],
)
def test_what_weighs_against_the_sampler_leaves_the_expert_alone(parts: dict[str, Any]) -> None:
    train = config(**parts)
    absent = slopes(group(), train, drift=0.1)
    assert all(g.isfinite().all() for g in absent)
    known = np.full(len(group().rows[4].tokens), -7.0, dtype=np.float32)
    assert largest_difference(absent, slopes(group(logprobs=known), train, drift=0.1)) == 0.0


@pytest.mark.parametrize(
    ("expert", "objective", "words"),
    [
        ({}, {"anchors": "none"}, "rollout r4 is an expert's, and the objective forms a ratio.*objective.anchors"),
        ({"route": None}, {}, r"rollout r4 is an expert's and has the route None.*curate\.route: \{sql: source\}"),
        ({"source": "policy", "route": None}, {"correction": "tis"}, "rollout r4 .*without a behaviour log-prob"),
        (
            {"source": "offline", "route": None},
            {"ratio": {"kind": "token", "denominator": "behavior"}},
            "rollout r4 .*without a behaviour log-prob.*import them with log-probs",
        ),
    ],
)
def test_rows_that_nobody_sampled_must_not_pass_for_the_policys(
    expert: dict[str, Any], objective: dict[str, Any], words: str
) -> None:
    with pytest.raises(RollwayError, match=words):
        update(tiny(dtype=torch.float32), None, None, group(**expert), config(**objective), TrainState(seed=0))


@pytest.mark.parametrize("age", [1, 4])
def test_stale_rollouts_without_behaviour_log_probs_are_refused(age: int) -> None:
    lost = np.full(3, np.nan, dtype=np.float32)
    batch = random_batch(3, length=3, logprobs=lost, age=age)
    train = config(ratio={"kind": "token", "denominator": "behavior"}, anchors="none")
    with pytest.raises(RollwayError, match=r"rollout r0 \(3 in all\) has tokens without a behaviour log-prob"):
        update(tiny(dtype=torch.float32), None, None, batch, train, TrainState(seed=0))


def test_experts_are_imitated_without_anchors() -> None:
    sft = {"ratio": "none", "gate": "sft", "aggregate": "token_mean"}
    train = TrainConfig.model_validate({"objective": sft})
    _, metrics = update(tiny(dtype=torch.float32), None, None, group(route=None), train, TrainState(seed=0))
    assert {m.name: m.value for m in metrics}["skipped"] == 0.0


@pytest.mark.parametrize("minibatches", [1, 2])
def test_entropy_and_engine_gap_are_those_of_sampled_rows(minibatches: int) -> None:
    train = TrainConfig.model_validate({"objective": DAGRPO, "minibatches": minibatches})
    _, metrics = update(tiny(dtype=torch.float32), None, None, group(), train, TrainState(seed=0))
    found = {m.name: m.value for m in reversed(metrics)}
    fixed = precompute(tiny(dtype=torch.float32), None, None, group(), train, {}, 1.0)
    own = fixed.tokens.mask.clone()
    own[4] = False
    assert fixed.tokens.entropy is not None
    assert found["entropy_old"] == pytest.approx(float(fixed.tokens.entropy[own].mean()), abs=1e-5)
    gap = (fixed.tokens.logp - fixed.behaviour)[own].abs().mean()
    assert found["gap_mean"] == pytest.approx(float(gap), abs=1e-5)
    assert found["gap_mean"] == pytest.approx({m.name: m.value for m in engine_gap(0, fixed)}["gap_mean"], abs=1e-5)
