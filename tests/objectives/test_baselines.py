"""Worked numbers and checks of the reference methods."""

import math

import pytest
import torch

from objectives.rows import (
    CORRECT,
    ENGINE,
    GROUP,
    NOW,
    OLD,
    V_NOW,
    V_OLD,
    at_ratio,
    group_relative,
    lengths_mask,
    padded,
    parse,
    worked,
)
from rollway.errors import RollwayError
from rollway.objectives import TokenBatch, loss, value_loss, whole_batch_metrics
from rollway.objectives.corrections import correction_weights, effective_sample_size
from rollway.objectives.kl import k1, k2, k3
from rollway.objectives.preference import implied_reward
from rollway.objectives.ratios import sequence_ratio
from rollway.training.advantages import broadcast, gae, returns, whiten

CLIP = {"kind": "clip", "low": 0.2, "high": 0.2}
GRPO = parse(ratio="token", gate=CLIP, aggregate="seq_mean_token_mean")
GRPO_A = group_relative(CORRECT, GROUP, std=True)


def value(batch: TokenBatch, **parts: object) -> float:
    return float(loss(batch, parse(**parts)).loss.detach())


def near(expected: object) -> object:
    return pytest.approx(expected, abs=6e-7)


@pytest.mark.parametrize(("baseline", "expected"), [(0.0, 0.933333), (0.5, -0.091667)])
def test_reinforce(baseline: float, expected: float) -> None:
    batch = worked([c - baseline for c in CORRECT])
    assert value(batch, ratio="none", gate="none", aggregate="seq_mean_token_sum") == near(expected)


def test_reinforce_as_a_token_mean() -> None:
    """The flag for runs that shall not weigh by length: the same sum over another denominator."""
    batch = worked([c - 0.5 for c in CORRECT])
    tokens = sum(len(row) for row in OLD)
    assert value(batch, ratio="none", gate="none", aggregate="token_mean") == near(-0.091667 * 6 / tokens)


def test_leave_one_out_is_dr_grpo_scaled() -> None:
    """RLOO = G / (G - 1) Dr.GRPO, in advantage and so in gradient."""
    dr, rloo = group_relative(CORRECT, GROUP, std=False), torch.tensor([1.0, -0.5, -0.5, 0.5, 0.5, -1.0]).double()
    assert rloo.tolist() == near((1.5 * dr).tolist())
    parts = {"ratio": "token", "gate": CLIP, "aggregate": {"kind": "seq_sum_const", "l_max": 4}}
    assert value(worked(rloo), **parts) == near(1.5 * -0.035005)


def test_rloo() -> None:
    batch = worked([1.0, -0.5, -0.5, 0.5, 0.5, -1.0])
    assert value(batch, ratio="none", gate="none", aggregate="seq_mean_token_sum") == near(-0.083333)


def test_reinforce_plus_plus() -> None:
    batch = worked()
    made = returns(
        batch.reward, batch.logp_old.nan_to_num(), batch.logp_ref.nan_to_num(), batch.mask, gamma=1.0, kl=0.01
    )
    assert made[0].tolist() == near([0.995, 0.996, 0.997, 0.998])
    advantage = whiten(made, batch.mask)
    assert advantage[0].tolist() == near([0.907945, 0.909892, 0.911840, 0.913787])
    assert value(worked(advantage), ratio="token", gate=CLIP, aggregate="token_mean") == near(-0.020010)


def test_reinforce_plus_plus_baseline() -> None:
    centred = group_relative(CORRECT, GROUP, std=False)
    advantage = whiten(broadcast(centred, worked().mask), worked().mask)
    assert value(worked(advantage), ratio="token", gate=CLIP, aggregate="token_mean") == near(-0.017526)


