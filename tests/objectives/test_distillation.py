"""Distillation in an objective: worked examples of the methods that use it, routes, granularity, refused options."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from objectives.rows import lengths_mask, padded, parse
from rollway.config.objectives import ROUTES, Objective
from rollway.errors import RollwayError
from rollway.objectives import TokenBatch, loss, totals
from rollway.objectives.distillation import with_divergence
from rollway.objectives.divergences import divergence

OPSD_P = ((0.7, 0.2, 0.1), (0.05, 0.9, 0.05))
OPSD_Q = ((0.4, 0.4, 0.2), (0.6, 0.2, 0.2))


def of_distributions(p: Any, q: Any, **fields: Any) -> TokenBatch:
    """One row per outermost entry; logits are log-probs, with gradients on the policy's."""
    teacher, policy = (torch.tensor(x, dtype=torch.float64).log() for x in (p, q))
    n, t, _ = policy.shape
    given = {"token_ids": torch.zeros(n, t, dtype=torch.int64), "mask": torch.ones(n, t, dtype=torch.bool)} | fields
    logits = policy.requires_grad_()
    logp = logits.log_softmax(-1).gather(-1, given["token_ids"][..., None])[..., 0]
    return TokenBatch(logp=logp, logits=logits, teacher_logits=teacher, **given)


def test_opsd_worked() -> None:
    """Forward KL capped at .2 over the whole vocabulary, seq_mean; and the sampled reverse KL."""
    part = {"divergence": "forward_kl", "estimate": "exact", "clip": 0.2}
    batch = of_distributions([OPSD_P], [OPSD_Q])
    found = loss(batch, parse(distill=part, aggregate="seq_mean_token_mean"))
    assert float(found.loss.detach()) == pytest.approx(-0.000752, abs=1e-6)
    slope = torch.autograd.grad(found.loss, batch.logits)[0][0]
    expected = torch.tensor([[0.06, -0.04, -0.02], [0.005, 0.01, -0.015]], dtype=torch.float64)
    torch.testing.assert_close(slope, expected, atol=1e-12, rtol=0)
    plain = loss(batch, parse(distill=part | {"clip": None}, aggregate="seq_mean_token_mean"))
    assert float(plain.loss.detach()) == pytest.approx(0.671948, abs=1e-6)
    batch = of_distributions([OPSD_P], [OPSD_Q])
    sampled = loss(batch, parse(distill={"divergence": "reverse_kl"}, aggregate="seq_mean_token_mean"))
    assert float(sampled.loss.detach()) == pytest.approx(-0.378292, abs=1e-6)


def test_a_tail_that_the_caller_knows_is_clamped_as_one_that_is_left_over() -> None:
    """Worked: tails (.6, .2) of top 2; and none at all, which on one side alone would weigh like a divergence."""
    part = parse(distill={"divergence": "reverse_kl", "estimate": {"kind": "topk"}}, aggregate="token_mean")
    top = torch.tensor([[[0.3, 0.1]], [[0.5, 0.5]]], dtype=torch.float64).log()
    own = torch.tensor([[[0.5, 0.3]], [[0.5, 0.5]]], dtype=torch.float64).log()
    flat = torch.zeros(2, 1, dtype=torch.float64)
    left = TokenBatch(logp=flat, mask=flat == 0, topk_logp=own, teacher_topk_logp=top)
    known = replace(left, teacher_tail=torch.tensor([[0.6], [0.0]], dtype=torch.float64))
    for batch in (left, known):
        found = loss(batch, part).token_loss[:, 0].tolist()
        assert found == pytest.approx([0.365274, 0.0], abs=1e-6)
        assert found[1] == pytest.approx(0.0, abs=1e-12)


def test_distillation_temperature_divides_both_logits() -> None:
    """dL / dz = (Q - P) / T for the forward KL, without a factor T^2."""
    batch = of_distributions([OPSD_P], [OPSD_Q])
    part = {"divergence": "forward_kl", "estimate": "exact", "temperature": 2.0}
    slope = torch.autograd.grad(loss(batch, parse(distill=part, aggregate="token_mean")).loss, batch.logits)[0]
    heated = [(x / 2.0).softmax(-1) for x in (batch.logits, batch.teacher_logits)]
    torch.testing.assert_close(slope, (heated[0] - heated[1]).detach() / 2.0 / 2)


