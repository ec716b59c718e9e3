"""Writes what the methods bench measured into docs/: `python benchmarks/methods_bench.py`, after the runs are done.

The runs: `snakemake --cores 2 --configfile config/examples/methods_bench.yaml` (`make methods-bench` does both). From
their files it makes docs/methods_bench/ (tables as CSV), docs/images/methods/ (a learning curve per method, the cosine
matrix) and the section "Measured" of every page in docs/methods whose recipe was run.
"""

from method_pages import (
    OUTCOME_HEADER,
    Bench,
    arguments,
    finished,
    mechanism,
    outcome_row,
    replace_section,
    table,
    with_interval,
    write_outcomes,
)
from methods_bench_mechanisms import MECHANISMS

from rollway.comparison import gradients, render, runs
from rollway.config import recipe_names
from rollway.store.atomic import write_text
from rollway.store.queries import as_text

BASELINE = "grpo"
GRADIENTS = ("grpo-s0", 5)
"""Run and round whose stored rollouts all objectives are differentiated on."""
OTHER_ARMS = {"probe"}
"""Runs that supply rollouts and are no contender."""


def main() -> None:
    args = arguments(__doc__ or "", "results/methods_bench")
    names = finished(args.results, BASELINE, OTHER_ARMS)
    bench = Bench(args.results, args.docs, args.commit, runs.compare_runs(args.results, BASELINE, [1, 8], names))
    write_outcomes(bench, bench.docs / "methods_bench" / "outcomes.csv", bench.docs / "images" / "methods")
    compared = write_gradients(bench)
    for name in recipe_names():
        if name in bench.names:
            write_measured(bench, name, compared)
    write_summary(bench, compared)


def write_gradients(bench: Bench) -> gradients.GradientComparison:
    """The gradient of every recipe on one round's rollouts, at the policy one round on."""
    run, round = GRADIENTS
    found = gradients.compare_gradients(bench.results, run, round, recipe_names(), at="next")
    write_text(bench.docs / "methods_bench" / "gradients.csv", as_text(gradients.rows(found), "csv") + "\n")
    write_text(bench.docs / "images" / "methods" / "cosine.svg", render.heat_map(found))
    return found


def write_measured(bench: Bench, name: str, compared: gradients.GradientComparison) -> None:
    """Replaces what stands between the headings "Measured" and the next one on the method's page."""
    replace_section(bench.docs / "methods" / f"{name}.md", "Measured", _measured(bench, name, compared))


def _measured(bench: Bench, name: str, compared: gradients.GradientComparison) -> list[str]:
    first, last = bench.outcome(name, 1), bench.outcome(name, 8)
    parts = [
        f"![Held-out pass@1 and pass@8 by round, with intervals](../images/methods/{name}.svg)",
        f"On the [methods bench](../methods_bench.md), {first.seeds} seeds, code at commit `{bench.commit}`: after "
        f"{first.round} rounds {with_interval(bench, name, first)}; {with_interval(bench, name, last)}.",
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
        parts += mechanism(bench, MECHANISMS[name])
    return parts


def write_summary(bench: Bench, compared: gradients.GradientComparison) -> None:
    """docs/methods_bench/tables.md: the table of outcomes and the figures of the gradients, for the page to include."""
    lines = [outcome_row(bench, name) for name in sorted(bench.names, key=lambda n: -bench.outcome(n, 1).value)]
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
        table(OUTCOME_HEADER, lines),
        f"## Gradients on the rollouts of {run}, round {round}, at the policy of round {round + 1}",
        table(["recipe", "norm", "cosine with GRPO", "tokens used", "gated", "effective tokens"], angles),
        *(["Left out:", "\n".join(left_out)] if left_out else []),
    ]
    write_text(bench.docs / "methods_bench" / "tables.md", "\n\n".join(text) + "\n")


if __name__ == "__main__":
    main()
