"""The grid of the survey of on-policy distillation (arXiv 2604.00626): losses by hand, by enumeration and by finite
differences, and where each recipe stands on its axes."""

import math
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from objectives.test_divergences import GENERATORS, pairs
from rollway.config import load_recipe, recipe_names
from rollway.config.base import ConfigError
from rollway.config.recipes import Recipe
from rollway.config.training import TeacherAdvantage
from rollway.objectives import TokenBatch, loss, route_codes
from rollway.objectives.divergences import divergence, terms, with_tail
from rollway.training.advantages import of_teacher

P, Q = (0.6, 0.3, 0.1), (0.2, 0.5, 0.3)
P2, Q2 = (0.25, 0.5, 0.25), (0.5, 0.25, 0.25)
SURE_P, SURE_Q = (0.95, 0.04, 0.01), (0.8, 0.1, 0.1)


def batch_of(p: Any, q: Any, y: Any, recipe: Recipe, ref: Any = None, **fields: Any) -> TokenBatch:
    """Rows of distributions [N, T, V] and sampled tokens [N, T], with the teacher's advantages of the recipe."""
    lp, z = (torch.tensor(x, dtype=torch.float64).log() for x in (p, q))
    ids = torch.tensor(y)
    lq = z.requires_grad_().log_softmax(-1)
    logp, teacher = (x.gather(-1, ids[..., None])[..., 0] for x in (lq, lp))
    base = None if ref is None else torch.tensor(ref, dtype=torch.float64).log().gather(-1, ids[..., None])[..., 0]
    mask = torch.ones_like(ids, dtype=torch.bool)
    part = recipe.train.advantage
    if isinstance(part, TeacherAdvantage):
        given = part.model_dump(exclude={"kind", "with_curated"})
        fields = {"advantage": of_teacher(teacher, logp.detach(), base, mask, **given)} | fields
    return TokenBatch(
        **{
            "logp": logp,
            "logp_old": logp.detach(),
            "mask": mask,
            "token_ids": ids,
            "logits": z,
            "teacher_logits": lp,
            "teacher_logp": teacher,
        }
        | fields
    )


def value(batch: TokenBatch, recipe: Recipe) -> float:
    return float(loss(batch, recipe.train.objective).loss.detach())


PER_ROW = ("opd", "gkd", "todi", "akl", "distillm", "distillm-2", "minillm", "opd-reward", "g-opd", "opsd", "sd-zero")


@pytest.mark.parametrize("name", [*PER_ROW, "kepo", "expo"])
def test_a_row_without_tokens_counts_as_0_and_stays_in_the_denominator(name: str) -> None:
    """Equation 1; KEPO's mean over all rows (its eq. 5, the policy's part) and ExPO's 1 / G."""
    recipe = load_recipe(name)
    one = batch_of([[P, P2]] * 2, [[Q, Q2]] * 2, [[0, 1]] * 2, recipe, ref=[[P2, P2]] * 2)
    fields = {"route": route_codes(["both" if name == "kepo" else "policy"] * 2), "group": torch.zeros(2).long()}
    fields |= {} if one.advantage is not None else {"advantage": torch.ones(2, dtype=torch.float64)}
    both = replace(one, **fields)
    empty = replace(both, mask=both.mask & torch.tensor([[True], [False]]))
    figure = "loss/policy" if name == "kepo" else "loss"
    found = [float(loss(x, recipe.train.objective).metrics[figure]) for x in (both, empty)]
    assert found[1] == pytest.approx(found[0] / 2, rel=1e-12)
    assert abs(found[0]) > 1e-3


def test_the_reward_form_by_hand() -> None:
    """-(ln P - ln Q) of the two tokens, summed: the spec's advantages 1.098612 and -.510826."""
    recipe = load_recipe("opd-reward")
    batch = batch_of([[P, P]], [[Q, Q]], [[0, 1]], recipe)
    assert batch.advantage is not None
    assert batch.advantage[0].tolist() == pytest.approx([1.098612, -0.510826], abs=1e-6)
    assert value(batch, recipe) == pytest.approx(-(1.098612 - 0.510826), abs=1e-6)


