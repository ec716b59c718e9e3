"""Every divergence against its closed form, its generator, enumeration and finite differences (arXiv 2604.00626)."""

import math
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from rollway.config.divergences import AnyDivergence, Divergence
from rollway.objectives.divergences import (
    advantage,
    divergence,
    renormalised,
    sampled_value,
    terms,
    with_tail,
)
from rollway.objectives.kl import k1, k2, k3

P, Q = (torch.tensor(x, dtype=torch.float64) for x in ((0.6, 0.3, 0.1), (0.2, 0.5, 0.3)))


def made(kind: str, **given: float) -> Divergence:
    return TypeAdapter(AnyDivergence).validate_python({"kind": kind, **given})


GENERATORS: dict[str, tuple[Divergence, Any]] = {
    "forward_kl": (made("forward_kl"), lambda u: u * u.log()),
    "reverse_kl": (made("reverse_kl"), lambda u: -u.log()),
    "jeffreys": (made("jeffreys"), lambda u: (u - 1) * u.log()),
    "jsd": (made("jsd"), lambda u: _jsd(u, 0.5)),
    "jsd_0.1": (made("jsd", beta=0.1), lambda u: _jsd(u, 0.1)),
    "jsd_0": (made("jsd", beta=0.0), lambda u: u * u.log()),
    "jsd_1": (made("jsd", beta=1.0), lambda u: -u.log()),
    "skew_forward": (made("skew_forward"), lambda u: u * (u / (0.1 * u + 0.9)).log()),
    "skew_reverse": (made("skew_reverse", alpha=0.3), lambda u: -(0.7 * u + 0.3).log()),
    "amari": (made("amari"), lambda u: _amari(u, 0.5)),
    "amari_0.2": (made("amari", alpha=0.2), lambda u: _amari(u, 0.2)),
    "amari_1.7": (made("amari", alpha=1.7), lambda u: _amari(u, 1.7)),
    "amari_-1": (made("amari", alpha=-1.0), lambda u: _amari(u, -1.0)),
    "amari_0": (made("amari", alpha=0.0), lambda u: -u.log()),
    "amari_1": (made("amari", alpha=1.0), lambda u: u * u.log()),
    "total_variation": (made("total_variation"), lambda u: (u - 1).abs() / 2),
    "pearson_chi2": (made("pearson_chi2"), lambda u: (u - 1).square()),
    "neyman_chi2": (made("neyman_chi2"), lambda u: (u - 1).square() / u),
    "hellinger2": (made("hellinger2"), lambda u: (u.sqrt() - 1).square()),
}


def _jsd(u: Tensor, b: float) -> Tensor:
    w = b * u + 1 - b
    return b * u * (u / w).log() - (1 - b) * w.log()


def _amari(u: Tensor, a: float) -> Tensor:
    return (u**a - a * u - (1 - a)) / (a * (a - 1))


def pairs(count: int = 20, v: int = 7) -> tuple[Tensor, Tensor]:
    """Log-probs of teacher and policy, [count, v], from close to far apart."""
    g = torch.Generator().manual_seed(0)
    spread = torch.linspace(0.01, 4.0, count, dtype=torch.float64)[:, None]
    a, b = (torch.randn(count, v, dtype=torch.float64, generator=g) for _ in range(2))
    return (a * spread).log_softmax(-1), (a * spread + b * spread).log_softmax(-1)


WORKED = {
    "forward_kl": (made("forward_kl"), 0.396058, (-0.4, 0.2, 0.2)),
    "reverse_kl": (made("reverse_kl"), 0.365274, (-0.292777, 0.072776, 0.220001)),
    "jsd": (made("jsd"), 0.091121, (-0.078773, 0.032140, 0.046632)),
    "jsd_0.1": (made("jsd", beta=0.1), 0.034761, None),
    "skew_forward": (made("skew_forward"), 0.305811, None),
    "skew_reverse": (made("skew_reverse"), 0.292107, None),
    "total_variation": (made("total_variation"), 0.4, None),
    "pearson_chi2": (made("pearson_chi2"), 1.013333, None),
    "hellinger2": (made("hellinger2"), 0.186173, None),
    "jeffreys": (made("jeffreys"), 0.761332, None),
    "amari": (made("amari"), 0.372346, None),
}