def test_sd_zero_worked() -> None:
    """Phase 2: reverse KL of two tokens; a token mean of one row."""
    batch = of_distributions([[(0.5, 0.25, 0.25), (0.7, 0.2, 0.1)]], [[(0.5, 0.3, 0.2), (0.1, 0.6, 0.3)]])
    found = loss(batch, parse(distill={"estimate": "exact"}, aggregate="seq_mean_token_mean"))
    assert float(found.loss.detach()) == pytest.approx(0.402114, abs=1e-6)
    assert float(found.metrics["distill/divergence"]) == pytest.approx(0.402114, abs=1e-6)
    assert found.token_loss[0].tolist() == pytest.approx([0.010068, 0.794160], abs=1e-6)


def test_kepo_worked() -> None:
    """Two rollouts of reward 0 and 2: JSD(.5) on the gated one, over its own tokens, beside GRPO's loss of 0."""
    q = [[(0.5, 0.5), (0.5, 0.5)], [(0.3, 0.7), (0.8, 0.2)]]
    p = [[(0.9, 0.1), (0.9, 0.1)], [(0.9, 0.1), (0.5, 0.5)]]
    advantage_ = torch.tensor([-0.707057, 0.707057], dtype=torch.float64)
    batch = of_distributions(
        p, q, advantage=advantage_, route=torch.tensor([ROUTES.index(n) for n in ("policy", "both")])
    )
    batch = TokenBatch(**{**vars(batch), "logp_old": batch.logp.detach()})
    objective = parse(
        ratio="token",
        gate="none",
        aggregate="seq_mean_token_mean",
        distill={"divergence": "jsd", "estimate": "exact", "rows": "routed", "aggregate": "token_mean"},
    )
    found = loss(batch, objective)
    assert float(found.loss.detach()) == pytest.approx(0.127855, abs=1e-6)
    assert float(found.metrics["loss/policy"]) == pytest.approx(0.0, abs=1e-6)
    assert float(found.metrics["distill/share"]) == 0.5
    nobody = TokenBatch(**{**vars(batch), "route": torch.zeros(2, dtype=torch.int64)})
    assert float(loss(nobody, objective).metrics["loss/distill"]) == 0.0


SRPO = {
    "ratio": "token",
    "gate": {"kind": "clip", "low": 0.2, "high": 0.28},
    "aggregate": "token_mean",
    "distill": {
        "divergence": "jsd",
        "estimate": "exact",
        "rows": "routed",
        "emphasis": {"kind": "entropy_weight", "beta": 1.0},
    },
}


def srpo_batch(**fields: Any) -> TokenBatch:
    """Row 0 to GRPO with two tokens, rows 1 and 2 to distillation with two tokens and one."""
    half = (1 / 3, 1 / 3, 1 / 3)
    q = [[half, half], [(0.5, 0.3, 0.2), (0.2, 0.2, 0.6)], [(0.1, 0.8, 0.1), half]]
    p = [[half, half], [(0.7, 0.2, 0.1), (0.4, 0.4, 0.2)], [(0.9, 0.05, 0.05), half]]
    policy, teacher = (torch.tensor(x, dtype=torch.float64).log() for x in (q, p))
    logp = policy[..., 0].clone()
    logp[0] = torch.tensor([0.6, 0.3], dtype=torch.float64).log()
    old = logp.clone()
    old[0] = torch.tensor([0.5, 0.4], dtype=torch.float64).log()
    given = {
        "logp": logp.requires_grad_(),
        "logp_old": old,
        "mask": torch.tensor([[True, True], [True, True], [True, False]]),
        "advantage": torch.tensor([2 / 3, -1 / 3, -1 / 3], dtype=torch.float64),
        "route": torch.tensor([ROUTES.index(n) for n in ("policy", "distill", "distill")]),
        "logits": policy.requires_grad_(),
        "teacher_logits": teacher,
    }
    return TokenBatch(**given | fields)


