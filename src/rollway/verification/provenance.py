"""Files against those that they were made from: a table names the digests of what its job read."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rollway.store import provenance


class Digests:
    """Of files that are there, each taken once."""

    def __init__(self) -> None:
        self._known: dict[Path, str] = {}

    def of(self, path: Path) -> str | None:
        if path not in self._known:
            try:
                self._known[path] = provenance.digest(path)
            except OSError:
                return None
        return self._known[path]


def changed(path: Path, present: Mapping[str, Sequence[Path]], digests: Digests) -> Iterator[str]:
    """What `path` was made from and is not there any more as it was. present: files that are there now, by role.

    Nothing of roles that `path` does not name, and of those of which no file is left (pruned).
    """
    for role, made_from in provenance.recorded(path).items():
        there = {found for file in present.get(role, ()) if (found := digests.of(file)) is not None}
        gone = [name for name in made_from if name not in there]
        if there and gone:
            files = ", ".join(sorted({str(file) for file in present[role]})[:2])
            yield f"made from other {role} than lie there now ({files}): {len(gone)} of {len(made_from)} changed since"
