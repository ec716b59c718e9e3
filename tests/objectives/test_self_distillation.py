"""SDPO, SRPO (arXiv 2601.20802, 2604.02288) and OPSD (arXiv 2601.18734): the worked examples through the recipes' own
SQL and objectives, and every line of the specifications' checks that concerns a loss."""

import math
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import Tensor

from curation.tables import column, scored_table
from rollway.config import load_recipe
from rollway.config.divergences import ForwardKl, Jsd
from rollway.config.objectives import ROUTES, Objective
from rollway.config.recipes import Recipe
from rollway.curation import curate
from rollway.objectives import TokenBatch, loss, totals
from rollway.objectives.distillation import with_divergence
from rollway.objectives.divergences import divergence, terms

WHOLE = {"train": {"objective": {"distill": {"estimate": {"kind": "exact"}}}}}
"""The student's top K with K = V: what `topk` gives up to the clamp of its empty tail."""
THREE = {"train": {"objective": {"distill": {"estimate": {"kind": "topk", "k": 3}}}}}

# y0 has two tokens of which only the sampled ones matter, y1 two and y2 one with whole distributions.
PI_0, OLD_0 = (0.6, 0.3), (0.5, 0.4)
PI = (((0.5, 0.3, 0.2), (0.2, 0.2, 0.6)), ((0.1, 0.8, 0.1),))
Q = (((0.7, 0.2, 0.1), (0.4, 0.4, 0.2)), ((0.9, 0.05, 0.05),))
JSD = (0.021901, 0.086305, 0.387787)
ENTROPY = (0.801819, 1.054920, 0.394398)
UNNORMALISED = (0.448513, 0.348220, 0.674086)
WEIGHT = (0.914822, 0.710258, 1.374920)


def curated(recipe: Recipe, rewards: list[list[float]]) -> pa.Table:
    """The recipe's batch; a rollout has a teacher where another one of its group is right."""
    table = scored_table(rewards)
    groups, right = column(table, "group_id"), [r >= recipe.score.threshold for r in column(table, "reward")]
    told = [any(right[m] and groups[m] == g and m != n for m in range(len(groups))) for n, g in enumerate(groups)]
    own = recipe.curate.model_copy(update={"teacher": None})
    return curate(table.append_column("has_teacher", pa.array(told)), own)


def worked(recipe: Recipe, **fields: Any) -> TokenBatch:
    """The worked group as the recipe's SQL curates it, with both models' log-probs; logits carry the gradient."""
    batch = curated(recipe, [[1.0, 0.0, 0.0]]).to_pylist()
    third = (1 / 3, 1 / 3, 1 / 3)
    pi = {"r00-0": (third, third), "r00-1": PI[0], "r00-2": (*PI[1], third)}
    q = {"r00-0": (third, third), "r00-1": Q[0], "r00-2": (*Q[1], third)}
    names = [row["rollout_id"] for row in batch]
    policy, teacher = (torch.tensor([of[n] for n in names], dtype=torch.float64).log() for of in (pi, q))
    logp, mask = policy[..., 0].clone(), torch.ones(len(names), 2, dtype=torch.bool)
    old = logp.clone()
    for row, name in enumerate(names):
        mask[row, 1] = name != "r00-2"
        if name == "r00-0":
            logp[row], old[row] = torch.tensor(PI_0).double().log(), torch.tensor(OLD_0).double().log()
    routes = [ROUTES.index(row["route"]) for row in batch] if batch[0]["route"] else None
    advantage = [row["advantage"] for row in batch]
    given = {
        "logp": logp.requires_grad_(),
        "logp_old": old,
        "logp_behavior": old,
        "mask": mask,
        "advantage": torch.tensor(advantage, dtype=torch.float64) if advantage[0] is not None else None,
        "route": None if routes is None else torch.tensor(routes),
        "logits": policy.requires_grad_(),
        "teacher_logits": teacher,
    }
    return TokenBatch(**given | fields)


