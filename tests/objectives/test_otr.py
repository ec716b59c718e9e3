"""OTR and DFT (arXiv 2509.26313, 2508.05629): the worked example, identities, draws, slopes, memory."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from objectives.rows import parse
from policies.test_head import KINDS, Largest
from rollway.config import load_recipe
from rollway.config.objectives import Objective, OneTokenGate
from rollway.objectives import TokenBatch, loss
from rollway.objectives.gates import dft_gate, one_token_gate
from rollway.policies import head as head_module
from rollway.policies.candidates import Counted, draw, of_all, of_drawn
from rollway.policies.head import Head
from rollway.training.batch import TrainingBatch
from rollway.training.candidates import numbers
from rollway.training.gradients import Models, accumulate
from rollway.training.precompute import precompute
from rollway.training.state import TrainState
from rollway.training.update import update
from training.tiny import gradients, largest_difference, random_batch, random_row, tiny

Z = [[2.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
X = [0, 1]
DRAWN = [[0, 0, 1, 0], [2, 2, 1, 0]]
KAPPA, BETA = 1.3, -0.1


def tensors(z: Any = Z, x: Any = X) -> tuple[Tensor, Head, Tensor]:
    """Hidden states that are the logits, the layer that leaves them as they are, the rows' own tokens."""
    states = torch.tensor(z, dtype=torch.float64, requires_grad=True)
    return states, Head(torch.eye(states.shape[1], dtype=torch.float64), None, 1.0, None), torch.tensor(x)


def batch_of(states: Tensor, targets: Tensor, counted: Counted | None, **given: Any) -> TokenBatch:
    """All tokens in one row."""
    logp = states.log_softmax(1).gather(1, targets[:, None]).T
    fields = {} if counted is None else {"hit": counted.hit[None], "missed": counted.missed[None]}
    entropy = torch.distributions.Categorical(logits=states.detach()).entropy()[None]
    mask = torch.ones_like(logp, dtype=torch.bool)
    return TokenBatch(logp=logp, mask=mask, **{"entropy": entropy, **fields, **given})


def of(name: str) -> Objective:
    return load_recipe(name).train.objective


def rewards(targets: Tensor, vocabulary: int, beta: float) -> Tensor:
    """[n, V]: 1 for the own token, beta for the others."""
    own = torch.nn.functional.one_hot(targets, vocabulary).double()
    return own + beta * (1 - own)


def test_worked() -> None:
    states, head, targets = tensors()
    found = loss(batch_of(states, targets, of_drawn(head, states, targets, torch.tensor(DRAWN), 1.0)), of("otr"))
    assert found.token_loss[0].tolist() == pytest.approx([0.270514, 0.321503], abs=6e-7)
    assert float(found.loss.detach()) == pytest.approx(0.296009, abs=6e-7)
    assert float(found.metrics["one_token/hit_rate"]) == pytest.approx((3 / 4 + 1 / 4) / 2)
    assert float(found.metrics["one_token/no_hit_share"]) == 0.0
    assert float(found.metrics["entropy"]) == pytest.approx(0.903862, abs=1e-6)
    exact = loss(batch_of(states, targets, of_all(head, states, targets, 1.0, KAPPA)), of("otr-exact"))
    assert exact.token_loss[0].tolist() == pytest.approx([0.173226, 0.307181], abs=6e-7)
    assert float(exact.loss.detach()) == pytest.approx(0.240204, abs=6e-7)
    assert "one_token/no_hit_share" not in exact.metrics
    for name, expected in (("sft", 0.979525), ("dft", 0.299986)):
        value = loss(batch_of(states, targets, None), of(name)).loss
        assert float(value.detach()) == pytest.approx(expected, abs=6e-7)


@pytest.mark.parametrize("kind", ["drawn", "all"])
def test_gradient_on_the_logits(kind: str) -> None:
    """Eq. 7: -(C_v - pi_v sum_a C_a), C_a the reward of a times how often it was drawn."""
    states, head, targets = tensors()
    ids = torch.tensor(DRAWN)
    reward = rewards(targets, 3, BETA)
    if kind == "drawn":
        counted = of_drawn(head, states, targets, ids, 1.0)
        weight = torch.nn.functional.one_hot(ids, 3).double().mean(1)
    else:
        counted = of_all(head, states, targets, 1.0, KAPPA)
        weight = (states.detach() / KAPPA).softmax(1)
    loss(batch_of(states, targets, counted), of("otr")).loss.backward()
    c = weight * reward
    expected = -(c - states.detach().softmax(1) * c.sum(1, keepdim=True)) / len(X)
    torch.testing.assert_close(states.grad, expected, atol=1e-14, rtol=0)


