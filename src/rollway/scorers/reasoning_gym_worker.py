"""Child process of the reasoning_gym scorer: what is an answer worth, by the verifier of its dataset?"""

import sys
from typing import Any

from rollway.scorers.limited_worker import serve
from rollway.scorers.rows import Verdict
from rollway.tasks.verifiers import Verifiers


def main(timeout: float) -> None:
    """Serves [answer, meta] until its input ends."""
    verifiers = Verifiers()

    def judge(question: tuple[str | None, dict[str, Any]]) -> Verdict:
        answer, meta = question
        return Verdict(verifiers.score(answer, meta))

    sums = {"dataset": "puzzle24", "params": {}, "entry": {"answer": "24", "metadata": {"numbers": [4, 6, 0, 0]}}}
    serve(judge, timeout, first=("4 * 6 + 0 * 0", sums))


if __name__ == "__main__":
    main(float(sys.argv[1]))
