"""A completion with its tokens coloured by one figure each, for a terminal: scales, legend, pieces of text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.text import Text

from rollway.errors import RollwayError
from rollway.printable import printable

MAX_COLOURED = 20_000
"""Tokens that are shown in colour; a longer completion ends with a count of the rest."""
FIGURES = ("logprob", "entropy", "advantage", "ratio")


@dataclass(frozen=True)
class Scale:
    """Bins of one figure: a token at or below `limit` gets the first such style; `label` is for the legend."""

    name: str
    unit: str
    bins: tuple[tuple[float, str, str], ...]

    def style(self, value: float) -> str:
        """What a token of that value looks like; dim where there is no value (NaN)."""
        if math.isnan(value):
            return "dim"
        return next(style for limit, style, _ in self.bins if value <= limit)


SCALES = {
    "logprob": Scale(
        "probability",
        "of the sampled token",
        (
            (math.log(0.05), "black on red", "< 0.05"),
            (math.log(0.2), "black on dark_orange", "< 0.2"),
            (math.log(0.5), "black on yellow", "< 0.5"),
            (math.log(0.9), "black on pale_green1", "< 0.9"),
            (math.inf, "", "more"),
        ),
    ),
    "entropy": Scale(
        "entropy",
        "nats",
        (
            (0.1, "", "< 0.1"),
            (0.5, "black on pale_green1", "< 0.5"),
            (1.0, "black on yellow", "< 1"),
            (2.0, "black on dark_orange", "< 2"),
            (math.inf, "black on red", "more"),
        ),
    ),
    "advantage": Scale(
        "advantage",
        "",
        (
            (-1.0, "black on red", "< -1"),
            (-1e-12, "black on light_coral", "< 0"),
            (1e-12, "", "0"),
            (1.0, "black on pale_turquoise1", "> 0"),
            (math.inf, "black on dodger_blue1", "> 1"),
        ),
    ),
    "ratio": Scale(
        "ratio",
        "of the policy one round on to the one that sampled",
        (
            (0.8, "black on red", "< 0.8"),
            (0.95, "black on light_coral", "< 0.95"),
            (1.05, "", "about 1"),
            (1.2, "black on pale_turquoise1", "< 1.2"),
            (math.inf, "black on dodger_blue1", "more"),
        ),
    ),
}


def values_of(by: str, row: dict[str, Any], batch: Sequence[dict[str, Any]]) -> list[float]:
    """The figure of every token [T]: log-probs and entropies in nats, advantages as the batch has them, NaN for none.

    row: of `rollouts`; batch: its rows in the batch, the first counts. Raises RollwayError where the figure is not
    stored.
    """
    count = len(row["tokens"])
    match by:
        case "logprob":
            found = row["logprobs"]
        case "entropy":
            found = row["entropy"]
            if not found:
                raise RollwayError("show: no entropies are stored of this rollout; run with rollout: {entropy: true}")
        case "advantage":
            entry = next((e for e in batch if e["token_advantage"] or e["advantage"] is not None), None)
            if entry is None:
                raise RollwayError("show: this rollout has no advantage: curation dropped it, or gave it none")
            found = entry["token_advantage"] or [
                entry["advantage"] if trained else math.nan for trained in row["train_mask"]
            ]
        case _:
            raise RollwayError(f"show: {by!r} is none of {', '.join(FIGURES)}")
    padded = [math.nan if value is None else float(value) for value in found[:count]]
    return padded + [math.nan] * (count - len(padded))


def legend(by: str) -> Text:
    scale = SCALES[by]
    text = Text(f"{scale.name}{f' ({scale.unit})' if scale.unit else ''}: ", style="dim")
    for _, style, label in scale.bins:
        text.append(f" {label} ", style=style).append(" ")
    return text


def coloured(by: str, tokens: Sequence[int], values: Sequence[float], tokenizer: Any) -> Text:
    """The completion with its tokens in the colours of their values; control characters are escaped, lines kept."""
    scale, text = SCALES[by], Text()
    for piece, value in zip(pieces(tokenizer, tokens[:MAX_COLOURED]), values[:MAX_COLOURED], strict=True):
        shown = "\n".join(printable(line) for line in piece.split("\n"))
        text.append(shown, style=scale.style(value))
    if len(tokens) > MAX_COLOURED:
        text.append(f"... {len(tokens) - MAX_COLOURED:,} more tokens", style="dim")
    return text


def pieces(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """What each token adds to the text; tokens that end inside a character add nothing, and the last of them all of it.

    A token's text depends on those before it (spaces, bytes of one character), so each is decoded with a short run-up.
    """
    found = []
    start = read = 0
    for end in range(1, len(tokens) + 1):
        before = tokenizer.decode(list(tokens[start:read]), skip_special_tokens=False) if read > start else ""
        with_it = tokenizer.decode(list(tokens[start:end]), skip_special_tokens=False)
        if with_it.endswith("\ufffd") and end < len(tokens) and end - read < 8:
            found.append("")
            continue
        found.append(with_it[len(before) :] if with_it.startswith(before) else with_it)
        start, read = read, end
    return found
