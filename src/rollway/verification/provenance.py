"""Files against those that they were made from: a table names the digests of what its job read."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rollway.store import provenance
from rollway.verification.findings import Finding, some


@dataclass(frozen=True)
class Edge:
    """What a file says of one role of its inputs, and the files that play it now."""

    file: Path
    stage: str
    role: str
    inputs: tuple[tuple[Path, str], ...]
    """With the stage that writes each; "" where a person does."""
    among: bool = False
    """Those that play it are among `inputs`: which they are is in no run.json."""


@dataclass
class Lineage:
    """Everything that was made from something, of all runs that are looked at.

    Of two files that disagree either may be the one that was changed. Where no file at all was made from what lies
    there now, it is the input: run again, its consumers would bless what was done to it. Else it is the consumer.
    """

    edges: list[Edge] = field(default_factory=list)
    _changed: dict[Path, tuple[Path, str]] = field(default_factory=dict)
    """File -> an input of it that was changed since, with its stage."""
    _known: dict[Path, str | None] = field(default_factory=dict)

    def add(self, file: Path, stage: str, *, among: bool = False, **inputs: Iterable[tuple[Path, str]]) -> None:
        """inputs: by role the files that lie there now, each with the stage that writes it; among: see `Edge`."""
        self.edges += [Edge(file, stage, role, tuple(dict.fromkeys(files)), among) for role, files in inputs.items()]

    def findings(self) -> Iterator[Finding]:
        """The changed inputs first."""
        agreeing: set[Path] = set()
        accused: dict[tuple[Path, str], list[Edge]] = {}
        stale: list[Finding] = []
        told: list[tuple[Edge, list[tuple[Path, str]], int, int]] = []
        for edge in self.edges:
            made_from = provenance.recorded(edge.file).get(edge.role, [])
            if not made_from:
                continue
            there = {file: found for file, _ in edge.inputs if (found := self.digest(file)) is not None}
            unfit, gone = unread(made_from, there)
            agreeing |= there.keys() - unfit
            # Without any left it is those that are missing, or were pruned, that are gone.
            if gone and (unfit or (edge.among and there)):
                told.append((edge, [item for item in edge.inputs if item[0] in unfit], gone, len(made_from)))
        for edge, others, lost, of in sorted(told, key=lambda item: item[0].among):
            if edge.among:  # of what it may have read, what others that did read it do not know
                others = [item for item in others if item in accused]
            written = all(stage for _, stage in others)
            if written and len(others) == lost and not any(file in agreeing for file, _ in others):
                for item in others:
                    accused.setdefault(item, []).append(edge)
                continue
            files = ", ".join(sorted({str(file) for file, _ in others})[:2])
            named = f" ({files})" if files and not edge.among else ""
            wrong = f"made from other {edge.role} than lie there now{named}: {lost} of {of} changed since"
            stale.append(Finding(edge.file, wrong, edge.stage))
        for (file, stage), edges in sorted(accused.items()):
            for edge in edges:
                self._changed.setdefault(edge.file, (file, stage))
            by = some(list(dict.fromkeys(f"{edge.file.parent.name}/{edge.file.name}" for edge in edges)))
            yield Finding(file, f"not the content that every file made from it has read ({by}): changed since", stage)
        yield from stale

    def follows(self, finding: Finding) -> Finding:
        """The same, with the file that is to be mended first where one that it was made from was changed."""
        made = finding.file.with_name("batch.parquet") if finding.file.name == "curate.json" else finding.file
        if made not in self._changed:
            return finding
        file, stage = self._changed[made]
        return replace(finding, wrong=f"{finding.wrong}; it may follow from {file}: mend that first ({stage})")

    def digest(self, path: Path) -> str | None:
        """Of a file, taken once; None where it is not there."""
        if path not in self._known:
            try:
                self._known[path] = provenance.digest(path)
            except OSError:
                self._known[path] = None
        return self._known[path]


def unread(made_from: Sequence[str], there: Mapping[Path, str]) -> tuple[set[Path], int]:
    """Files that are none of those that were read, and how many of those are not there.

    made_from: digests, one for each file that was read. there: file -> digest. Each digest stands for one file: of two
    with equal content one may have been changed. In the order in which they were read where all of them are there.
    """
    if len(made_from) == len(there):
        others = {file for (file, found), read in zip(there.items(), made_from, strict=True) if found != read}
        if len(others) == (Counter(made_from) - Counter(there.values())).total():
            return others, len(others)
    left, others = Counter(made_from), set[Path]()
    for file, found in there.items():
        if left[found]:
            left[found] -= 1
        else:
            others.add(file)
    return others, left.total()
