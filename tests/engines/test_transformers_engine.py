"""Decoding against the model's own forward, whatever the batch."""

import numpy as np
import peft
import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from engines.full_forwards import assert_same, requests, slow
from rollway.config.policies import ScratchPolicy
from rollway.config.rollouts import Sampling, TransformersEngine, VllmEngine
from rollway.engines import Request, kv_cache, make, transformers_engine
from rollway.engines.decoding_trial import takes_slots
from rollway.engines.fused_qwen3 import fused
from rollway.engines.transformers_engine import generate
from rollway.errors import RollwayError
from rollway.policies.causal_lm import CausalPolicy, decode
from rollway.policies.logprobs import Row, token_logprobs


@pytest.mark.parametrize(
    "sampling", [Sampling(max_tokens=24), Sampling(max_tokens=24, temperature=0.6, top_p=0.9, top_k=9)]
)
def test_equals_full_forwards(policy, sampling):
    wanted = requests(12, group=2)
    for request, completion in zip(wanted, generate(policy, wanted, sampling, batch=5, seed=3), strict=True):
        tokens, logprobs = slow(policy, request, sampling, 3)
        assert completion.tokens == tokens
        assert np.allclose(completion.logprobs, logprobs, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_batch_composition_does_not_matter(config, peaked, attention):
    policy = peaked(ScratchPolicy(**{**config.model_dump(), "attention": attention}))
    wanted = requests(48)
    sampling = Sampling(max_tokens=25)
    together = generate(policy, wanted, sampling, batch=64, seed=0, entropy=True)
    for batch in (7, 24):
        assert_same(generate(policy, wanted, sampling, batch=batch, seed=0), together)
    for i in (0, 17, 47):
        alone = generate(policy, [wanted[i]], sampling, batch=64, seed=0, entropy=True)
        assert_same(alone, [together[i]])
        assert np.allclose(alone[0].entropy, together[i].entropy, atol=1e-4)
    assert_same(generate(policy, wanted[::-1], sampling, batch=9, seed=0)[::-1], together)
    assert len({len(c.tokens) for c in together}) > 5
    assert {c.finish for c in together} == {"stop", "length"}


def test_seeds_and_samples_differ(policy):
    wanted = [Request(f"r{i}", [7, 8]) for i in range(20)]
    first = generate(policy, wanted, Sampling(max_tokens=10), batch=20, seed=0)
    other = generate(policy, wanted, Sampling(max_tokens=10), batch=20, seed=1)
    assert len({tuple(c.tokens) for c in first}) > 15
    assert sum(a.tokens == b.tokens for a, b in zip(first, other, strict=True)) < 5


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_stored_logprobs_are_what_the_trainer_computes(policy, temperature):
    """INCIDENTS 8; entropies too."""
    wanted = requests(40)
    sampling = Sampling(max_tokens=30, temperature=temperature)
    completions = generate(policy, wanted, sampling, batch=16, seed=5, entropy=True)
    rows = [Row(r.prompt_tokens, c.tokens) for r, c in zip(wanted, completions, strict=True)]
    result = token_logprobs(policy.model, rows, temperature=temperature, micro_tokens=500, entropy=True)
    for i, completion in enumerate(completions):
        n = len(completion.tokens)
        assert np.allclose(completion.logprobs, result.logp[i, :n], atol=1e-5)
        assert np.allclose(completion.entropy, result.entropy[i, :n], atol=1e-5)


def test_truncated_sampler_stores_the_truncated_distribution(policy):
    """INCIDENTS 9: the ratio to the full softmax is not 1, and at most 1."""
    wanted = requests(40)
    completions = generate(policy, wanted, Sampling(max_tokens=20, top_k=3), batch=16, seed=5)
    rows = [Row(r.prompt_tokens, c.tokens) for r, c in zip(wanted, completions, strict=True)]
    full = token_logprobs(policy.model, rows, temperature=1.0, micro_tokens=500).logp
    gaps = [c.logprobs[t] - full[i, t].item() for i, c in enumerate(completions) for t in range(len(c.tokens))]
    assert min(gaps) > -1e-5
    assert np.mean(gaps) > 0.05


def test_end_is_kept_and_truncation_is_told(policy):
    """INCIDENTS 11, 12: the EOS is part of the completion; without one every token is kept and finish says length."""
    eos = policy.tokenizer.eos_token_id
    for c in generate(policy, requests(64), Sampling(max_tokens=30), batch=64, seed=0):
        assert eos not in c.tokens[:-1]
        assert (c.tokens[-1] == eos) == (c.finish == "stop")
        assert c.finish == "stop" or len(c.tokens) == 30
        assert len(c.logprobs) == len(c.tokens)


def test_pad_equal_to_eos(policy):
    """INCIDENTS 11: the same completions when the pad token is the EOS."""
    wanted = requests(32)
    before = generate(policy, wanted, Sampling(max_tokens=30), batch=8, seed=0)
    pad = policy.tokenizer.pad_token
    policy.tokenizer.pad_token = policy.tokenizer.eos_token
    try:
        assert_same(generate(policy, wanted, Sampling(max_tokens=30), batch=8, seed=0), before)
    finally:
        policy.tokenizer.pad_token = pad


def test_ids_are_never_tokenised_again(policy):
    """INCIDENTS 22: prompts whose decoding encodes to other ids (specials, unknowns) go in and come out as they are."""
    odd = [policy.tokenizer.convert_tokens_to_ids(t) for t in ("<unk>", "<pad>", "<user>", "<eos>")]
    wanted = [Request("a", odd), Request("b", [9, *odd, 9])]
    text = decode(policy, wanted[1].prompt_tokens)
    assert policy.tokenizer.encode(text, add_special_tokens=False) != wanted[1].prompt_tokens
    for request, completion in zip(
        wanted, generate(policy, wanted, Sampling(max_tokens=5), batch=2, seed=0), strict=True
    ):
        assert completion.tokens == slow(policy, request, Sampling(max_tokens=5), 0)[0]
        assert all(type(token) is int for token in completion.tokens)


def test_stop_texts(policy):
    wanted = requests(64)
    free = generate(policy, wanted, Sampling(max_tokens=30), batch=64, seed=0)
    halted = generate(policy, wanted, Sampling(max_tokens=30, stop=["a", "12", "+="]), batch=64, seed=0)
    seen = 0
    for a, b in zip(free, halted, strict=True):
        assert a.tokens[: len(b.tokens)] == b.tokens
        texts = [decode(policy, b.tokens[:n]) for n in range(len(b.tokens) + 1)]
        ends = [any(stop in text for stop in ("a", "12", "+=")) for text in texts]
        assert not any(ends[:-1])
        if ends[-1]:
            seen += 1
            assert b.finish == "stop"
        else:
            assert a.tokens == b.tokens
    assert seen > 20


def test_special_token_as_stop_text(policy):
    wanted = requests(64)
    unk = policy.tokenizer.unk_token_id
    completions = generate(policy, wanted, Sampling(max_tokens=30, stop=["<unk>"]), batch=64, seed=0)
    assert not any(unk in c.tokens[:-1] for c in completions)
    assert any(c.tokens[-1] == unk and c.finish == "stop" for c in completions)


def test_context_limit(policy):
    """A completion stops at the context; a prompt that fills it is refused by name."""
    context = policy.model.config.max_position_embeddings
    long = Request("long", [7] * (context - 3))
    completion = generate(policy, [long, Request("short", [7])], Sampling(max_tokens=50), batch=2, seed=0)[0]
    assert len(completion.tokens) <= 3
    with pytest.raises(RollwayError, match=r"rollout full: its prompt has 96 tokens.*context"):
        generate(policy, [Request("full", [7] * context)], Sampling(), batch=2, seed=0)


def test_bad_requests(policy):
    with pytest.raises(RollwayError, match="no token"):
        generate(policy, [Request("x", [])], Sampling(), batch=2, seed=0)
    with pytest.raises(RollwayError, match="share a rollout_id"):
        generate(policy, [Request("x", [7]), Request("x", [8])], Sampling(), batch=2, seed=0)
    assert generate(policy, [], Sampling(), batch=2, seed=0) == []


def test_fused_step_is_the_models_own(policy, monkeypatch):
    """The small Qwen3 in few operations, and when it must stand back."""
    wanted = requests(24)
    sampling = Sampling(max_tokens=20)
    assert fused(policy.model) is not None
    quick = generate(policy, wanted, sampling, batch=10, seed=0, entropy=True)
    monkeypatch.setattr(transformers_engine, "fused", lambda model: None)
    own = generate(policy, wanted, sampling, batch=10, seed=0, entropy=True)
    assert_same(quick, own)
    assert all(np.allclose(a.entropy, b.entropy, atol=1e-5) for a, b in zip(quick, own, strict=True))


def test_fused_step_stands_back(peaked, config):
    assert fused(peaked(config).model.to(torch.bfloat16)) is None
    assert fused(peaked(ScratchPolicy(**{**config.model_dump(), "attention": "eager"})).model) is None
    for target in ("q_proj", "embed_tokens"):
        adapted = peaked(config).model
        peft.get_peft_model(adapted, peft.LoraConfig(target_modules=[target]))
        assert fused(adapted) is None


def test_cache_grows(policy, monkeypatch):
    wanted = requests(8)
    expected = generate(policy, wanted, Sampling(max_tokens=40), batch=4, seed=0)
    monkeypatch.setattr(kv_cache, "FIRST_TOKENS", 2)
    assert_same(generate(policy, wanted, Sampling(max_tokens=40), batch=4, seed=0), expected)


def test_sliding_window_takes_batches_of_one_length(policy):
    torch.manual_seed(0)
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=len(policy.tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            sliding_window=6,
            max_position_embeddings=96,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
    ).eval()
    windowed = CausalPolicy(model, policy.tokenizer, policy.spec)
    assert not takes_slots(model)
    wanted = requests(20)
    sampling = Sampling(max_tokens=16)
    for request, completion in zip(wanted, generate(windowed, wanted, sampling, batch=8, seed=2), strict=True):
        tokens, logprobs = slow(windowed, request, sampling, 2)
        assert completion.tokens == tokens
        assert np.allclose(completion.logprobs, logprobs, atol=1e-4)


def test_two_checkpoints_never_share_a_cache(policy):
    """INCIDENTS 23."""
    wanted = requests(8)
    first = generate(policy, wanted, Sampling(max_tokens=10), batch=8, seed=0)
    saved = policy.model.model.layers[0].self_attn.k_proj.weight.detach().clone()
    with torch.no_grad():
        policy.model.model.layers[0].self_attn.k_proj.weight.mul_(2)
    changed = generate(policy, wanted, Sampling(max_tokens=10), batch=8, seed=0)
    rows = [Row(r.prompt_tokens, c.tokens) for r, c in zip(wanted, changed, strict=True)]
    fresh = token_logprobs(policy.model, rows, temperature=1.0, micro_tokens=500).logp
    with torch.no_grad():
        policy.model.model.layers[0].self_attn.k_proj.weight.copy_(saved)
    assert any(a.logprobs != b.logprobs for a, b in zip(first, changed, strict=True))
    assert all(np.allclose(c.logprobs, fresh[i, : len(c.tokens)], atol=1e-5) for i, c in enumerate(changed))


def test_half_precision_stays_near_the_trainer(config, peaked):
    policy = peaked(config)
    policy.model.to(torch.bfloat16)
    wanted = requests(16)
    completions = generate(policy, wanted, Sampling(max_tokens=20), batch=8, seed=0)
    rows = [Row(r.prompt_tokens, c.tokens) for r, c in zip(wanted, completions, strict=True)]
    logp = token_logprobs(policy.model, rows, temperature=1.0, micro_tokens=500).logp
    gaps = [abs(x - logp[i, t].item()) for i, c in enumerate(completions) for t, x in enumerate(c.logprobs)]
    assert np.mean(gaps) < 0.02


def test_mode_is_restored(policy):
    policy.model.train()
    generate(policy, requests(2), Sampling(max_tokens=2), batch=2, seed=0)
    assert policy.model.training
    policy.model.eval()


def test_make(policy):
    completions = make(TransformersEngine(batch=3))(policy, requests(5), Sampling(max_tokens=4), seed=0)
    assert len(completions) == 5
    with pytest.raises(RollwayError, match="vllm"):
        make(VllmEngine())