def srpo(**over: Any) -> Recipe:
    return load_recipe("srpo", over or WHOLE)


def with_part(recipe: Recipe, **part: Any) -> Objective:
    """The recipe's objective with other settings of its distillation."""
    whole = recipe.train.objective.model_dump()
    return Objective.model_validate({**whole, "distill": {**whole["distill"], **part}})


def test_srpo_worked_through_sql_and_objective() -> None:
    recipe = srpo()
    table = curated(recipe, [[1.0, 0.0, 0.0]])
    assert column(table, "advantage") == pytest.approx([0.666667, -0.333333, -0.333333], abs=1e-6)
    assert column(table, "route") == ["policy", "distill", "distill"]
    batch = worked(recipe)
    found = loss(batch, recipe.train.objective)
    assert float(found.loss.detach()) == pytest.approx(-0.137098, abs=1e-6)
    told = [w * d for w, d in zip(WEIGHT, JSD, strict=True)]
    assert found.token_loss[found.kept].tolist() == pytest.approx([-0.8, -0.5, *told], abs=1e-6)
    assert float(found.metrics["distill/share"]) == pytest.approx(3 / 5)
    assert float(found.metrics["distill/teacher_entropy"]) == pytest.approx(sum(ENTROPY) / 3, abs=1e-6)
    ready = with_divergence(batch, recipe.train.objective)
    assert ready.teacher_entropy is not None
    at = batch.mask & (batch.route == ROUTES.index("distill"))[:, None]
    assert ready.teacher_entropy[at].tolist() == pytest.approx(list(ENTROPY), abs=1e-6)
    assert (-ready.teacher_entropy[at]).exp().tolist() == pytest.approx(list(UNNORMALISED), abs=1e-6)
    mean = totals(batch, recipe.train.objective)["distill/emphasis"]
    assert ((-ready.teacher_entropy[at]).exp() / mean).tolist() == pytest.approx(list(WEIGHT), abs=1e-6)
    unweighted = loss(worked(recipe), with_part(recipe, emphasis={"kind": "none"}))
    assert float(unweighted.loss.detach()) == pytest.approx(-0.160801, abs=1e-6)


def test_srpo_over_the_students_whole_vocabulary_as_its_top_k() -> None:
    """K = V: with the tail it is the full JSD, up to the tail's clamp."""
    recipe = srpo(**THREE)
    assert float(loss(worked(recipe), recipe.train.objective).loss.detach()) == pytest.approx(-0.137098, abs=2e-6)


def test_sdpo_worked_through_sql_and_objective() -> None:
    """Alone: the mean over the tokens that have a teacher. The only right rollout has none and is not in the batch."""
    recipe = load_recipe("sdpo", WHOLE)
    assert column(curated(recipe, [[1.0, 0.0, 0.0]]), "rollout_id") == ["r00-1", "r00-2"]
    found = loss(worked(recipe), recipe.train.objective)
    assert float(found.loss.detach()) == pytest.approx(sum(JSD) / 3, abs=1e-6)
    assert found.token_loss[found.kept].tolist() == pytest.approx(list(JSD), abs=1e-6)
    assert column(curated(recipe, [[1.0, 1.0, 0.0], [0.0, 0.0]]), "rollout_id") == ["r00-0", "r00-1", "r00-2"]


def test_srpo_routing_table() -> None:
    """Right, any: policy; wrong with a teacher: teacher; all wrong: policy, with advantage 0; right alone: policy."""
    table = curated(srpo(), [[1, 1, 0], [0, 0], [1, 0], [1]])
    routes = ["policy", "policy", "distill", "policy", "policy", "policy", "distill", "policy"]
    assert column(table, "route") == routes
    assert column(table, "advantage")[3:5] == [0.0, 0.0]


