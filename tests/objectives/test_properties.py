"""Properties of every objective: gradients, splits, masks, extremes, permutations, degenerate batches."""

import zlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from objectives.cases import CASES, leaves, random_batch, with_leaves
from rollway.config.objectives import IMITATING, ROUTES, Objective
from rollway.objectives import (
    LossResult,
    TokenBatch,
    initial_state,
    loss,
    prepare,
    requirements,
    separable,
    totals,
    unit,
)

NAMES = sorted(CASES)
ADDITIVE = [n for n in NAMES if separable(CASES[n])]
POLICY = [n for n in NAMES if CASES[n].preference.kind == "none"]


def gradients(batch: TokenBatch, result: LossResult) -> dict[str, Tensor]:
    names = [n for n in leaves(batch) if leaves(batch)[n].requires_grad]
    found = torch.autograd.grad(result.loss, [leaves(batch)[n] for n in names], allow_unused=True)
    return {n: torch.zeros_like(leaves(batch)[n]) if g is None else g for n, g in zip(names, found, strict=True)}


def evaluated(batch: TokenBatch, objective: Objective) -> tuple[Tensor, dict[str, Tensor]]:
    result = loss(batch, objective)
    return result.loss.detach(), gradients(batch, result)


def seeded(name: str, **options: Any) -> TokenBatch:
    return random_batch(CASES[name], zlib.crc32(name.encode()), **options)


def same(a: tuple[Tensor, dict[str, Tensor]], b: tuple[Tensor, dict[str, Tensor]], atol: float = 1e-10) -> None:
    torch.testing.assert_close(a[0], b[0], atol=atol, rtol=0)
    for name in a[1]:
        torch.testing.assert_close(a[1][name], b[1][name], atol=atol, rtol=0)


# A finite difference cannot hold still what a stop-gradient does: the closed forms of these are tested instead.
STOPPED = (
    *("dft", "cispo", "gspo_token", "dagrpo"),
    *("distill_sampled", "distill_sequence", "distill_scope", "distill_srpo", "distill_renormalised"),
)
WITHOUT_LOGP = ("distill_topk", "distill_exact", "distill_by_source")
"""Their gradient goes to other inputs alone."""


