"""Text of models in a page, and which colour a run has."""

from collections.abc import Sequence
from typing import Any

from rollway.report import data, svg


def visible(text: Any) -> Any:
    """Escapes HTML and makes control characters visible, so that model output is inert and nothing in it hides."""
    from markupsafe import Markup, escape

    safe = "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in str(text))
    return Markup(escape(safe))


def colours_of(runs: Sequence[data.Run]) -> dict[str, int]:
    """Name -> number of its colour; all seeds of a name share it."""
    return {name: i % svg.COLOURS for i, name in enumerate(dict.fromkeys(run.name for run in runs))}
