"""Stored log-probs and texts of a few rollouts against what their policy makes of the tokens now."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rollway.errors import RollwayError
from rollway.verification.findings import some

TOLERANCE = {"float32": 1e-3}
"""Nats, by the policy's dtype; half precision: 0.1."""
COLUMNS = ("rollout_id", "prompt_tokens", "tokens", "logprobs", "source", "policy", "text")


@dataclass
class Recomputed:
    rows: int = 0
    largest: float = 0.0
    """Largest difference in nats."""
    wrong: dict[Path, list[str]] = field(default_factory=dict)


def sample(tables: Sequence[pa.Table], count: int) -> list[list[dict[str, Any]]]:
    """Of each file about `count` / files of the policy's rollouts, at least one, evenly spread over the file."""
    share = -(-count // len(tables))
    found = []
    for table in tables:
        own = table.filter(pc.equal(table.column("source"), "policy"))
        places = np.linspace(0, own.num_rows - 1, min(share, own.num_rows)).astype(int)
        found.append(own.take(np.unique(places)).to_pylist())
    return found


def recompute(
    files: Sequence[tuple[Path, float, list[dict[str, Any]]]], policy: Path, tolerance: float | None
) -> Recomputed:
    """files: each with its sampling temperature and rows that this policy wrote. Raises RollwayError where the policy
    cannot be loaded."""
    from rollway.policies import causal_lm, manifest
    from rollway.policies.logprobs import Row, token_logprobs

    loaded = causal_lm.load(policy)
    limit = tolerance
    if limit is None:
        limit = TOLERANCE.get(manifest.named(policy, manifest.read_manifest(policy), "main").dtype, 0.1)
    said = Recomputed()
    for file, temperature, rows in files:
        if not rows:
            continue
        asked = [Row(row["prompt_tokens"], row["tokens"]) for row in rows]
        try:
            found = token_logprobs(loaded.model, asked, temperature=temperature, micro_tokens=4096).logp.cpu().numpy()
        except (IndexError, RuntimeError) as error:
            # What is no token of the model ends in its embedding.
            raise RollwayError(f"{file}: the policy cannot read its tokens ({error})") from error
        gaps = {
            row["rollout_id"]: float(
                np.abs(found[n, : len(row["tokens"])] - np.array(row["logprobs"])).max(initial=0.0)
            )
            for n, row in enumerate(rows)
        }
        said.rows += len(rows)
        said.largest = max(said.largest, *gaps.values())
        said.wrong[file] = [*_far(gaps, limit), *_texts(rows, loaded)]
    return said


def _far(gaps: dict[str, float], limit: float) -> Iterator[str]:
    if far := {name: gap for name, gap in gaps.items() if not gap <= limit}:
        yield f"log-probs differ from the policy's by up to {max(far.values()):.3g} nats ({some(sorted(far))})"


def _texts(rows: list[dict[str, Any]], loaded: Any) -> Iterator[str]:
    from rollway.policies import causal_lm

    if other := [row["rollout_id"] for row in rows if causal_lm.decode(loaded, row["tokens"]) != row["text"]]:
        yield f"the text is not what the tokens say ({some(other)})"


def has_weights(file: Path) -> bool:
    """Raises RollwayError where policy.json is damaged."""
    from rollway.policies import manifest

    main = manifest.named(file, manifest.read_manifest(file), "main")
    return main.folder is None or (file.parent / main.folder).exists()