def test_ppo() -> None:
    mask = lengths_mask(OLD)
    raw, target = gae(torch.tensor(CORRECT, dtype=torch.float64), padded(V_OLD).nan_to_num(), mask, gamma=1.0, lam=0.95)
    batch = worked(whiten(raw, mask), value=padded(V_NOW).requires_grad_(), value_old=padded(V_OLD), returns=target)
    parts = {"ratio": "token", "gate": {"kind": "dual_clip"}, "aggregate": "token_mean"}
    assert value(batch, **parts) == near(0.004445)
    assert float(value_loss(batch, 0.2).detach()) == near(0.061772)
    assert float(value_loss(batch, None).detach()) == near(0.057801)
    assert value(batch, **parts, value={"clip": 0.2, "coefficient": 0.5}) == near(0.004445 + 0.5 * 0.061772)


def test_grpo() -> None:
    result = loss(worked(GRPO_A), GRPO)
    assert GRPO_A.tolist() == near([1.154699, -0.577349, -0.577349, 0.577349, 0.577349, -1.154699])
    assert result.token_loss[0].tolist() == near([-1.276139, -0.855422, -1.154699, -1.385638])
    assert result.token_loss[2, :3].tolist() == near([0.779340, 0.577349, 0.461879])
    assert result.token_loss[2, 3] == 0.0
    assert float(result.loss.detach()) == near(-0.026756)
    assert value(worked(GRPO_A), ratio="token", gate=CLIP, aggregate="token_mean") == near(-0.085597)
    assert value(worked(GRPO_A), ratio="token", gate=CLIP, aggregate="seq_mean_token_sum") == near(-0.242524)


def test_grpo_with_kl() -> None:
    mask = lengths_mask(NOW)
    lp, lr = worked().logp.detach()[mask], worked().logp_ref[mask]
    assert [float(k(lp, lr).mean()) for k in (k1, k2, k3)] == near([0.070588, 0.042941, 0.044454])
    result = loss(
        worked(GRPO_A),
        parse(ratio="token", gate=CLIP, aggregate="seq_mean_token_mean", kl={"kind": "k3", "beta": 0.04}),
    )
    assert float(result.loss.detach()) == near(-0.024685)
    assert float(result.metrics["kl/reference"]) == near(0.044454)


def test_gradients_of_the_kl_estimators_token_by_token() -> None:
    """k1 -> 1, k2 -> lp - lr, k3 -> 1 - exp(lr - lp), times grad lp."""
    expected = {
        "k1": lambda lp, lr: torch.ones_like(lp),
        "k2": lambda lp, lr: lp - lr,
        "k3": lambda lp, lr: 1 - (lr - lp).exp(),
    }
    for kind, slope in expected.items():
        batch = worked(torch.zeros(6, dtype=torch.float64))
        objective = parse(ratio="token", gate=CLIP, aggregate="token_mean", kl={"kind": kind, "beta": 1.0})
        found = torch.autograd.grad(loss(batch, objective).loss, batch.logp)[0][batch.mask]
        lp, lr = batch.logp.detach()[batch.mask], batch.logp_ref[batch.mask]
        torch.testing.assert_close(found * 17, slope(lp, lr), atol=1e-12, rtol=0)


def test_clips_of_sequences_and_of_tokens_drop_different_tokens() -> None:
    """GSPO and GRPO on the worked batch: a row's mean may be inside where a token is outside, and vice versa."""
    dropped = {}
    for ratio, gate in (("token", CLIP), ("sequence", {"kind": "clip", "low": 3e-4, "high": 4e-4})):
        batch = worked(GRPO_A)
        result = loss(batch, parse(ratio=ratio, gate=gate, aggregate="seq_mean_token_mean"))
        gradient = torch.autograd.grad(result.loss, batch.logp)[0]
        dropped[ratio] = batch.mask & (gradient == 0.0)
    assert bool((dropped["token"] & ~dropped["sequence"]).any())
    assert bool((dropped["sequence"] & ~dropped["token"]).any())