def test_extrapolation_by_hand() -> None:
    """lam 1.25, reference (.25, .4, .35): 1.25 ln(.6 / .25) - ln(.2 / .25) = 1.317480 for y = 0, -.582747 for y = 1."""
    recipe = load_recipe("g-opd")
    ref = (0.25, 0.4, 0.35)
    batch = batch_of([[P, P]], [[Q, Q]], [[0, 1]], recipe, ref=[[ref, ref]])
    assert batch.advantage is not None
    assert batch.advantage[0].tolist() == pytest.approx([1.317480, -0.582747], abs=1e-6)
    assert value(batch, recipe) == pytest.approx(-0.734733, abs=1e-6)
    plain = load_recipe("g-opd", {"train": {"advantage": {"extrapolate": 1.0}}})
    again = batch_of([[P, P]], [[Q, Q]], [[0, 1]], plain, ref=[[ref, ref]])
    assert value(again, plain) == value(batch_of([[P, P]], [[Q, Q]], [[0, 1]], plain), load_recipe("opd-reward"))


def test_extrapolation_rests_at_the_teacher_sharpened_against_the_reference() -> None:
    """At Q proportional to P^lam ref^(1 - lam) the expected gradient is 0; at the teacher itself it is not."""
    recipe = load_recipe("g-opd")
    assert isinstance(recipe.train.advantage, TeacherAdvantage)
    lam = recipe.train.advantage.extrapolate
    ref = torch.tensor([0.25, 0.4, 0.35], dtype=torch.float64)
    teacher = torch.tensor(P, dtype=torch.float64)
    goal = (lam * teacher.log() + (1 - lam) * ref.log()).softmax(-1)
    found = []
    for q in (goal, teacher):
        batch = batch_of([[P]] * 3, [[q.tolist()]] * 3, [[0], [1], [2]], recipe, ref=[[ref.tolist()]] * 3)
        batch = TokenBatch(**{**vars(batch), "weight": q})
        found.append(torch.autograd.grad(loss(batch, recipe.train.objective).loss, batch.logits)[0].sum(0).abs().max())
    assert float(found[0]) < 1e-12
    assert float(found[1]) > 1e-2


def test_minillm_by_hand() -> None:
    """L_single .365274 + .173287, L_long -ln(.5 / .25) ln .2 = 1.115577: the last token's own reward counts nowhere."""
    recipe = load_recipe("minillm")
    batch = batch_of([[P, P2]], [[Q, Q2]], [[0, 1]], recipe)
    assert batch.advantage is not None
    assert batch.advantage[0].tolist() == pytest.approx([math.log(2), 0.0], abs=1e-12)
    found = loss(batch, recipe.train.objective)
    assert float(found.metrics["loss/policy"]) == pytest.approx(1.115577, abs=1e-6)
    assert float(found.metrics["loss/distill"]) == pytest.approx(0.538561, abs=2e-6)
    assert float(found.loss.detach()) == pytest.approx(1.654138, abs=3e-6)


def test_minillm_of_a_mixture_by_hand() -> None:
    """w = Q / (.2 P + .8 Q) = .2 / .28 = .714286 of the first token weighs L_long, and not L_single."""
    recipe = load_recipe("minillm-mixed")
    assert recipe.rollout.mix is not None
    share = recipe.rollout.mix.share
    mixed = [math.log(share * p[y] + (1 - share) * q[y]) for p, q, y in ((P, Q, 0), (P2, Q2, 1))]
    batch = batch_of([[P, P2]], [[Q, Q2]], [[0, 1]], recipe)
    batch = replace(batch, logp_old=batch.logp.detach(), logp_behavior=torch.tensor([mixed], dtype=torch.float64))
    found = loss(batch, recipe.train.objective)
    assert float(found.metrics["loss/policy"]) == pytest.approx(1.115577 * 0.2 / 0.28, abs=1e-6)
    assert float(found.metrics["loss/distill"]) == pytest.approx(0.538561, abs=2e-6)
    everything = load_recipe("minillm-mixed", {"train": {"objective": {"correction": {"weighs": "all"}}}})
    last = Q2[1] / (share * P2[1] + (1 - share) * Q2[1])
    weighed = float(loss(batch, everything.train.objective).metrics["loss/distill"])
    assert weighed == pytest.approx(0.365274 * 0.2 / 0.28 + 0.173287 * last, abs=2e-6)
    assert abs(weighed - 0.538561) > 0.05


