"""1 if the completion matches a regular expression, else 0."""

from collections.abc import Callable

import regex

from rollway.config.scorers import FormatScorer
from rollway.scorers.rows import Row, Verdict, each
from rollway.tasks.extract import SECONDS


def verdicts(config: FormatScorer, rows: list[Row]) -> list[Verdict]:
    match = judge(config)
    return each(rows, lambda row: match(row.completion), lambda row: row.completion)


def judge(config: FormatScorer) -> Callable[[str], Verdict]:
    """Of a completion; one without anything but white space matches nothing. A pattern that backtracks for longer than
    SECONDS on it is that row's error."""
    compiled = regex.compile(config.pattern)
    match = compiled.fullmatch if config.full else compiled.search

    def found(completion: str) -> Verdict:
        if not completion.strip():
            return Verdict(0.0)
        try:
            return Verdict(float(match(completion, timeout=SECONDS) is not None))
        except TimeoutError:
            return Verdict.failed(f"the pattern takes longer than {SECONDS:g} s on this text; make it backtrack less")

    return found
