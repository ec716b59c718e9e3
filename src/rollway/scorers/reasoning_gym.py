"""The verifier that comes with a `reasoning_gym` dataset."""

from collections.abc import Hashable
from dataclasses import dataclass, replace

from rollway.config.scorers import ReasoningGymScorer
from rollway.scorers.limited import ask_all
from rollway.scorers.rows import Row, Verdict, judged
from rollway.tasks.extract import SECONDS, Extractor, extractor
from rollway.tasks.verifiers import Verifiers, compares_texts

_WORKER = "rollway.scorers.reasoning_gym_worker"


@dataclass(frozen=True)
class Question:
    """What is an answer to a prompt worth?"""

    prompt_id: str
    answer: str | None
    """As extracted; the verifier itself says what a missing one is worth."""


def verdicts(config: ReasoningGymScorer, rows: list[Row], threads: int) -> list[Verdict]:
    """Scores 0 to 1 of the extracted, stripped completions. Each (prompt, answer) is judged once.

    Verifiers that compare texts are asked here, all others in processes with limits (`limited.ask_all`).
    """
    extract = extractor(config.extract)
    verifiers = Verifiers()
    metas = {row.prompt_id: row.meta for row in rows}
    questions = [_question(config, row, extract) for row in rows]
    known: dict[Hashable, Verdict] = {}
    hard: list[Question] = []
    for question in dict.fromkeys(q for q in questions if isinstance(q, Question)):
        if compares_texts(str(metas[question.prompt_id]["dataset"])):
            judged(question, lambda q: Verdict(verifiers.score(q.answer, metas[q.prompt_id])), question, known)
        else:
            hard.append(question)
    asked = [(question.answer, metas[question.prompt_id]) for question in hard]
    known.update(zip(hard, ask_all(_WORKER, asked, config.processes or threads, config.timeout), strict=True))
    return [_paid(config, known[q]) if isinstance(q, Question) else q for q in questions]


def _question(config: ReasoningGymScorer, row: Row, extract: Extractor) -> Question | Verdict:
    """What has to be judged, or the verdict where nothing has."""
    if "entry" not in row.meta:
        return Verdict.failed("the prompt holds no reasoning_gym entry")
    try:
        given = extract(row.completion)
    except TimeoutError:
        return Verdict.failed(f"extract {config.extract} takes longer than {SECONDS:g} s on this text")
    return Question(row.prompt_id, None if given is None else given.strip())


def _paid(config: ReasoningGymScorer, verdict: Verdict) -> Verdict:
    return verdict if config.partial else replace(verdict, reward=float(verdict.reward >= 1.0))
