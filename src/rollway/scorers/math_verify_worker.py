"""Child process of the math_verify scorer: reads [answer, completion] lines, writes verdicts as JSON lines."""

import json
import logging
import os
import resource
import signal
import sys

WALL = 10
"""Times the limit on processor time: when a row is ended that waits instead of computing."""
MEMORY = 4 * 2**30
"""Bytes of address space: an expression such as 10**10**10 must not take the machine down."""


def main(timeout: float) -> None:
    """Serves until its input ends. A row that exceeds `timeout` seconds of processor time ends the process by a signal.

    Processor time, so that verdicts do not depend on how busy the machine is.
    """
    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)
    # Replies go to a descriptor of their own, so that nothing a library prints can pass for one.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    # The parsers build their tables at their first use, which the first row should not pay for.
    verify(parse("$\\frac{1}{2}$", parsing_timeout=None), parse("0.5", parsing_timeout=None), timeout_seconds=None)
    for line in sys.stdin:
        answer, completion = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, timeout)
        signal.setitimer(signal.ITIMER_REAL, WALL * timeout)
        try:
            # The library's own limits raise inside SymPy, which may swallow them, and take SIGALRM for themselves.
            gold = parse(_as_latex(answer), parsing_timeout=None)
            if gold:
                given = parse(completion, parsing_timeout=None)
                reply = {"reward": float(verify(gold, given, timeout_seconds=None)), "components": {}, "error": None}
            else:
                reply = _failed(f"the reference answer {answer[:80]!r} is not mathematics")
        except MemoryError:
            reply = {"reward": 0.0, "components": {"memory": 1.0}, "error": None}
        except Exception as error:
            reply = _failed(f"{type(error).__name__}: {error}"[:300])
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _as_latex(answer: str) -> str:
    return answer if "$" in answer or "\\boxed" in answer else f"${answer}$"


def _failed(error: str) -> dict[str, object]:
    return {"reward": 0.0, "components": {}, "error": error}


if __name__ == "__main__":
    main(float(sys.argv[1]))
