"""1 if the completion matches a regular expression, else 0."""

import regex

from rollway.config.scorers import FormatScorer
from rollway.scorers.rows import Row, Verdict, each
from rollway.tasks.extract import SECONDS


def verdicts(config: FormatScorer, rows: list[Row]) -> list[Verdict]:
    """A pattern that backtracks for longer than SECONDS on a row is that row's error."""
    compiled = regex.compile(config.pattern)
    match = compiled.fullmatch if config.full else compiled.search

    def judge(row: Row) -> Verdict:
        try:
            return Verdict(float(match(row.completion, timeout=SECONDS) is not None))
        except TimeoutError:
            return Verdict.failed(f"the pattern takes longer than {SECONDS:g} s on this text; make it backtrack less")

    return each(rows, judge, lambda row: row.completion)
