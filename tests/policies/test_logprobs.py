"""Log-probabilities of given tokens: padding, packing, temperature, precision, chunks, gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rollway.config.policies import ScratchPolicy
from rollway.errors import RollwayError
from rollway.policies import causal_lm, head
from rollway.policies.head import Head
from rollway.policies.layout import Layout
from rollway.policies.logprobs import Row, forward_logprobs, hidden_states, micro_batches, token_logprobs

GENERATOR = torch.Generator().manual_seed(0)


def random_rows(count, longest=12):
    def ids(low):
        size = int(torch.randint(low, longest, (1,), generator=GENERATOR))
        return torch.randint(0, 101, (size,), generator=GENERATOR).tolist()

    return [Row(ids(1), ids(1)) for _ in range(count)]


def reference(model, row, temperature=1.0):
    """One row alone, from the model's own forward. -> logp [T], entropy at temperature 1 [T]."""
    with torch.no_grad():
        ids = torch.tensor([[*row.prompt_tokens, *row.tokens]])
        logits = model(input_ids=ids).logits[0, len(row.prompt_tokens) - 1 : -1]
    logp = (logits / temperature).log_softmax(-1)[range(len(row.tokens)), row.tokens]
    plain = logits.log_softmax(-1)
    return logp, -(plain.exp() * plain).sum(-1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("micro_tokens", [1, 50, 10_000])
def test_padded_and_packed_rows_equal_single_rows(attention, packed, micro_tokens):
    """INCIDENTS 18, 19."""
    config = ScratchPolicy(layers=2, hidden=32, intermediate=64, attention=attention)
    model = causal_lm.build(config, [], seed=0, device="cpu").model
    rows = random_rows(9)
    result = token_logprobs(
        model, rows, temperature=0.7, micro_tokens=micro_tokens, entropy=True, extra_temperature=2.0, packed=packed
    )
    assert result.logp.shape == (9, max(len(r.tokens) for r in rows))
    for i, row in enumerate(rows):
        n = len(row.tokens)
        logp, entropy = reference(model, row, 0.7)
        assert torch.allclose(result.logp[i, :n], logp, atol=1e-5)
        assert torch.allclose(result.entropy[i, :n], entropy, atol=1e-5)
        assert torch.allclose(result.extra[i, :n], reference(model, row, 2.0)[0], atol=1e-5)
        for column in (result.logp, result.entropy, result.extra):
            assert not column[i, n:].any()


def test_packed_without_positions_that_restart_would_leak(policy, monkeypatch):
    """The proof that the packing test can fail: one row of all tokens changes every row but the first."""
    rows = random_rows(3)
    leak_free = token_logprobs(policy.model, rows, temperature=1.0, micro_tokens=1000, packed=True).logp
    decode = policy.model.model.forward
    monkeypatch.setattr(policy.model.model, "forward", lambda input_ids, position_ids, **kw: decode(input_ids, **kw))
    leaking = token_logprobs(policy.model, rows, temperature=1.0, micro_tokens=1000, packed=True).logp
    assert (leak_free - leaking).abs().max() > 1e-3


def test_temperature_divides_logits_not_logprobs(policy):
    """INCIDENTS 8."""
    row = random_rows(1)[0]
    hot = token_logprobs(policy.model, [row], temperature=2.0, micro_tokens=100).logp[0]
    plain = token_logprobs(policy.model, [row], temperature=1.0, micro_tokens=100).logp[0]
    assert not torch.allclose(hot, plain / 2, atol=1e-3)
    assert torch.allclose(hot, reference(policy.model, row, 2.0)[0], atol=1e-5)


def test_pad_and_eos_ids_are_ordinary_tokens(policy):
    """INCIDENTS 11, 12: masks come from lengths; a pad or EOS id inside a row is scored like any other."""
    pad, eos = policy.tokenizer.pad_token_id, policy.tokenizer.eos_token_id
    rows = [Row([pad, 7], [eos, pad, eos]), Row([7], [8, 9, 10, 11, 12, 13])]
    result = token_logprobs(policy.model, rows, temperature=1.0, micro_tokens=100).logp
    assert (result[0, :3] < 0).all()
    assert not result[0, 3:].any()
    assert (result[1] < 0).all()
    assert torch.allclose(result[0, :3], reference(policy.model, rows[0])[0], atol=1e-5)


def test_logits_are_float32_under_half_precision(policy):
    """INCIDENTS 25: the head's product is taken in float32, so it differs from the model's own bfloat16 logits."""
    model = policy.model.to(torch.bfloat16)
    states = torch.randn(5, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    logits = Head.of(model).logits(states)
    exact = states.double() @ model.lm_head.weight.double().T
    assert logits.dtype == torch.float32
    assert (logits - exact).abs().max() < 1e-6
    assert (model.lm_head(states) - exact).abs().max() > 1e-4
    result = token_logprobs(model, random_rows(3), temperature=1.0, micro_tokens=100, entropy=True)
    assert result.logp.dtype == result.entropy.dtype == torch.float32


def test_half_precision_parity_bar(policy):
    rows = random_rows(8)
    exact = token_logprobs(policy.model, rows, temperature=1.0, micro_tokens=1000).logp
    half = token_logprobs(policy.model.to(torch.bfloat16), rows, temperature=1.0, micro_tokens=1000).logp
    assert (exact - half).abs().max() < 0.05


@pytest.mark.parametrize("elements", [101, 101 * 7, 10**9])
def test_chunks_change_neither_values_nor_gradients(policy, monkeypatch, elements):
    monkeypatch.setitem(head.LOGIT_ELEMENTS, "cpu", elements)
    model = policy.model.requires_grad_(True)
    rows = random_rows(6)
    weights = torch.randn(6, 12, generator=torch.Generator().manual_seed(2))
    result = forward_logprobs(model, rows, temperature=1.3, entropy=True, width=12)
    ((result.logp + 0.3 * result.entropy) * weights).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    total = 0.0
    for i, row in enumerate(rows):
        logits = model(input_ids=torch.tensor([[*row.prompt_tokens, *row.tokens]])).logits[0]
        logits = logits[len(row.prompt_tokens) - 1 : -1]
        plain = logits.log_softmax(-1)
        logp = (logits / 1.3).log_softmax(-1)[range(len(row.tokens)), row.tokens]
        total = total + ((logp - 0.3 * (plain.exp() * plain).sum(-1)) * weights[i, : len(row.tokens)]).sum()
    total.backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(gradients[name], parameter.grad, atol=1e-5), name


def test_gradient_over_all_micro_batches(policy):
    model = policy.model.requires_grad_(True)
    rows = random_rows(5)
    token_logprobs(model, rows, temperature=1.0, micro_tokens=20, grad=True).logp.sum().backward()
    split = model.lm_head.weight.grad.clone()
    model.zero_grad()
    forward_logprobs(model, rows, temperature=1.0).logp.sum().backward()
    assert torch.allclose(split, model.lm_head.weight.grad, atol=1e-5)
    assert not token_logprobs(model, rows, temperature=1.0, micro_tokens=20).logp.requires_grad


def test_hidden_states_stand_before_their_token(policy):
    rows = random_rows(4)
    result = token_logprobs(policy.model, rows, temperature=1.0, micro_tokens=30, hidden=True)
    with torch.no_grad():
        states = hidden_states(policy.model, rows)
    assert torch.allclose(result.hidden, states, atol=1e-6)
    logits = Head.of(policy.model).logits(states[2, 0][None])
    assert torch.allclose(logits.log_softmax(-1)[0, rows[2].tokens[0]], result.logp[2, 0], atol=1e-5)


def test_evaluation_mode_without_gradients_and_mode_restored(policy):
    policy.model.train()
    token_logprobs(policy.model, random_rows(2), temperature=1.0, micro_tokens=30)
    assert policy.model.training


def test_no_rows_and_no_tokens(policy):
    assert token_logprobs(policy.model, [], temperature=1.0, micro_tokens=10).logp.shape == (0, 0)
    result = token_logprobs(policy.model, [Row([6], []), Row([6], [])], temperature=1.0, micro_tokens=10, entropy=True)
    assert result.logp.shape == result.entropy.shape == (2, 0)
    mixed = token_logprobs(policy.model, [Row([6], []), Row([6], [7])], temperature=1.0, micro_tokens=10)
    assert mixed.logp.shape == (2, 1)
    assert mixed.logp[0, 0] == 0


def test_empty_prompt_is_refused(policy):
    with pytest.raises(RollwayError, match="empty prompt"):
        token_logprobs(policy.model, [Row([], [7])], temperature=1.0, micro_tokens=10)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=40), st.integers(1, 100), st.booleans())
def test_micro_batches_cover_rows_within_budget(lengths, budget, packed):
    rows = [Row([0] * n, []) for n in lengths]
    batches = micro_batches(rows, Layout(packed, budget))
    assert sorted(i for b in batches for i in b) == list(range(len(rows)))
    for batch in batches:
        sizes = [max(1, rows[i].length - 1) for i in batch]
        cost = sum(sizes) if packed else max(sizes) * len(sizes)
        assert cost <= budget or len(batch) == 1
