"""SCOPE (arXiv 2604.10688): the recipe's own SQL and objective on the spec's worked example, and its checks."""

from dataclasses import replace
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from curation.tables import column, scored_table
from objectives.rows import lengths_mask, padded
from rollway.config import load_recipe
from rollway.config.assets import folder
from rollway.config.recipes import Recipe
from rollway.curation import curate
from rollway.errors import RollwayError
from rollway.objectives import TokenBatch, loss, route_codes, totals

RIGHT = (1, 1, 0, 0)
OLD = [(-0.2, -0.4), (-1.0, -0.8, -1.2), (-0.5, -0.7), (-0.3, -0.6, -0.9)]
NOW = [(-0.1, -0.4), (-0.9, -0.8, -1.3), (-0.6, -0.7), (-0.3, -0.5, -0.9)]
TEACHER = [(-0.3, -0.3), (-0.9, -0.7, -1.0), (-0.2, -0.4), (-1.5, -2.0, -1.0)]
WEIGHTS = (0.331812, 0.668188, 0.768525, 0.231475)
LOSSES = (-2.105171, -3.010008, -0.661935, 2.957756)
"""L_MLE of the two right rollouts, L_OPD of the two wrong ones."""


def recipe(**weight: Any) -> Recipe:
    return load_recipe("scope", {"curate": {"weight": weight}})


def curated(right: Any, old: Any, teacher: Any, **weight: Any) -> pa.Table:
    """The batch that the recipe's SQL makes of groups of rollouts, from what the store holds of them."""
    means = [[float(np.mean(row)) for row in rows] for rows in (old, teacher)]
    table = scored_table(right, mean_logprob=means[0], teacher=means[1])
    # The token-level columns are tensors of the batch below.
    return curate(table, recipe(**weight).curate.model_copy(update={"teacher": None}))


def batch_of(table: pa.Table, old: Any, now: Any, teacher: Any, width: int = 0) -> TokenBatch:
    return TokenBatch(
        logp=padded(now, width).requires_grad_(),
        logp_old=padded(old, width),
        teacher_logp=padded(teacher, width),
        mask=lengths_mask(old, width),
        advantage=torch.tensor(column(table, "advantage"), dtype=torch.float64),
        weight=torch.tensor(column(table, "weight"), dtype=torch.float64),
        route=route_codes(column(table, "route")),
        group=torch.tensor([int(name[1:]) for name in column(table, "group_id")]),
    )


def worked(**changed: Any) -> TokenBatch:
    given = {"right": [RIGHT], "old": OLD, "now": NOW, "teacher": TEACHER} | changed
    table = curated(given["right"], given["old"], given["teacher"])
    return batch_of(table, given["old"], given["now"], given["teacher"])


OBJECTIVE = recipe().train.objective


def slope(batch: TokenBatch) -> Tensor:
    return torch.autograd.grad(loss(batch, OBJECTIVE).loss, batch.logp)[0]


def test_the_worked_example_through_sql_and_objective() -> None:
    table = curated([RIGHT], OLD, TEACHER)
    assert column(table, "weight") == pytest.approx(WEIGHTS, abs=1e-6)
    assert column(table, "route") == ["policy", "policy", "distill", "distill"]
    found = loss(worked(), OBJECTIVE)
    assert found.token_loss.sum(1).tolist() == pytest.approx(LOSSES, abs=1e-6)
    assert float(found.loss.detach()) == pytest.approx(-2.533838, abs=1e-6)
    assert float(found.metrics["distill/share"]) == pytest.approx(0.5)


