"""Scorers: what judges a rollout. One module per family."""

from rollway.scorers.rows import Row, Verdict, join
from rollway.scorers.run import read_answer, score
from rollway.scorers.texts import TextScorer, score_texts

__all__ = ["Row", "TextScorer", "Verdict", "join", "read_answer", "score", "score_texts"]
