"""How often the scorers of a round failed, or said two things of one rollout."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow.compute as pc

from rollway.config.scorers import JudgeScorer, ProgramScorer, PythonScorer, ScoreConfig
from rollway.store import parquet


def fault_shares(scores: Mapping[str, Sequence[Path]], score: ScoreConfig, round: int) -> dict[str, float]:
    """`score_NAME_errors`: share of the round's rows on which a scorer failed that may (`max_error_share`);
    `score_NAME_unstable`: share of the rows judged twice (`recheck`) whose rewards differed.

    scores: files of each scorer, those of replayed rounds among them.
    """
    found: dict[str, float] = {}
    for name, config in score.scorers.items():
        checked = isinstance(config, PythonScorer | JudgeScorer | ProgramScorer) and config.recheck > 0.0
        files = [path for path in scores.get(name, []) if path.parents[2].name == f"r{round:04d}"]
        if not files or not (checked or config.max_error_share > 0.0):
            continue
        table = parquet.read_many(files, ["components", "error"])
        if config.max_error_share > 0.0 and table.num_rows:
            found[f"score_{name}_errors"] = 1.0 - table.column("error").null_count / table.num_rows
        if checked:
            twice = pc.drop_null(pc.map_lookup(table.column("components"), "unstable", "first"))
            if len(twice):
                found[f"score_{name}_unstable"] = pc.mean(twice).as_py()
    return found