def test_srpo_worked() -> None:
    found = loss(srpo_batch(), parse(**SRPO))
    assert float(found.loss.detach()) == pytest.approx(-0.137098, abs=1e-6)
    weighted = [0.914822 * 0.021901, 0.710258 * 0.086305, 1.374920 * 0.387787]
    assert found.token_loss[found.kept].tolist() == pytest.approx([-0.8, -0.5, *weighted], abs=1e-6)
    unweighted = {**SRPO, "distill": {**SRPO["distill"], "emphasis": "none"}}
    assert float(loss(srpo_batch(), parse(**unweighted)).loss.detach()) == pytest.approx(-0.160801, abs=1e-6)


def test_srpo_top_k_of_the_whole_vocabulary_is_the_full_divergence() -> None:
    for of in ("teacher", "student"):
        part = {**SRPO["distill"], "estimate": {"kind": "topk", "k": 3, "of": of}}
        found = loss(srpo_batch(), parse(**{**SRPO, "distill": part}))
        assert float(found.loss.detach()) == pytest.approx(-0.137098, abs=2e-6)


def test_srpo_without_rows_to_distil_is_grpo() -> None:
    batch = srpo_batch(route=torch.zeros(3, dtype=torch.int64))
    grpo = {key: part for key, part in SRPO.items() if key != "distill"}
    torch.testing.assert_close(loss(batch, parse(**SRPO)).loss, loss(batch, parse(**grpo)).loss)


def test_srpo_mean_weight_is_one_and_micro_batches_share_it() -> None:
    objective, batch = parse(**SRPO), srpo_batch()
    whole = totals(batch, objective)
    ready = with_divergence(batch, objective)
    each = (-ready.teacher_entropy).exp()[batch.mask & (batch.route == ROUTES.index("distill"))[:, None]]
    assert float(whole["distill/emphasis"]) == pytest.approx(float(each.mean()))
    parts = [loss(batch.rows([n]), objective, totals=whole).loss for n in range(3)]
    torch.testing.assert_close(sum(parts), loss(batch, objective).loss)


def test_truncated_importance_scales_the_token_and_takes_no_gradient() -> None:
    """SDPO: sg(min(exp(logp - old), 2)) times the divergence."""
    old = torch.tensor([[0.0, 0.0], [-1.0, -0.2], [-9.0, 0.0]], dtype=torch.float64)
    part = {**SRPO["distill"], "emphasis": "none"}
    plain, scaled = (
        loss(srpo_batch(logp_old=old), parse(**{**SRPO, "distill": part | extra}))
        for extra in ({}, {"importance": {"kind": "truncated", "cap": 2.0}})
    )
    logp = srpo_batch().logp.detach()
    expected = plain.token_loss[1:] * (logp - old)[1:].exp().clamp(max=2.0)
    torch.testing.assert_close(scaled.token_loss[1:], expected)
    assert float((logp - old)[2, 0].exp()) > 2.0


def scope_batch() -> TokenBatch:
    old = [(-0.2, -0.4), (-1.0, -0.8, -1.2), (-0.5, -0.7), (-0.3, -0.6, -0.9)]
    now = [(-0.1, -0.4), (-0.9, -0.8, -1.3), (-0.6, -0.7), (-0.3, -0.5, -0.9)]
    teacher = [(-0.3, -0.3), (-0.9, -0.7, -1.0), (-0.2, -0.4), (-1.5, -2.0, -1.0)]
    weight = torch.tensor([0.331812, 0.668188, 0.768525, 0.231475], dtype=torch.float64)
    return TokenBatch(
        logp=padded(now).requires_grad_(),
        logp_old=padded(old),
        mask=lengths_mask(old),
        teacher_logp=padded(teacher),
        advantage=torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64),
        # The spec sums over a group's rows; the aggregation takes the mean over all rows.
        weight=4 * weight,
        route=torch.tensor([ROUTES.index(n) for n in ("policy", "policy", "distill", "distill")]),
    )


SCOPE = {
    "ratio": "token",
    "gate": "none",
    "aggregate": {"kind": "seq_mean_token_sum", "weights": "numerator"},
    "distill": {"importance": "ratio", "rows": "routed"},
}


