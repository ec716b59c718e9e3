"""Scorers that look at a completion's text or its length alone: row group by row group, no Python object per rollout.

The verdicts are those of `run.score`, whatever the row groups.
"""

from collections.abc import Hashable, Iterable, Sequence

import pyarrow as pa

from rollway.config.scorers import ExactScorer, FormatScorer, LengthScorer
from rollway.scorers import exact, length, pattern
from rollway.scorers.rows import Verdict, asked_of, judged, tell
from rollway.scorers.run import check_errors
from rollway.store.parquet import conform

TextScorer = ExactScorer | FormatScorer | LengthScorer

COLUMNS = ["rollout_id", "prompt_id", "text", "length"]
"""Columns of rollouts that these scorers read."""


def score_texts(name: str, config: TextScorer, parts: Iterable[pa.Table], prompts: pa.Table) -> pa.Table:
    """As `run.score`. parts: COLUMNS of rollouts. prompts: prompt_id and answer.

    Raises RollwayError when a rollout's prompt is not among `prompts`, ScorerFailed when more than `max_error_share`
    fail.
    """
    known: dict[Hashable, Verdict] = {}
    tables: list[pa.Table] = []
    failed: list[tuple[str, str | None]] = []
    for part in parts:
        places = asked_of(part, prompts)
        known.clear()  # Bounds memory: texts of one row group.
        verdicts = [verdict.checked() for verdict in _verdicts(config, part, prompts, places, known)]
        ids = part.column("rollout_id")
        failed += [(ids[n].as_py(), v.error) for n, v in enumerate(verdicts) if v.error is not None]
        tables.append(_table(name, ids, verdicts))
        tell(verdicts)
    none = conform(pa.table({c: [] for c in ("rollout_id", "scorer", "reward", "components")}), "scores")
    scores = pa.concat_tables(tables or [none])
    check_errors(name, config, scores.num_rows, failed, scores)
    return scores


def _verdicts(
    config: TextScorer, part: pa.Table, prompts: pa.Table, places: pa.ChunkedArray, known: dict[Hashable, Verdict]
) -> Sequence[Verdict]:
    match config:
        case ExactScorer():
            answers = prompts.column("answer").take(places).to_pylist()
            pairs = zip(answers, part.column("text").to_pylist(), strict=True)
            judge = exact.judge(config)
            return [judged(pair, judge, pair, known) for pair in pairs]
        case FormatScorer():
            judge_text = pattern.judge(config)
            return [judged(text, judge_text, text, known) for text in part.column("text").to_pylist()]
        case LengthScorer():
            return [
                judged(tokens, lambda n: Verdict(length.overlong(n, config.limit, config.cache)), tokens, known)
                for tokens in part.column("length").to_pylist()
            ]


def _table(name: str, ids: pa.ChunkedArray, verdicts: Sequence[Verdict]) -> pa.Table:
    rows = len(verdicts)
    columns = {
        "rollout_id": ids,
        "scorer": pa.repeat(pa.scalar(name), rows),
        "reward": pa.array([v.reward for v in verdicts], pa.float64()),
        "components": pa.MapArray.from_arrays([0] * (rows + 1), pa.array([], pa.string()), pa.array([], pa.float64())),
        "error": pa.array([v.error for v in verdicts], pa.string()),
    }
    return conform(pa.table(columns), "scores")