def test_srpo_advantages_do_not_know_of_routes() -> None:
    rewards = [[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]
    routed = curated(srpo(), rewards)
    plain = curated(srpo(curate={"route": {"sql": "correctness"}}), rewards)
    assert column(routed, "advantage") == column(plain, "advantage")


@pytest.mark.parametrize("beta", [1e-9, 0.5, 1.0, 7.0])
def test_srpo_weights_have_mean_one(beta: float) -> None:
    """For any beta; all are 1 as beta goes to 0, and where the entropy is the same everywhere."""
    recipe = srpo()
    objective = with_part(recipe, emphasis={"kind": "entropy_weight", "beta": beta})
    batch = worked(recipe)
    weighted, plain = loss(batch, objective), loss(batch, with_part(recipe, emphasis={"kind": "none"}))
    at = batch.mask & (batch.route == ROUTES.index("distill"))[:, None]
    weight = (weighted.token_loss / plain.token_loss)[at]
    assert float(weight.mean()) == pytest.approx(1.0, abs=1e-12)
    if beta == 1e-9:
        torch.testing.assert_close(weight, torch.ones_like(weight), atol=1e-8, rtol=0)
    flat = replace(batch, teacher_entropy=torch.full_like(batch.logp.detach(), 0.7))
    torch.testing.assert_close(loss(flat, objective).loss, plain.loss)


def test_srpo_without_wrong_rows_that_have_a_teacher_is_grpo() -> None:
    """All right, or no group with a right one: the token mean of GRPO, weight for weight."""
    recipe = srpo()
    grpo = Objective.model_validate({**recipe.train.objective.model_dump(), "distill": None})
    for rewards in ([[1, 1, 1]], [[0, 0, 0]], [[1.0, 1.0], [0.0]]):
        assert set(column(curated(recipe, rewards), "route")) == {"policy"}
    batch = worked(recipe, route=torch.zeros(3, dtype=torch.int64))
    found, expected = loss(batch, recipe.train.objective), loss(batch, grpo)
    assert float(found.loss.detach()) == float(expected.loss.detach())
    assert float(found.metrics["loss/distill"]) == 0.0
    slopes = [torch.autograd.grad(x.loss, batch.logp)[0] for x in (found, expected)]
    assert torch.equal(*slopes)


@pytest.mark.parametrize("name", ["sdpo", "srpo"])
def test_a_teacher_that_is_the_student_says_nothing(name: str) -> None:
    """f ignored and no lag of the average: every distilled token's loss is 0, and so is its gradient."""
    for over in (WHOLE, THREE):
        recipe = load_recipe(name, over)
        batch = worked(recipe)
        assert batch.logits is not None
        same = replace(batch, teacher_logits=batch.logits.detach().clone())
        found = loss(same, recipe.train.objective)
        rows = slice(None) if name == "sdpo" else slice(1, None)
        assert float(found.token_loss[rows].abs().max()) < 1e-12
        slope = torch.autograd.grad(found.loss, same.logits)[0]
        assert float(slope.abs().max()) < 1e-9


def test_at_ratio_one_srpos_policy_rows_have_the_policy_gradient() -> None:
    """d lG = -A grad log pi."""
    recipe = srpo()
    batch = worked(recipe)
    batch = replace(batch, logp_old=batch.logp.detach().clone(), logp_behavior=batch.logp.detach().clone())
    slope = torch.autograd.grad(loss(batch, recipe.train.objective).loss, batch.logp)[0]
    torch.testing.assert_close(slope[0], torch.full((2,), -2 / 3 / 5, dtype=torch.float64))
    assert not bool(slope[1:].any()), "distilled rows move by their distributions, not by the sampled token"


def test_the_gradient_never_reaches_the_teacher() -> None:
    recipe = srpo()
    batch = worked(recipe)
    assert batch.teacher_logits is not None
    teacher = batch.teacher_logits.clone().requires_grad_()
    found = loss(replace(batch, teacher_logits=teacher), recipe.train.objective)
    assert torch.autograd.grad(found.loss, teacher, allow_unused=True)[0] is None


def test_sdpo_importance_is_capped_and_constant() -> None:
    """(6): lS times sg(min(exp(ln pi - ln pi_old), 2)) times the engine's weight, which is capped at 2 too."""
    recipe = load_recipe("sdpo", WHOLE)
    old = torch.tensor([[-1.0, -0.2], [-9.0, 0.0]], dtype=torch.float64)
    behaviour = torch.tensor([[-1.5, -0.1], [-9.0, 0.0]], dtype=torch.float64)
    batch = worked(recipe, logp_old=old, logp_behavior=behaviour)
    found = loss(batch, recipe.train.objective)
    logp = batch.logp.detach()
    weight = (logp - old).exp().clamp(max=2.0) * (old - behaviour).exp().clamp(max=2.0)
    assert float((logp - old).exp()[1, 0]) > 2.0
    expected = torch.tensor([[JSD[0], JSD[1]], [JSD[2], 0.0]], dtype=torch.float64) * weight * batch.mask
    torch.testing.assert_close(found.token_loss, expected, atol=2e-6, rtol=0)
    assert not bool(torch.autograd.grad(found.loss, batch.logp, allow_unused=True, materialize_grads=True)[0].any())


def test_logit_level_advantages_of_the_reverse_kl() -> None:
    """(3): -grad L = sum_v grad pi(v) A(v), A(v) = ln q(v) - ln pi(v)."""
    recipe = load_recipe("sdpo", WHOLE)
    batch = worked(recipe)
    objective = with_part(recipe, divergence={"kind": "reverse_kl"}, importance={"kind": "none"})
    slope = torch.autograd.grad(loss(batch, objective).loss, batch.logits)[0]
    assert batch.logits is not None and batch.teacher_logits is not None
    pi = batch.logits.softmax(-1)
    against = (batch.teacher_logits - batch.logits).detach()
    wanted = torch.autograd.grad(-(pi * against).sum(-1)[batch.mask].mean(), batch.logits)[0]
    torch.testing.assert_close(slope, wanted)


def test_jsd_is_at_most_ln_2() -> None:
    g = torch.Generator().manual_seed(3)
    logits = 8 * torch.randn(2, 200, 9, dtype=torch.float64, generator=g)
    for beta in (0.1, 0.5, 0.9):
        assert float(divergence(*logits.log_softmax(-1), Jsd(beta=beta)).max()) <= math.log(2) + 1e-12
    apart = torch.full((2, 4), -math.inf, dtype=torch.float64)
    apart[0, :2], apart[1, 2:] = math.log(0.5), math.log(0.5)
    assert float(divergence(*apart, Jsd())) == pytest.approx(math.log(2))


# OPSD

P = ((0.7, 0.2, 0.1), (0.05, 0.9, 0.05))
S = ((0.4, 0.4, 0.2), (0.6, 0.2, 0.2))


def opsd(**part: Any) -> Objective:
    return with_part(load_recipe("opsd"), **part)


def of_logits(teacher: Tensor, student: Tensor, **fields: Any) -> TokenBatch:
    """Rows [N, T, V] whose sampled token is 0 everywhere."""
    student = student.detach().clone().requires_grad_()
    given = {"mask": torch.ones(student.shape[:2], dtype=torch.bool)} | fields
    ids = torch.zeros(student.shape[:2], dtype=torch.int64)
    logp = student.log_softmax(-1)[..., 0]
    return TokenBatch(logp=logp, logits=student, teacher_logits=teacher, token_ids=ids, **given)


def opsd_worked_batch() -> TokenBatch:
    return of_logits(*(torch.tensor([x], dtype=torch.float64).log() for x in (P, S)))


def slope_of(batch: TokenBatch, objective: Objective) -> Tensor:
    return torch.autograd.grad(loss(batch, objective).loss, batch.logits)[0]


def test_opsd_worked() -> None:
    lp, lq = (torch.tensor(x, dtype=torch.float64).log() for x in (P, S))
    expected = [0.391731, -0.138629, -0.069315, -0.124245, 1.353670, -0.069315]
    assert terms(lp, lq, ForwardKl()).flatten().tolist() == pytest.approx(expected, abs=1e-6)
    batch, objective = opsd_worked_batch(), opsd(clip=0.2)
    found = loss(batch, objective)
    assert float(found.loss.detach()) == pytest.approx(-0.000752, abs=1e-6)
    assert found.token_loss[0].tolist() == pytest.approx([-0.007944, 0.006440], abs=1e-6)
    assert float(found.metrics["distill/divergence"]) == pytest.approx(-0.000752, abs=1e-6)
    assert float(found.metrics["distill/raw_divergence"]) == pytest.approx(0.671948, abs=1e-6)
    assert float(found.metrics["distill/clipped_entries"]) == pytest.approx(2 / 6)
    wanted = torch.tensor([[0.06, -0.04, -0.02], [0.005, 0.01, -0.015]], dtype=torch.float64)
    torch.testing.assert_close(slope_of(batch, objective)[0], wanted, atol=1e-12, rtol=0)
    plain = loss(opsd_worked_batch(), opsd(clip=None))
    assert plain.token_loss[0].tolist() == pytest.approx([0.183787, 1.160110], abs=1e-6)
    assert float(plain.loss.detach()) == pytest.approx(0.671948, abs=1e-6)
    assert "distill/raw_divergence" not in plain.metrics
    sampled = opsd(divergence={"kind": "reverse_kl"}, estimate={"kind": "sampled"}, clip=None)
    found = loss(opsd_worked_batch(), sampled)
    assert float(found.loss.detach()) == pytest.approx(-0.378292, abs=1e-6)
    logp = opsd_worked_batch().logp.detach()[0]
    assert (-found.token_loss[0] / logp).tolist() == pytest.approx([0.559616, -2.484907], abs=1e-6)


def test_opsd_over_a_stored_top_k_of_the_whole_vocabulary_logs_the_same() -> None:
    """Clip, raw divergence and share of clipped entries of (7), here of all three tokens."""
    estimate = {"kind": "topk", "k": 3, "outside": "renormalise"}
    batch, objective = opsd_worked_batch(), opsd(clip=0.2, estimate=estimate)
    found = loss(batch, objective)
    assert float(found.loss.detach()) == pytest.approx(-0.000752, abs=1e-6)
    assert float(found.metrics["distill/raw_divergence"]) == pytest.approx(0.671948, abs=1e-6)
    assert float(found.metrics["distill/clipped_entries"]) == pytest.approx(2 / 6)


def random_logits(rows: int = 3, tokens: int = 4, vocabulary: int = 6) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(8)
    made = 2 * torch.randn(2, rows, tokens, vocabulary, dtype=torch.float64, generator=g)
    return made[0], made[1]


def test_opsd_teacher_that_is_the_student_moves_nothing() -> None:
    teacher, _ = random_logits()
    for tau in (0.05, None):
        batch = of_logits(teacher, teacher)
        assert float(loss(batch, opsd(clip=tau)).loss.detach()) == 0.0
        assert float(slope_of(batch, opsd(clip=tau)).abs().max()) < 1e-15


def test_opsd_clip_far_away_is_the_plain_divergence_and_at_zero_kills_what_is_positive() -> None:
    teacher, student = random_logits()
    far, plain = (loss(of_logits(teacher, student), opsd(clip=tau)).loss for tau in (1e9, None))
    torch.testing.assert_close(far, plain)
    lp, lq = teacher.log_softmax(-1), student.log_softmax(-1).requires_grad_()
    each = terms(lp, lq.detach(), ForwardKl())
    for tau in (0.0, -0.01):
        found = divergence(lp, lq, ForwardKl(), tau)
        torch.testing.assert_close(found, torch.minimum(each, torch.tensor(tau).double()).sum(-1))
        slope = torch.autograd.grad(found.sum(), lq)[0]
        assert not bool(slope[each > tau].any())
        assert bool(slope[each < tau].any())


def test_opsd_one_hot_teacher_is_cross_entropy() -> None:
    _, student = random_logits(rows=1)
    token = torch.tensor([[2, 0, 5, 2]])
    teacher = torch.full_like(student, -math.inf).scatter(-1, token[..., None], 0.0)
    batch = of_logits(teacher, student)
    expected = torch.nn.functional.cross_entropy(batch.logits[0], token[0])
    found = loss(batch, opsd(clip=None)).loss
    torch.testing.assert_close(found, expected)
    slopes = [torch.autograd.grad(x, batch.logits, retain_graph=True)[0] for x in (found, expected)]
    torch.testing.assert_close(*slopes)


@pytest.mark.parametrize("t", [1.0, 1.7])
def test_opsd_gradient_on_logits(t: float) -> None:
    """(6): (1 / T) (a_v - Q_v sum_w a_w), a_v = -P_v 1[l_v <= tau], times the reduction's weight; it sums to 0."""
    teacher, student = random_logits()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    share = mask / mask.sum(1, keepdim=True) / 3
    lp, lq = ((x / t).log_softmax(-1) for x in (teacher, student))
    each = terms(lp, lq, ForwardKl())
    for tau in (0.05, None):
        a = -lp.exp() * (1.0 if tau is None else (each <= tau).double())
        wanted = (a - lq.exp() * a.sum(-1, keepdim=True)) / t * share[..., None]
        found = slope_of(of_logits(teacher, student, mask=mask), opsd(clip=tau, temperature=t))
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(found.sum(-1), torch.zeros(3, 4, dtype=torch.float64), atol=1e-15, rtol=0)
    assert bool((each > 0.05).any())


def test_opsd_empty_rollouts_stay_in_the_mean() -> None:
    teacher, student = random_logits()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    found = loss(of_logits(teacher, student, mask=mask), opsd(clip=None)).loss
    each = divergence(teacher.log_softmax(-1), student.log_softmax(-1), ForwardKl())
    torch.testing.assert_close(found, (each[0].mean() + each[1, :2].mean()) / 3)


def test_opsd_reductions() -> None:
    """(5): `token_mean` is the sum over the number of all valid tokens."""
    teacher, student = random_logits()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    objective = Objective.model_validate({**opsd(clip=None).model_dump(), "aggregate": "token_mean"})
    each = divergence(teacher.log_softmax(-1), student.log_softmax(-1), ForwardKl())
    torch.testing.assert_close(loss(of_logits(teacher, student, mask=mask), objective).loss, each[mask].mean())


def test_opsd_padding_and_order_do_not_matter() -> None:
    teacher, student = random_logits()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    whole = loss(of_logits(teacher, student, mask=mask), opsd()).loss
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(loss(of_logits(teacher[order], student[order], mask=mask[order]), opsd()).loss, whole)
    wide = [
        torch.cat([x, torch.full((3, 2, 6), fill, dtype=torch.float64)], 1)
        for x, fill in ((teacher, math.nan), (student, 9.0))
    ]
    padded = torch.cat([mask, torch.zeros(3, 2, dtype=torch.bool)], 1)
    torch.testing.assert_close(loss(of_logits(*wide, mask=padded), opsd()).loss, whole)


def test_opsd_sampled_gradient_is_the_reverse_kls_in_expectation() -> None:
    """Over all tokens, each with the student's probability: E[-A grad ln p] = grad KL(Q || P)."""
    teacher, student = random_logits(rows=1, tokens=1)
    sampled = opsd(divergence={"kind": "reverse_kl"}, estimate={"kind": "sampled"}, clip=None)
    total = torch.zeros(6, dtype=torch.float64)
    for token in range(6):
        batch = of_logits(teacher, student)
        ids = torch.tensor([[token]])
        logp = batch.logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        slope = torch.autograd.grad(loss(replace(batch, logp=logp, token_ids=ids), sampled).loss, batch.logits)[0]
        total += student.softmax(-1)[0, 0, token] * slope[0, 0]
    exact = slope_of(of_logits(teacher, student), opsd(divergence={"kind": "reverse_kl"}, clip=None))[0, 0]
    torch.testing.assert_close(total, exact)
