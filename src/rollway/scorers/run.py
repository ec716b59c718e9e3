"""Runs one scorer over rows: dispatch by kind, the limit on errors, the scores table."""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from rollway.config.scorers import (
    DiscriminatorScorer,
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
from rollway.runtime.notice import notice
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
    Raises ScorerFailed when more than `max_error_share` of the rows fail, naming the first, and RollwayError when the
    scorer itself is unusable (no such function, model or host).
    """
    missing = [need for need in config.needs if need not in needs]
    if missing:
        raise RollwayError(f"scorer {name}: needs the rewards of {missing}, which were not given")
    read = {need: needs[need] for need in config.needs}
    said = _verdicts(name, config, rows, read, threads, root, cache, trained)
    judged = [(row, verdict.checked()) for row, verdict in zip(rows, said, strict=True) if verdict is not None]
    if isinstance(config, PythonScorer | JudgeScorer) and config.recheck > 0.0 and len(judged) == len(rows):
        # Past the cache, which would give the judge's first verdict again.
        judged = twice(
            judged, config.recheck, lambda some: _verdicts(name, config, some, read, threads, root, None, None)
        )
    if isinstance(config, AT_ONCE):
        tell([verdict for _, verdict in judged])
    if isinstance(config, PythonScorer | JudgeScorer | ProgramScorer) and config.recheck > 0.0:
        _tell_of_unstable(name, [verdict for _, verdict in judged])
    failed = [(row.rollout_id, verdict.error) for row, verdict in judged if verdict.error is not None]
    table = _table(name, config, judged)
    check_errors(name, config, len(rows), failed, table)
    return table


def _table(name: str, config: Scorer, judged: list[tuple[Row, Verdict]]) -> pa.Table:
    verdicts = [verdict for _, verdict in judged]
    columns = {
        "rollout_id": pa.array([row.rollout_id for row, _ in judged], pa.string()),
        "scorer": pa.array([name] * len(judged), pa.string()),
        "reward": pa.array([v.reward for v in verdicts], pa.float64()),
        "components": pa.array([sorted(v.components.items()) for v in verdicts], pa.map_(pa.string(), pa.float64())),
        "error": pa.array([v.error for v in verdicts], pa.string()),
    }
    if isinstance(config, PythonScorer) and config.feedback:
        columns["feedback"] = pa.array([v.feedback for v in verdicts], pa.string())
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
) -> Sequence[Verdict | None]:
    """None: not asked any more, because too many rows had failed."""
    match config:
        case ExactScorer():
            return exact.verdicts(config, rows)
        case ReasoningGymScorer():
            return reasoning_gym.verdicts(config, rows, threads)
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
        case DiscriminatorScorer():
            # Its outputs as they are: what they are compared with is the group, and every round has another model.
            reader = RewardModelScorer(trained=name, normalise=False, batch=config.batch)
            return reward_model.verdicts(name, reader, rows, threads, root, trained)
        case JudgeScorer():
            return judge.verdicts(name, config, rows, needs, cache)
        case TeacherScorer():
            raise RollwayError(f"scorer {name}: a teacher needs the rollouts' token ids: use teacher.score_teacher")


def twice(
    judged: list[tuple[Row, Verdict]], share: float, judge: Callable[[list[Row]], Sequence[Verdict | None]]
) -> list[tuple[Row, Verdict]]:
    """With a share of the rows, drawn by hash, judged a second time: the lower of two different rewards counts.

    Component `unstable` of those judged twice: whether their rewards differ. A row that fails the second time fails.
    """
    drawn = [
        n
        for n, (row, verdict) in enumerate(judged)
        if verdict.error is None and zlib.crc32(row.rollout_id.encode()) < share * 2**32
    ]
    found = list(judged)
    for n, again in zip(drawn, judge([judged[n][0] for n in drawn]), strict=True):
        row, first = judged[n]
        second = None if again is None else again.checked()
        if second is None or second.error is not None:
            error = "not judged" if second is None else second.error
            found[n] = row, Verdict.failed(f"the second time, after a reward of {first.reward:g}: {error}")
            continue
        lower = min(first, second, key=lambda verdict: verdict.reward)
        unstable = float(first.reward != second.reward)
        found[n] = row, replace(lower, components={**lower.components, "unstable": unstable})
    return found


def _tell_of_unstable(name: str, verdicts: Sequence[Verdict]) -> None:
    known = [verdict.components["unstable"] for verdict in verdicts if "unstable" in verdict.components]
    if any(known):
        notice(
            f"scorer {name}: {int(sum(known))} of {len(known)} rollouts judged twice got another reward the second "
            "time, so it is no function of the rollout (component `unstable`); the lower reward counts"
        )


class ScorerFailed(RollwayError):
    """More rows failed than may. `scores`: what was scored until then, in the table's schema."""

    def __init__(self, message: str, scores: pa.Table) -> None:
        super().__init__(message)
        self.scores = scores


def check_errors(
    name: str, config: Scorer, rows: int, failed: Sequence[tuple[str, str | None]], scores: pa.Table
) -> None:
    """failed: rollout_id and error; scores: of the rows that were judged.

    Raises ScorerFailed when the failed ones are more than `max_error_share` of the rows.
    """
    if len(failed) > config.max_error_share * rows:
        rollout, error = failed[0]
        left = rows - scores.num_rows
        raise ScorerFailed(
            f"scorer {name}: failed on {len(failed)} of {rows} rollouts, more than max_error_share "
            f"{config.max_error_share:g} allows"
            + (f" ({left} were not asked any more)" if left else "")
            + f"; the first, rollout {rollout}: {error}. "
            f"Mend the scorer, or raise score.scorers.{name}.max_error_share (failed rows get reward 0)",
            scores,
        )
