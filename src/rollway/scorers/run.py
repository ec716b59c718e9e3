"""Runs one scorer over rows: dispatch by kind, the limit on errors, the scores table."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from rollway.config.scorers import (
    ExactScorer,
    FormatScorer,
    JudgeScorer,
    LengthScorer,
    MathVerifyScorer,
    ProgramScorer,
    PythonScorer,
    ReasoningGymScorer,
    RewardModelScorer,
    Scorer,
    TeacherScorer,
)
from rollway.errors import RollwayError
from rollway.scorers import exact, judge, length, math_verify, pattern, program, python, reasoning_gym, reward_model
from rollway.scorers.rows import Row, Verdict, tell
from rollway.store.parquet import conform
from rollway.tasks.extract import boxed, extractor, last_number

Needs = dict[str, dict[str, float]]
AT_ONCE = (ExactScorer, ReasoningGymScorer, LengthScorer, FormatScorer)
"""Scorers that are done in a moment; the others tell the stage's bar of every row or batch."""


def score(
    name: str,
    config: Scorer,
    rows: list[Row],
    *,
    needs: Needs,
    threads: int,
    root: Path,
    cache: Path | None = None,
    trained: Path | None = None,
) -> pa.Table:
    """One row per rollout, in order, in the `scores` schema.

    `needs` holds the rewards of the scorers that this one reads (scorer -> rollout_id -> reward), `root` is where
    relative paths start, `cache` the folder in which a judge keeps its verdicts (None: nowhere), `trained` the
    reward_model.json of a scorer that names a model trained here.
    Raises RollwayError when more than `max_error_share` of the rows fail, naming the first, and when the scorer itself
    is unusable (no such function, model or host).
    """
    missing = [need for need in config.needs if need not in needs]
    if missing:
        raise RollwayError(f"scorer {name}: needs the rewards of {missing}, which were not given")
    read = {need: needs[need] for need in config.needs}
    verdicts = [verdict.checked() for verdict in _verdicts(name, config, rows, read, threads, root, cache, trained)]
    if isinstance(config, AT_ONCE):
        tell(verdicts)
    failed = [(row.rollout_id, v.error) for row, v in zip(rows, verdicts, strict=True) if v.error is not None]
    check_errors(name, config, len(rows), failed)
    columns = {
        "rollout_id": pa.array([row.rollout_id for row in rows], pa.string()),
        "scorer": pa.array([name] * len(rows), pa.string()),
        "reward": pa.array([v.reward for v in verdicts], pa.float64()),
        "components": pa.array([sorted(v.components.items()) for v in verdicts], pa.map_(pa.string(), pa.float64())),
        "error": pa.array([v.error for v in verdicts], pa.string()),
    }
    return conform(pa.table(columns), "scores")


def read_answer(config: Scorer, completion: str) -> str:
    """The answer as the scorer reads it, for majority votes; empty where the completion has none."""
    match config:
        case ExactScorer():
            return exact.read(config, completion) or ""
        case ReasoningGymScorer():
            return (extractor(config.extract)(completion) or "").strip()
        case MathVerifyScorer() if config.extract != "none":
            return (extractor(config.extract)(completion) or "").strip()
        case MathVerifyScorer():
            return boxed(completion) or last_number(completion) or completion.strip()
        case _:
            return completion.strip()


def _verdicts(
    name: str,
    config: Scorer,
    rows: list[Row],
    needs: Needs,
    threads: int,
    root: Path,
    cache: Path | None,
    trained: Path | None,
) -> list[Verdict]:
    match config:
        case ExactScorer():
            return exact.verdicts(config, rows)
        case ReasoningGymScorer():
            return reasoning_gym.verdicts(config, rows)
        case MathVerifyScorer():
            return math_verify.verdicts(config, rows, threads)
        case LengthScorer():
            return length.verdicts(config, rows)
        case FormatScorer():
            return pattern.verdicts(config, rows)
        case PythonScorer():
            return python.verdicts(name, config, rows, needs, root)
        case ProgramScorer():
            return program.verdicts(name, config, rows, threads)
        case RewardModelScorer():
            return reward_model.verdicts(name, config, rows, threads, root, trained)
        case JudgeScorer():
            return judge.verdicts(name, config, rows, needs, cache)
        case TeacherScorer():
            raise RollwayError(f"scorer {name}: a teacher needs the rollouts' token ids: use teacher.score_teacher")


def check_errors(name: str, config: Scorer, rows: int, failed: Sequence[tuple[str, str | None]]) -> None:
    """failed: rollout_id and error. Raises RollwayError when they are more than `max_error_share` of the rows."""
    if len(failed) > config.max_error_share * rows:
        rollout, error = failed[0]
        raise RollwayError(
            f"scorer {name}: failed on {len(failed)} of {rows} rollouts, more than max_error_share "
            f"{config.max_error_share:g} allows; the first, rollout {rollout}: {error}. "
            f"Mend the scorer, or raise score.scorers.{name}.max_error_share (failed rows get reward 0)"
        )
