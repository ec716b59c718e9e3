"""One update on rows of skewed length: rollway's trainer and a padded loop around a `transformers` model.

    python benchmarks/train.py [--rows N] [--repeats N] [--threads N] [--device cuda] [--record]

A Qwen3 of 0.8 M parameters in float32; prompts of 16 tokens, completions of 8 to 256, log-uniform. Both sides take one
GRPO step with the same rows: log-probs, loss, gradients, clipping, fused AdamW; ours also takes what it writes down
(entropies, KL, gaps). The loop pads each micro-batch to its longest row, in the rows' order, with as many rows as its
token budget holds. Two cases: the budget is rollway's default `micro_tokens`; it is the one that was fastest for the
loop in a trial. That both take the same step is checked.
"""

import copy
import functools
import sys
import time
from collections.abc import Iterator

import harness
import numpy as np
import torch
from transformers import PreTrainedModel

from rollway.config import load_recipe
from rollway.config.policies import ScratchPolicy
from rollway.policies import causal_lm
from rollway.training.batch import TrainingBatch, TrainingRow
from rollway.training.state import TrainState
from rollway.training.update import update

PROMPT, SHORTEST, LONGEST = 16, 8, 256
BUDGETS = (16384, 8192, 4096, 2048)
"""Tokens of a micro-batch, padding included, that the loop may choose from; the first is rollway's `micro_tokens`."""
LR = 1e-5


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("--rows", type=int, default=256)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = made_model(options.device)
    batch = made_batch(options.rows)
    train = load_recipe("grpo", {"train": {"optimizer": {"lr": LR}}}).train

    def ours(trained: PreTrainedModel) -> None:
        update(trained, None, None, batch, train, TrainState(seed=0))
        synchronise(options.device)

    def loop(trained: PreTrainedModel, budget: int) -> None:
        padded_step(trained, batch, budget)
        synchronise(options.device)

    check(model, ours, loop)
    times = {budget: min(seconds(loop, copy.deepcopy(model), budget) for _ in range(2)) for budget in BUDGETS}
    budget = min(times, key=lambda b: times[b])
    print({b: round(t, 2) for b, t in times.items()}, "s of the loop by budget", file=sys.stderr)
    results = []
    for case, tokens in (("the same token budget", BUDGETS[0]), ("the loop's best token budget", budget)):
        first, second = copy.deepcopy(model), copy.deepcopy(model)
        results.append(
            harness.race(
                "train",
                f"{options.rows} rows of {PROMPT + SHORTEST} to {PROMPT + LONGEST} tokens, {case}",
                functools.partial(ours, first),
                functools.partial(loop, second, tokens),
                peer_name=f"padded transformers loop ({tokens} tokens at once)",
                bar=harness.at_least(1.8, 2.5),
                repeats=options.repeats,
                note=f"{sum(row.length for row in batch.rows)} tokens without padding",
            )
        )
    return harness.finish(results, options)


def made_model(device: str) -> PreTrainedModel:
    model = causal_lm.build(ScratchPolicy(layers=4, context=512), [], seed=0, device=device).model
    return model.requires_grad_(True).eval()


def made_batch(count: int) -> TrainingBatch:
    rng = np.random.default_rng(1)
    lengths = np.exp(rng.uniform(np.log(SHORTEST), np.log(LONGEST + 1), count)).astype(np.int64)
    lengths[0] = LONGEST
    none = np.zeros(0, dtype=np.int64)
    return TrainingBatch([made_row(rng, n, int(length)) for n, length in enumerate(lengths)], none, none)


def made_row(rng: np.random.Generator, n: int, length: int) -> TrainingRow:
    return TrainingRow(
        rollout_id=f"r{n}",
        slot=0,
        prompt_tokens=rng.integers(5, 100, PROMPT).astype(np.int32),
        tokens=rng.integers(5, 100, length).astype(np.int32),
        logprobs=np.full(length, -4.6, dtype=np.float32),
        train_mask=np.ones(length, dtype=np.bool_),
        source="policy",
        advantage=float(rng.normal()),
        token_advantage=None,
        weight=1.0,
        route=None,
        group=n // 8,
        reward=0.0,
        correct=False,
        age=0,
    )


def padded_step(model: PreTrainedModel, batch: TrainingBatch, budget: int) -> None:
    """One GRPO step at ratio 1: the mean over rows of -A times the mean log-prob of their tokens."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)
    for rows in micro_batches(batch.rows, budget):
        width = max(row.length for row in rows)
        ids, mask = np.zeros((len(rows), width), np.int64), np.zeros((len(rows), width), np.float32)
        for n, row in enumerate(rows):
            ids[n, : row.length] = np.concatenate([row.prompt_tokens, row.tokens])
            mask[n, len(row.prompt_tokens) : row.length] = row.advantage / len(row.tokens) / len(batch.rows)
        tokens = torch.from_numpy(ids).to(model.device)
        # Rows are padded on the right: under a causal mask no token sees the padding, and attention needs no mask.
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
        logp = logits.log_softmax(-1).gather(2, tokens[:, 1:, None])[:, :, 0]
        loss = -(logp * torch.from_numpy(mask[:, 1:]).to(model.device)).sum()
        loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def micro_batches(rows: list[TrainingRow], budget: int) -> Iterator[list[TrainingRow]]:
    part: list[TrainingRow] = []
    for row in rows:
        if part and (len(part) + 1) * max(r.length for r in [*part, row]) > budget:
            yield part
            part = []
        part.append(row)
    yield part


def check(model: PreTrainedModel, ours, loop) -> None:
    """Both sides move the weights alike: AdamW's first step is of size lr wherever a gradient is not about 0."""
    mine, theirs = copy.deepcopy(model), copy.deepcopy(model)
    ours(mine)
    loop(theirs, BUDGETS[-1])
    moved = [
        torch.cat([(p - q).detach().flatten() for p, q in zip(m.parameters(), model.parameters(), strict=True)])
        for m in (mine, theirs)
    ]
    agreement = float(torch.nn.functional.cosine_similarity(moved[0], moved[1], dim=0))
    print(f"cosine of the two steps: {agreement:.6f}", file=sys.stderr)
    if agreement < 0.999:
        raise SystemExit("the two sides took different steps")


def seconds(work, *arguments: object) -> float:
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