def test_j_is_the_mean_over_prompts_and_parts_of_a_batch_add_up() -> None:
    """Two prompts of unequal groups: a second one, all wrong, of one rollout whose weight is 1."""
    old, now, teacher = [*OLD, OLD[3]], [*NOW, NOW[3]], [*TEACHER, TEACHER[3]]
    table = curated([RIGHT, (0,)], old, teacher)
    assert column(table, "weight")[-1] == 1.0
    batch = batch_of(table, old, now, teacher)
    whole = loss(batch, OBJECTIVE)
    assert float(whole.loss.detach()) == pytest.approx((-2.533838 + LOSSES[3]) / 2, abs=1e-6)
    given = totals(batch, OBJECTIVE)
    assert float(given["denominator"]) == 2.0
    parts = [loss(batch.rows(at), OBJECTIVE, totals=given).loss for at in ([0, 4], [1], [2, 3])]
    torch.testing.assert_close(sum(parts), whole.loss)


def test_gradients_at_ratio_one() -> None:
    """Right rows: -w grad sum log pi, maximum likelihood; wrong ones: w (lS - lT) grad log pi, sampled reverse KL."""
    batch = worked(now=OLD)
    weight = batch.weight[:, None]
    gap = (batch.logp_old - batch.teacher_logp).nan_to_num()
    expected = torch.where(torch.tensor(RIGHT, dtype=torch.bool)[:, None], -weight, weight * gap)
    torch.testing.assert_close(slope(batch), torch.where(batch.mask, expected, 0.0), atol=1e-12, rtol=0)


def test_gradients_off_policy_go_through_the_ratio_alone() -> None:
    batch = worked()
    ratio = (batch.logp - batch.logp_old).exp()
    gap = batch.logp - batch.teacher_logp
    right = torch.tensor(RIGHT, dtype=torch.bool)[:, None]
    expected = batch.weight[:, None] * torch.where(right, -ratio, ratio * gap)
    torch.testing.assert_close(slope(batch), torch.where(batch.mask, expected, 0.0).detach(), atol=1e-12, rtol=0)


def test_the_wrong_path_has_the_gradient_of_the_reverse_kl_in_expectation() -> None:
    """One token over a vocabulary of five, every token once with its probability as weight, on and off the policy."""
    g = torch.Generator().manual_seed(0)
    z, p, mu = (torch.randn(5, dtype=torch.float64, generator=g) for _ in range(3))
    z.requires_grad_()
    lq, lp = z.log_softmax(-1), p.log_softmax(-1)
    exact = torch.autograd.grad((lq.exp() * (lq - lp)).sum(), z, retain_graph=True)[0]
    for behaviour in (lq.detach(), mu.log_softmax(-1)):
        batch = TokenBatch(
            logp=lq[:, None],
            logp_old=behaviour[:, None],
            teacher_logp=lp[:, None],
            mask=torch.ones(5, 1, dtype=torch.bool),
            advantage=torch.full((5,), -1.0, dtype=torch.float64),
            weight=behaviour.exp(),
            route=route_codes(["distill"] * 5),
            group=torch.zeros(5, dtype=torch.int64),
        )
        found = torch.autograd.grad(loss(batch, OBJECTIVE).loss, z, retain_graph=True)[0]
        torch.testing.assert_close(found, exact, atol=1e-12, rtol=0)


def test_a_group_that_is_all_right_never_asks_the_teacher() -> None:
    batch = worked(right=[(1, 1, 1, 1)])
    nobody = replace(batch, teacher_logp=torch.full_like(batch.logp, float("nan")))
    found = loss(nobody, OBJECTIVE)
    assert float(found.metrics["loss/distill"]) == 0.0
    torch.testing.assert_close(found.loss, loss(batch, OBJECTIVE).loss, atol=0, rtol=0)
    assert bool(slope(nobody)[batch.mask].isfinite().all())


def test_a_group_that_is_all_wrong_still_learns() -> None:
    """GRPO has no signal there."""
    batch = worked(right=[(0, 0, 0, 0)])
    found = loss(batch, OBJECTIVE)
    assert float(found.metrics["loss/policy"]) == 0.0
    assert float(found.metrics["distill/share"]) == 1.0
    assert bool((slope(batch)[batch.mask] != 0).any())


