"""1 if the completion equals the reference answer, else 0."""

from collections.abc import Callable

from rollway.config.scorers import ExactScorer
from rollway.scorers.rows import Row, Verdict, each
from rollway.tasks.extract import extractor


def verdicts(config: ExactScorer, rows: list[Row]) -> list[Verdict]:
    compare = judge(config)
    return each(rows, lambda row: compare((row.answer, row.completion)), lambda row: (row.answer, row.completion))


def judge(config: ExactScorer) -> Callable[[tuple[str | None, str]], Verdict]:
    """Of an answer and a completion."""
    extract = extractor(config.extract)

    def compare(pair: tuple[str | None, str]) -> Verdict:
        answer, completion = pair
        if answer is None:
            return Verdict.failed("the prompt has no answer")
        given = extract(completion)
        # Nothing is no answer, whatever the reference is.
        right = given is not None and given.strip() != "" and _plain(config, given) == _plain(config, answer)
        return Verdict(float(right))

    return compare


def read(config: ExactScorer, completion: str) -> str | None:
    """The answer as compared: extracted, stripped, lower case, as configured."""
    given = extractor(config.extract)(completion)
    return None if given is None else _plain(config, given)


def _plain(config: ExactScorer, text: str) -> str:
    text = text.strip() if config.strip else text
    return text.casefold() if config.ignore_case else text
