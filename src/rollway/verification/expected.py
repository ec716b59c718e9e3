"""What should lie there, by run.json, and does not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import takewhile
from pathlib import Path

from rollway.runtime import plan_told, retention
from rollway.runtime.plan import Plan
from rollway.verification.findings import Finding, some


def missing(plan: Plan, run: str, known: set[Path]) -> Iterator[Finding]:
    """Planned files that are not there, each with its stage; those after the last one that is there are one finding,
    since nobody can tell whether they were lost or not made yet.

    known: files that were told already; what is told here is added. Raises RollwayError.
    """
    planned = list(dict.fromkeys(plan_told.files(plan, run)))
    absent = {path for path, _ in planned if not path.exists()}
    tail = [*takewhile(lambda item: item[0] in absent, reversed(planned))][::-1]
    for path, stage in planned[: len(planned) - len(tail)]:
        if path in absent and path not in known:
            known.add(path)
            yield Finding(path, "missing", stage)
    untold = [(path, stage) for path, stage in tail if path not in known]
    known |= {path for path, _ in untold}
    if untold:
        path, stage = untold[0]
        after = [str(p.relative_to(plan.results)) for p, _ in untold[1:]]
        yield Finding(path, "missing, lost or not made yet" + (f", and so is {some(after)}" if after else ""), stage)


def kept(plans: Iterable[Plan]) -> set[Path]:
    """Folders of policies and discriminators whose weights no `keep` lets go. Raises RollwayError."""
    found: set[Path] = set()
    for plan in plans:
        found |= retention.protected(plan)
    return found
