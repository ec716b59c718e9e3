"""Stored log-probs of a few rollouts against those that their policy gives now."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rollway.verification.findings import some

TOLERANCE = {"float32": 1e-3}
"""Nats, by the policy's dtype; half precision: 0.1."""


@dataclass
class Recomputed:
    rows: int
    largest: float
    """Largest difference in nats."""
    wrong: list[str] = field(default_factory=list)


def recompute(
    table: pa.Table, policy: Callable[[int], Path], temperature: float, count: int, tolerance: float | None
) -> Recomputed | None:
    """Of `count` of the policy's rollouts, evenly spread over the file. None: nothing to compare, or no weights.

    policy: round -> its policy.json.
    """
    from rollway.policies import causal_lm, manifest
    from rollway.policies.logprobs import Row, token_logprobs

    own = table.filter(pc.equal(table.column("source"), "policy"))
    if not own.num_rows:
        return None
    places = np.unique(np.linspace(0, own.num_rows - 1, min(count, own.num_rows)).astype(int))
    rows = own.take(places).to_pylist()
    file = policy(rows[0]["policy_round"])
    if not file.exists() or not _has_weights(file):
        return None
    loaded = causal_lm.load(file)
    asked = [Row(row["prompt_tokens"], row["tokens"]) for row in rows if row["policy_round"] == rows[0]["policy_round"]]
    found = token_logprobs(loaded.model, asked, temperature=temperature, micro_tokens=4096).logp.cpu().numpy()
    limit = (
        tolerance
        if tolerance is not None
        else TOLERANCE.get(manifest.named(file, manifest.read_manifest(file), "main").dtype, 0.1)
    )
    gaps = {
        row["rollout_id"]: float(np.abs(found[n, : len(row["tokens"])] - np.array(row["logprobs"])).max(initial=0.0))
        for n, row in enumerate(rows[: len(asked)])
    }
    far = {name: gap for name, gap in gaps.items() if not gap <= limit}
    wrong = []
    if far:
        wrong = [f"log-probs differ from the policy's by up to {max(far.values()):.3g} nats ({some(sorted(far))})"]
    return Recomputed(len(asked), max(gaps.values()), wrong)


def _has_weights(file: Path) -> bool:
    from rollway.policies import manifest

    main = manifest.named(file, manifest.read_manifest(file), "main")
    return main.folder is None or (file.parent / main.folder).exists()
