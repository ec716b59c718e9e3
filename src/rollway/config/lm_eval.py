"""lm-eval on the exported policy: an evaluation beside rollway's own, and only where a run asks for it."""

from pydantic import Field, NonNegativeInt, PositiveInt

from rollway.config.base import Strict


class LmEvalConfig(Strict):
    """Runs EleutherAI's `lm_eval` on the policy, as a plain Hugging Face model."""

    tasks: list[str] = Field(min_length=1)
    """Names of lm-eval's tasks or groups, or of your own in `include`."""
    include: str | None = None
    """Folder with task files of your own; whatever lies in it counts as input. None: lm-eval's own tasks alone."""
    every: PositiveInt | None = None
    """Rounds between evaluations besides the one at the end; None: the last policy alone."""
    fewshot: NonNegativeInt | None = None
    """Examples before each question (`num_fewshot`); None: as the task says."""
    limit: PositiveInt | None = None
    """Questions per task; None: all. Figures of a limit are no figures of the task."""
    batch: PositiveInt = 8
    """Sequences at once."""
    chat: bool = False
    """Word questions with the tokenizer's chat template (`apply_chat_template`)."""

    def rounds(self, last: int) -> list[int]:
        """Rounds whose policy is evaluated in a run of `last` rounds."""
        return sorted({last, *(range(self.every, last + 1, self.every) if self.every else ())})
