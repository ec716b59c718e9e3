"""Scorers: what judges a rollout. One module per family."""

from rollway.scorers.rows import Row, Verdict, join
from rollway.scorers.run import read_answer, score

__all__ = ["Row", "Verdict", "join", "read_answer", "score"]
