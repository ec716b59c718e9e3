"""Two models' distributions compared by blocks of the vocabulary: values, slopes, memory."""

from functools import partial
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from policies.test_head import Largest
from rollway.config.divergences import AnyDivergence
from rollway.objectives.divergences import clipped_terms, divergence, terms
from rollway.policies import head as module
from rollway.policies.head import Head
from rollway.policies.two_heads import compared

KINDS: dict[str, Any] = {
    "forward_kl": {},
    "reverse_kl": {},
    "jeffreys": {},
    "jsd": {"beta": 0.3},
    "skew_forward": {},
    "skew_reverse": {},
    "amari": {"alpha": 0.4},
    "total_variation": {},
    "pearson_chi2": {},
    "neyman_chi2": {},
    "hellinger2": {},
    "todi": {},
}
HEADS = {"plain": (1.0, None, False), "scale, cap and bias": (2.0, 3.0, True)}


def inputs(with_bias: bool, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Head, Tensor]:
    """States, weight and bias of the policy; head and states of a wider teacher."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    own = [normal(5, 4), normal(11, 4), *([normal(11)] if with_bias else [])]
    teacher = Head(normal(11, 6), normal(11), 0.5, None)
    return [x.requires_grad_() for x in own], teacher, normal(5, 6)


@pytest.mark.parametrize("elements", [1, 37, 10**9])
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("which", HEADS)
def test_values_and_slopes(which: str, name: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the divergence of whole log-softmaxes and its autograd, and against finite differences."""
    monkeypatch.setitem(module.LOGIT_ELEMENTS, "cpu", elements)
    scale, softcap, with_bias = HEADS[which]
    own, teacher, teacher_states = inputs(with_bias)
    kind = TypeAdapter(AnyDivergence).validate_python({"kind": name, **KINDS[name]})

    def ours(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        policy = Head(weight, bias, scale, softcap)
        return compared(policy, states, teacher, teacher_states, partial(terms, kind=kind), 1.3)

    def naive(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        lq = (Head(weight, bias, scale, softcap).logits(states) / 1.3).log_softmax(-1)
        return divergence((teacher.logits(teacher_states) / 1.3).log_softmax(-1), lq, kind)

    weights = torch.randn(5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.allclose(ours(*own), naive(*own), atol=1e-13)
    slopes = [torch.autograd.grad((f(*own) * weights).sum(), own) for f in (ours, naive)]
    for mine, theirs in zip(*slopes, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-12)
    if elements == 37 and name not in ("todi", "total_variation"):
        assert torch.autograd.gradcheck(ours, own)


@pytest.mark.parametrize("elements", [1, 10**9])
def test_capped_entries(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.LOGIT_ELEMENTS, "cpu", elements)
    own, teacher, teacher_states = inputs(False)
    kind = TypeAdapter(AnyDivergence).validate_python({"kind": "forward_kl"})
    capped = partial(clipped_terms, kind=kind, clip=0.05)

    found = compared(Head(own[1], None, 1.0, None), own[0], teacher, teacher_states, capped)
    lq = Head(own[1], None, 1.0, None).logits(own[0]).log_softmax(-1)
    expected = divergence(teacher.logits(teacher_states).log_softmax(-1), lq, kind, clip=0.05)
    assert torch.allclose(found, expected, atol=1e-13)
    for mine, theirs in zip(
        torch.autograd.grad(found.sum(), own), torch.autograd.grad(expected.sum(), own), strict=True
    ):
        assert torch.allclose(mine, theirs, atol=1e-12)


@pytest.mark.parametrize("elements", [1, 10**9])
@pytest.mark.parametrize("name", KINDS)
def test_capped_entries_that_one_model_rules_out(name: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of -inf: the terms are infinite, and the cap's slope of 0 is not multiplied by theirs."""
    monkeypatch.setitem(module.LOGIT_ELEMENTS, "cpu", elements)
    own, teacher, teacher_states = inputs(False)
    bias = torch.zeros(11, dtype=torch.float64)
    bias[[2, 7]] = -torch.inf
    teacher = Head(teacher.weight, bias, 0.5, None)
    kind = TypeAdapter(AnyDivergence).validate_python({"kind": name, **KINDS[name]})
    term = partial(clipped_terms, kind=kind, clip=0.05)
    found = compared(Head(own[1], None, 1.0, None), own[0], teacher, teacher_states, term)
    lq = Head(own[1], None, 1.0, None).logits(own[0]).log_softmax(-1)
    expected = divergence(teacher.logits(teacher_states).log_softmax(-1), lq, kind, clip=0.05)
    assert torch.allclose(found, expected, atol=1e-13)
    slopes = [torch.autograd.grad(x.sum(), own) for x in (found, expected)]
    for mine, theirs in zip(*slopes, strict=True):
        assert bool(theirs.isfinite().all())
        assert torch.allclose(mine, theirs, atol=1e-12)


def test_half_precision_and_frozen_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.LOGIT_ELEMENTS, "cpu", 20)
    kind = TypeAdapter(AnyDivergence).validate_python({"kind": "jsd"})
    (states, weight), teacher, teacher_states = inputs(False, torch.bfloat16)
    weight.requires_grad_(False)
    found = compared(Head(weight, None, 1.0, None), states, teacher, teacher_states, partial(terms, kind=kind))
    assert found.dtype == torch.float32
    found.sum().backward()
    assert states.grad is not None
    assert states.grad.dtype == torch.bfloat16
    assert weight.grad is None
    with torch.no_grad():
        empty = compared(
            Head(weight, None, 1.0, None), states[:0], teacher, teacher_states[:0], partial(terms, kind=kind)
        )
    assert empty.shape == (0,)


def test_neither_models_logits_exist_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """[K, V] of 900 x 2000 in neither direction."""
    monkeypatch.setitem(module.LOGIT_ELEMENTS, "cpu", 90_000)
    kind = TypeAdapter(AnyDivergence).validate_python({"kind": "jsd"})
    g = torch.Generator().manual_seed(0)
    weight, states = (torch.randn(n, 3, generator=g).requires_grad_() for n in (2000, 900))
    teacher, teacher_states = Head(torch.randn(2000, 5, generator=g), None, 1.0, None), torch.randn(900, 5, generator=g)
    with Largest() as seen:
        compared(
            Head(weight, None, 1.0, None), states, teacher, teacher_states, partial(terms, kind=kind)
        ).sum().backward()
    assert 10_000 < seen.elements <= 90_000
