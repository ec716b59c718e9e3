"""Top K by blocks of the vocabulary, against a naive float32 forward over whole rows."""

import pytest
import torch

from policies.architectures import tiny_model
from rollway.errors import RollwayError
from rollway.policies.head import LOGIT_ELEMENTS, Head, blocks_of
from rollway.policies.logprobs import Row
from rollway.policies.top_k import row_top_k, top_k


@pytest.mark.parametrize("elements", [1, 20, 31, 10**9])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("k", [0, 1, 4, 11])
def test_blocks_give_the_whole_softmax(
    elements: int, temperature: float, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LOGIT_ELEMENTS, "cpu", elements)
    generator = torch.Generator().manual_seed(0)
    states, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((6, 4), (11, 4), (11,))
    )
    targets = torch.randint(0, 11, (6,), generator=generator)
    head = Head(weight, bias, 2.0, 3.0)
    logits = head.logits(states) / temperature
    found = top_k(head, states, targets, k, temperature)
    assert torch.allclose(found.logp, logits.log_softmax(-1)[range(6), targets], atol=1e-13)
    assert torch.allclose(found.entropy, torch.distributions.Categorical(logits=logits).entropy(), atol=1e-13)
    values, ids = logits.log_softmax(-1).sort(dim=1, descending=True, stable=True)
    assert torch.allclose(found.logprobs, values[:, :k], atol=1e-13)
    assert torch.equal(found.ids, ids[:, :k])


@pytest.mark.parametrize("elements", [3, 7, 24, 10**9])
def test_of_equal_logits_the_lower_id_comes_first(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOGIT_ELEMENTS, "cpu", elements)
    weight = torch.tensor([1.0, 2.0, 2.0, 0.0, 2.0, 3.0, 2.0, 1.0, 2.0])[:, None]
    states = torch.tensor([[1.0], [0.0], [-1.0]])
    found = top_k(Head(weight, None, 1.0, None), states, torch.tensor([0, 0, 0]), 3)
    assert found.ids.tolist() == [[5, 1, 2], [0, 1, 2], [3, 0, 7]]


def test_large_logits_stay_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOGIT_ELEMENTS, "cpu", 2)
    weight = torch.tensor([-3e4, 3e4, 0.0, 2.9e4])[:, None]
    found = top_k(Head(weight, None, 1.0, None), torch.ones(1, 1), torch.tensor([1]), 2)
    assert (found.logp.item(), found.entropy.item()) == (0.0, 0.0)
    assert found.logprobs.tolist() == [[0.0, -1000.0]]


def test_k_beyond_the_vocabulary_is_refused() -> None:
    with pytest.raises(RollwayError, match="top_k 5 is larger than the vocabulary of 4 tokens"):
        top_k(Head(torch.ones(4, 1), None, 1.0, None), torch.ones(1, 1), torch.tensor([0]), 5)


@pytest.mark.parametrize("packed", [False, True])
def test_rows_of_any_prompt_are_read_at_their_own_tokens(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same completion behind prompts of other lengths, in one pass, against each row alone and whole."""
    monkeypatch.setitem(LOGIT_ELEMENTS, "cpu", 100)
    model = tiny_model("qwen3", dtype=torch.float32)
    tokens = [3, 1, 4, 1, 5]
    rows = [Row([2], tokens), Row([7, 8, 9, 10, 11, 2], tokens), Row([1, 2, 3], [6])]
    found = row_top_k(model, rows, 3, packed=packed)
    for row, said in zip(rows, found, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*row.prompt_tokens, *row.tokens]])).logits[0]
        logp = logits.log_softmax(-1)[len(row.prompt_tokens) - 1 : -1]
        assert torch.allclose(said.logp, logp.gather(1, torch.tensor(row.tokens)[:, None])[:, 0], atol=1e-5)
        assert torch.allclose(said.entropy, -(logp.exp() * logp).sum(1), atol=1e-5)
        assert torch.allclose(said.logprobs, logp.topk(3).values, atol=1e-5)
        assert torch.equal(said.ids, logp.topk(3).indices)
    assert not torch.allclose(found[0].logp, found[1].logp, atol=1e-3), "another prompt says something else"


def test_no_block_is_larger_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOGIT_ELEMENTS, "cpu", 40)
    assert all((block.stop - block.start) * 6 <= 40 for block in blocks_of(6, 1000, "cpu"))
