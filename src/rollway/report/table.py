"""Before and after: held-out pass@1 of every run's first and last evaluated policy."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb

from rollway.evaluation.intervals import Difference, paired_difference
from rollway.report import data
from rollway.store.catalog import with_catalog
from rollway.store.queries import rows as ask


@dataclass(frozen=True)
class Row:
    """One entry of `runs:` over all its seeds. `gain` is None until a second round is evaluated."""

    name: str
    recipe: str
    seeds: list[int]
    first: int
    last: int
    before: float
    after: float
    gain: Difference | None
    seed_gains: list[float]


def before_after(catalog: duckdb.DuckDBPyConnection, runs: Sequence[data.Run], counted: str = "by_prompt") -> list[Row]:
    """One row per run name that has an evaluation.

    The interval of the gain comes from a paired bootstrap over held-out prompts, each prompt's gain averaged over the
    seeds first: it says how sure the gain is for other prompts, given these seeds. `seed_gains` shows how seeds differ.
    counted: the view or table that has (run, round, prompt_id, n, c).
    """
    figures: dict[tuple[str, int], dict[str, float]] = {}
    query = f"SELECT run, round, prompt_id, c / n::DOUBLE FROM {counted} ORDER BY ALL"
    for run, round, prompt_id, share in ask(catalog, query):
        figures.setdefault((run, round), {})[prompt_id] = share
    rows = []
    for name in dict.fromkeys(run.name for run in runs):
        seeds = [run for run in runs if run.name == name and any(key[0] == run.run for key in figures)]
        if seeds:
            rows.append(_row(name, seeds, figures))
    return rows


def _row(name: str, seeds: list[data.Run], figures: dict[tuple[str, int], dict[str, float]]) -> Row:
    """All seeds are read at the same two rounds: the first and the last that every one of them has evaluated."""
    shared = set.intersection(*({r for run, r in figures if run == seed.run} for seed in seeds))
    if not shared:
        return _row(name, seeds[:1], figures)
    first, last = min(shared), max(shared)
    pairs = [(figures[s.run, first], figures[s.run, last]) for s in seeds]
    prompts = sorted(set.intersection(*({*before} & {*after} for before, after in pairs)))
    before, after = ({p: _mean([pair[end][p] for pair in pairs]) for p in prompts} for end in (0, 1))
    gain = paired_difference(before, after, resamples=2000) if last > first and prompts else None
    return Row(
        name=name,
        recipe=str(seeds[0].info.get("recipe", "")),
        seeds=[seed.seed for seed in seeds],
        first=first,
        last=last,
        before=_mean([_mean(list(b.values())) for b, _ in pairs]),
        after=_mean([_mean(list(a.values())) for _, a in pairs]),
        gain=gain,
        seed_gains=[_mean(list(a.values())) - _mean(list(b.values())) for b, a in pairs],
    )


def before_after_table(results: Path) -> str:
    """The rows as aligned text under a line that says what they are; a sentence where nothing is evaluated yet."""
    rows = with_catalog(results, lambda catalog: before_after(catalog, data.read(results)))
    if not rows:
        return "no evaluation yet: held-out pass@1 appears here once the evaluate stage has run"
    cells = [["run", "seeds", "rounds", "before", "after", "gain", "95 % interval", "gain by seed"]]
    cells += [cells_of(row) for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(["held-out pass@1 (interval: paired bootstrap over prompts)", *lines])


def cells_of(row: Row) -> list[str]:
    """A row as text: name, seeds, rounds, before, after, gain, interval, gains of the seeds (lowest to highest)."""
    gains = sorted(row.seed_gains)
    spread = f"{gains[0]:+.3f}" if len(gains) == 1 else f"{gains[0]:+.3f} to {gains[-1]:+.3f}"
    changed = row.gain is not None
    return [
        row.name,
        str(len(row.seeds)),
        f"{row.first} -> {row.last}" if changed else str(row.last),
        f"{row.before:.3f}",
        f"{row.after:.3f}" if changed else "-",
        f"{row.gain.value:+.3f}" if row.gain else "-",
        f"[{row.gain.low:+.3f}, {row.gain.high:+.3f}]" if row.gain else "-",
        spread if changed else "-",
    ]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
