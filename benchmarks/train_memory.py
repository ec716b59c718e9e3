"""Peak memory of a forward and backward pass with a vocabulary of 151,936: rollway's log-probs and a plain log_softmax.

    python benchmarks/train_memory.py [--tokens N] [--repeats N] [--threads N] [--device cuda] [--record]

A Qwen3 of two layers and hidden size 64 in float32 (20 M parameters, nearly all in the two embeddings), 4,096 tokens in
rows of 1,024. Each side runs in a process of its own and differentiates the mean log-prob of the tokens. Peak: the
resident set of the whole process, Python and libraries included; on a GPU what torch had allocated. The plain side is
what most trainers do: logits of a pass's tokens in float32, log_softmax, gather. On the CPU the trainer takes passes
of 2,048 tokens, and so does the plain side; in a second case it takes all tokens at once.
"""

import argparse
import json
import resource
import sys
from collections.abc import Callable

import harness
import numpy as np

VOCABULARY, HIDDEN, LAYERS, ROW = 151_936, 64, 2, 1024
PASS = 2048
"""Tokens of a pass on the CPU, as the trainer's; the plain side does not import it."""


def main() -> int:
    parser = harness.parser(__doc__, repeats=3)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--side", choices=("ours", "plain", "at once"), help=argparse.SUPPRESS)
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

    peers = {"plain": "log_softmax over [T, V]", "at once": "log_softmax over [T, V], all tokens in one pass"}
    if options.device == "cuda":
        del peers["at once"]  # There the trainer too takes all of them at once.
    results = [
        harness.race(
            "train_memory",
            f"forward and backward, {options.tokens} tokens, vocabulary {VOCABULARY}",
            peak("ours"),
            peak(side),
            peer_name=name,
            bar=harness.at_most(0.35),
            repeats=options.repeats,
            warmup=0,
            unit="MiB",
            note="whole process" if options.device == "cpu" else "allocated by torch",
        )
        for side, name in peers.items()
    ]
    if max(losses.values()) - min(losses.values()) > 1e-4 * abs(losses["ours"]):
        raise SystemExit(f"the sides differ: {losses}")
    return harness.finish(results, options)


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
    at_once = len(rows) if options.side == "at once" or options.device == "cuda" else PASS // ROW
    loss = (ours if options.side == "ours" else plain)(model, rows, at_once)
    if options.device == "cuda":
        return {"loss": loss, "peak": float(torch.cuda.max_memory_allocated())}
    return {"loss": loss, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0}


def ours(model, ids: np.ndarray, rows_of_a_pass: int) -> float:
    """As the trainer does it: micro-batches, of `rows_of_a_pass` rows, each differentiated before the next."""
    from rollway.policies.layout import Layout
    from rollway.policies.logprobs import Row, forward_logprobs, micro_batches

    rows = [Row(row[:1], row[1:]) for row in ids]
    layout, total = Layout.of(model, ids.size), 0.0
    batches = micro_batches(rows, layout)
    if max(map(len, batches)) != min(rows_of_a_pass, len(rows)):
        raise SystemExit(f"the trainer's passes have {max(map(len, batches))} rows, the peer's {rows_of_a_pass}")
    for micro in batches:
        part = [rows[n] for n in micro]
        loss = -forward_logprobs(model, part, temperature=1.0, packed=layout.packed).logp.sum() / ids.size
        loss.backward()
        total += float(loss.detach())
    return total


def plain(model, ids: np.ndarray, rows_of_a_pass: int) -> float:
    """`rows_of_a_pass` rows at once; they are of one length, so there is no padding."""
    import torch

    total = 0.0
    for start in range(0, len(ids), rows_of_a_pass):
        tokens = torch.from_numpy(ids[start : start + rows_of_a_pass]).to(model.device)
        logp = model(input_ids=tokens, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        loss = -logp.gather(2, tokens[:, 1:, None]).sum() / ids.size
        del logp
        loss.backward()
        total += float(loss.detach())
        del loss
    return total


if __name__ == "__main__":
    sys.exit(main())
