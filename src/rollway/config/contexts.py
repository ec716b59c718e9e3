"""What a teacher reads in place of the policy's prompt: templates, in scoring and in warm-ups that teach their use."""

import re

from pydantic import model_validator

from rollway.config.base import Strict
from rollway.errors import RollwayError
from rollway.template import parse

NAMED = (
    *("prompt", "answer", "completion", "messages", "meta", "task", "scores", "sibling", "reference", "feedback"),
    *("verdict", "rollout_id", "prompt_id", "group_id", "sample", "length", "finish", "tokens"),
)
"""What templates of a context may name."""
COMPLETION = re.compile(r"(?<!\{)\{\s*completion\s*(?:\|\s*first\s+([1-9]\d?)%\s*)?\}(?!\})")
"""In a prefix: the completion's own tokens, or so many of a hundred of them."""
_PLACEHOLDER = re.compile(r"\{\s*([^{}|]*?)\s*(?:\|[^{}]*)?\}")


class TeacherContext(Strict):
    """What the teacher reads before the completion's tokens, in place of what the policy read.

    Templates name fields of the row: prompt (its last message), answer, completion, messages, meta, task, scores;
    `sibling`, the first right completion of the same group that is not this one; `feedback`, what a scorer wrote about
    this rollout; `reference`, a stored completion of the prompt by somebody else (`references`); `verdict`, one of the
    two texts below. `{sibling|without_think}` leaves out what stands between <think> and </think>.
    """

    prompt: str | None = None
    """Template of the last message; None: as the policy read it."""
    prefix: str = ""
    """Template of what stands between prompt and completion, in the assistant's turn. `{completion}` in it stands for
    the completion's own tokens without the end token, `{completion|first 80%}` for the first of them (rounded down)."""
    right: str | None = None
    """`{verdict}` of a right rollout."""
    wrong: str | None = None
    """`{verdict}` of a wrong one."""

    @property
    def templates(self) -> str:
        return f"{self.prompt or ''} {self.prefix}"

    @property
    def needs_others(self) -> bool:
        """Whether it names what not every rollout has."""
        return any(self.names(field) for field in ("sibling", "reference", "feedback"))

    def names(self, field: str) -> bool:
        """Whether a template names the field, or what lies in it."""
        return re.search(rf"(?<!\{{)\{{\s*{field}\b", self.templates) is not None

    @model_validator(mode="after")
    def _names_what_there_is(self) -> "TeacherContext":
        for key, template in (("prompt", self.prompt or ""), ("prefix", self.prefix)):
            for path in _PLACEHOLDER.findall(template.replace("{{", "").replace("}}", "")):
                if path.split(".")[0] not in NAMED:
                    raise ValueError(
                        f"{key}: a row has no field {path!r}; there are {', '.join(NAMED[:11])}. What a task's entries "
                        "hold is in `meta` where tasks.<name>.meta names it"
                    )
        return self

    @model_validator(mode="after")
    def _can_be_parsed(self) -> "TeacherContext":
        for key, template in (("prompt", self.prompt or ""), ("prefix", COMPLETION.sub("", self.prefix))):
            try:
                parse(template)
            except RollwayError as error:
                hint = "; `prefix` alone takes {completion|first 80%}" if "first" in template else ""
                raise ValueError(f"{key}: {error}{hint}") from None
        return self

    @model_validator(mode="after")
    def _says_something(self) -> "TeacherContext":
        if self.prompt is None and not self.prefix:
            raise ValueError(
                "a context gives `prompt`, `prefix` or both; leave `context` out for the policy's own prompt"
            )
        texts = (self.right is not None, self.wrong is not None)
        if self.names("verdict") and not all(texts):
            raise ValueError("`{verdict}` needs its two texts: give `right` and `wrong`")
        if any(texts) and not self.names("verdict"):
            raise ValueError("`right` and `wrong` have no effect without `{verdict}` in a template; remove them")
        return self
