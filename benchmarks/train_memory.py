"""Peak memory of a forward and backward pass with a vocabulary of 151,936: rollway's log-probs and a plain log_softmax.

    python benchmarks/train_memory.py [--tokens N] [--repeats N] [--threads N] [--device cuda] [--record]

A Qwen3 of two layers and hidden size 64 in float32 (20 M parameters, nearly all in the two embeddings), 4,096 tokens in
rows of 1,024. Each side runs in a process of its own and differentiates the mean log-prob of the tokens. Peak: the
resident set of the whole process, Python and libraries included; on a GPU what torch had allocated. The plain side is
what most trainers do: logits of all tokens in float32, log_softmax, gather.
"""

import argparse
import json
import resource
import sys
from collections.abc import Callable

import harness
import numpy as np

VOCABULARY, HIDDEN, LAYERS, ROW = 151_936, 64, 2, 1024


def main() -> int:
    parser = harness.parser(__doc__, repeats=3)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--side", choices=("ours", "plain"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side is not None:
        print(json.dumps(one_side(options)))
        return 0
    losses: dict[str, float] = {}

    def peak(side: str) -> Callable[[], float]:
        def run() -> float:
            words = ["--side", side, "--tokens", str(options.tokens), "--device", options.device]
            found = json.loads(harness.in_child([__file__, *words, "--threads", str(options.threads)]))
            losses[side] = found["loss"]
            return found["peak"] / 2**20

        return run

    result = harness.race(
        "train_memory",
        f"forward and backward, {options.tokens} tokens, vocabulary {VOCABULARY}",
        peak("ours"),
        peak("plain"),
        peer_name="log_softmax over [T, V]",
        bar=harness.at_most(0.35),
        repeats=options.repeats,
        warmup=0,
        unit="MiB",
        note="whole process" if options.device == "cpu" else "allocated by torch",
    )
    if abs(losses["ours"] - losses["plain"]) > 1e-4 * abs(losses["plain"]):
        raise SystemExit(f"the two sides differ: {losses}")
    return harness.finish([result], options)


def one_side(options: argparse.Namespace) -> dict[str, float]:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 3 * HIDDEN, "num_hidden_layers": LAYERS, "head_dim": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = Qwen3Config(
        vocab_size=VOCABULARY, max_position_embeddings=ROW, tie_word_embeddings=False, **sizes, **heads
    )
    model = Qwen3ForCausalLM(config).to(options.device)
    rows = np.random.default_rng(0).integers(0, VOCABULARY, (options.tokens // ROW, ROW))
    loss = (ours if options.side == "ours" else plain)(model, rows)
    if options.device == "cuda":
        return {"loss": loss, "peak": float(torch.cuda.max_memory_allocated())}
    return {"loss": loss, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0}


def ours(model, ids: np.ndarray) -> float:
    """As the trainer does it: micro-batches, each differentiated before the next."""
    from rollway.policies.layout import Layout
    from rollway.policies.logprobs import Row, forward_logprobs, micro_batches

    rows = [Row(row[:1], row[1:]) for row in ids]
    layout, total = Layout.of(model, ids.size), 0.0
    for micro in micro_batches(rows, layout):
        part = [rows[n] for n in micro]
        loss = -forward_logprobs(model, part, temperature=1.0, packed=layout.packed).logp.sum() / ids.size
        loss.backward()
        total += float(loss.detach())
    return total


def plain(model, ids: np.ndarray) -> float:
    """All rows at once; they are of one length, so there is no padding."""
    import torch

    tokens = torch.from_numpy(ids).to(model.device)
    logp = model(input_ids=tokens, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    loss = -logp.gather(2, tokens[:, 1:, None]).sum() / ids.size
    loss.backward()
    return float(loss.detach())


if __name__ == "__main__":
    sys.exit(main())