def test_dr_grpo() -> None:
    advantage = group_relative(CORRECT, GROUP, std=False)
    aggregate = {"kind": "seq_sum_const", "l_max": 4}
    assert value(worked(advantage), ratio="token", gate=CLIP, aggregate=aggregate) == near(-0.035005)


def test_dapo() -> None:
    gate = {"kind": "clip", "low": 0.2, "high": 0.28}
    assert value(worked(GRPO_A), ratio="token", gate=gate, aggregate="token_mean") == near(-0.092484)


def test_gspo() -> None:
    batch = worked()
    x = torch.where(batch.mask, batch.logp.detach() - batch.logp_old, 0.0)
    s = sequence_ratio(x, batch.mask)[:, 0]
    assert s.tolist() == near([1, 0.951229, 0.967216, 1.349859, 1.105171, 0.935507])
    for (low, high), expected in (((3e-4, 4e-4), -0.000192), ((0.1, 0.1), -0.039504)):
        gate = {"kind": "clip", "low": low, "high": high}
        assert value(worked(GRPO_A), ratio="sequence", gate=gate, aggregate="seq_mean_token_mean") == near(expected)


def test_gspo_token_equals_gspo_when_the_advantage_is_constant_in_a_row() -> None:
    gate = {"kind": "clip", "low": 0.1, "high": 0.1}
    gradients = []
    for ratio in ("sequence", "sequence_token"):
        batch = worked(GRPO_A)
        result = loss(batch, parse(ratio=ratio, gate=gate, aggregate="seq_mean_token_mean"))
        gradients.append((float(result.loss.detach()), torch.autograd.grad(result.loss, batch.logp)[0]))
    assert gradients[0][0] == pytest.approx(gradients[1][0], abs=1e-12)
    torch.testing.assert_close(gradients[0][1], gradients[1][1], atol=1e-12, rtol=0)


def test_cispo() -> None:
    gate = {"kind": "cispo", "low": 1.0, "high": 0.28}
    assert value(worked(GRPO_A), ratio="token", gate=gate, aggregate="token_mean") == near(-0.008875)


def test_cispo_with_an_absolute_cap() -> None:
    """TRL caps the ratio at 5 and has no lower bound: low 1, high 4."""
    batch = at_ratio([(0.01, 3.0, 5.0), (7.0, 0.5)], [1.0, -2.0])
    result = loss(batch, parse(ratio="token", gate={"kind": "cispo", "low": 1.0, "high": 4.0}, aggregate="token_mean"))
    gradient = 5 * torch.autograd.grad(result.loss, batch.logp)[0]
    assert gradient[0].tolist() == near([-0.01, -3.0, -5.0])
    assert gradient[1, :2].tolist() == near([10.0, 1.0])


def test_cispo_keeps_the_gradient_of_every_token() -> None:
    batch = at_ratio([(0.5, 1.0, 5.0), (0.1, 1.2)], [1.0, -2.0])
    result = loss(batch, parse(ratio="token", gate={"kind": "cispo", "low": 1.0, "high": 0.28}, aggregate="token_mean"))
    gradient = 5 * torch.autograd.grad(result.loss, batch.logp)[0]
    assert gradient[0].tolist() == near([-0.5, -1.0, -1.28])
    assert gradient[1].tolist() == near([0.2, 2.4, 0.0])


@pytest.mark.parametrize(
    ("correction", "aggregate", "expected"),
    [
        ({"kind": "tis", "cap": 2.0}, "token_mean", -0.077549),
        ({"kind": "tis", "cap": 2.0}, "seq_mean_token_mean", -0.008261),
        ({"kind": "tis", "level": "sequence", "cap": 2.0}, "token_mean", -0.117467),
        ({"kind": "mis", "cap": 2.0}, "token_mean", -0.145473),
    ],
)
def test_importance_corrections(correction: dict[str, object], aggregate: str, expected: float) -> None:
    assert value(worked(GRPO_A), ratio="token", gate=CLIP, aggregate=aggregate, correction=correction) == near(expected)