def test_a_teacher_equal_to_the_student_leaves_wrong_rollouts_alone() -> None:
    batch = worked(teacher=NOW)
    found = loss(batch, OBJECTIVE)
    assert not bool(found.token_loss[2:].any())
    assert not bool(slope(batch)[2:].any())


def test_padding_changes_nothing() -> None:
    table = curated([RIGHT], OLD, TEACHER)
    assert torch.equal(*(loss(batch_of(table, OLD, NOW, TEACHER, width), OBJECTIVE).loss for width in (0, 9)))


def test_directions_of_the_weights() -> None:
    """More surprise of the student at a right rollout, and less of the teacher at a wrong one, mean more weight; the
    flag of the released code turns the first round and leaves the second."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        old, teacher = ([tuple(-rng.random(3) - 0.05) for _ in range(4)] for _ in range(2))
        base, turned = (column(curated([RIGHT], old, teacher, student_sign=sign), "weight") for sign in (1, -1))
        surprising = [old[0], tuple(x - 0.5 for x in old[1]), *old[2:]]
        odd = [*teacher[:3], tuple(x - 0.5 for x in teacher[3])]
        assert column(curated([RIGHT], surprising, teacher), "weight")[1] > base[1]
        assert column(curated([RIGHT], surprising, teacher, student_sign=-1), "weight")[1] < turned[1]
        assert column(curated([RIGHT], old, odd), "weight")[3] < base[3]
        assert turned[2:] == base[2:]
        # What does not belong to a path has no say in its weights.
        assert column(curated([RIGHT], surprising, teacher), "weight")[2:] == base[2:]
        assert column(curated([RIGHT], old, odd), "weight")[:2] == base[:2]


def test_weights_sum_to_one_or_average_one() -> None:
    right = [(1, 1, 1, 0), (0, 0), (1,)]
    rows = [*OLD, *OLD[:3]]
    for weight, total in (({}, lambda n: 1.0), ({"mean_one": True}, float)):
        found = column(curated(right, rows, rows[::-1], **weight), "weight")
        sets = (found[:3], found[3:4], found[4:6], found[6:])
        assert [sum(own) for own in sets] == pytest.approx([total(len(own)) for own in sets])


def test_the_top_k_form_of_the_released_code() -> None:
    """Reverse KL over the teacher's top 2, both renormalised, averaged over the wrong rollouts' tokens alone, and the
    right rollouts' likelihood over theirs, in a batch with a group that is all wrong; weights average 1."""
    mean = {"kind": "token_mean", "weights": "numerator"}
    part = {"estimate": {"kind": "topk", "outside": "renormalise"}, "importance": "none", "aggregate": mean}
    objective = load_recipe(
        "scope",
        {
            "score": {"scorers": {"teacher": {"top_k": 2}}},
            "curate": {"weight": {"mean_one": True}},
            "train": {"objective": {"aggregate": mean, "distill": part}},
        },
    ).train.objective
    right, old, now, teacher = [RIGHT, (0, 0)], [*OLD, *OLD[:2]], [*NOW, *NOW[:2]], [*TEACHER, *TEACHER[:2]]
    table = curated(right, old, teacher, mean_one=True)
    g = torch.Generator().manual_seed(1)
    p, q = (torch.randn(6, 3, 6, dtype=torch.float64, generator=g).log_softmax(-1) for _ in range(2))
    best = p.topk(2, dim=-1).indices
    lp, lq = p.gather(-1, best), q.gather(-1, best)
    batch = replace(batch_of(table, old, now, teacher), teacher_topk_logp=lp, topk_logp=lq.requires_grad_())
    p2, q2 = (x.exp() / x.exp().sum(-1, keepdim=True) for x in (lp, lq))
    each = (q2 * (q2 / p2).log()).sum(-1).detach()
    reinforced = torch.tensor([*RIGHT, 0, 0], dtype=torch.bool)[:, None] & batch.mask
    wrong = batch.mask & ~reinforced
    found = loss(batch, objective).metrics
    expected = (batch.weight[:, None] * each)[wrong].sum() / wrong.sum()
    assert float(found["loss/distill"]) == pytest.approx(float(expected.detach()), abs=1e-12)
    likelihood = -batch.weight[:, None] * (batch.logp - batch.logp_old).exp()
    expected = likelihood[reinforced].sum() / reinforced.sum()
    assert float(found["loss/policy"]) == pytest.approx(float(expected.detach()), abs=1e-12)
    assert int(reinforced.sum()) == 5
    assert int(wrong.sum()) == 10


