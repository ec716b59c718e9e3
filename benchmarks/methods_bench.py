"""Writes what the methods bench measured into docs/: `python benchmarks/methods_bench.py`, after the runs are done.

The runs: `snakemake --cores 2 --configfile config/examples/methods_bench.yaml` (`make methods-bench` does both). From
their files it makes docs/methods_bench/ (tables as CSV), docs/images/methods/ (a learning curve per method, the cosine
matrix) and the section "Measured" of every page in docs/methods whose recipe was run.
"""

import argparse
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from methods_bench_mechanisms import MECHANISMS, Mechanism

from rollway.comparison import gradients, render, runs
from rollway.config import recipe_names
from rollway.store.atomic import write_text
from rollway.store.catalog import open_catalog
from rollway.store.queries import as_text

BASELINE = "grpo"
GRADIENTS = ("grpo-s0", 5)
"""Run and round whose stored rollouts all objectives are differentiated on."""
OTHER_ARMS = {"probe"}
"""Runs that supply rollouts and are no contender."""


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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("results/methods_bench"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--commit", help="of the code that made the results (default: HEAD)")
    args = parser.parse_args()
    commit = args.commit or subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], text=True).strip()
    bench = Bench(
        args.results, args.docs, commit, runs.compare_runs(args.results, BASELINE, [1, 8], finished(args.results))
    )
    write_outcomes(bench)
    compared = write_gradients(bench)
    for name in recipe_names():
        if name in bench.names:
            write_measured(bench, name, compared)
    write_summary(bench, compared)


def finished(results: Path) -> list[str]:
    """Runs that are as far as the baseline is; the others are said to be left out."""
    found = {c.name: c.final for c in runs.compare_runs(results, None, [1]).contenders if c.name not in OTHER_ARMS}
    behind = [name for name, final in found.items() if final < found[BASELINE]]
    if behind:
        print(f"left out, not finished: {', '.join(behind)}")
    return [name for name in found if name not in behind]


def write_outcomes(bench: Bench) -> None:
    """docs/methods_bench/outcomes.csv, and the picture of each method beside the baseline."""
    write_text(bench.docs / "methods_bench" / "outcomes.csv", as_text(runs.rows(bench.comparison), "csv") + "\n")
    by_name = {c.name: c for c in bench.comparison.contenders}
    for name in bench.names:
        pair = [by_name[n] for n in dict.fromkeys([BASELINE, name])]
        picture = render.curves_svg(replace(bench.comparison, contenders=pair))
        write_text(bench.docs / "images" / "methods" / f"{name}.svg", picture)


def write_gradients(bench: Bench) -> gradients.GradientComparison:
    """The gradient of every recipe on one round's rollouts, at the policy one round on."""
    run, round = GRADIENTS
    found = gradients.compare_gradients(bench.results, run, round, recipe_names(), at="next")
    write_text(bench.docs / "methods_bench" / "gradients.csv", as_text(gradients.rows(found), "csv") + "\n")
    write_text(bench.docs / "images" / "methods" / "cosine.svg", render.heat_map(found))
    return found


def write_measured(bench: Bench, name: str, compared: gradients.GradientComparison) -> None:
    """Replaces what stands between the headings "Measured" and the next one on the method's page."""
    page = bench.docs / "methods" / f"{name}.md"
    text = page.read_text(encoding="utf-8")
    section = "\n\n".join(["## Measured", *_measured(bench, name, compared)])
    changed, count = re.subn(r"## Measured\n.*?(?=\n## )", lambda _: section + "\n", text, count=1, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"{page}: has no section Measured that another one follows")
    write_text(page, changed)