def test_scope_worked() -> None:
    batch = scope_batch()
    found = loss(batch, parse(**SCOPE))
    assert found.token_loss.sum(1).tolist() == pytest.approx([-2.105171, -3.010008, -0.661935, 2.957756], abs=1e-6)
    assert float(found.loss.detach()) == pytest.approx(-2.533838, abs=2e-6)
    slope = torch.autograd.grad(found.loss, batch.logp)[0][2]
    ratio, r = (batch.logp - batch.logp_old).exp()[2], (batch.logp - batch.teacher_logp)[2]
    torch.testing.assert_close(slope[:2], (0.768525 * ratio * r).detach()[:2])


def test_a_teacher_equal_to_the_policy_gives_exactly_nothing() -> None:
    batch = scope_batch()
    same = TokenBatch(**{**vars(batch), "teacher_logp": batch.logp.detach()})
    assert not bool(loss(same, parse(**SCOPE)).token_loss[2:].any())
    for kind in ("forward_kl", "reverse_kl", "jsd", "pearson_chi2", "total_variation", "hellinger2"):
        for granularity in ("token", "sequence"):
            part = {"divergence": kind, "estimate": {"kind": "sampled", "granularity": granularity}}
            found = loss(same, parse(distill=part, aggregate="token_mean"))
            assert float(found.loss.detach()) == 0.0
            assert not bool(torch.autograd.grad(found.loss, batch.logp)[0].any())


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd", "hellinger2", "skew_forward"])
def test_sequence_granularity_has_the_gradient_of_the_sequence_divergence(kind: str) -> None:
    """All sequences of two tokens over three: the weighted mean of the surrogates against D of the joint."""
    g = torch.Generator().manual_seed(4)
    first, second = (
        torch.randn(3, dtype=torch.float64, generator=g),
        torch.randn(3, 3, dtype=torch.float64, generator=g),
    )
    p_first, p_second = (
        torch.randn(3, dtype=torch.float64, generator=g),
        torch.randn(3, 3, dtype=torch.float64, generator=g),
    )
    first.requires_grad_(), second.requires_grad_()

    def tokens(a: Tensor, b: Tensor) -> Tensor:
        """[9, 2] log-probs of both tokens of every sequence."""
        one, two = a.log_softmax(-1), b.log_softmax(-1)
        return torch.stack([one[:, None].expand(3, 3).flatten(), two.flatten()], dim=1)

    lq, lp = tokens(first, second), tokens(p_first, p_second)
    part = {"divergence": kind, "estimate": {"kind": "sampled", "granularity": "sequence"}}
    objective = parse(distill=part, aggregate={"kind": "seq_mean_token_sum", "weights": "numerator"})
    weight = 9 * lq.detach().sum(1).exp()
    batch = TokenBatch(logp=lq, mask=torch.ones(9, 2, dtype=torch.bool), teacher_logp=lp, weight=weight)
    found = torch.autograd.grad(loss(batch, objective).loss, [first, second], retain_graph=True)
    assert objective.distill is not None
    exact = divergence(lp.sum(1), lq.sum(1), objective.distill.divergence)
    for mine, theirs in zip(found, torch.autograd.grad(exact, [first, second]), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-9)


def test_log_ratios_of_samples_are_clamped() -> None:
    batch = scope_batch()
    far = TokenBatch(**{**vars(batch), "teacher_logp": torch.full_like(batch.logp, -1e4)})
    found = loss(far, parse(distill={}, aggregate="token_mean"))
    assert bool(found.loss.isfinite())
    torch.testing.assert_close(found.token_loss[0, :2], 20.0 * batch.logp.detach()[0, :2])


def test_emphasis_above_a_threshold_counts_only_uncertain_tokens() -> None:
    batch = scope_batch()
    entropy = padded([(0.1, 0.9), (0.5, 0.6, 0.7), (0.1, 0.1), (2.0, 0.2, 0.3)])
    batch = TokenBatch(**{**vars(batch), "teacher_entropy": entropy, "route": None})
    part = {"emphasis": {"kind": "entropy_above", "threshold": 0.5}}
    found = loss(batch, parse(distill=part, aggregate="token_mean"))
    live = batch.mask & (entropy > 0.5)
    assert int(live.sum()) == 4
    assert torch.equal(found.token_loss != 0, live)
    assert float(found.metrics["distill/share"]) == pytest.approx(4 / 10)


