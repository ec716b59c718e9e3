"""Overlong shaping of DAPO (arXiv 2503.14476, eq. 13)."""

from rollway.config.scorers import LengthScorer
from rollway.scorers.rows import Row, Verdict


def verdicts(config: LengthScorer, rows: list[Row]) -> list[Verdict]:
    return [Verdict(overlong(row.length, config.limit, config.cache)) for row in rows]


def overlong(length: int, limit: int, cache: int) -> float:
    """0 up to limit - cache tokens, -1 from limit on, linear between. `length` counts the end token.

    A completion cut at `rollout.sampling.max_tokens` has that length: a limit above max_tokens never yields -1.
    """
    return float(min(0, max(-1, (limit - cache - length) / cache)))