APART = {
    "aggregate": {"kind": "token_mean", "weights": "numerator"},
    "distill": {"aggregate": {"kind": "token_mean", "weights": "numerator"}},
}
"""The released code's denominators, as the page writes them."""


def released() -> Recipe:
    return load_recipe("scope", {"curate": {"weight": {"mean_one": True}}, "train": {"objective": APART}})


def test_each_path_of_the_released_code_is_a_mean_over_its_own_tokens() -> None:
    """Right rollouts by the tokens of right ones alone, wrong by those of wrong ones, weights in the sums alone."""
    table = curated([RIGHT], OLD, TEACHER, mean_one=True)
    found = loss(batch_of(table, OLD, NOW, TEACHER), released().train.objective).metrics
    right, wrong = (len(OLD[0]) + len(OLD[1]), len(OLD[2]) + len(OLD[3]))
    weighted = [2 * w * x for w, x in zip(WEIGHTS, LOSSES, strict=True)]
    assert float(found["loss/policy"]) == pytest.approx(sum(weighted[:2]) / right, abs=1e-5)
    assert float(found["loss/distill"]) == pytest.approx(sum(weighted[2:]) / wrong, abs=1e-5)


@pytest.mark.parametrize("kind", ["token_mean", "seq_mean_token_mean", "group_mean_token_sum"])
@pytest.mark.parametrize("empty", ["zero", "leave_out"])
def test_wrong_rollouts_do_not_thin_out_the_mean_over_right_ones(kind: str, empty: str) -> None:
    """Four tokens each at ratio 1 and weight 1, two right rows and one wrong one: the policy's loss is -1 a token, and
    the wrong row's share of the teacher's mean is all of it."""
    mean = {"kind": kind} | ({"empty": empty} if kind == "seq_mean_token_mean" else {})
    parts = {"aggregate": mean, "distill": {"aggregate": mean}}
    objective = load_recipe("scope", {"train": {"objective": parts}}).train.objective
    flat = torch.zeros(3, 4, dtype=torch.float64)
    batch = TokenBatch(
        logp=flat,
        logp_old=flat,
        teacher_logp=flat - 0.5,
        mask=torch.ones(3, 4, dtype=torch.bool),
        advantage=torch.ones(3, dtype=torch.float64),
        route=route_codes(["policy", "policy", "distill"]),
        group=torch.zeros(3, dtype=torch.int64),
    )
    found = loss(batch, objective).metrics
    a_row, rows = (4.0, 2.0) if kind == "group_mean_token_sum" else (1.0, 1.0)
    assert float(found["loss/policy"]) == pytest.approx(-a_row * rows)
    assert float(found["loss/distill"]) == pytest.approx(0.5 * a_row)
    given = totals(batch, objective)
    parted = [loss(batch.rows([n]), objective, totals=given).loss for n in range(3)]
    assert float(sum(parted)) == pytest.approx(float(loss(batch, objective).loss))


AS_SCRIPTED = {
    "aggregate": {"kind": "token_mean", "weights": "numerator"},
    "distill": {
        "importance": "clipped",
        "aggregate": {"kind": "token_mean", "weights": "numerator"},
        "over": "batch",
    },
}
"""The way that the released scripts distil, as the page writes it."""


