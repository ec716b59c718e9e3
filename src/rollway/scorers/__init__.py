"""Scorers: what judges a rollout. One module per family."""

from rollway.scorers.rows import Row, Verdict, join
from rollway.scorers.run import ScorerFailed, read_answer, score
from rollway.scorers.texts import TextScorer, score_texts

__all__ = ["Row", "ScorerFailed", "TextScorer", "Verdict", "join", "read_answer", "score", "score_texts"]