def _measured(bench: Bench, name: str, compared: gradients.GradientComparison) -> list[str]:
    first, last = bench.outcome(name, 1), bench.outcome(name, 8)
    parts = [
        f"![Held-out pass@1 and pass@8 by round, with intervals](../images/methods/{name}.svg)",
        f"On the [methods bench](../methods_bench.md), {first.seeds} seeds, code at commit `{bench.commit}`: after "
        f"{first.round} rounds {_with_interval(bench, name, first)}; {_with_interval(bench, name, last)}.",
    ]
    if name in compared.measured:
        m, cosine = compared.measured[name], compared.cosine[name, BASELINE]
        angle = "" if name == BASELINE or cosine is None else f", cosine with GRPO's {cosine:.2f}"
        gated = "" if m.gated is None else f", {100 * m.gated:.0f} % of the tokens with an advantage without gradient"
        run, round = GRADIENTS
        parts.append(
            f"Gradient on the stored rollouts of {run}, round {round}, at the policy of round {round + 1}: "
            f"norm {m.norm:.3g}{angle}{gated}."
        )
    if name in MECHANISMS:
        parts += _mechanism(bench, MECHANISMS[name])
    return parts


def _with_interval(bench: Bench, name: str, o: runs.Outcome) -> str:
    text = f"pass@{o.k} {o.value:.3f} [{o.low:.3f}, {o.high:.3f}]"
    if name == BASELINE or o.difference is None:
        return text
    against = f"GRPO {bench.outcome(BASELINE, o.k).value:.3f}, difference {o.difference:+.3f}"
    return f"{text} ({against} [{o.difference_low:+.3f}, {o.difference_high:+.3f}])"


def _mechanism(bench: Bench, mechanism: Mechanism) -> list[str]:
    with open_catalog(bench.results) as catalog:
        answer = catalog.execute(mechanism.sql)
        header = [column[0] for column in answer.description or []]
        rows = [[_cell(value) for value in row] for row in answer.fetchall()]
    if not rows:
        raise SystemExit(f"mechanism {mechanism.title!r}: its query finds nothing; are its runs done?")
    return [f"**{mechanism.title}** {mechanism.text}".strip(), _table(header, rows)]


def write_summary(bench: Bench, compared: gradients.GradientComparison) -> None:
    """docs/methods_bench/tables.md: the table of outcomes and the figures of the gradients, for the page to include."""
    header = ["run", "seeds", "pass@1", "95 % interval", "difference", "interval", "pass@8", "tokens", "seconds"]
    lines = []
    for name in sorted(bench.names, key=lambda n: -bench.outcome(n, 1).value):
        o, eight = bench.outcome(name, 1), bench.outcome(name, 8)
        difference = (
            ("-", "-")
            if o.difference is None
            else (f"{o.difference:+.3f}", f"{o.difference_low:+.3f} to {o.difference_high:+.3f}")
        )
        lines.append(
            [
                name,
                str(o.seeds),
                f"{o.value:.3f}",
                f"{o.low:.3f} to {o.high:.3f}",
                *difference,
                f"{eight.value:.3f}",
                "-" if o.tokens_per_seed is None else f"{o.tokens_per_seed:,.0f}",
                "-" if o.seconds_per_seed is None else f"{o.seconds_per_seed:,.0f}",
            ]
        )
    angles = [
        [
            name,
            f"{m.norm:.3g}",
            "-" if compared.cosine[name, BASELINE] is None else f"{compared.cosine[name, BASELINE]:.3f}",
            f"{m.tokens_used} of {m.tokens}",
            "-" if m.gated is None else f"{100 * m.gated:.1f} %",
            f"{m.effective_tokens:.0f}",
        ]
        for name, m in compared.measured.items()
    ]
    run, round = GRADIENTS
    left_out = [f"- {name}: {reason}" for name, reason in compared.reasons.items()]
    text = [
        "<!-- Made by benchmarks/methods_bench.py from the results; do not edit. -->",
        "# Tables of the methods bench",
        f"Code at commit `{bench.commit}`. What they say: [methods_bench.md](../methods_bench.md).",
        "## Outcomes",
        _table(header, lines),
        f"## Gradients on the rollouts of {run}, round {round}, at the policy of round {round + 1}",
        _table(["recipe", "norm", "cosine with GRPO", "tokens used", "gated", "effective tokens"], angles),
        *(["Left out:", "\n".join(left_out)] if left_out else []),
    ]
    write_text(bench.docs / "methods_bench" / "tables.md", "\n\n".join(text) + "\n")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
