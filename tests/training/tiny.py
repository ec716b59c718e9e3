"""A policy small enough for float64, random batches for it, and the closed forms that the trainer is held against."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from rollway.training.batch import TrainingBatch, TrainingRow

VOCABULARY = 12


def tiny(seed: int = 0, dtype: torch.dtype = torch.float64) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=0.3,
    )
    return Qwen3ForCausalLM(config).to(dtype).eval()


def random_row(rng: np.random.Generator, n: int, **given: object) -> TrainingRow:
    length = int(given.pop("length", rng.integers(1, 7)))
    values: dict[str, object] = {
        "rollout_id": f"r{n}",
        "slot": 0,
        "prompt_tokens": rng.integers(0, VOCABULARY, int(rng.integers(1, 5))).astype(np.int32),
        "tokens": rng.integers(0, VOCABULARY, length).astype(np.int32),
        "logprobs": rng.normal(-2.0, 0.3, length).astype(np.float32),
        "train_mask": np.ones(length, dtype=np.bool_),
        "source": "policy",
        "advantage": float(rng.normal()),
        "token_advantage": None,
        "weight": 1.0,
        "route": None,
        "group": n // 4,
        "reward": float(rng.integers(0, 2)),
        "correct": bool(rng.integers(0, 2)),
        "age": 0,
    }
    return TrainingRow(**{**values, **given})  # type: ignore[arg-type]


def random_batch(count: int, seed: int = 0, pairs: int = 0, **given: object) -> TrainingBatch:
    rng = np.random.default_rng(seed)
    at = np.arange(2 * pairs, dtype=np.int64)
    return TrainingBatch([random_row(rng, n, **given) for n in range(count)], at[::2], at[1::2])


def naive_logp(model: Qwen3ForCausalLM, row: TrainingRow, temperature: float = 1.0) -> Tensor:
    """Log-probs [T] of a row's tokens, one row at a time and from the model's own logits."""
    ids = torch.tensor([[*row.prompt_tokens.tolist(), *row.tokens.tolist()]])
    logits = model(input_ids=ids, use_cache=False).logits[0, len(row.prompt_tokens) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(row.tokens.tolist())[:, None])[:, 0]


def gradients(model: torch.nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def largest_difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return max(float((x - y).detach().abs().max()) for x, y in zip(a, b, strict=True))


def states_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
