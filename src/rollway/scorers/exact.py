"""1 if the completion equals the reference answer, else 0."""

from rollway.config.scorers import ExactScorer
from rollway.scorers.rows import Row, Verdict, each
from rollway.tasks.extract import extractor


def verdicts(config: ExactScorer, rows: list[Row]) -> list[Verdict]:
    extract = extractor(config.extract)

    def judge(row: Row) -> Verdict:
        if row.answer is None:
            return Verdict.failed("the prompt has no answer")
        given = extract(row.completion)
        right = given is not None and _plain(config, given) == _plain(config, row.answer)
        return Verdict(float(right))

    return each(rows, judge, lambda row: (row.answer, row.completion))


def read(config: ExactScorer, completion: str) -> str | None:
    """The answer as compared: extracted, stripped, lower case, as configured."""
    given = extractor(config.extract)(completion)
    return None if given is None else _plain(config, given)


def _plain(config: ExactScorer, text: str) -> str:
    text = text.strip() if config.strip else text
    return text.casefold() if config.ignore_case else text
