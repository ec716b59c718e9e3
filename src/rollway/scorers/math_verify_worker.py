"""Child process of the math_verify scorer: is a completion's answer equal to the reference?"""

import sys

from rollway.scorers.limited_worker import serve
from rollway.scorers.rows import Verdict


def main(timeout: float) -> None:
    """Serves [answer, completion] until its input ends."""
    from math_verify import parse, verify

    def judge(question: tuple[str, str]) -> Verdict:
        answer, completion = question
        # The library's own limits raise inside SymPy, which may swallow them, and take SIGALRM for themselves.
        gold = parse(_as_latex(answer), parsing_timeout=None)
        if not gold:
            return Verdict.failed(f"the reference answer {answer[:80]!r} is not mathematics")
        given = parse(completion, parsing_timeout=None)
        return Verdict(float(verify(gold, given, timeout_seconds=None)))

    serve(judge, timeout, first=("$\\frac{1}{2}$", "0.5"))


def _as_latex(answer: str) -> str:
    return answer if "$" in answer or "\\boxed" in answer else f"${answer}$"


if __name__ == "__main__":
    main(float(sys.argv[1]))
