"""What the benches of methods share: a finished results folder, tables and intervals in words, sections of pages."""

import argparse
import re
import subprocess
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rollway.comparison import render, runs
from rollway.store.atomic import write_text
from rollway.store.catalog import open_catalog
from rollway.store.queries import as_text


def arguments(about: str, results: str) -> argparse.Namespace:
    """Of a bench's script: `results`, `docs` and the `commit` whose code made the results."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path(results))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--commit", help="of the code that made the results (default: HEAD)")
    args = parser.parse_args()
    args.commit = args.commit or subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], text=True).strip()
    return args


@dataclass(frozen=True)
class Mechanism:
    """One mechanism: a sentence for the page, and the query whose rows show it."""

    title: str
    text: str
    sql: str


@dataclass(frozen=True)
class Bench:
    """A finished results folder, and where it was made."""

    results: Path
    docs: Path
    commit: str
    comparison: runs.RunComparison

    def outcome(self, name: str, k: int) -> runs.Outcome:
        return next(o for o in self.comparison.outcomes if (o.name, o.k) == (name, k))

    @property
    def names(self) -> list[str]:
        return [c.name for c in self.comparison.contenders]

    @property
    def baseline(self) -> str:
        assert self.comparison.baseline is not None
        return self.comparison.baseline


def finished(results: Path, baseline: str, others: Collection[str] = ()) -> list[str]:
    """Runs that are as far as the baseline is; the others are said to be left out. others: no contenders at all."""
    found = {c.name: c.final for c in runs.compare_runs(results, None, [1]).contenders if c.name not in others}
    behind = [name for name, final in found.items() if final < found[baseline]]
    if behind:
        print(f"left out, not finished: {', '.join(behind)}")
    return [name for name in found if name not in behind]


def write_outcomes(bench: Bench, table: Path, pictures: Path) -> None:
    """All outcomes as CSV, and the picture of each method beside the baseline."""
    write_text(table, as_text(runs.rows(bench.comparison), "csv") + "\n")
    by_name = {c.name: c for c in bench.comparison.contenders}
    for name in bench.names:
        pair = [by_name[n] for n in dict.fromkeys([bench.baseline, name])]
        write_text(pictures / f"{name}.svg", render.curves_svg(replace(bench.comparison, contenders=pair)))


def outcome_row(bench: Bench, name: str) -> list[str]:
    """A line of the table of outcomes, under OUTCOME_HEADER."""
    o, eight = bench.outcome(name, 1), bench.outcome(name, 8)
    return [
        name,
        str(o.seeds),
        f"{o.value:.3f}",
        f"{o.low:.3f} to {o.high:.3f}",
        *difference(o),
        f"{eight.value:.3f}",
        "-" if o.tokens_per_seed is None else f"{o.tokens_per_seed:,.0f}",
        "-" if o.seconds_per_seed is None else f"{o.seconds_per_seed:,.0f}",
    ]


OUTCOME_HEADER = ["run", "seeds", "pass@1", "95 % interval", "difference", "interval", "pass@8", "tokens", "seconds"]


def difference(o: runs.Outcome) -> tuple[str, str]:
    """From the baseline, and its interval."""
    if o.difference is None:
        return "-", "-"
    return f"{o.difference:+.3f}", f"{o.difference_low:+.3f} to {o.difference_high:+.3f}"


def with_interval(bench: Bench, name: str, o: runs.Outcome) -> str:
    """pass@k in words, beside GRPO's."""
    text = f"pass@{o.k} {o.value:.3f} [{o.low:.3f}, {o.high:.3f}]"
    if name == bench.baseline or o.difference is None:
        return text
    against = f"GRPO {bench.outcome(bench.baseline, o.k).value:.3f}, difference {o.difference:+.3f}"
    return f"{text} ({against} [{o.difference_low:+.3f}, {o.difference_high:+.3f}])"


def mechanism(bench: Bench, shown: Mechanism) -> list[str]:
    """Its sentence and its table. Raises SystemExit where the query finds nothing."""
    rows = asked(bench.results, shown.sql)
    if len(rows) < 2:
        raise SystemExit(f"mechanism {shown.title!r}: its query finds nothing; are its runs done?")
    return [f"**{shown.title}** {shown.text}".strip(), table(rows[0], rows[1:])]


def asked(results: Path, sql: str) -> list[list[str]]:
    """Header and rows of an answer, as cells of a table."""
    with open_catalog(results) as catalog:
        answer = catalog.execute(sql)
        header = [column[0] for column in answer.description or []]
        return [header, *([cell(value) for value in row] for row in answer.fetchall())]


def replace_section(page: Path, heading: str, parts: Sequence[str]) -> None:
    """Replaces what stands between a heading of the second level and the next one."""
    text = page.read_text(encoding="utf-8")
    section = "\n\n".join([f"## {heading}", *parts])
    pattern = rf"## {re.escape(heading)}\n.*?(?=\n## )"
    changed, count = re.subn(pattern, lambda _: section + "\n", text, count=1, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"{page}: has no section {heading} that another one follows")
    write_text(page, changed)


def replace_block(page: Path, name: str, parts: Sequence[str], *, after: str) -> None:
    """Replaces what stands between the comments `name: begin` and `name: end`; where there are none yet, they go to the
    end of the section `after`."""
    text = page.read_text(encoding="utf-8")
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    block = "\n\n".join([begin, *parts, end])
    if begin in text:
        changed, count = re.subn(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: block, text, flags=re.DOTALL)
    else:
        pattern = rf"(## {re.escape(after)}\n.*?)\n+(?=## |\Z)"
        changed, count = re.subn(pattern, lambda m: f"{m[1].rstrip()}\n\n{block}\n\n", text, count=1, flags=re.DOTALL)
        changed = changed.rstrip("\n") + "\n"
    if count != 1:
        raise SystemExit(f"{page}: has no section {after}, or no end of the block {name}")
    write_text(page, changed)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
