"""What every job would do first, done once by the warm worker: lazy imports, tables that libraries build when first
asked, parsed SQL. Each part works on data of its own in a temporary folder, in one thread, and on the CPU.

Nothing here may start a backward pass: autograd's threads do not survive a fork, and PyTorch refuses to go on. Nor
may anything multiply matrices: MKL keeps lists of buffers by thread, and a child that inherits one may search it for
ever (`mm_account_ptr_by_tid`, seen twice in a full run of the tests).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

LETTERS = "ab"
PROMPT = {
    "prompt_id": "p",
    "task": "rehearsal",
    "split": "train",
    "messages": '[{"role": "user", "content": "ab"}]',
    "answer": "a",
    "meta": "{}",
}
ROLLOUT = {
    **{"round": 0, "pass": 0, "policy": "x", "policy_round": 0, "group_id": "g", "prompt_id": "p", "source": "policy"},
    **{"finish": "stop", "length": 1, "engine": "transformers", "sampling": "{}", "prompt_tokens": [1, 2]},
    **{"tokens": [1], "logprobs": [-1.0], "train_mask": [True]},
    "segments": [{"start": 0, "end": 1, "author": "policy", "turn": 0}],
}


def curation() -> None:
    """Rollouts scored, and curated by GRPO's SQL. Nothing is read from Parquet: that would start Arrow's threads."""
    import pyarrow as pa

    from rollway import curation, scorers
    from rollway.config import load_recipe
    from rollway.config.scorers import ExactScorer
    from rollway.curation.group_sql import group_sql
    from rollway.store import parquet
    from rollway.store.tables import PROMPTS, ROLLOUTS

    recipe = load_recipe("grpo")
    prompts = pa.Table.from_pylist([PROMPT], schema=PROMPTS.schema())
    sampled = [ROLLOUT | {"rollout_id": text, "sample": n, "text": text} for n, text in enumerate(LETTERS)]
    rollouts = pa.Table.from_pylist(sampled, schema=ROLLOUTS.schema())
    with tempfile.TemporaryDirectory(prefix="rollway-rehearsal-") as name:
        folder = Path(name)
        parquet.write(folder / "rollouts.parquet", rollouts, "rollouts")
        rows = scorers.join(rollouts, prompts)
        scores = scorers.score("exact", ExactScorer(), rows, needs={}, threads=1, root=folder)
        scored = rollouts.select(["rollout_id", "group_id", "sample"]).append_column("reward", scores.column("reward"))
        parquet.write(folder / "batch.parquet", curation.curate(scored, recipe.curate), "batch")
    for step in curation.plan(recipe.curate):
        group_sql(step.file)


PARTS: dict[str, Callable[[], None]] = {"curation": curation}