@pytest.mark.parametrize("name", [n for n in NAMES if n not in STOPPED])
def test_gradient_equals_finite_differences(name: str) -> None:
    """Selections are kept as they are: they are constants for the gradient."""
    objective = CASES[name]
    batch = prepare(seeded(name), objective)
    inputs = [x for x in leaves(batch).values() if x.requires_grad]
    names = [n for n, x in leaves(batch).items() if x.requires_grad]

    def value(*given: Tensor) -> Tensor:
        return loss(with_leaves(batch, dict(zip(names, given, strict=True))), objective).loss

    detached = [x.detach().clone().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(value, detached, eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("split", [[8], [4, 4], [2] * 4, [1] * 8, [3, 1, 4], [7, 1]])
@pytest.mark.parametrize("name", ADDITIVE)
def test_micro_batches_add_up(name: str, split: list[int]) -> None:
    """INCIDENTS 1-5: whatever the split, the same loss, gradients and metrics."""
    objective = CASES[name]
    batch = prepare(seeded(name), objective)
    state, whole = initial_state(objective), totals(batch, objective)
    reference = loss(batch, objective, state=state)
    parts = [batch.rows(rows) for rows in torch.arange(8).split(split)]
    results = [loss(part, objective, state=state, totals=whole) for part in parts]
    torch.testing.assert_close(sum(r.loss for r in results), reference.loss, atol=1e-10, rtol=0)
    total = sum(r.loss for r in results)
    assert isinstance(total, Tensor)
    names = [n for n, x in leaves(batch).items() if x.requires_grad]
    split_g = torch.autograd.grad(total, [leaves(batch)[n] for n in names], allow_unused=True)
    whole_g = torch.autograd.grad(reference.loss, [leaves(batch)[n] for n in names], allow_unused=True)
    for g, h in zip(split_g, whole_g, strict=True):
        if h is not None:
            torch.testing.assert_close(g, h, atol=1e-10, rtol=0)
    for metric, value in reference.metrics.items():
        parts_of = torch.stack([r.metrics[metric] for r in results])
        combined = parts_of.max() if metric.startswith("max/") else parts_of.sum()
        torch.testing.assert_close(combined, value, atol=1e-10, rtol=0, msg=metric)


@pytest.mark.parametrize("name", [n for n in NAMES if unit(CASES[n]) in ("pair", "group")])
def test_pairs_and_groups_add_up_when_kept_together(name: str) -> None:
    objective, batch = CASES[name], seeded(name)
    whole = totals(batch, objective)
    parts = [loss(batch.rows(rows), objective, totals=whole).loss for rows in ([0, 1, 2, 3], [4, 5, 6, 7])]
    torch.testing.assert_close(sum(parts), loss(batch, objective).loss, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", [n for n in NAMES if not separable(CASES[n])])
def test_two_pass_gradient_of_interacting_rows_is_exact(name: str) -> None:
    """Differentiate the whole batch with respect to its inputs, then backpropagate those per micro-batch."""
    objective = CASES[name]
    batch = seeded(name)
    weights = torch.linspace(-0.1, 0.1, 6, dtype=torch.float64).requires_grad_()
    features = torch.randn(*batch.logp.shape, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    shift = batch.logp.detach().nan_to_num(-1.0, neginf=-1.0)

    def policy(rows: Tensor) -> Tensor:
        return shift[rows] + features[rows] @ weights

    rows = torch.arange(8)
    exact = torch.autograd.grad(loss(replace(batch, logp=policy(rows)), objective).loss, weights)[0]
    logp = policy(rows).detach().requires_grad_()
    wanted = torch.autograd.grad(loss(replace(batch, logp=logp), objective).loss, logp)[0]
    found = torch.zeros_like(weights)
    for part in rows.split([3, 1, 4]):
        found += torch.autograd.grad(policy(part), weights, grad_outputs=wanted[part])[0]
    torch.testing.assert_close(found, exact, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", [n for n in ADDITIVE if n not in WITHOUT_LOGP])
def test_ranks_of_unequal_token_counts_sum_to_one(name: str) -> None:
    """INCIDENTS 4: four ranks that only share the totals; the sum of their parameter gradients is the single rank's."""
    objective = CASES[name]
    batch = prepare(seeded(name), objective)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    whole = totals(batch, objective)
    single = torch.autograd.grad(loss(replace(batch, logp=batch.logp * scale), objective).loss, scale)[0]
    found = torch.zeros_like(single)
    for rank in range(4):
        own = batch.rows(torch.arange(rank, 8, 4))
        found += torch.autograd.grad(loss(replace(own, logp=own.logp * scale), objective, totals=whole).loss, scale)[0]
    torch.testing.assert_close(found, single, atol=1e-10, rtol=0)


@pytest.mark.parametrize("garbage", [float("nan"), float("-inf"), 1e30])
@pytest.mark.parametrize("name", NAMES)
def test_masked_positions_never_matter(name: str, garbage: float) -> None:
    """INCIDENTS 20, 21: anything may stand under the mask; its gradient is exactly 0 and nothing else changes."""
    objective = CASES[name]
    clean, dirty = seeded(name, fill=0.0), seeded(name, fill=garbage)
    a, b = evaluated(clean, objective), evaluated(dirty, objective)
    assert bool(b[0].isfinite())
    same(a, b, atol=0.0)
    for g in b[1].values():
        assert torch.equal(g[~dirty.mask], torch.zeros_like(g[~dirty.mask]))


@pytest.mark.parametrize("name", NAMES)
def test_extreme_ratios_stay_finite(name: str) -> None:
    objective = CASES[name]
    for dtype in (torch.float64, torch.float32):
        batch = seeded(name, dtype=dtype)
        for distance in (300.0, 1e4):
            far = torch.where(torch.arange(batch.logp.shape[1]) % 2 == 0, -distance, -1e-6).to(dtype)
            logp = far.expand_as(batch.logp).clone().requires_grad_()
            value, found = evaluated(replace(batch, logp=logp), objective)
            assert bool(value.isfinite())
            assert value.dtype == dtype
            assert all(bool(g.isfinite().all()) for g in found.values())


@pytest.mark.parametrize("name", NAMES)
def test_float32_agrees_with_float64(name: str) -> None:
    objective = CASES[name]
    double, single = seeded(name), seeded(name, dtype=torch.float32)
    a, b = loss(double, objective), loss(single, objective)
    assert b.loss.dtype == torch.float32
    assert float(b.loss.detach()) == pytest.approx(float(a.loss.detach()), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_row_order_does_not_matter(name: str) -> None:
    """INCIDENTS 14: rows are told apart by their fields, never by their position."""
    objective, batch = CASES[name], seeded(name)
    order = torch.tensor([5, 2, 7, 0, 3, 6, 1, 4])
    a, b = evaluated(batch, objective), evaluated(batch.rows(order), objective)
    torch.testing.assert_close(a[0], b[0], atol=1e-12, rtol=0)
    back = gradients(batch, loss(batch.rows(order), objective))
    for leaf, g in a[1].items():
        torch.testing.assert_close(g, back[leaf], atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", POLICY)
def test_padding_rows_change_nothing(name: str) -> None:
    """INCIDENTS 13, 31: rows repeated to fill a micro-batch carry weight 0, or no valid token, and real values."""
    objective, batch = CASES[name], seeded(name)
    batch = replace(batch, weight=torch.ones(8, dtype=torch.float64) if batch.weight is None else batch.weight)
    batch = prepare(batch, objective)
    whole = totals(batch, objective)
    reference = loss(batch, objective)
    padded = batch.rows(torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 3, 3]))
    weight = padded.weight.clone()
    weight[8:] = 0.0
    padded = replace(padded, weight=weight)
    assert objective.aggregate is not None
    given = whole if objective.aggregate.weights == "numerator" or unit(objective) == "batch" else None
    if unit(objective) == "batch":
        given = None
    torch.testing.assert_close(loss(padded, objective, totals=given).loss, reference.loss, atol=1e-12, rtol=0)
    hollow = replace(padded, weight=batch.weight[torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 3, 3])])
    mask = hollow.mask.clone()
    mask[8:] = False
    hollow = replace(hollow, mask=mask)
    given = None if unit(objective) == "batch" else whole
    torch.testing.assert_close(loss(hollow, objective, totals=given).loss, reference.loss, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", POLICY)
def test_empty_batches_give_zero(name: str) -> None:
    objective, batch = CASES[name], seeded(name)
    empty = replace(batch, mask=torch.zeros_like(batch.mask))
    value, found = evaluated(empty, objective)
    assert float(value) == 0.0
    assert all(not bool(g.any()) for g in found.values())
    assert float(loss(batch.rows([]), objective).loss.detach()) == 0.0


PLAIN = {
    n: CASES[n]
    for n in POLICY
    if CASES[n].distill is None
    and CASES[n].imitate is None
    and CASES[n].gate.kind not in IMITATING
    and CASES[n].mixing.kind == "none"
    and CASES[n].correction.kind == "none"
}


# A sequence ratio reads all valid tokens, so with a selection the unselected ones share the gradient.
@pytest.mark.parametrize("name", sorted(PLAIN.keys() - {"d3s_gspo"}))
def test_on_policy_gradient_is_the_policy_gradient(name: str) -> None:
    """At ratio 1 every gate gives -A grad logp under its own aggregation: scale factor exactly 1 (INCIDENTS 2)."""
    full = PLAIN[name]
    objective = full.model_copy(update={"kl": CASES["grpo"].kl, "entropy_bonus": 0.0, "value": None})
    batch = prepare(seeded(name), objective)
    old = torch.where(batch.mask, batch.logp.detach(), 0.0)
    fields = {"logp_old": old, "logp_behavior": old}
    if batch.route is not None and objective.anchors.kind == "shaped":
        fields["route"] = torch.full_like(batch.route, ROUTES.index("policy"))
    batch = replace(batch, **fields)
    plain = Objective(ratio=CASES["reinforce"].ratio, gate=CASES["reinforce"].gate, aggregate=objective.aggregate)
    result = loss(batch, objective)
    kept = replace(batch, extra={"keep": result.kept})
    ours = torch.autograd.grad(result.loss, batch.logp)[0]
    expected = torch.autograd.grad(loss(kept, plain).loss, batch.logp)[0]
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", sorted(PLAIN))
def test_groups_without_signal_give_no_gradient(name: str) -> None:
    full = PLAIN[name]
    objective = full.model_copy(update={"kl": CASES["grpo"].kl, "entropy_bonus": 0.0, "value": None})
    batch = seeded(name)
    zero = torch.zeros_like(batch.advantage)
    old = torch.where(batch.mask, batch.logp.detach(), 0.0)
    batch = replace(batch, advantage=zero, logp_old=old, logp_behavior=old)
    value, found = evaluated(batch, objective)
    assert float(value) == 0.0
    assert not bool(found["logp"].any())


@pytest.mark.parametrize("name", NAMES)
def test_constants_take_no_gradient(name: str) -> None:
    objective, batch = CASES[name], seeded(name)
    constants = (
        "logp_old",
        "logp_ref",
        "logp_behavior",
        "logp_old_temp",
        "advantage",
        "weight",
        "returns",
        "value_old",
        "reward",
    )
    held = {n: getattr(batch, n).clone().requires_grad_() for n in constants if getattr(batch, n) is not None}
    result = loss(replace(batch, **held), objective)
    found = torch.autograd.grad(result.loss, list(held.values()), allow_unused=True)
    assert all(g is None or not bool(g.any()) for g in found)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_required_is_asked_for_and_nothing_else(name: str) -> None:
    from rollway.errors import RollwayError

    objective = CASES[name]
    batch = seeded(name)
    needs = requirements(objective)
    for field in needs:
        with pytest.raises(RollwayError, match=f"`{field}`"):
            loss(replace(batch, **{field: None}), objective)
    optional = {f: None for f in vars(batch) if f not in needs | {"logp", "mask", "extra", "weight"}}
    lean, full = loss(replace(batch, **optional), objective), loss(batch, objective)
    assert torch.equal(lean.loss, full.loss)


@pytest.mark.parametrize("name", ADDITIVE)
def test_totals_come_before_the_forward_pass(name: str) -> None:
    """Denominators do not depend on the current models, which have not run when the micro-batches are cut."""
    objective, batch = CASES[name], seeded(name)
    early = replace(batch, logp=torch.full_like(batch.logp, -1.0), value=None, hidden=None, lm_head=None, lr=None)
    given = totals(prepare(early, objective), objective)
    for key, x in totals(prepare(batch, objective), objective).items():
        assert torch.equal(given[key], x), key
