"""Child process of the python scorer with a limit of time: reads rows, calls the user's function, writes verdicts.

The first line of its input is the settings, each further one a row, all as JSON; each is answered by one line.
"""

import ctypes
import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path

from rollway.errors import RollwayError
from rollway.scorers.python import judge, load

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serves until its input ends, or the process that started it does."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # Rows and replies have descriptors of their own: the function may read and print what it likes.
    rows = os.fdopen(os.dup(0), "r", encoding="utf-8")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    settings = json.loads(rows.readline())
    try:
        function, file = load(settings["name"], settings["function"], Path(settings["root"]))
    except RollwayError as error:
        print(json.dumps({"refused": str(error)}), file=replies, flush=True)
        return
    print(json.dumps({}), file=replies, flush=True)
    for line in rows:
        verdict = judge(function, file, json.loads(line), settings["params"], settings["feedback"])
        print(json.dumps(asdict(verdict)), file=replies, flush=True)


if __name__ == "__main__":
    main()
