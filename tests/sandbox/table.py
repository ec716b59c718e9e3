"""docs/hostile.md, from the hostile programs: `python tests/sandbox/table.py > docs/hostile.md`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from sandbox.hostile import GROUPS, Hostile

ENDS = {
    "": "runs to its end, and is wrong",
    "crash": "is gone before its tests are over",
    "output": "stopped at the limit of output",
    "raised": "raises an exception",
    "timeout": "killed at a limit of time",
}
INTRO = """\
# Hostile programs

Made by `make docs` from the programs in [tests/sandbox/hostile](../tests/sandbox/hostile), each of which the tests run
in the sandbox of the [`program` scorer](scorers.md#programs). A program gets a reward of 1 only where its attack works;
all of them get 0, touch nothing outside, and leave no process behind.

`outside`: yes where the tests also run the program without the sandbox (in a plain interpreter, or in one process with
the tests that judge it), and the attack works there. The others would harm the machine that runs them, or are aimed at
the sandbox itself.
"""


def page() -> str:
    lines = [INTRO]
    for title, cases in GROUPS.items():
        lines += [f"## {title}\n", "| program | what it tries | in the sandbox it | outside |", "|---|---|---|---|"]
        lines += [_line(case) for case in cases]
        lines.append("")
    return "\n".join(lines)


def _line(case: Hostile) -> str:
    limits = ", ".join(f"`{key}: {str(value).lower()}`" for key, value in case.settings.items())
    tries = f"{case.tries} ({limits})" if limits else case.tries
    return f"| `{case.name}` | {tries} | {ENDS[case.ends]} | {'yes' if case.works_outside else ''} |"


if __name__ == "__main__":
    print(page(), end="")