@pytest.mark.parametrize("name", WORKED)
def test_worked_values_and_slopes(name: str) -> None:
    kind, value, slope = WORKED[name]
    z = Q.log().requires_grad_()
    found = divergence(P.log(), z.log_softmax(-1), kind)
    assert abs(float(found.detach()) - value) < 1e-6
    if slope is not None:
        found.backward()
        assert torch.allclose(z.grad, torch.tensor(slope, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("name", GENERATORS)
def test_value_is_the_generators(name: str) -> None:
    """D = sum Q f(P / Q), term by term; 0 for equal models, never negative."""
    kind, f = GENERATORS[name]
    lp, lq = pairs()
    expected = lq.exp() * f((lp - lq).exp())
    # What f leaves undetermined, c (u - 1), sums to 0.
    torch.testing.assert_close(divergence(lp, lq, kind), expected.sum(-1), atol=1e-11, rtol=1e-9)
    torch.testing.assert_close(terms(lp, lq, kind), expected, atol=1e-11, rtol=1e-9)
    assert bool((divergence(lp, lq, kind) >= -1e-14).all())
    assert float(divergence(lp, lp, kind).abs().max()) < 1e-14


@pytest.mark.parametrize("name", GENERATORS)
def test_slope_on_logits_is_equation_2(name: str) -> None:
    """dD / dz_v = Q_v (g_v - sum_w Q_w g_w), g = f - u f', with f' by finite differences of the generator."""
    kind, f = GENERATORS[name]
    lp, lq = pairs()
    z = lq.clone().requires_grad_()
    slope = torch.autograd.grad(divergence(lp, z.log_softmax(-1), kind).sum(), z)[0]
    u, q = (lp - lq).exp(), lq.exp()
    h = 1e-6 * u
    g = f(u) - u * (f(u + h) - f(u - h)) / (2 * h)
    expected = q * (g - (q * g).sum(-1, keepdim=True))
    torch.testing.assert_close(slope, expected, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("name", [n for n in GENERATORS if n != "total_variation"])
def test_slope_against_finite_differences_of_the_value(name: str) -> None:
    kind = GENERATORS[name][0]
    lp, lq = pairs(6, 5)
    z = lq.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: divergence(lp, x.log_softmax(-1), kind), [z], eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", GENERATORS)
def test_sampled_surrogate_has_the_exact_gradient_in_expectation(name: str) -> None:
    """E_{y ~ Q}[-a(u(y)) grad ln Q(y)] over all y of the vocabulary; its value's estimate has mean D; a(1) = 0."""
    kind = GENERATORS[name][0]
    lp, lq = pairs()
    z = lq.clone().requires_grad_()
    exact = torch.autograd.grad(divergence(lp, z.log_softmax(-1), kind).sum(), z)[0]
    now = z.log_softmax(-1)
    surrogate = (lq.exp() * -advantage(lp - lq, kind) * now).sum()
    torch.testing.assert_close(torch.autograd.grad(surrogate, z)[0], exact, atol=1e-10, rtol=1e-8)
    estimate = sampled_value(lp - lq, kind)
    torch.testing.assert_close((lq.exp() * estimate).sum(-1), divergence(lp, lq, kind), atol=1e-10, rtol=1e-8)
    assert bool((estimate >= -1e-12).all())
    assert float(advantage(torch.zeros(1, dtype=torch.float64), kind)) == 0.0


def test_todi_is_sampled_with_its_own_gradient() -> None:
    kind = made("todi")
    lp, lq = pairs()
    z = lq.clone().requires_grad_()
    exact = torch.autograd.grad(divergence(lp, z.log_softmax(-1), kind).sum(), z)[0]
    now = (lq.exp() * -advantage(lp - lq, kind) * z.log_softmax(-1)).sum()
    torch.testing.assert_close(torch.autograd.grad(now, z)[0], exact, atol=1e-10, rtol=1e-8)


def test_traps_of_the_estimators_as_losses() -> None:
    """Equation 3, by enumeration: k1's gradient has mean 0, k2's is the reverse KL's, k3's is the FORWARD KL's."""
    lp, lq = pairs()
    q, z = lq.exp(), lq.clone().requires_grad_()

    def slope(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss.sum(), z, retain_graph=True)[0]

    now = z.log_softmax(-1)
    forward, backward = (slope(divergence(lp, now, made(n))) for n in ("forward_kl", "reverse_kl"))
    assert float(slope(q * k1(now, lp)).abs().max()) < 1e-14
    torch.testing.assert_close(slope(q * k2(now, lp)), backward, atol=1e-12, rtol=0)
    torch.testing.assert_close(slope(q * k3(now, lp)), forward, atol=1e-12, rtol=1e-9)
    assert float((forward - backward).abs().max()) > 0.1
    torch.testing.assert_close(slope(q * (lq - lp) * now), backward, atol=1e-12, rtol=0)
    # As values k1 and k3 are unbiased, and k2 is not.
    value = divergence(lp, lq, made("reverse_kl"))
    torch.testing.assert_close((q * k1(lq, lp)).sum(-1), value)
    torch.testing.assert_close((q * k3(lq, lp)).sum(-1), value)
    assert float(((q * k2(lq, lp)).sum(-1) - value).abs().max()) > 0.1
    # The surrogate of the forward KL is k3's gradient, that of the reverse KL is k2's.
    d = torch.tensor([0.3, -2.0], dtype=torch.float64)
    torch.testing.assert_close(advantage(d, made("forward_kl")), d.exp() - 1)
    torch.testing.assert_close(advantage(d, made("reverse_kl")), d)
    torch.testing.assert_close(sampled_value(d, made("reverse_kl")), k3(-d, torch.zeros_like(d)))


def test_worked_sampled_values() -> None:
    logp, teacher = Q.log()[0], P.log()[0]
    found = [float(k(logp, teacher)) for k in (k1, k2, k3)]
    assert found == pytest.approx([-1.098612, 0.603474, 0.901388], abs=1e-6)
    assert float(advantage(P.log() - Q.log(), made("reverse_kl"))[1]) == pytest.approx(-0.510826, abs=1e-6)


def test_end_points() -> None:
    """JSD(b) / b -> forward KL, JSD(b) / (1 - b) -> reverse KL, and JSD itself -> 0; alpha -> 1 and 0 likewise."""
    lp, lq = P.log(), Q.log()
    forward, backward = (float(divergence(lp, lq, made(n))) for n in ("forward_kl", "reverse_kl"))
    near = 1e-5
    assert float(divergence(lp, lq, made("jsd", beta=near))) / near == pytest.approx(forward, abs=1e-3)
    assert float(divergence(lp, lq, made("jsd", beta=1 - near))) / near == pytest.approx(backward, abs=1e-3)
    assert float(divergence(lp, lq, made("jsd", beta=near))) < 1e-5
    assert float(divergence(lp, lq, made("jsd", beta=0.0))) == forward
    assert float(divergence(lp, lq, made("jsd", beta=1.0))) == backward
    for step in (1e-3, 1e-6, 1e-9, -1e-9, -1e-3):
        assert float(divergence(lp, lq, made("amari", alpha=1 + step))) == pytest.approx(forward, abs=abs(step))
        assert float(divergence(lp, lq, made("amari", alpha=step))) == pytest.approx(backward, abs=abs(step))
    for kind, limit in (("skew_forward", forward), ("skew_reverse", backward)):
        assert float(divergence(lp, lq, made(kind, alpha=1e-9))) == pytest.approx(limit, abs=1e-7)


def test_close_models_lose_no_digits_in_float32() -> None:
    """D is of second order in the difference: a naive chi2 or alpha divergence would be all rounding."""
    g = torch.Generator().manual_seed(2)
    lp = torch.randn(50, dtype=torch.float64, generator=g).log_softmax(-1)
    lq = (lp + 1e-2 * torch.randn(50, dtype=torch.float64, generator=g)).log_softmax(-1)
    for name in ("pearson_chi2", "neyman_chi2", "hellinger2", "total_variation"):
        exact = float(divergence(lp, lq, GENERATORS[name][0]))
        assert float(divergence(lp.float(), lq.float(), GENERATORS[name][0])) == pytest.approx(exact, rel=1e-3)


def test_swapping_the_arguments() -> None:
    lp, lq = pairs()
    for a, b in (
        (made("forward_kl"), made("reverse_kl")),
        (made("skew_forward", alpha=0.3), made("skew_reverse", alpha=0.3)),
        (made("pearson_chi2"), made("neyman_chi2")),
        (made("jsd", beta=0.3), made("jsd", beta=0.7)),
        (made("amari", alpha=0.3), made("amari", alpha=0.7)),
        *[(made(n), made(n)) for n in ("jeffreys", "total_variation", "hellinger2", "todi")],
    ):
        torch.testing.assert_close(divergence(lp, lq, a), divergence(lq, lp, b), atol=1e-11, rtol=1e-10)


def test_relations() -> None:
    lp, lq = pairs()
    of = {n: divergence(lp, lq, kind) for n, (kind, _) in GENERATORS.items()}
    torch.testing.assert_close(of["amari"], 2 * of["hellinger2"])
    torch.testing.assert_close(divergence(lp, lq, made("amari", alpha=2.0)), of["pearson_chi2"] / 2)
    torch.testing.assert_close(of["jeffreys"], of["forward_kl"] + of["reverse_kl"])
    assert bool((of["jsd"] <= math.log(2)).all())
    assert bool((of["total_variation"] <= 1).all())
    assert bool((of["total_variation"].square() <= of["forward_kl"] / 2 + 1e-12).all()), "Pinsker"


DISJOINT = {
    "forward_kl": math.inf,
    "reverse_kl": math.inf,
    "jeffreys": math.inf,
    "jsd": math.log(2),
    "jsd_0.1": -0.1 * math.log(0.1) - 0.9 * math.log(0.9),
    "skew_forward": math.log(10),
    "skew_reverse": math.log(1 / 0.3),
    "amari": 4.0,
    "amari_0.2": 1 / (0.2 * 0.8),
    "amari_1.7": math.inf,
    "amari_-1": math.inf,
    "total_variation": 1.0,
    "pearson_chi2": math.inf,
    "neyman_chi2": math.inf,
    "hellinger2": 2.0,
    "todi": math.inf,
    "akl": math.inf,
}


@pytest.mark.parametrize("name", DISJOINT)
def test_disjoint_supports_have_defined_values(name: str) -> None:
    """Finite kinds are finite with finite slopes, the others are +inf and never NaN; entries that neither has are 0."""
    kind = GENERATORS[name][0] if name in GENERATORS else made(name)
    off = -math.inf
    lp = torch.tensor([math.log(0.5), math.log(0.5), off, off, off], dtype=torch.float64)
    lq = torch.tensor([off, off, math.log(0.25), math.log(0.75), off], dtype=torch.float64).requires_grad_()
    found = divergence(lp, lq, kind)
    assert float(found.detach()) == pytest.approx(DISJOINT[name], rel=1e-12)
    if math.isfinite(DISJOINT[name]):
        found.backward()
        assert bool(lq.grad.isfinite().all())


@pytest.mark.parametrize(
    ("p", "q", "expected"),
    [
        # The head is where both agree: of the two only the reverse KL counts, which is finite.
        ((0.5, 0.3, 0.2), (0.5, 0.5, 0.0), 0.5 * math.log(0.5 / 0.3)),
        # The same, and the reverse KL is infinite, as the policy has what the teacher lacks.
        ((0.5, 0.5, 0.0), (0.5, 0.0, 0.5), math.inf),
        ((1.0, 0.0, 0.0), (0.0, 0.5, 0.5), math.inf),
        ((0.6, 0.4, 0.0), (0.6, 0.4, 0.0), 0.0),
    ],
)
def test_akl_has_a_value_where_supports_differ_in_part(
    p: tuple[float, ...], q: tuple[float, ...], expected: float
) -> None:
    lp, lq = (torch.tensor(x, dtype=torch.float64).log() for x in (p, q))
    assert float(divergence(lp, lq, made("akl"))) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("alpha", [math.nan, math.inf, -math.inf])
def test_an_alpha_that_is_no_number_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        made("amari", alpha=alpha)


def test_a_one_hot_teacher_under_forward_kl_is_cross_entropy() -> None:
    z = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([-math.inf, 0.0, -math.inf], dtype=torch.float64)
    for kind in (made("forward_kl"), made("jsd", beta=0.0), made("amari", alpha=1.0)):
        found = divergence(teacher, z.log_softmax(-1), kind)
        torch.testing.assert_close(found, -z.log_softmax(-1)[1])
        slope = torch.autograd.grad(found, z)[0]
        torch.testing.assert_close(slope, z.softmax(-1) - torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64))


def test_clip_caps_entries_and_their_slope() -> None:
    """OPSD's worked example: tau = .2, forward KL; a clipped entry's slope on logits comes from the others alone."""
    p = torch.tensor([[0.7, 0.2, 0.1], [0.05, 0.9, 0.05]], dtype=torch.float64)
    z = torch.tensor([[0.4, 0.4, 0.2], [0.6, 0.2, 0.2]], dtype=torch.float64).log().requires_grad_()
    kind, lq = made("forward_kl"), z.log_softmax(-1)
    each = [[0.391731, -0.138629, -0.069315], [-0.124245, 1.353670, -0.069315]]
    torch.testing.assert_close(
        terms(p.log(), lq, kind), torch.tensor(each, dtype=torch.float64), atol=1e-6, rtol=0, check_stride=False
    )
    assert divergence(p.log(), lq, kind).tolist() == pytest.approx([0.183787, 1.160110], abs=1e-6)
    capped = divergence(p.log(), lq, kind, clip=0.2)
    assert capped.tolist() == pytest.approx([-0.007944, 0.006440], abs=1e-6)
    slope = torch.autograd.grad(capped.mean(), z)[0]
    expected = torch.tensor([[0.06, -0.04, -0.02], [0.005, 0.01, -0.015]], dtype=torch.float64)
    torch.testing.assert_close(slope, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(slope.sum(-1), torch.zeros(2, dtype=torch.float64), atol=1e-14, rtol=0)
    torch.testing.assert_close(divergence(p.log(), lq, kind, clip=math.inf), divergence(p.log(), lq, kind))


@pytest.mark.parametrize("name", [*GENERATORS, "todi"])
def test_a_clipped_entry_of_infinite_divergence_has_no_slope(name: str) -> None:
    """P = (.5, .5, 0) or Q with a 0: as where a tiny probability stands for it and the term is finite."""
    kind, q = GENERATORS[name][0] if name in GENERATORS else made(name), torch.tensor([0.2, 0.3, 0.5]).double()
    half = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64).log()
    for lp, logits in ((half, q.log()), (q.log(), half)):
        found = []
        for least in (-math.inf, -700.0):
            z = logits.clone().clamp(min=least).requires_grad_()
            value = divergence(lp.clamp(min=least), z.log_softmax(-1), kind, clip=0.2)
            found.append((value.detach(), torch.autograd.grad(value, z)[0]))
        torch.testing.assert_close(found[0], found[1], atol=1e-12, rtol=0)
    uniform = torch.zeros(3, dtype=torch.float64).log_softmax(-1)
    if name == "amari_0":
        assert float(divergence(half, uniform, kind, clip=0.2)) == pytest.approx(-0.070310, abs=1e-6)


def test_tail_and_renormalisation() -> None:
    """Worked: the student's top 2 are ids 1 and 2. A tail keeps a lower bound of the full divergence."""
    kind = made("reverse_kl")
    ids = torch.tensor([1, 2])
    lp, lq = P.log()[ids], Q.log()[ids]
    assert float(divergence(with_tail(lp), with_tail(lq), kind)) == pytest.approx(0.365274, abs=1e-6)
    assert float(divergence(renormalised(lp), renormalised(lq), kind)) == pytest.approx(0.038098, abs=1e-6)
    teacher, policy = pairs()
    for name, (each, _) in GENERATORS.items():
        full = divergence(teacher, policy, each)
        for k in (1, 3, 7):
            at = teacher.topk(k, dim=-1).indices
            part = divergence(with_tail(teacher.gather(-1, at)), with_tail(policy.gather(-1, at)), each)
            assert bool((part <= full + 1e-6 * (1 + full)).all()), (name, k)
        torch.testing.assert_close(part, full, atol=1e-6, rtol=1e-6, msg=name)
        torch.testing.assert_close(divergence(renormalised(teacher), renormalised(policy), each), full)


def test_a_tail_of_nothing_is_clamped() -> None:
    whole = torch.tensor([0.5, 0.5 + 1e-7]).log().requires_grad_()
    tail = with_tail(whole)
    assert tail[-1].item() == pytest.approx(math.log(1e-7), rel=1e-3)
    tail.sum().backward()
    assert bool(whole.grad.isfinite().all())


def test_todi_has_the_value_of_jeffreys_and_another_slope() -> None:
    """As the spec has it, a P ln(P/Q) + (1-a) Q ln(Q/P) with a = P / (P + Q) sums to Jeffreys'."""
    lp, lq = pairs()
    z = lq.clone().requires_grad_()
    values = [divergence(lp, z.log_softmax(-1), made(n)) for n in ("todi", "jeffreys")]
    torch.testing.assert_close(*values)
    slopes = [torch.autograd.grad(v.sum(), z)[0] for v in values]
    assert float((slopes[0] - slopes[1]).abs().max()) > 0.1


def test_akl_weighs_head_and_tail() -> None:
    """Worked by hand: the head is id 0 (.6 >= .5), G_h = .4, G_t = .2 + .2; equal models give 0."""
    kind = made("akl")
    lp, lq = P.log(), Q.log()
    forward, backward = (float(divergence(lp, lq, made(n))) for n in ("forward_kl", "reverse_kl"))
    assert float(divergence(lp, lq, kind)) == pytest.approx(0.5 * forward + 0.5 * backward)
    wide = made("akl", head=0.7)
    assert float(divergence(lp, lq, wide)) == pytest.approx(0.75 * forward + 0.25 * backward)
    assert float(divergence(lp, lp, kind)) == 0.0
    z = lq.clone().requires_grad_()
    divergence(lp, z.log_softmax(-1), kind).backward()
    y = lq.clone().requires_grad_()
    both = [divergence(lp, y.log_softmax(-1), made(n)) for n in ("forward_kl", "reverse_kl")]
    (0.5 * both[0] + 0.5 * both[1]).backward()
    torch.testing.assert_close(z.grad, y.grad)


def test_the_teacher_takes_no_gradient() -> None:
    lp, lq = pairs()
    teacher, policy = lp.clone().requires_grad_(), lq.clone().requires_grad_()
    for kind in [k for k, _ in GENERATORS.values()] + [made("todi"), made("akl")]:
        assert (
            torch.autograd.grad(divergence(teacher, policy, kind).sum(), [teacher, policy], allow_unused=True)[0]
            is None
        )


@pytest.mark.parametrize(
    "given",
    [
        {"kind": "jsd", "beta": 1.1},
        {"kind": "jsd", "beta": -0.1},
        {"kind": "skew_forward", "alpha": 0.0},
        {"kind": "skew_reverse", "alpha": 1.0},
        {"kind": "forward_kl", "beta": 0.5},
        {"kind": "akl", "head": 0.0},
        {"kind": "renyi"},
    ],
)
def test_parameters_outside_their_range_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(AnyDivergence).validate_python(given)


@pytest.mark.parametrize("name", [n for n in GENERATORS if n != "total_variation"])
def test_far_apart_in_float32_stays_finite_where_it_can(name: str) -> None:
    """Logits 60 nats apart: no overflow in intermediate terms of what is finite."""
    kind = GENERATORS[name][0]
    lp = torch.tensor([0.0, -60.0, 3.0]).log_softmax(-1)
    z = torch.tensor([-60.0, 0.0, 3.0], requires_grad=True)
    found = divergence(lp, z.log_softmax(-1), kind)
    found.backward()
    exact = divergence(lp.double(), z.detach().double().log_softmax(-1), kind)
    assert float(found.detach()) == pytest.approx(float(exact), rel=1e-3)
    assert bool(z.grad.isfinite().all())
