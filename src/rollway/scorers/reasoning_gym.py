"""The verifier that comes with a `reasoning_gym` dataset."""

from rollway.config.scorers import ReasoningGymScorer
from rollway.scorers.rows import Row, Verdict, each
from rollway.tasks.extract import extractor
from rollway.tasks.procedural import Verifiers


def verdicts(config: ReasoningGymScorer, rows: list[Row]) -> list[Verdict]:
    """Scores 0 to 1 of the extracted, stripped completion; the verifier itself says what a missing answer is worth."""
    extract = extractor(config.extract)
    verifiers = Verifiers()

    def judge(row: Row) -> Verdict:
        if "entry" not in row.meta:
            return Verdict.failed("the prompt holds no reasoning_gym entry")
        given = extract(row.completion)
        score = verifiers.score(None if given is None else given.strip(), row.meta)
        return Verdict(score if config.partial else float(score >= 1.0))

    return each(rows, judge, lambda row: (row.prompt_id, row.completion))
