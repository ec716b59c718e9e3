"""Where a method of on-policy distillation stands on the three axes of its survey (arXiv 2604.00626, version 1)."""

from typing import Literal

from rollway.config.base import Strict


class Axes(Strict):
    """What a distillation method learns from, of whom, and how finely; it changes nothing that is computed."""

    feedback: Literal["logit", "outcome", "self_play"]
    """logit: a teacher's log-probs; outcome: a verdict on the whole rollout; self_play: the policy's older rounds."""
    access: Literal["white_box", "black_box", "teacher_free"]
    """white_box: another model's log-probs are seen; black_box: only its text or its verdict; teacher_free: there is no
    other model."""
    granularity: Literal["token", "sequence", "hybrid"]
    """What the signal is said of: each token, the whole rollout, or both."""
