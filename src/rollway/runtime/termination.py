"""SIGTERM to a workflow ends it, at whatever moment it comes."""

import signal
import threading
from types import FrameType


def heed_in_a_thread() -> None:
    """Snakemake's own answer to SIGTERM, given by a thread.

    That answer takes the scheduler's lock. Where the signal meets the main thread while it holds that lock, finishing a
    job, the thread would wait for itself for ever (Snakemake 9.27). Called by the Snakefile's `onstart`, in the main
    thread, when Snakemake's answer is in place.
    """
    answer = signal.getsignal(signal.SIGTERM)
    if not callable(answer) or threading.current_thread() is not threading.main_thread():
        return

    def heed(number: int, frame: FrameType | None) -> None:
        threading.Thread(target=answer, args=(number, frame), daemon=True).start()

    signal.signal(signal.SIGTERM, heed)
