"""Log-probs and entropies by blocks of the vocabulary: values, slopes, precision, memory."""

import pytest
import torch
from torch import Tensor

from policies.architectures import tiny_model
from rollway.errors import RollwayError
from rollway.policies import head as module
from rollway.policies.head import Head, check_head
from rollway.policies.logprobs import Row, forward_logprobs

TEMPERATURES = (0.7, 1.0, 2.0)
KINDS = {"plain": (1.0, None, False), "bias and scale": (0.5, None, True), "all": (2.0, 3.0, True)}


def given(bias: bool, dtype: torch.dtype = torch.float64, tokens: int = 6) -> tuple[list[Tensor], Tensor]:
    """Hidden states, weight and, where wanted, bias; targets."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, 4), (11, 4), *([(11,)] if bias else [])]
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]
    return inputs, torch.randint(0, 11, (tokens,), generator=generator)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("elements", [1, 20, 31, 10**9])
def test_values_and_slopes(kind: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against torch's own log_softmax and entropy; slopes against finite differences and against autograd of those."""
    monkeypatch.setitem(module.LOGIT_ELEMENTS, "cpu", elements)
    scale, softcap, with_bias = KINDS[kind]
    inputs, targets = given(with_bias)

    def values(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
        logps, entropy = Head(weight, bias, scale, softcap).token_values(states, targets, TEMPERATURES, True)
        return (*logps, entropy)

    def naive(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
        logits = Head(weight, bias, scale, softcap).logits(states)
        logps = [(logits / t).log_softmax(-1)[range(6), targets] for t in TEMPERATURES]
        return (*logps, torch.distributions.Categorical(logits=logits).entropy())

    weights = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.autograd.gradcheck(values, inputs)
    found, expected = values(*inputs), naive(*inputs)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-13)
    slopes = [torch.autograd.grad((torch.stack(v) * weights).sum(), inputs) for v in (found, expected)]
    for mine, theirs in zip(*slopes, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("elements", [1, 20, 31, 10**9])
def test_log_probs_at_given_tokens(kind: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four of 11 tokens at a temperature of their own, some of them twice and some the target: values and slopes."""
    monkeypatch.setitem(module.LOGIT_ELEMENTS, "cpu", elements)
    scale, softcap, with_bias = KINDS[kind]
    inputs, targets = given(with_bias)
    ids = torch.randint(0, 11, (6, 4), generator=torch.Generator().manual_seed(3))
    ids[0, 1], ids[1, 0], ids[2] = ids[0, 0], targets[1], torch.tensor([0, 10, 10, 0])

    def values(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
        logps, entropy, at = Head(weight, bias, scale, softcap).values_at(states, targets, (0.7, 1.0), True, ids, 1.5)
        return (*logps, entropy, at)

    def naive(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
        logits = Head(weight, bias, scale, softcap).logits(states)
        logps = [(logits / t).log_softmax(-1)[range(6), targets] for t in (0.7, 1.0)]
        at = (logits / 1.5).log_softmax(-1).gather(1, ids)
        return (*logps, torch.distributions.Categorical(logits=logits).entropy(), at)

    assert torch.autograd.gradcheck(values, inputs)
    found, expected = values(*inputs), naive(*inputs)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-13)
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=g, dtype=torch.float64) for x in expected]
    for chosen in ([0, 1, 2, 3], [3], [0, 3]):
        slopes = [
            torch.autograd.grad(sum((v[n] * weights[n]).sum() for n in chosen), inputs)
            for v in (values(*inputs), naive(*inputs))
        ]
        for mine, theirs in zip(*slopes, strict=True):
            assert torch.allclose(mine, theirs, atol=1e-12)


@pytest.mark.parametrize("elements", [7, 10**9])
def test_logits_of_any_size_stay_finite(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks whose largest logits differ by 10^4: sums are kept relative to the largest so far."""
    monkeypatch.setitem(module.LOGIT_ELEMENTS, "cpu", elements)
    weight = torch.tensor([[1.0], [1e4], [-1e4], [9999.0], [0.0]])
    for sign in (1.0, -1.0):
        states = torch.full((5, 1), sign)
        logps, entropy = Head(weight, None, 1.0, None).token_values(states, torch.arange(5), (1.0, 0.5), True)
        logits = Head(weight, None, 1.0, None).logits(states)
        assert torch.allclose(logps[0], logits.log_softmax(-1).diagonal(), rtol=1e-6)
        assert torch.allclose(logps[1], (logits / 0.5).log_softmax(-1).diagonal(), rtol=1e-6)
        assert torch.allclose(
            entropy.double(), torch.distributions.Categorical(logits=logits.double()).entropy(), atol=1e-6
        )


def test_half_precision_weights_give_float32_values_and_slopes_of_their_own_dtype(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs, targets = given(True, torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    for elements in (20, 10**9):
        monkeypatch.setitem(module.LOGIT_ELEMENTS, "cpu", elements)
        found = []
        for states, weight, bias in (inputs, exact):
            logps, entropy = Head(weight, bias, 1.0, None).token_values(states, targets, (1.0,), True)
            slopes = torch.autograd.grad((logps[0] + 0.1 * entropy).sum(), (states, weight, bias))
            found.append((logps[0], entropy, slopes))
        assert found[0][0].dtype == found[0][1].dtype == torch.float32
        assert (found[0][0] - found[1][0]).abs().max() < 1e-5
        for mine, theirs in zip(found[0][2], found[1][2], strict=True):
            assert mine.dtype == torch.bfloat16
            assert torch.allclose(mine.double(), theirs, rtol=2**-8, atol=1e-6)


def test_entropies_that_nobody_uses_and_frozen_weights_cost_no_slope() -> None:
    (states, weight), targets = given(False)
    weight.requires_grad_(False)
    logps, entropy = Head(weight, None, 1.0, None).token_values(states, targets, (1.0,), True)
    logps[0].sum().backward()
    assert states.grad is not None
    assert weight.grad is None
    assert entropy is not None
    with torch.no_grad():
        logps, entropy = Head(weight, None, 1.0, None).token_values(states[:0], targets[:0], (1.0,), False)
    assert (logps[0].shape, entropy) == ((0,), None)


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        sizes = [x.numel() for x in (made if isinstance(made, tuple | list) else [made]) if isinstance(x, Tensor)]
        self.elements = max([self.elements, *sizes])
        return made


def test_all_logits_never_exist_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """[K, V] of 900 x 2000 in neither direction, and no float32 copy of a half-precision weight."""
    monkeypatch.setitem(module.LOGIT_ELEMENTS, "cpu", 90_000)
    weight = torch.randn(2000, 3).bfloat16().requires_grad_()
    states = torch.randn(900, 3).bfloat16().requires_grad_()
    targets, ids = torch.zeros(900).long(), torch.arange(8).expand(900, 8)
    with Largest() as seen:
        logps, entropy, at = Head(weight, None, 1.0, None).values_at(states, targets, (1.0, 0.5), True, ids)
        (logps[0] + logps[1] + entropy + at.sum(1)).sum().backward()
    assert 45_000 < seen.elements <= 90_000


@pytest.mark.parametrize("name", ["gemma2", "qwen3", "gpt2"])
def test_a_model_whose_logits_are_known_passes_and_another_is_refused(name: str, monkeypatch) -> None:
    model = tiny_model(name, "eager", torch.float32)
    check_head(model, "folder")
    output = model.get_output_embeddings()
    monkeypatch.setattr(output, "forward", lambda x: 2 * torch.nn.functional.linear(x, output.weight))
    with pytest.raises(RollwayError, match="changes its logits in a way that rollway does not know"):
        check_head(model, "folder")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_as_on_the_cpu(dtype: torch.dtype) -> None:
    model = tiny_model("qwen3", dtype=dtype)
    rows = [Row([1, 2], [3, 4, 5]), Row([6], [7])]
    here = forward_logprobs(model, rows, temperature=0.7, entropy=True)
    there = forward_logprobs(model.cuda(), rows, temperature=0.7, entropy=True)
    bar = 1e-5 if dtype == torch.float32 else 0.1
    assert (here.logp - there.logp.cpu()).abs().max() < bar
    assert (here.entropy - there.entropy.cpu()).abs().max() < bar
