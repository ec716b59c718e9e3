"""Rows that share a pass do not see each other: buckets, packing and single rows agree, over architectures."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.architectures import ARCHITECTURES, VOCABULARY, tiny_model
from rollway.policies.layout import CPU_TOKENS, Layout, _buckets, _trial
from rollway.policies.logprobs import Row, forward_logprobs, micro_batches

EAGER_ONLY = {"gemma2", "mamba2"}
LINEAR = {"mamba2", "qwen3_next"}
WINDOWED = {"mistral", "gemma2", "gemma3"}


def random_rows(count: int = 7) -> list[Row]:
    """Prompts of 1 to 8 tokens, completions of 1 to 20: longer than the sliding windows."""
    rng = np.random.default_rng(0)
    draw = lambda longest: rng.integers(0, VOCABULARY, int(rng.integers(1, longest))).tolist()  # noqa: E731
    return [Row(draw(9), draw(21)) for _ in range(count)]


def cases() -> list[tuple[str, str]]:
    return [(n, a) for n in ARCHITECTURES for a in ("sdpa", "eager") if a == "eager" or n not in EAGER_ONLY]


def slopes(model: torch.nn.Module, rows: list[Row], batches: list[list[int]], packed: bool) -> list[torch.Tensor]:
    """Log-probs of all rows, then the gradients of a fixed function of log-probs and entropies."""
    model.zero_grad(set_to_none=True)
    width = max(len(row.tokens) for row in rows)
    weights = torch.randn(2, len(rows), width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights, found = weights.to(model.device), torch.zeros(len(rows), width, dtype=torch.float64, device=model.device)
    for batch in batches:
        part = [rows[n] for n in batch]
        seen = forward_logprobs(model, part, temperature=0.7, entropy=True, packed=packed, width=width)
        (seen.logp * weights[0, batch] + seen.entropy * weights[1, batch]).sum().backward()
        found[batch] = seen.logp.detach().to(found.dtype)
    return [found, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize(("name", "attention"), cases())
def test_buckets_and_packing_equal_single_rows_in_value_and_gradient(name: str, attention: str) -> None:
    """INCIDENTS 18, 19."""
    model, rows = tiny_model(name, attention), random_rows()
    single = slopes(model, rows, [[n] for n in range(len(rows))], packed=False)
    layouts = [Layout(False, 60, overhead=3), *([] if name in LINEAR else [Layout(True, 60), Layout(True, 1000)])]
    for layout in layouts:
        batches = micro_batches(rows, layout)
        assert max(map(len, batches)) > 1
        for mine, alone in zip(slopes(model, rows, batches, layout.packed), single, strict=True):
            # transformers takes norms and the softmax of eager attention in float32, whatever the weights are.
            assert (mine - alone).norm() <= 1e-5 * alone.norm()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_trial_tells_models_that_keep_rows_apart(name: str) -> None:
    """Linear attention carries its state from row to row: packed it would be wrong, and the trial sees it."""
    model, rows = tiny_model(name, "eager", torch.float32), random_rows()
    assert _trial(model) == (name not in LINEAR)
    alone = torch.cat([forward_logprobs(model, [r], temperature=1.0).logp[0] for r in rows])
    packed = forward_logprobs(model, rows, temperature=1.0, packed=True).logp
    packed = torch.cat([packed[n, : len(r.tokens)] for n, r in enumerate(rows)])
    assert ((packed - alone).abs().max() > 0.1) == (name in LINEAR)


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["flex_attention", "flash_attention_2"])
@pytest.mark.parametrize("name", sorted(ARCHITECTURES.keys() - EAGER_ONLY - {"gpt2", "qwen3_next"}))
def test_block_wise_attention_packs_where_every_layer_sees_whole_rows(name: str, attention: str) -> None:
    """On the CPU flex_attention has no backward pass, and flash_attention_2 nothing at all."""
    if attention == "flash_attention_2":
        pytest.importorskip("flash_attn", reason="flash-attn is not installed")
    dtype = torch.bfloat16 if attention == "flash_attention_2" else torch.float32
    model, rows = tiny_model(name, attention, dtype).cuda(), random_rows()
    layout = Layout.of(model, 100)
    assert layout.packed == (name not in WINDOWED)
    single = slopes(model, rows, [[n] for n in range(len(rows))], packed=False)
    for mine, alone in zip(slopes(model, rows, micro_batches(rows, layout), layout.packed), single, strict=True):
        assert (mine - alone).norm() <= (1e-4 if dtype == torch.float32 else 0.05) * alone.norm()


def test_other_attention_goes_to_buckets_of_at_most_cpu_tokens() -> None:
    for attention in ("sdpa", "eager"):
        assert Layout.of(tiny_model("qwen3", attention), 10**6) == Layout(False, CPU_TOKENS)
    assert Layout.of(tiny_model("qwen3"), 100).tokens == 100


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 9), max_size=9), st.integers(1, 30), st.integers(0, 12))
def test_buckets_cost_least(lengths: list[int], most: int, overhead: int) -> None:
    """Against every way of cutting the sorted rows."""
    lengths = sorted(lengths, reverse=True)

    def cost(ends: tuple[int, ...] | list[int]) -> int:
        parts = [lengths[a:b] for a, b in zip([0, *ends], ends, strict=False)]
        fits = all(len(p) * p[0] <= most or len(p) == 1 for p in parts)
        return sum(len(p) * p[0] + overhead for p in parts) if fits else 10**9

    count = len(lengths)
    ways = [
        [n for n in range(1, count) if bits >> n & 1] + [count] * (count > 0)
        for bits in range(0, 2 ** max(count, 1), 2)
    ]
    assert cost(_buckets(lengths, most, overhead)) == min(map(cost, ways))


def test_skewed_rows_waste_little_on_padding() -> None:
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.uniform(np.log(8), np.log(512), 256)).astype(int).tolist()
    padded = sum(len(b) * max(lengths[n] for n in b) for b in Layout(False, 2048).cut(lengths))
    assert padded < 1.1 * sum(lengths)
