"""Policies, reward models, discriminators, figures in JSON, and the catalogue, each by itself."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rollway.store import provenance
from rollway.store.catalog import DATABASE

if TYPE_CHECKING:
    from rollway.verification.verify import Outcome


def policy(path: Path, stage: str, kept: set[Path] | None, outcome: Outcome) -> None:
    """policy.json and the files that it names. kept: folders that `keep` protects: pruned weights of others are no
    fault; None: unknown."""
    from rollway.policies import manifest

    outcome.files += 1

    def look() -> Iterator[str]:
        found = manifest.read_manifest(path)
        if any(p.folder is not None for p in found.policies.values()) and not (path.parent / "weights").exists():
            yield from _pruned(path, kept, outcome)
            return
        # A prune that was killed may have taken the state alone.
        without = bool(found.state) and not (path.parent / "state").exists() and _may_be_pruned(path, kept)
        if without:
            outcome.skip("policies without state (pruned)")
        manifest.verify(path, state=not without)

    outcome.check(path, stage, look)


def reward_model(path: Path, stage: str, kept: set[Path] | None, outcome: Outcome) -> None:
    """reward_model.json and its weights."""
    from rollway.policies import reward_model as models

    outcome.files += 1

    def look() -> Iterator[str]:
        if parsed_whole(path) and not (path.parent / models.WEIGHTS).exists():
            yield from _pruned(path, kept, outcome)
        else:
            models.read_manifest(path)

    outcome.check(path, stage, look)


def _pruned(path: Path, kept: set[Path] | None, outcome: Outcome) -> Iterator[str]:
    if not _may_be_pruned(path, kept):
        yield "its weights are gone, and they are none that `keep` lets go"
    else:
        outcome.skip("policies without weights (pruned)")


def _may_be_pruned(path: Path, kept: set[Path] | None) -> bool:
    return kept is None or path.parent not in kept


def others(results: Path, outcome: Outcome) -> None:
    """What belongs to no run: reward models, figures of warm-ups, the catalogue."""
    for path in sorted(results.glob("reward_models/*/reward_model.json")):
        reward_model(path, "reward_model", {path.parent}, outcome)
    for folder in sorted(results.glob("reward_models/*")):
        if folder.is_dir() and not (folder / "reward_model.json").exists():
            outcome.check(folder / "reward_model.json", "reward_model", iter, ["missing"])
    for pattern, stage in (("reward_models/*/metrics.json", "reward_model"), ("warmups/*/metrics.json", "warmup")):
        for path in sorted(results.glob(pattern)):
            outcome.files += 1
            outcome.check(path, stage, figures, path)
    for path in sorted(results.glob("*/tracked.json")):
        outcome.files += 1
        outcome.check(path, "track", parsed, path)
    if (path := results / DATABASE).exists():
        outcome.files += 1
        outcome.check(path, "catalog", _catalogue, path)


def _catalogue(path: Path) -> Iterator[str]:
    """Its views point at files by their old place where the folder was moved: only that it is a catalogue counts."""
    import duckdb

    try:
        with duckdb.connect(str(path), read_only=True) as connection:
            views = {
                name
                for (name,) in connection.execute("SELECT view_name FROM duckdb_views() WHERE NOT internal").fetchall()
            }
    except duckdb.Error as error:
        if "lock" in str(error):
            return  # somebody works with it
        yield f"is no DuckDB database that can be opened ({str(error).splitlines()[0]})"
        return
    if lacking := sorted({"rollouts", "scores", "batch", "evals", "metrics"} - views):
        yield f"lacks the views {', '.join(lacking)}"


def figures(path: Path) -> Iterator[str]:
    """Of a metrics file."""
    told = json.loads(path.read_text(encoding="utf-8"))
    rows = [(row["name"], row["value"]) for row in told["metrics"]]
    if not all(isinstance(name, str) for name, _ in rows):
        yield "damaged: the name of a figure is no text"
        return
    odd = [name for name, value in rows if value is not None and not math.isfinite(value)]
    if not provenance.is_account(told.get("inputs", {})):
        yield "damaged: what it says that it was made from (`inputs`) is no digests by role"
    if odd:
        yield f"figures that are not finite ({', '.join(odd[:3])})"


def parsed(path: Path) -> Iterator[str]:
    """Of any JSON file."""
    if not parsed_whole(path):
        yield "damaged: no JSON mapping"


def parsed_whole(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except (OSError, ValueError, RecursionError):
        return False