def token_losses(counted: Counted, states: Tensor, targets: Tensor, beta: float) -> Tensor:
    logp = states.log_softmax(1).gather(1, targets[:, None])[:, 0]
    return one_token_gate(logp, counted.hit, counted.missed, beta)


def random_case(seed: int = 0, n: int = 5, vocabulary: int = 7) -> tuple[Tensor, Head, Tensor]:
    g = torch.Generator().manual_seed(seed)
    z = 1.5 * torch.randn(n, vocabulary, dtype=torch.float64, generator=g)
    return tensors(z.tolist(), torch.randint(0, vocabulary, (n,), generator=g).tolist())


def test_many_candidates_come_to_the_exact_loss() -> None:
    states, head, targets = random_case()
    exact = token_losses(of_all(head, states, targets, 1.0, KAPPA), states, targets, BETA)
    slope = torch.autograd.grad(exact.sum(), states)[0]
    errors = []
    for count in (40, 400, 40_000):
        uniform = torch.rand(5, count, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        ids = draw(head, states.detach(), KAPPA, uniform)
        found = token_losses(of_drawn(head, states, targets, ids, 1.0), states, targets, BETA)
        gap = torch.autograd.grad(found.sum(), states)[0] - slope
        errors.append(max(float((found - exact).detach().abs().max()), float(gap.abs().max())))
    # Four standard errors of a share of 1/2 among 40,000.
    assert errors[2] < 4 * 0.5 / 200
    assert errors[2] < errors[1] < errors[0]


def test_without_heat_and_penalty_it_is_dft() -> None:
    states, head, targets = random_case(1)
    mine = token_losses(of_all(head, states, targets, 1.0, 1.0), states, targets, 0.0)
    theirs = dft_gate(states.log_softmax(1).gather(1, targets[:, None])[:, 0])
    torch.testing.assert_close(mine, theirs, atol=1e-14, rtol=0)
    slopes = [torch.autograd.grad(x.sum(), states)[0] for x in (mine, theirs)]
    torch.testing.assert_close(*slopes, atol=1e-14, rtol=0)


@pytest.mark.parametrize("beta", [1.0, 0.5, 0.0, -0.1, -2.0])
def test_without_heat_the_penalty_only_scales_the_expected_step(beta: float) -> None:
    """Eq. 8: (1 - beta) x DFT; nothing at beta 1."""
    states, head, targets = random_case(2)
    mine = token_losses(of_all(head, states, targets, 1.0, 1.0), states, targets, beta)
    theirs = (1 - beta) * dft_gate(states.log_softmax(1).gather(1, targets[:, None])[:, 0])
    slopes = [torch.autograd.grad(x.sum(), states)[0] for x in (mine, theirs)]
    torch.testing.assert_close(*slopes, atol=1e-14, rtol=0)
    assert bool(slopes[1].any()) == (beta != 1.0)


def test_with_heat_the_penalty_is_a_direction_of_its_own() -> None:
    states, head, targets = random_case(2)
    pull, push = (
        torch.autograd.grad(
            token_losses(of_all(head, states, targets, 1.0, KAPPA), states, targets, beta).sum(), states
        )[0]
        for beta in (0.0, -0.5)
    )
    assert float(torch.nn.functional.cosine_similarity(pull.flatten(), push.flatten(), dim=0)) < 0.999


def test_a_position_without_a_hit_contributes_nothing_unless_misses_cost() -> None:
    states, head, targets = tensors()
    ids = torch.tensor([[1, 1, 2, 2], [1, 0, 0, 1]])
    for beta, moves in ((0.0, False), (-0.1, True)):
        counted = of_drawn(head, states, targets, ids, 1.0)
        slope = torch.autograd.grad(token_losses(counted, states, targets, beta).sum(), states)[0]
        assert bool(slope[0].any()) == moves
        assert bool(slope[1].any())
    found = loss(batch_of(states, targets, of_drawn(head, states, targets, ids, 1.0)), of("otr"))
    assert float(found.metrics["one_token/no_hit_share"]) == 0.5


@pytest.mark.parametrize("count", [None, 8])
def test_a_certain_token_has_no_gradient(count: int | None) -> None:
    states, head, targets = tensors([[80.0, 0.0, 0.0]], [0])
    counted = of_all(head, states, targets, 1.0, KAPPA)
    if count is not None:
        uniform = torch.linspace(0.01, 0.99, count, dtype=torch.float64)[None]
        counted = of_drawn(head, states, targets, draw(head, states.detach(), KAPPA, uniform), 1.0)
    slope = torch.autograd.grad(token_losses(counted, states, targets, BETA).sum(), states)[0]
    assert float(slope.abs().max()) < 1e-24


def test_a_rare_token_pulls_less_than_in_sft_by_its_heated_probability() -> None:
    ratios = []
    for gap in (2.0, 6.0, 12.0):
        states, head, targets = tensors([[0.0, gap, 0.0]], [0])
        mine = token_losses(of_all(head, states, targets, 1.0, KAPPA), states, targets, 0.0)
        plain = -states.log_softmax(1)[0, 0]
        of_mine, of_plain = (torch.autograd.grad(x.sum(), states)[0].norm() for x in (mine, plain))
        ratios.append(float(of_mine / of_plain))
        assert ratios[-1] == pytest.approx(float((states.detach() / KAPPA).softmax(1)[0, 0]))
    assert ratios[0] > ratios[1] > ratios[2]
    assert ratios[2] < 2e-4


def test_the_loss_may_be_negative() -> None:
    states, head, targets = tensors([[0.0] * 50], [0])
    found = loss(batch_of(states, targets, of_all(head, states, targets, 1.0, KAPPA)), of("otr-exact")).loss
    assert float(found.detach()) == pytest.approx((-0.02 + 0.1 * 0.98) * math.log(1 / 50))
    assert float(found.detach()) < 0.0


def test_an_empty_sequence_counts_as_nothing_in_the_mean() -> None:
    states, head, targets = tensors()
    one = batch_of(states, targets, of_all(head, states, targets, 1.0, KAPPA))
    names = ("logp", "mask", "hit", "missed", "entropy")
    both = replace(one, **{name: torch.cat([getattr(one, name)] * 2) for name in names})
    both.mask[1] = False
    twice, once = (float(loss(x, of("otr-exact")).loss.detach()) for x in (both, one))
    assert twice == pytest.approx(once / 2)


# ---- candidates


@pytest.mark.parametrize("elements", [1, 40, 10**9])
def test_draws_are_what_the_logits_say(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the blocks of the vocabulary are; the same ids in all of them."""
    states, head, _ = random_case(3)
    uniform = torch.rand(5, 20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = draw(head, states.detach(), KAPPA, uniform)
    monkeypatch.setitem(head_module.LOGIT_ELEMENTS, "cpu", elements)
    ids = draw(head, states.detach(), KAPPA, uniform)
    assert torch.equal(ids, whole)
    shares = torch.nn.functional.one_hot(ids, 7).double().mean(1)
    expected = (states.detach() / KAPPA).softmax(1)
    assert float(((shares - expected).abs() / (expected * (1 - expected) / 20_000).sqrt()).max()) < 4.5


@pytest.mark.parametrize("elements", [1, 10**9])
def test_tokens_without_probability_are_never_drawn(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head_module.LOGIT_ELEMENTS, "cpu", elements)
    states, head, _ = tensors([[-1e4, 0.0, -1e4, -1e4], [-1e4, -1e4, -1e4, 3.0], [0.0, -1e4, 0.0, -1e4]], [0, 0, 0])
    edge = torch.tensor([[2.0**-53, 0.25, 0.5, 0.75, 1.0 - 2.0**-53]] * 3, dtype=torch.float64)
    ids = draw(head, states.detach(), 1.0, edge)
    assert ids.tolist() == [[1] * 5, [3] * 5, [0, 0, 2, 2, 2]]


def test_the_same_seed_gives_the_same_candidates_and_each_step_others() -> None:
    rows = random_batch(6, seed=2).rows
    lengths = [len(row.tokens) for row in rows]
    first = numbers(rows, 16, 0, 3)
    assert first.shape == (sum(lengths), 16)
    assert np.array_equal(first, numbers(rows, 16, 0, 3))
    assert not np.isin(first, numbers(rows, 16, 0, 4)).any()
    assert not np.isin(first, numbers(rows, 16, 1, 3)).any()
    # Whatever rows are beside it.
    assert np.array_equal(numbers(rows[2:3], 16, 0, 3), first[sum(lengths[:2]) : sum(lengths[:3])])
    assert len(np.unique(first)) == first.size
    states, head, _ = random_case(4, n=len(first))
    ids = draw(head, states.detach(), KAPPA, torch.from_numpy(first))
    assert all(len(set(at)) < 16 for at in ids.tolist()), "with replacement: 16 draws of 7 tokens repeat some"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("elements", [1, 31, 10**9])
def test_slopes(kind: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`missed` against finite differences and against whole logits, by any blocks; hits are constants."""
    monkeypatch.setitem(head_module.LOGIT_ELEMENTS, "cpu", elements)
    scale, softcap, with_bias = KINDS[kind]
    g = torch.Generator().manual_seed(0)
    shapes = [(6, 4), (11, 4), *([(11,)] if with_bias else [])]
    inputs = [torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes]
    targets = torch.randint(0, 11, (6,), generator=g)
    ids = torch.randint(0, 11, (6, 5), generator=g)
    ids[0], ids[1, 0] = targets[0], targets[1]
    kappa, temperature = 1.7, 0.8
    with torch.no_grad():
        heated = (Head(inputs[1], inputs[2] if with_bias else None, scale, softcap).logits(inputs[0])).div(
            kappa * temperature
        )
        fixed = heated.softmax(1)

    def counted(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Counted, Counted]:
        head = Head(weight, bias, scale, softcap)
        return of_drawn(head, states, targets, ids, temperature), of_all(head, states, targets, temperature, kappa)

    def naive(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        logp = (Head(weight, bias, scale, softcap).logits(states) / temperature).log_softmax(1)
        miss = (ids != targets[:, None]).double()
        others = fixed.scatter(1, targets[:, None], 0.0)
        return (logp.gather(1, ids) * miss).mean(1), (others * logp).sum(1)

    drawn, every = counted(*inputs)
    expected = naive(*inputs)
    assert drawn.hit.tolist() == (ids == targets[:, None]).double().mean(1).tolist()
    torch.testing.assert_close(every.hit, fixed.gather(1, targets[:, None])[:, 0], atol=1e-13, rtol=0)
    assert not every.hit.requires_grad
    weights = torch.randn(6, generator=g, dtype=torch.float64)
    for mine, theirs in zip((drawn.missed, every.missed), expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)
        slopes = [torch.autograd.grad((x * weights).sum(), inputs, retain_graph=True) for x in (mine, theirs)]
        for a, b in zip(*slopes, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    step, way = 1e-6, [torch.randn(x.shape, generator=g, dtype=torch.float64) for x in inputs]
    for at in (0, 1):
        # The heated probabilities stay where they are, as for the gradient.
        moved = [naive(*(x.detach() + s * step * w for x, w in zip(inputs, way, strict=True)))[at] for s in (1, -1)]
        found = torch.autograd.grad((drawn.missed, every.missed)[at].sum(), inputs, retain_graph=True)
        slope = sum(float((a * b).sum()) for a, b in zip(found, way, strict=True))
        assert float((moved[0] - moved[1]).sum()) / (2 * step) == pytest.approx(slope, abs=1e-7)


def test_half_precision_and_nothing_to_do() -> None:
    states, weight = torch.randn(3, 4).bfloat16().requires_grad_(), torch.randn(9, 4).bfloat16().requires_grad_()
    head, targets = Head(weight, None, 1.0, None), torch.tensor([0, 3, 8])
    for counted in (of_all(head, states, targets, 1.0, 1.3), of_drawn(head, states, targets, targets[:, None], 1.0)):
        assert counted.hit.dtype == counted.missed.dtype == torch.float32
        (counted.missed.sum() + 0 * states.sum()).backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.bfloat16
    assert of_all(head, states[:0], targets[:0], 1.0, 1.3).missed.shape == (0,)
    assert draw(head, states[:0], 1.3, torch.zeros(0, 5, dtype=torch.float64)).shape == (0, 5)


# ---- through the trainer


def naive_gradients(name: str, batch: TrainingBatch, seed: int, step: int) -> list[Tensor]:
    """Of the mean over rows of each row's token mean, through whole logits and the trainer's uniform numbers."""
    policy = tiny()
    gate = of(name).gate
    assert isinstance(gate, OneTokenGate)
    total = []
    for row in batch.rows:
        ids = torch.tensor([[*row.prompt_tokens.tolist(), *row.tokens.tolist()]])
        logits = policy(input_ids=ids, use_cache=False).logits[0, len(row.prompt_tokens) - 1 : -1]
        logp, heated = logits.log_softmax(1), (logits.detach() / gate.kappa).softmax(1)
        reward = rewards(torch.tensor(row.tokens.tolist()), logits.shape[1], gate.beta)
        weight = heated
        if gate.candidates is not None:
            drawn = torch.searchsorted(
                heated.cumsum(1), torch.from_numpy(numbers([row], gate.candidates, seed, step)), right=True
            )
            weight = torch.nn.functional.one_hot(drawn, logits.shape[1]).double().mean(1)
        total.append(-(weight * reward * logp).sum(1).mean())
    torch.stack(total).mean().backward()
    return gradients(policy)


@pytest.mark.parametrize("micro", [25, 4096])
@pytest.mark.parametrize("name", ["otr", "otr-exact"])
def test_the_trainer_gives_that_gradient(name: str, micro: int) -> None:
    batch, train = random_batch(8, seed=1), load_recipe(name).train
    policy = tiny()
    fixed = precompute(policy, None, None, batch, train, {}, 1.0)
    accumulate(Models(policy, None, 1.0, micro, seed=5, step=2), fixed.rows, fixed.tokens, train.objective, {})
    assert largest_difference(gradients(policy), naive_gradients(name, batch, 5, 2)) < 1e-12


def weights_after(name: str, seed: int, **over: Any) -> list[Tensor]:
    train = load_recipe(name, {"train": {"optimizer": {"lr": 1e-2}, "minibatches": 2, **over}}).train
    policy = tiny()
    _, metrics = update(policy, None, None, random_batch(8, seed=1), train, TrainState(seed=seed))
    named = {m.name for m in metrics}
    assert {"entropy", "one_token/hit_rate"} <= named
    assert ("one_token/no_hit_share" in named) == (name == "otr")
    return [p.detach().clone() for p in policy.parameters()]


def test_reruns_are_equal_and_seeds_differ() -> None:
    few = {"objective": {"gate": {"candidates": 4}}}
    first = weights_after("otr", 0, **few)
    assert largest_difference(first, weights_after("otr", 0, **few)) == 0.0
    assert largest_difference(first, weights_after("otr", 1, **few)) > 0.0
    assert largest_difference(first, weights_after("otr", 0, objective={"gate": {"candidates": 5}})) > 0.0
    for gate in ({"kappa": 2.0}, {"beta": -0.5}):
        assert largest_difference(
            weights_after("otr-exact", 0), weights_after("otr-exact", 0, objective={"gate": gate})
        )


@pytest.mark.parametrize("name", ["otr", "otr-exact"])
def test_all_logits_never_exist_together(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step over 640 tokens and a vocabulary of 400: no tensor of both, forward or backward."""
    monkeypatch.setitem(head_module.LOGIT_ELEMENTS, "cpu", 40_000)
    train = load_recipe(name, {"train": {"objective": {"gate": {"candidates": 8}}}} if name == "otr" else {}).train
    rng = np.random.default_rng(0)
    rows = [random_row(rng, n, length=16) for n in range(40)]
    config = type(tiny().config)(**{**tiny().config.to_dict(), "vocab_size": 400, "hidden_size": 4})
    policy = type(tiny())(config)
    fixed = precompute(policy, None, None, TrainingBatch(rows, *(np.zeros(0, dtype=np.int64),) * 2), train, {}, 1.0)
    with Largest() as seen:
        accumulate(Models(policy, None, 1.0, 10**6), fixed.rows, fixed.tokens, train.objective, {})
    assert seen.elements < 640 * 400 / 4


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"gate": "one_token", "ratio": "token"}, "gate one_token uses no ratio"),
        ({"gate": "dft", "ratio": "token"}, "gate dft uses no ratio"),
        ({"gate": "one_token", "ratio": "none", "correction": "tis"}, "correction cannot act"),
        ({"gate": {"kind": "one_token", "beta": 1.0}, "ratio": "none"}, "less than 1"),
        ({"gate": {"kind": "one_token", "candidates": 0}, "ratio": "none"}, "greater than 0"),
    ],
)
def test_what_does_not_go_together(parts: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse(aggregate="token_mean", **parts)
