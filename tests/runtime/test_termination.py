"""A workflow that is told to end while it holds its own lock ends all the same."""

import subprocess
import sys

import pytest

CODE = """
import os, signal, threading, time
from rollway.runtime import termination

lock, heard = threading.Lock(), threading.Event()

def answer(number, frame):
    with lock:
        heard.set()

signal.signal(signal.SIGTERM, answer)
if {mended}:
    termination.heed_in_a_thread()
with lock:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.2)
assert heard.wait(10)
print("ended")
"""


@pytest.mark.parametrize("mended", [True, False])
def test_a_signal_that_meets_the_lock(mended: bool) -> None:
    """Without the mend it waits for ever: what the test would miss if Python or Snakemake changed."""
    running = subprocess.Popen(
        [sys.executable, "-c", CODE.format(mended=mended)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        output, errors = running.communicate(timeout=20 if mended else 3)
    except subprocess.TimeoutExpired:
        running.kill()
        output, errors = running.communicate()
    assert output.strip() == ("ended" if mended else ""), errors
