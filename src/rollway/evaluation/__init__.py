"""Evaluation statistics: pass@k, maj@k, bootstrap intervals over prompts, paired comparisons."""

from rollway.evaluation.intervals import Difference, Interval, bootstrap_means, holm, interval, paired_difference
from rollway.evaluation.pass_at_k import avg_at_k, maj_at_k, pass_at_k, pass_auc
from rollway.evaluation.summary import prompt_figures, summarise

__all__ = [
    "Difference",
    "Interval",
    "avg_at_k",
    "bootstrap_means",
    "holm",
    "interval",
    "maj_at_k",
    "paired_difference",
    "pass_at_k",
    "pass_auc",
    "prompt_figures",
    "summarise",
]