def test_rows_without_teacher_data_may_lie_under_other_routes() -> None:
    batch = scope_batch()
    teacher = batch.teacher_logp.clone()
    teacher[:2] = float("nan")
    holed = TokenBatch(**{**vars(batch), "teacher_logp": teacher})
    found, expected = loss(holed, parse(**SCOPE)), loss(batch, parse(**SCOPE))
    torch.testing.assert_close(found.loss, expected.loss)
    assert bool(torch.autograd.grad(found.loss, batch.logp)[0][batch.mask].isfinite().all())


ALONE = {"aggregate": "token_mean"}
GRPO = {"ratio": "token", "gate": "clip", "aggregate": "token_mean"}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (ALONE | {"distill": {"temperature": 2.0}}, "sampled sees single log-probs"),
        (ALONE | {"distill": {"clip": 0.1}}, "caps entries of the vocabulary"),
        (ALONE | {"distill": {"divergence": "akl"}}, "head against tail"),
        (ALONE | {"distill": {"divergence": "akl", "estimate": "exact"}}, "sorts the vocabulary"),
        (ALONE | {"distill": {"divergence": "akl", "estimate": "topk", "clip": 0.1}}, "akl weighs two"),
        (ALONE | {"distill": {"estimate": "topk", "importance": "ratio"}}, "replaces logp in estimate sampled"),
        (
            ALONE
            | {"distill": {"estimate": {"kind": "sampled", "granularity": "sequence"}, "importance": "truncated"}},
            "one number per row",
        ),
        (
            ALONE | {"distill": {"estimate": {"kind": "sampled", "granularity": "sequence"}, "divergence": "todi"}},
            "defined per token",
        ),
        (ALONE | {"distill": {"aggregate": "token_mean"}}, "set the objective's `aggregate`"),
        ({"distill": {}}, "aggregate: not given"),
        (ALONE | {"distill": {}, "mixing": "target_entropy"}, "mixing cannot act"),
        (ALONE | {"distill": {}, "anchors": "unit"}, "anchors cannot act"),
        (ALONE | {"distill": {}, "select": "signal_top"}, "select cannot act"),
        (ALONE | {"distill": {}, "value": {}}, "value cannot act"),
        (ALONE | {"distill": {}, "ratio": "token"}, "gate: not given"),
        ({"preference": "dpo", "distill": {}}, "distill would do nothing"),
        (GRPO | {"distill": {}, "anchors": "unit"}, "rows: routed"),
        (ALONE | {"distill": {"weight": 0.0}}, "greater than 0"),
        (ALONE | {"distill": {"emphasis": "entropy_above"}}, "threshold"),
        (ALONE | {"distill": {"direction": "forward"}}, "Extra inputs"),
    ],
)
def test_options_without_effect_are_refused(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Objective.model_validate(parts)


def test_what_the_teacher_must_give() -> None:
    def reads(**part: Any) -> set[str]:
        made = parse(distill=part, aggregate="token_mean").distill
        assert made is not None
        return set(made.reads())

    assert reads() == {"teacher_logprob"}
    assert reads(estimate="topk", emphasis="entropy_weight") == {
        "teacher_topk_ids",
        "teacher_topk_logprobs",
        "teacher_entropy",
    }
    assert reads(estimate="exact") == set()


def test_experts_are_distilled_only_where_nothing_takes_them_for_samples() -> None:
    assert parse(distill={"estimate": "topk"}, aggregate="token_mean").places_experts()
    assert not parse(distill={}, aggregate="token_mean").places_experts()
    assert not parse(distill={"estimate": "topk", "importance": "truncated"}, aggregate="token_mean").places_experts()


def test_absent_teacher_data_is_named() -> None:
    batch = TokenBatch(logp=torch.zeros(1, 2), mask=torch.ones(1, 2, dtype=torch.bool))
    for part, field in (
        ({}, "teacher_logp"),
        ({"estimate": "topk"}, "teacher_topk_logp"),
        ({"estimate": "exact"}, "divergence"),
    ):
        with pytest.raises(RollwayError, match=field):
            loss(batch, parse(distill=part, aggregate="token_mean"))
