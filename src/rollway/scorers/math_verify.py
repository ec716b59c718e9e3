"""Mathematical equality by `math_verify`: string check first, then child processes that a hang cannot outlive."""

from dataclasses import dataclass

from rollway.config.scorers import MathVerifyScorer
from rollway.scorers.limited import ask_all
from rollway.scorers.rows import Row, Verdict
from rollway.tasks.extract import SECONDS, Extractor, boxed, extractor

_WORKER = "rollway.scorers.math_verify_worker"


@dataclass(frozen=True)
class Question:
    """Is the completion's final answer equal to the reference?"""

    answer: str
    completion: str


def verdicts(config: MathVerifyScorer, rows: list[Row], threads: int) -> list[Verdict]:
    """1 if equal, else 0. Each (answer, completion) is judged once; the order of rows is kept.

    A comparison that exceeds `timeout` seconds of processor time, or the worker's memory, is wrong (component
    `timeout`, `memory`): a policy can write expressions that nobody can simplify, and that must not stop a run.
    """
    extract = extractor(config.extract)
    known: dict[Question, Verdict] = {}
    hard: list[Question] = []
    questions = [_question(config, row, extract) for row in rows]
    for question in dict.fromkeys(q for q in questions if isinstance(q, Question)):
        if not question.completion.strip():
            known[question] = Verdict(0.0)
        elif _same_text(question):
            known[question] = Verdict(1.0)
        else:
            hard.append(question)
    said = ask_all(_WORKER, [(q.answer, q.completion) for q in hard], config.processes or threads, config.timeout)
    known.update(zip(hard, said, strict=True))
    return [known[q] if isinstance(q, Question) else q for q in questions]


def _question(config: MathVerifyScorer, row: Row, extract: Extractor) -> Question | Verdict:
    """What has to be compared, or the verdict where nothing has."""
    if row.answer is None:
        return Verdict.failed("the prompt has no answer")
    try:
        given = extract(row.completion)
    except TimeoutError:
        return Verdict.failed(f"extract {config.extract} takes longer than {SECONDS:g} s on this text")
    if given is None:
        return Verdict(0.0)
    return Question(row.answer, given if config.extract == "none" else f"\\boxed{{{given.strip()}}}")


def _same_text(question: Question) -> bool:
    answer = question.answer.strip()
    if question.completion.strip() == answer:
        return True
    return question.completion.count("\\boxed") == 1 and boxed(question.completion) == answer
