"""What a stored teacher costs with a vocabulary of 151,936: bytes per token in the score file, peak memory, seconds.

    python benchmarks/teacher_columns.py [--tokens N] [--k 0 16 100] [--threads N]

A Qwen3 of two layers and hidden size 64 in float32 whose output layer is scaled until its entropy is about 4 nats, a
high one for a language model; tokens are drawn evenly, 4,096 in rows of 512. Each K runs in a process of its own: the
scorer's own pass and writer. Peak: the resident set of the whole process over that of one with the model loaded and
nothing done. The plain side takes log_softmax of all tokens' logits and topk.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import harness

VOCABULARY, HIDDEN, LAYERS, ROW, PASS = 151_936, 64, 2, 512, 2048
SCALE = 1780.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--k", type=int, nargs="+", default=[0, 16, 100])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side is not None:
        print(json.dumps(one_side(options)))
        return 0
    found = {}
    for side in ("idle", *(f"ours {k}" for k in options.k), "plain 100"):
        words = ["--side", side, "--tokens", str(options.tokens), "--threads", str(options.threads)]
        found[side] = json.loads(harness.in_child([__file__, *words]))
    print(f"{options.tokens} tokens, entropy {found['ours ' + str(options.k[0])]['entropy']:.2f} nats")
    print("| side | peak over idle, MB | seconds | bytes per token as written, raw | on disk |")
    print("|---|---|---|---|---|")
    for side, values in list(found.items())[1:]:
        peak = (values["peak"] - found["idle"]["peak"]) / 1e6
        size = "" if "disk" not in values else f"{values['raw']:.0f} | {values['disk']:.1f}"
        print(f"| {side} | {peak:.0f} | {values['seconds']:.1f} | {size} |")
    return 0


def one_side(options: argparse.Namespace) -> dict[str, float]:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=False,
    )
    model = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(SCALE / HIDDEN)
    rows = torch.randint(0, VOCABULARY, (options.tokens // ROW, ROW + 1), generator=torch.Generator().manual_seed(1))
    side, _, k = options.side.partition(" ")
    start, found = time.perf_counter(), {}
    match side:
        case "ours":
            found = ours(model, rows.tolist(), int(k))
        case "plain":
            with torch.no_grad():
                logits = model(rows[:, :-1]).logits.float()
                logp = logits.log_softmax(-1)
                found = {"checksum": float(logp.topk(int(k)).values.sum() + (logp.exp() * logp).sum())}
    found["seconds"] = time.perf_counter() - start
    kilobytes = 1 if sys.platform == "darwin" else 1024
    return {**found, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobytes}


def ours(model: object, rows: list[list[int]], k: int) -> dict[str, float]:
    """The scorer's pass and writer on rows whose prompt is one token."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from rollway.config.scorers import TeacherScorer
    from rollway.policies.layout import Layout
    from rollway.policies.logprobs import Row, micro_batches
    from rollway.policies.top_k import row_top_k
    from rollway.scorers.rows import Verdict
    from rollway.scorers.teacher import Said, columns, table
    from rollway.store import parquet
    from rollway.store.tables import TABLES

    config = TeacherScorer.model_validate({"model": {"kind": "policy"}, "top_k": k})
    sequences = [Row(row[:1], row[1:]) for row in rows]
    layout, said = Layout.of(model, PASS), {}
    for batch in micro_batches(sequences, layout):
        for i, top in zip(batch, row_top_k(model, [sequences[i] for i in batch], k), strict=True):
            said[i] = Said(Verdict(0.0), [], top)
    ids = pa.chunked_array([[f"{n:012d}" for n in range(len(rows))]])
    made = table("t", config, ids, [said[n] for n in range(len(rows))])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scores.parquet"
        parquet.write_groups(path, iter([made]), "scores", columns(config))
        meta = pq.ParquetFile(path).metadata
        chunks = [meta.row_group(g).column(n) for g in range(meta.num_row_groups) for n in range(meta.num_columns)]
        disk = sum(c.total_compressed_size for c in chunks if c.path_in_schema.startswith("teacher_"))
    assert made.num_columns == len(TABLES["scores"].names()) + len(columns(config))
    tokens = sum(len(row) - 1 for row in rows)
    entropy = sum(float(s.found.entropy.sum()) for s in said.values() if s.found) / tokens
    return {"disk": disk / tokens, "raw": 4.0 * (2 + 2 * k), "entropy": entropy}


if __name__ == "__main__":
    sys.exit(main())
