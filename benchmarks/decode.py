"""Sampling completions: rollway's engine and `transformers.generate`, same model, prompts, threads and batch.

    python benchmarks/decode.py [--rows N] [--repeats N] [--threads N] [--device cuda] [--record]

A Qwen3 of 0.8 M parameters in float32, one token per character; 8 completions of each prompt of 16 tokens, sampled at
temperature 1 without an end token. `equal`: 64 tokens each. `skewed`: 8 to 256 tokens, log-uniform; neither side knows
a row's length before the row has reached it: ours asks its `Stopper`, generate its `StoppingCriteria`. Ours returns
log-probs, which are compared with a full forward; generate returns none, except where the case says so. Of generate's
dynamic and static cache each case takes the one that was faster in a trial.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest import mock

import harness
import numpy as np
import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from rollway.config.policies import ScratchPolicy
from rollway.config.rollouts import Sampling
from rollway.engines import Completion, Request, transformers_engine
from rollway.engines.stopping import Stopper
from rollway.policies import causal_lm
from rollway.policies.logprobs import Row, token_logprobs

PROMPT, GROUP, TOKENS = 16, 8, 64
SHORTEST, LONGEST = 8, 256
TOLERANCE = 1e-4
"""Nats between our log-probs and those of a full forward."""


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("--rows", type=int, default=512, help="completions, all decoded at once")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    policy = endless_policy(options.device)
    requests = made_requests(options.rows, len(policy.tokenizer))
    equal = np.full(options.rows, TOKENS)
    spread = np.exp(np.random.default_rng(1).uniform(np.log(SHORTEST), np.log(LONGEST + 1), options.rows))
    skewed = spread.astype(np.int64)
    skewed[0] = LONGEST
    results = [
        race(policy, requests, equal, f"{options.rows} x {TOKENS} tokens", harness.at_least(1.3, 2.0), options),
        race(
            policy,
            requests,
            equal,
            f"{options.rows} x {TOKENS} tokens, log-probs on both sides",
            harness.at_least(1.3, 2.0),
            options,
            logprobs=True,
        ),
        race(
            policy,
            requests,
            skewed,
            f"{options.rows} x {SHORTEST} to {LONGEST} tokens",
            harness.at_least(2.5, 4.0),
            options,
        ),
    ]
    for lengths in (equal, skewed):
        print(f"decode: {limit(policy, lengths)}")
    return harness.finish(results, options)


def endless_policy(device: str) -> causal_lm.CausalPolicy:
    """A policy whose tokenizer and configuration know no end token."""
    policy = causal_lm.build(ScratchPolicy(layers=4, context=512), [], seed=0, device=device)
    policy.model.eval()
    policy.tokenizer.eos_token = None
    policy.model.generation_config.eos_token_id = None
    policy.model.config.eos_token_id = None
    return policy


def made_requests(rows: int, vocabulary: int) -> list[Request]:
    """`GROUP` requests per prompt of random tokens."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(6, vocabulary, (-(-rows // GROUP), PROMPT)).tolist()
    return [Request(f"r{i}", prompts[i // GROUP]) for i in range(rows)]


def race(
    policy: causal_lm.CausalPolicy,
    requests: Sequence[Request],
    lengths: np.ndarray,
    case: str,
    bar: harness.Bar,
    options: argparse.Namespace,
    *,
    logprobs: bool = False,
) -> harness.Result:
    check(policy, requests, lengths, ours(policy, requests, lengths))

    def peer(cache: str | None) -> Tensor:
        return theirs(policy, requests, lengths, cache, logprobs=logprobs)

    def trial(cache: str | None) -> float:
        peer(cache)
        start = time.perf_counter()
        peer(cache)
        return time.perf_counter() - start

    cache = min((None, "static"), key=trial)
    return harness.race(
        "decode",
        case,
        lambda: discard(ours(policy, requests, lengths)),
        lambda: discard(peer(cache)),
        peer_name=f"transformers.generate{' with log-probs' if logprobs else ''}",
        bar=bar,
        repeats=options.repeats,
        note=f"{lengths.sum():,} tokens; ours returns log-probs; generate with its {cache or 'dynamic'} cache",
    )


def discard(_: object) -> None:
    """So that the wall seconds are the cost."""


def ours(policy: causal_lm.CausalPolicy, requests: Sequence[Request], lengths: np.ndarray) -> list[Completion]:
    class ByLength(Stopper):
        def stops(self, drawn: np.ndarray, history: np.ndarray, rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
            return counts >= lengths[rows]

    sampling = Sampling(max_tokens=int(lengths.max()))
    with mock.patch.object(transformers_engine, "Stopper", ByLength):
        return transformers_engine.generate(policy, requests, sampling, batch=len(requests), seed=0)


class AtLength(StoppingCriteria):
    def __init__(self, lengths: Tensor) -> None:
        self.ends = lengths + PROMPT

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids.shape[1] >= self.ends


def theirs(
    policy: causal_lm.CausalPolicy,
    requests: Sequence[Request],
    lengths: np.ndarray,
    cache: str | None,
    *,
    logprobs: bool,
) -> Tensor:
    """Tokens, or with `logprobs` their log-probabilities, on the CPU."""
    device = policy.model.device
    prompts = torch.tensor([request.prompt_tokens for request in requests], device=device)
    uneven = len(set(lengths.tolist())) > 1
    stop = StoppingCriteriaList([AtLength(torch.from_numpy(lengths).to(device))]) if uneven else None
    with torch.inference_mode():
        output = policy.model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=int(lengths.max()),
            pad_token_id=0,
            stopping_criteria=stop,
            cache_implementation=cache,
            return_dict_in_generate=logprobs,
            output_logits=logprobs,
        )
        if not logprobs:
            return output.cpu()
        logits = torch.stack(output.logits, dim=1)
        return logits.log_softmax(dim=-1).gather(2, output.sequences[:, PROMPT:, None]).squeeze(2).cpu()


def check(
    policy: causal_lm.CausalPolicy,
    requests: Sequence[Request],
    lengths: np.ndarray,
    completions: Sequence[Completion],
) -> None:
    """Exits where a completion is not of its length, or its log-probs are not those of a full forward."""
    rows = [Row(r.prompt_tokens, c.tokens) for r, c in zip(requests, completions, strict=True)]
    full = token_logprobs(policy.model, rows, temperature=1.0, micro_tokens=8192).logp.cpu().numpy()
    if [len(completion.tokens) for completion in completions] != lengths.tolist():
        sys.exit("decode: a completion is not of the length asked for")
    gap = max(float(np.abs(np.array(c.logprobs) - full[i, : len(c.logprobs)]).max()) for i, c in enumerate(completions))
    if not gap <= TOLERANCE:
        sys.exit(f"decode: log-probs differ from a full forward by {gap:.1e}, more than {TOLERANCE}")


def limit(policy: causal_lm.CausalPolicy, lengths: np.ndarray) -> str:
    """What these completions cost at least on this machine: the matrix products of their tokens at the speed that
    their shapes reach (256 rows at once), and reading each row's keys and values once a step, without overlap."""
    config, device = policy.model.config, policy.model.device
    matrices = [w for name, w in policy.model.named_parameters() if w.dim() == 2 and "embed" not in name]
    rows = 256
    with torch.inference_mode():
        products = sum(best(partial(torch.mm, w.new_ones(rows, w.shape[1]), w.t().contiguous())) for w in matrices)
    block = torch.zeros(2**25, device=device)
    reading = best(block.sum) / block.nbytes
    flops = 2 * sum(w.numel() for w in matrices) * lengths.sum()
    # A completion of n tokens takes n - 1 steps; step k looks at the prompt and k tokens.
    contexts = (PROMPT * (lengths - 1) + (lengths - 1) * lengths / 2).sum()
    cache = contexts * config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 4
    seconds = products / rows * lengths.sum(), reading * cache
    return (
        f"limit for {lengths.sum():,} tokens: {flops / 1e9:.1f} GFLOP of products in {seconds[0]:.2f} s"
        f" ({flops / seconds[0] / 1e9:.0f} GFLOP/s), {cache / 1e9:.2f} GB of cache in {seconds[1]:.2f} s"
        f" ({cache / seconds[1] / 1e9:.0f} GB/s): {sum(seconds):.2f} s"
    )


def best(work: Callable[[], Tensor], repeats: int = 30) -> float:
    """Seconds of the fastest of several calls."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work().cpu()
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    sys.exit(main())