V, T = 3, 3
EVERY = list(product(range(V), repeat=T))


def tables(seed: int) -> list[Tensor]:
    """Logits of each token given those before it: [3], [3, 3], [3, 3, 3]."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*([V] * (t + 1)), dtype=torch.float64, generator=g) for t in range(T)]


def over_sequences(policy: list[Tensor], teacher: list[Tensor], **advantage: Any) -> tuple[TokenBatch, Tensor]:
    """Every sequence of three tokens, weighed by its probability; and KL(Q || P) of whole sequences."""

    def spread(logits: list[Tensor]) -> Tensor:
        rows = [torch.stack([logits[t][y[:t]].log_softmax(-1) for t in range(T)]) for y in EVERY]
        return torch.stack(rows)

    ids = torch.tensor(EVERY)
    lq, lp = spread(policy), spread(teacher)
    own, said = (x.gather(-1, ids[..., None])[..., 0] for x in (lq, lp))
    weight = own.detach().sum(1).exp()
    mask = torch.ones_like(ids, dtype=torch.bool)
    batch = TokenBatch(
        logp=own,
        logp_old=own.detach(),
        mask=mask,
        weight=weight,
        topk_logp=lq,
        teacher_topk_logp=lp,
        advantage=of_teacher(said, own.detach(), None, mask, **advantage),
    )
    joint = own.sum(1)
    return batch, (joint.exp() * (joint - said.sum(1))).sum()


SUMMED = {
    # Without dividing by the number of later tokens, both are the policy gradient of the sequence's KL.
    "minillm": {"gamma": 1.0, "mean": False, "from_next": True},
    "opd-reward": {"gamma": 1.0},
}


@pytest.mark.parametrize("name", SUMMED)
def test_sums_of_later_rewards_give_the_gradient_of_the_sequence_kl(name: str) -> None:
    """L_single + L_long, and the reward-to-go, over all 27 sequences against autograd of sum_y Q ln(Q / P)."""
    recipe = load_recipe(name, {"train": {"advantage": SUMMED[name]}})
    policy = [x.requires_grad_() for x in tables(0)]
    batch, exact = over_sequences(policy, tables(1), **SUMMED[name])
    found = torch.autograd.grad(loss(batch, recipe.train.objective).loss, policy, retain_graph=True)
    for mine, theirs in zip(found, torch.autograd.grad(exact, policy), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6 if name == "minillm" else 1e-12, rtol=0)


def test_minillms_mean_is_the_same_direction_with_shorter_reach() -> None:
    """As the recipe has it: sum_t grad KL_t - E sum_t mean(r_s, s > t) grad ln Q, against autograd of just that."""
    recipe = load_recipe("minillm")
    policy = [x.requires_grad_() for x in tables(0)]
    batch, exact = over_sequences(policy, tables(1), gamma=1.0, mean=True, from_next=True)
    found = torch.autograd.grad(loss(batch, recipe.train.objective).loss, policy, retain_graph=True)
    lq, lp = batch.topk_logp, batch.teacher_topk_logp
    assert lq is not None
    assert lp is not None
    ids = torch.tensor(EVERY)[..., None]
    r = (lp - lq).detach().gather(-1, ids)[..., 0]
    later = torch.stack([r[:, 1:].mean(1), r[:, 2], torch.zeros(len(r), dtype=torch.float64)], dim=1)
    weight = batch.weight
    assert weight is not None
    single = (weight[:, None] * (lq.exp() * (lq - lp)).sum(-1)).sum()
    long = -(weight[:, None] * later * lq.gather(-1, ids)[..., 0]).sum()
    expected = torch.autograd.grad(single + long, policy, retain_graph=True)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=0)
    whole = torch.autograd.grad(exact, policy)
    dot = sum(float((a * b).sum()) for a, b in zip(found, whole, strict=True))
    assert dot > 0.0


def test_without_later_rewards_the_reward_form_is_the_sum_of_token_kls() -> None:
    """gamma 0: prefixes are as they come, no gradient goes through their sampling (eq. 1)."""
    policy = [x.requires_grad_() for x in tables(0)]
    batch, _ = over_sequences(policy, tables(1), gamma=0.0)
    found = torch.autograd.grad(loss(batch, load_recipe("opd-reward").train.objective).loss, policy, retain_graph=True)
    lq, lp = batch.topk_logp, batch.teacher_topk_logp
    assert lq is not None
    assert lp is not None
    assert batch.weight is not None
    each = (batch.weight[:, None] * (lq.exp() * (lq - lp)).sum(-1)).sum()
    for mine, theirs in zip(found, torch.autograd.grad(each, policy), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)


def test_distillm_2_by_hand() -> None:
    """One row of each source at the spec's P and Q: (skewRKL .292107 + skewFKL .305811) / 2."""
    recipe = load_recipe("distillm-2")
    batch = batch_of([[P], [P]], [[Q], [Q]], [[0], [0]], recipe, route=route_codes(["policy", "expert"]))
    found = loss(batch, recipe.train.objective)
    assert found.token_loss[:, 0].tolist() == pytest.approx([0.292107, 0.305811], abs=2e-6)
    assert float(found.loss.detach()) == pytest.approx(0.298959, abs=2e-6)
    slope = torch.autograd.grad(found.loss, batch.logits)[0]
    lp = torch.tensor(P, dtype=torch.float64).log()
    for row, name in ((0, "skew_reverse"), (1, "skew_forward")):
        z = torch.tensor(Q, dtype=torch.float64).log().requires_grad_()
        part = recipe.train.objective.distill
        assert part is not None
        kind = part.divergence if row == 0 else part.experts
        assert kind is not None
        assert kind.kind == name
        (divergence(lp, z.log_softmax(-1), kind) / 2).backward()
        torch.testing.assert_close(slope[row, 0], z.grad, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"curate": {"route": None}}, r"distill.experts: is the divergence of rows routed to `expert`.*sql: source"),
        ({"train": {"objective": {"distill": {"experts": {"kind": "skew_reverse"}}}}}, "it is the divergence of the"),
        ({"train": {"objective": {"distill": {"estimate": "sampled"}}}}, "estimate sampled knows one divergence"),
        ({"train": {"objective": {"distill": {"rows": "routed"}}}}, "no expert's row is distilled"),
    ],
)
def test_a_divergence_of_experts_rows_that_could_not_act_is_refused(over: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe("distillm-2", over)


def test_entropy_aware_by_hand() -> None:
    """H(P) .897946 is above h = .5 and adds the forward KL .396058 to the reward's loss; H .223495 adds nothing."""
    recipe = load_recipe("eopd")
    batch = batch_of([[P, SURE_P]], [[Q, SURE_Q]], [[0, 0]], recipe)
    found = loss(batch, recipe.train.objective)
    assert float(found.metrics["loss/policy"]) == pytest.approx(-(1.098612 + 0.171850) / 2, abs=1e-6)
    assert float(found.metrics["loss/distill"]) == pytest.approx(0.396058 / 2, abs=2e-6)
    assert float(found.metrics["distill/share"]) == 0.5
    everywhere = load_recipe("eopd", {"train": {"objective": {"distill": {"emphasis": {"threshold": 0.2}}}}})
    more = sum(p * math.log(p / q) for p, q in zip(SURE_P, SURE_Q, strict=True))
    found = loss(batch, everywhere.train.objective)
    assert float(found.metrics["loss/distill"]) == pytest.approx((0.396058 + more) / 2, abs=2e-6)


def test_entropy_aware_clips_every_token_and_only_the_reward() -> None:
    recipe = load_recipe("eopd")
    batch = batch_of([[P, SURE_P]], [[Q, SURE_Q]], [[0, 0]], recipe)
    moved = TokenBatch(**{**vars(batch), "logp_old": batch.logp.detach() - math.log(1.5)})
    found = loss(moved, recipe.train.objective)
    assert float(found.metrics["loss/policy"]) == pytest.approx(-1.2 * (1.098612 + 0.171850) / 2, abs=1e-6)
    assert float(found.metrics["loss/distill"]) == pytest.approx(0.396058 / 2, abs=2e-6)
    slope = torch.autograd.grad(found.loss, batch.logits)[0][0]
    assert bool(slope[0].any())
    assert not bool(slope[1].any())


@pytest.mark.parametrize("name", ["todi", "akl"])
def test_adaptive_kinds_by_finite_differences_with_their_weights_held(name: str) -> None:
    """The recipe's loss over all entries and their tail; the weights are those of the undisturbed policy."""
    recipe = load_recipe(name)
    part = recipe.train.objective.distill
    assert part is not None
    lp, lq = pairs(6, 5)
    z = lq.clone().requires_grad_()
    given = {"mask": torch.ones(6, 1, dtype=torch.bool), "teacher_topk_logp": lp[:, None]}
    now = z.log_softmax(-1)
    batch = TokenBatch(logp=now[:, :1], topk_logp=now[:, None], **given)
    slope = torch.autograd.grad(loss(batch, recipe.train.objective).loss, z)[0]
    forward, backward = GENERATORS["forward_kl"][0], GENERATORS["reverse_kl"][0]
    p, q = with_tail(lp), with_tail(lq)
    if name == "todi":
        held = (p - q).sigmoid()
    else:
        order = p.exp().sort(dim=-1, descending=True)
        head = torch.zeros_like(p, dtype=torch.bool)
        for row in range(len(p)):
            mass = 0.0
            for mass_of, at in zip(order.values[row].tolist(), order.indices[row].tolist(), strict=True):
                head[row, at] = mass < 0.5
                mass += mass_of
        gap = (p.exp() - q.exp()).abs()
        held = ((gap * head).sum(-1, keepdim=True) / gap.sum(-1, keepdim=True)).expand_as(p)

    def frozen(logits: Tensor) -> Tensor:
        x = with_tail(logits.log_softmax(-1))
        return (held * terms(p, x, forward) + (1 - held) * terms(p, x, backward)).sum(-1).mean()

    g, step = torch.Generator().manual_seed(3), 1e-6
    for _ in range(4):
        way = torch.randn(lq.shape, dtype=torch.float64, generator=g)
        found = (frozen(lq + step * way) - frozen(lq - step * way)) / (2 * step)
        torch.testing.assert_close(found, (slope * way).sum(), atol=1e-7, rtol=1e-6)


def test_a_divergence_is_zero_for_equal_models_alone() -> None:
    lp, lq = pairs()
    for name, (kind, _) in GENERATORS.items():
        assert float(divergence(lp, lq, kind).min()) > 1e-8, name


REGISTRY = {
    **dict.fromkeys(
        ("gkd", "opd", "distillm", "distillm-2", "opd-reward", "g-opd", "eopd", "akl", "todi"),
        ("logit", "white_box", "token"),
    ),
    "minillm": ("logit", "white_box", "hybrid"),
    **dict.fromkeys(("gad", "ovd"), ("outcome", "black_box", "sequence")),
    **dict.fromkeys(("opsd", "sdpo", "sd-zero"), ("logit", "teacher_free", "token")),
    "spin": ("self_play", "teacher_free", "sequence"),
}
"""The survey's registry. Of srpo, kepo and scope it says `hybrid`; seqkd, off-policy, has no place in it."""


@pytest.mark.parametrize("name", sorted(set(REGISTRY) & set(recipe_names())))
def test_recipes_stand_where_the_survey_puts_them(name: str) -> None:
    axes = load_recipe(name).axes
    assert axes is not None
    assert tuple(axes.model_dump().values()) == REGISTRY[name]


@pytest.mark.parametrize("name", [n for n in recipe_names() if load_recipe(n).axes is not None])
def test_axes_are_those_of_the_recipes_teacher(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.axes is not None
    stored = recipe.score.scorers.get(recipe.curate.teacher or "")
    others = stored is not None and stored.kind == "teacher" and stored.model.kind in ("huggingface", "warmup")
    assert others == (recipe.axes.access == "white_box")
    if name in ("srpo", "kepo", "scope"):
        assert recipe.axes.granularity == "hybrid"


@pytest.mark.parametrize(
    ("name", "axes", "message"),
    [
        ("grpo", {"feedback": "logit", "access": "white_box", "granularity": "token"}, "training reads no teacher"),
        ("opd", {"feedback": "outcome"}, "training reads a teacher's log-probs: say logit"),
        ("opd", {"access": "black_box"}, "a black box shows no log-probs"),
        ("opd", {"granularity": "word"}, "axes.granularity"),
        ("grpo", {"feedback": "outcome"}, "axes.access"),
    ],
)
def test_axes_that_contradict_the_recipe_are_refused(name: str, axes: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(name, {"axes": axes})
