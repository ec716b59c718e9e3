"""What a child process of `limited` does: reads questions as lines of JSON, writes verdicts as lines of JSON."""

import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

from rollway.scorers.rows import Verdict, described

WALL = 10
"""Times the limit on processor time: when a question is ended that waits instead of computing."""
MEMORY = 4 * 2**30
"""Bytes of address space: an expression such as 10**10**10 must not take the machine down."""


def serve(judge: Callable[[Any], Verdict], timeout: float, first: Any) -> None:
    """Until the input ends. A question of more than `timeout` seconds of processor time ends the process by a signal.

    Processor time, so that verdicts do not depend on how busy the machine is. first: asked before the clock runs, as
    libraries build tables at their first use, which no row should pay for.
    """
    logging.disable(logging.CRITICAL)
    # Replies go to a descriptor of their own, so that nothing a library prints can pass for one.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    judge(first)
    for line in sys.stdin:
        question = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, timeout)
        signal.setitimer(signal.ITIMER_REAL, WALL * timeout)
        try:
            verdict = judge(question)
        except MemoryError:
            verdict = Verdict(0.0, {"memory": 1.0})
        except Exception as error:
            verdict = Verdict.failed(described(error))
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        reply = {"reward": verdict.reward, "components": verdict.components, "error": verdict.error}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
