"""Architectures that the transformers engine decodes, with which cache, and those that it refuses before it samples."""

import pytest
import torch
from transformers import (
    BloomConfig,
    FalconConfig,
    FalconMambaConfig,
    GPTNeoConfig,
    LlamaConfig,
    MambaConfig,
    MptConfig,
    OpenAIGPTConfig,
    Phi3Config,
    PreTrainedModel,
    RwkvConfig,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from policies.architectures import ARCHITECTURES, SIZES, VOCABULARY, tiny_model
from rollway.config.rollouts import Sampling
from rollway.engines import Request
from rollway.engines.decoding_trial import takes_slots
from rollway.engines.kv_cache import SlotCache
from rollway.engines.transformers_engine import generate
from rollway.errors import RollwayError
from rollway.policies.causal_lm import CausalPolicy, context_length
from rollway.policies.logprobs import Row, token_logprobs

V = {"vocab_size": VOCABULARY}
MORE = {
    "mamba": lambda: MambaConfig(**V, hidden_size=16, num_hidden_layers=2, state_size=4, initializer_range=0.3),
    "falcon_mamba": lambda: FalconMambaConfig(**V, hidden_size=16, num_hidden_layers=2, state_size=4),
    "rwkv": lambda: RwkvConfig(**V, hidden_size=16, num_hidden_layers=2, attention_hidden_size=16, context_length=64),
    "gpt_neo": lambda: GPTNeoConfig(
        **V,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
        window_size=8,
        max_position_embeddings=64,
        initializer_range=0.3,
    ),
    "falcon_alibi": lambda: FalconConfig(
        **V, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, alibi=True, new_decoder_architecture=False
    ),
    "bloom": lambda: BloomConfig(**V, hidden_size=16, n_layer=2, n_head=2, initializer_range=0.3),
    "mpt": lambda: MptConfig(**V, d_model=16, n_heads=2, n_layers=2, max_seq_len=64),
    "openai-gpt": lambda: OpenAIGPTConfig(**V, n_embd=16, n_layer=2, n_head=2, n_positions=64),
}


def model_of(name: str) -> PreTrainedModel:
    if name in ARCHITECTURES:
        return tiny_model(name, "eager", torch.float32)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(MORE[name](), attn_implementation="eager").float().eval()


@pytest.mark.parametrize("name", [*ARCHITECTURES, *MORE])
def test_what_is_decoded_has_the_log_probs_of_a_forward_and_the_rest_is_refused(
    name: str, policy: CausalPolicy
) -> None:
    """Prompts of unequal lengths, beyond every window; a model that cannot be decoded gives one sentence."""
    model = model_of(name)
    theirs = CausalPolicy(model, policy.tokenizer, policy.spec)
    prompts = [[(5 * n + 3 * k) % VOCABULARY for k in range(size)] for n, size in enumerate((20, 3, 11, 20))]
    wanted = [Request(f"r{n}", prompt) for n, prompt in enumerate(prompts)]
    if name in REFUSED:
        with pytest.raises(RollwayError, match=f"does not decode {model.config.model_type} token by token"):
            generate(theirs, wanted, Sampling(max_tokens=8), batch=4, seed=0)
        return
    found = generate(theirs, wanted, Sampling(max_tokens=8), batch=4, seed=0)
    for prompt, completion in zip(prompts, found, strict=True):
        row = Row(prompt, completion.tokens)
        with torch.no_grad():
            own = token_logprobs(model, [row], temperature=1.0, micro_tokens=1 << 14).logp[0]
        assert torch.allclose(own, torch.tensor(completion.logprobs), atol=2e-5), name


REFUSED = {"rwkv", "openai-gpt"}
SLOTS = {"qwen3", "llama", "gpt2"}


@pytest.mark.parametrize("name", [*ARCHITECTURES, *sorted(set(MORE) - REFUSED)])
def test_rows_of_different_lengths_share_a_batch_where_that_is_right(name: str) -> None:
    with torch.inference_mode():
        assert takes_slots(model_of(name)) == (name in SLOTS)


def test_memory_that_runs_out_says_nothing_of_the_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    def prefill(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(SlotCache, "prefill", prefill)
    with torch.inference_mode(), pytest.raises(torch.OutOfMemoryError):
        takes_slots(model_of("llama"))


def test_the_window_ends_where_positions_would_depend_on_other_rows() -> None:
    """longrope takes other factors for all rows where one is longer than the original context, dynamic scaling where
    one is longer than the model's."""
    sizes = {k: v for k, v in SIZES.items() if k != "head_dim"} | {"pad_token_id": 0}
    long = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    long |= {"original_max_position_embeddings": 32}
    phi = Phi3Config(**sizes, original_max_position_embeddings=32, rope_parameters=long)
    dynamic = LlamaConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    found = [context_length(AutoModelForCausalLM.from_config(c)) for c in (phi, dynamic, Phi3Config(**sizes))]
    assert found == [32, 64, 64]