@pytest.mark.parametrize(
    "now", [OLD, NOW, [[x - 1.5 for x in row] for row in OLD], [[x + 1.5 for x in row] for row in OLD]]
)
def test_the_ppo_form_of_the_released_scripts(now: Any) -> None:
    """A = -w (lS_old - lT), 0 on right rollouts, in PPO's doubly clipped loss over the tokens of all; beside it the
    right rollouts' likelihood over theirs. Policies near the one that sampled, and so far that every clip acts."""
    recipe = load_recipe("scope", {"curate": {"weight": {"mean_one": True}}, "train": {"objective": AS_SCRIPTED}})
    batch = batch_of(curated([RIGHT], OLD, TEACHER, mean_one=True), OLD, now, TEACHER)
    logp = batch.logp.detach().nan_to_num().requires_grad_()
    found = loss(replace(batch, logp=logp), recipe.train.objective)
    ours = torch.autograd.grad(found.loss, logp)[0]

    right = torch.tensor(RIGHT, dtype=torch.bool)[:, None]
    ratio = (logp - batch.logp_old.nan_to_num()).exp()
    a = torch.where(batch.mask & ~right, batch.teacher_logp - batch.logp_old, 0.0).nan_to_num() * batch.weight[:, None]
    pushed = torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.2))
    pushed = torch.where(a < 0, torch.minimum(pushed, -3.0 * a), pushed)
    distilled = torch.where(batch.mask, pushed, 0.0).sum() / batch.mask.sum()
    likely = torch.where(batch.mask & right, -batch.weight[:, None] * ratio, 0.0).sum() / (batch.mask & right).sum()
    assert float(found.loss.detach()) == pytest.approx(float((distilled + likely).detach()), abs=1e-12)
    assert torch.allclose(ours, torch.autograd.grad(distilled + likely, logp)[0], atol=1e-12, rtol=0)

    wrong = batch.mask & ~right
    stopped = ((a > 0) & (ratio > 1.2)) | ((a < 0) & ((ratio < 0.8) | (ratio > 3.0)))
    assert float(found.metrics["distill/clip_share"]) == pytest.approx(int(stopped[wrong].sum()) / int(wrong.sum()))
    assert float(found.metrics["loss/distill"]) == pytest.approx(float(distilled.detach()), abs=1e-12)


def test_at_the_first_step_the_ppo_form_is_equation_3() -> None:
    """But for the denominator: at ratio 1 nothing is clipped."""
    objective = load_recipe("scope", {"train": {"objective": AS_SCRIPTED}}).train.objective
    batch = worked(now=OLD)
    theirs = torch.autograd.grad(loss(batch, objective).loss, batch.logp)[0][2:]
    assert torch.allclose(theirs, slope(batch)[2:] / batch.mask.sum(), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (
            {"importance": "clipped", "estimate": {"kind": "topk"}},
            "importance clipped replaces logp in estimate sampled",
        ),
        ({"over": "batch"}, "over: has no effect without `aggregate`"),
        ({"over": "batch", "rows": "all", "aggregate": "token_mean"}, "over: has no effect where all rows"),
        ({"importance": {"kind": "clipped", "dual": 0.5}}, "dual"),
    ],
)
def test_what_has_no_meaning_is_refused(part: dict[str, Any], said: str) -> None:
    with pytest.raises((ValueError, RollwayError), match=said):
        load_recipe("scope", {"train": {"objective": {"distill": part}}})


def test_the_diagnostic_goes_on_from_the_policys_own_wrong_rollouts() -> None:
    """One whose score is missing is not right; what another pass derived is no rollout of the policy's own."""
    rows = [("a", "policy", True), ("b", "policy", False), ("c", "policy", None), ("d", "two_kept", False)]
    scored = pa.table(dict(zip(("rollout_id", "source", "correct"), map(list, zip(*rows, strict=True)), strict=True)))
    with duckdb.connect() as con:
        con.register("scored", scored)
        found = con.execute((folder("sql") / "parents" / "wrong.sql").read_text()).fetchall()
    assert sorted(found) == [("b",), ("c",)]