def test_correction_is_idle_without_a_mismatch_and_never_touches_the_kl() -> None:
    parts = {"ratio": "token", "gate": CLIP, "aggregate": "token_mean", "kl": {"kind": "k3", "beta": 0.5}}
    batch = worked(GRPO_A)
    plain = loss(batch, parse(**parts))
    same = TokenBatch(**(vars(batch) | {"logp_behavior": batch.logp_old}))
    corrected = loss(same, parse(**parts, correction={"kind": "tis", "cap": math.inf}))
    assert torch.equal(plain.loss, corrected.loss)
    shifted = loss(batch, parse(**parts, correction="tis"))
    assert torch.equal(plain.metrics["loss/kl"], shifted.metrics["loss/kl"])
    assert not torch.equal(plain.loss, shifted.loss)


def test_sequence_correction_is_the_product_of_the_token_ratios() -> None:
    old, engine = padded([(-0.5, -0.7)]), padded([(-0.6, -1.0)])
    mask = torch.ones(1, 2, dtype=torch.bool)
    weights = correction_weights(old, engine, mask, kind="tis", level="sequence", cap=5.0)
    assert weights.tolist() == [near([math.exp(0.4)] * 2)]


@pytest.mark.parametrize("kind", ["tis", "mis"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_what_is_logged_of_the_correction(kind: str, level: str) -> None:
    """Mean weight and (sum w)^2 / (n sum w^2), n the number of weights: one per token, or one per row."""
    part = {"kind": kind, "level": level, "cap": 2.0}
    objective = parse(ratio="token", gate=CLIP, aggregate="token_mean", correction=part)
    gaps = [[o - v for o, v in zip(old, engine, strict=True)] for old, engine in zip(OLD, ENGINE, strict=True)]
    raw = [math.exp(x) for row in gaps for x in row] if level == "token" else [math.exp(sum(row)) for row in gaps]
    w = [min(x, 2.0) if kind == "tis" else (x if x <= 2.0 else 0.0) for x in raw]
    found = whole_batch_metrics(worked(GRPO_A), objective)
    assert found == pytest.approx(
        {"correction/mean": sum(w) / len(w), "correction/ess": sum(w) ** 2 / (len(w) * sum(x * x for x in w))},
        abs=1e-12,
    )


def test_effective_sample_size() -> None:
    assert float(effective_sample_size(torch.ones(5))) == 1.0
    assert float(effective_sample_size(torch.tensor([1.0, 0.0, 0.0, 0.0]))) == 0.25
    assert float(effective_sample_size(torch.zeros(3))) == 0.0


def test_preferences() -> None:
    pairs = {"pair_chosen": torch.tensor([0, 3]), "pair_rejected": torch.tensor([1, 5])}
    dpo = loss(worked(**pairs), parse(preference={"kind": "dpo", "beta": 0.1}))
    assert float(dpo.loss.detach()) == near(0.663597)
    assert float(dpo.metrics["preference/margin"]) == near(0.6)
    d = implied_reward(worked().logp.detach(), worked().logp_ref, worked().mask)
    assert (d[[0, 3]] - d[[1, 5]]).tolist() == near([0.6, 0.6])
    assert value(worked(**pairs), preference={"kind": "ipo", "beta": 0.1}) == near(19.36)
    assert value(worked(**pairs), preference={"kind": "dpo", "beta": 1e-12}) == near(math.log(2))
    one = 0.5 / 4 - (-0.1) / 2
    two = 0.5 / 1 - (-0.1) / 3
    expected = ((one - 5) ** 2 + (two - 5) ** 2) / 2
    assert value(worked(**pairs), preference={"kind": "ipo", "beta": 0.1, "average": True}) == near(expected)


def test_supervised() -> None:
    parts = {"ratio": "none", "gate": "sft", "aggregate": "token_mean"}
    assert value(worked(), **parts) == near(0.723529)
    right = torch.tensor(CORRECT).nonzero()[:, 0]
    assert value(worked().rows(right), **parts) == near(0.622222)


def test_positive_and_negative_reinforcement() -> None:
    parts = {"ratio": "token", "gate": CLIP, "aggregate": "token_mean"}
    sign = [1.0 if c else -1.0 for c in CORRECT]
    batch = worked(sign)
    assert value(batch.rows(batch.correct == 1), **parts) == near(-1.050666)
    assert value(batch.rows(batch.correct == 0), **parts) == near(1.009554)
    assert value(worked([0.1 if c else -1.0 for c in CORRECT]), **parts) == near(0.419461)


def test_clipping_regions() -> None:
    batch = at_ratio([(1.3,), (5.0,)], [1.0, -1.0])
    clipped = loss(batch, parse(ratio="token", gate=CLIP, aggregate="token_mean"))
    assert clipped.token_loss[:, 0].tolist() == near([-1.2, 5.0])
    assert torch.autograd.grad(clipped.loss, batch.logp)[0][0, 0] == 0.0
    dual = loss(batch, parse(ratio="token", gate="dual_clip", aggregate="token_mean"))
    assert dual.token_loss[1, 0] == near(3.0)
    assert torch.autograd.grad(dual.loss, batch.logp)[0][1, 0] == 0.0
    assert float(dual.metrics["clip_share"]) == 1.0
    assert float(clipped.metrics["clip_share"]) == 0.5


def test_entropy_bonus_is_a_token_mean() -> None:
    z = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64, requires_grad=True)
    logp = z.log_softmax(0)
    assert logp.exp().tolist() == near([0.665241, 0.244728, 0.090031])
    entropy = -(logp.exp() * logp).sum()
    batch = TokenBatch(
        logp=logp[None, :1].detach(),
        mask=torch.ones(1, 1, dtype=torch.bool),
        advantage=torch.zeros(1, dtype=torch.float64),
        entropy=entropy[None, None],
    )
    result = loss(batch, parse(ratio="none", gate="none", aggregate="token_mean", entropy_bonus=1.0))
    assert float(result.loss.detach()) == near(-0.832396)
    gradient = torch.autograd.grad(result.loss, z)[0]
    assert (-gradient).tolist() == near([-0.282587, 0.140770, 0.141817])


def test_old_log_probs_are_never_made_up() -> None:
    batch = TokenBatch(**(vars(worked(GRPO_A)) | {"logp_old": None}))
    with pytest.raises(RollwayError, match="needs `logp_old`"):
        loss(batch, GRPO)


def test_ratio_comes_from_the_columns() -> None:
    """Two updates from the same rollouts: ratio 1 in the first, exp(new - old) in the second."""
    batch = worked(GRPO_A)
    first = TokenBatch(**(vars(batch) | {"logp": batch.logp_old.clone()}))
    assert float(loss(first, GRPO).metrics["max/ratio"]) == 1.0
    second = loss(batch, GRPO).metrics
    assert float(second["ratio/mean"]) == near(float((batch.logp.detach() - batch.logp_old)[batch.mask].exp().mean()))
    assert float(second["max/ratio"]) == near(math.exp(0.4))


def test_sequence_ratio_of_two_tokens_is_the_root_of_the_product() -> None:
    result = loss(
        at_ratio([(2.0, 0.5), (2.0, 2.0)], [1.0, 1.0]), parse(ratio="sequence", gate="none", aggregate="token_mean")
    )
    assert result.token_loss.tolist() == [near([-1.0, -1.0]), near([-2.0, -2.0])]


def test_sequence_ratio_refuses_token_advantages() -> None:
    batch = at_ratio([(1.0, 1.0)], [[1.0, -1.0]])
    with pytest.raises(RollwayError, match="sequence_token"):
        loss(batch, parse(ratio="sequence", gate=CLIP, aggregate="token_mean"))
