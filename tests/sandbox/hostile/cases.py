"""Programs that attack the sandbox or the verdict. Each gets its reward only where its attack works.

`stdio` programs print `pwned` when they got what they wanted; `tests` and `asserts` programs pass an assertion that
they cannot know.
"""

from dataclasses import dataclass, field
from textwrap import dedent

PRINTED = "pwned"
TEST = "def check(candidate):\n    assert candidate(3) == 'MARKER'\n    assert candidate(4) + 1 == 94721\n"
"""MARKER is replaced by a text that no program can guess."""


@dataclass(frozen=True)
class Hostile:
    """name, what it tries, and the component by which its verdict says how it ended ('' for plain wrong)."""

    name: str
    tries: str
    ends: str
    program: str
    by: str = "stdio"
    works_outside: bool = False
    """A plain interpreter, or tests in one process with the program, fall for it: the suite checks that they do."""
    settings: dict[str, object] = field(default_factory=dict)
    test: str = TEST
    """What defines check(candidate) of `tests` programs, the assertions (a line each) of `asserts` programs."""


def printing(name, tries, ends, program, *, outside=False, **settings):
    return Hostile(name, tries, ends, dedent(program).strip() + "\n", "stdio", outside, settings)


def graded(name, tries, ends, program, *, outside=False, test=TEST, **settings):
    return Hostile(name, tries, ends, dedent(program).strip() + "\n", "tests", outside, settings, dedent(test))


def asserted(name, tries, ends, program, *assertions, outside=False):
    """Judged by assertions of the MBPP kind, which may call what nothing defines."""
    return Hostile(name, tries, ends, dedent(program).strip() + "\n", "asserts", outside, {}, "\n".join(assertions))
