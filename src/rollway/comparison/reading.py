"""Evaluations and lengths of many runs, read with one query each; a fork has its parent's rounds too."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path

import duckdb

from rollway.store.lineage import Inherited
from rollway.store.queries import rows as ask

Counts = dict[str, tuple[int, int]]
"""prompt_id -> (samples, right ones)"""

_ROUND = "r[0-9][0-9][0-9][0-9]"


def evaluations(results: Path, lineage: Sequence[Inherited]) -> dict[str, dict[int, Counts]]:
    """Run -> round -> counts of its held-out prompts; of an inherited round a run's own evaluation, if it has one.

    The same rows as the view `by_prompt`, without opening the other tables of the folder. Raises RollwayError where a
    file is damaged.
    """
    files = {(p.parts[-3], int(p.parts[-2][1:])): p for p in sorted(results.glob(f"*/{_ROUND}/evals.parquet"))}
    seen = dict(files)
    for part in lineage:
        if part.stage == "evaluate":
            for round in range(part.first_round, part.last_round + 1):
                if (part.home, round) in files:
                    seen.setdefault((part.run, round), files[part.home, round])
    counted: dict[str, Counts] = {}
    query = """SELECT filename, prompt_id, count(*), count(*) FILTER (correct)
        FROM read_parquet($1, filename = true, hive_partitioning = false) GROUP BY ALL ORDER BY ALL"""
    for file, prompt_id, n, c in _ask(query, list(files.values())):
        counted.setdefault(file, {})[prompt_id] = (n, c)
    found: dict[str, dict[int, Counts]] = {}
    for (run, round), path in sorted(seen.items()):
        if str(path) in counted:
            found.setdefault(run, {})[round] = counted[str(path)]
    return found


def sampled_tokens(
    results: Path, lineage: Sequence[Inherited], rounds: Collection[tuple[str, int]]
) -> dict[tuple[str, int], int]:
    """(run, round) -> tokens that a policy sampled in it, for those of `rounds` whose rollouts are there.

    Rows of source `policy` alone: experts' solutions and stored completions cost a run nothing to generate.
    """
    homes = {key: key[0] for key in rounds}
    for part in lineage:
        if part.stage == "rollout":
            inherited = range(part.first_round, part.last_round + 1)
            homes |= {(part.run, r): part.home for r in inherited if (part.run, r) in homes}
    wanted = {(home, round) for (_, round), home in homes.items()}
    files: dict[tuple[str, int], list[Path]] = {}
    for path in sorted(results.glob(f"*/{_ROUND}/p[0-9]*/rollouts-*.parquet")):
        place = (path.parts[-4], int(path.parts[-3][1:]))
        if place in wanted:
            files.setdefault(place, []).append(path)
    query = """SELECT filename, sum(length)::BIGINT FROM read_parquet($1, filename = true, hive_partitioning = false)
        WHERE source = 'policy' GROUP BY filename"""
    lengths = dict(_ask(query, [path for paths in files.values() for path in paths]))
    spent = {place: sum(int(lengths.get(str(path), 0)) for path in paths) for place, paths in files.items()}
    return {key: spent[home, key[1]] for key, home in homes.items() if (home, key[1]) in spent}


def job_seconds(results: Path, logs: Path, run: str) -> list[float] | None:
    """Wall times of a run's own jobs, evaluation left out; None unless each round that it trained has left its log."""
    own = {path.parent.name for path in (results / run).glob("r[0-9]*/policy.json")}
    usages = sorted((logs / run).glob("r[0-9]*/*.usage.json"))
    trained = {path.parent.name for path in usages if path.name == "train.usage.json"}
    if not trained or own - trained:
        return None
    counted = [path for path in usages if not path.name.startswith("evaluate")]
    return [float(json.loads(path.read_text(encoding="utf-8"))["seconds"]) for path in counted]


def _ask(query: str, files: list[Path]) -> list[tuple]:
    if not files:
        return []
    with duckdb.connect() as connection:
        return ask(connection, query, [str(path) for path in files])
