"""Writes what the distillation bench measured into docs/: `python benchmarks/distillation_bench.py`, after the runs.

The runs: `snakemake --cores 2 --configfile config/examples/distillation_bench.yaml` (`make distillation-bench` does
both). From their files it makes docs/distillation_bench/ (tables as CSV), docs/images/distillation/ (learning curves by
student tokens and by seconds), the measured part of docs/distillation_bench.md, and a block under "Measured" on the
page of every method that was run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from distillation_bench_mechanisms import MECHANISMS
from distillation_figures import (
    Costs,
    Distance,
    Mean,
    at_equal_cost,
    distances,
    processor_seconds,
    student_tokens,
    teacher_bytes,
)
from method_pages import Bench, arguments, asked, difference, finished, mechanism, replace_block, table, write_outcomes

from rollway.comparison import render, runs
from rollway.comparison.runs import Contender, Outcome
from rollway.config import load_recipe, recipe_names
from rollway.report import svg
from rollway.report.data import Point
from rollway.store.atomic import write_text
from rollway.store.queries import as_text

BASELINE = "grpo"
TASK, TEACHER = "sums", "teacher-s0"
NO_ARMS = ("teacher-text",)
"""Runs that write what arms read."""
BLOCK = "distillation bench"
FAMILIES = {
    "logit": "a teacher's log-probs",
    "outcome": "outcomes, and what they make of the policy's own text",
    "self_play": "the policy against itself",
}
"""Where a recipe's feedback comes from (its `axes`), and the picture that it is drawn in."""


@dataclass(frozen=True)
class Measured:
    """What the runs of the bench come to."""

    bench: Bench
    tokens: dict[str, Costs]
    seconds: dict[str, Costs]
    token_budget: float
    second_budget: float
    by_tokens: dict[str, Outcome]
    by_seconds: dict[str, Outcome]
    distances: dict[str, Distance]

    @property
    def names(self) -> list[str]:
        """The best first, at equal student tokens."""
        return sorted(self.by_tokens, key=lambda name: -self.by_tokens[name].value)

    def final(self, name: str) -> int:
        return next(c.final for c in self.bench.comparison.contenders if c.name == name)


def main() -> None:
    args = arguments(__doc__ or "", "results/distillation_bench")
    found = measure(args.results, args.docs, args.commit)
    folder, pictures = args.docs / "distillation_bench", args.docs / "images" / "distillation"
    write_outcomes(found.bench, folder / "outcomes.csv", pictures)
    write_text(folder / "equal_cost.csv", as_text(_equal_cost(found), "csv") + "\n")
    drawn = write_curves(found, pictures)
    replace_block(args.docs / "distillation_bench.md", BLOCK, page(found, drawn), after="Measured")
    for name in recipe_names():
        if name in found.bench.names and name != BASELINE:
            replace_block(args.docs / "methods" / f"{name}.md", BLOCK, of_method(found, name), after="Measured")


def measure(results: Path, docs: Path, commit: str) -> Measured:
    comparison = runs.compare_runs(results, BASELINE, [1, 8], finished(results, BASELINE, NO_ARMS))
    contenders = comparison.contenders
    tokens = student_tokens(results, contenders)
    seconds = processor_seconds(results, contenders)
    # No arm is taken past its end: the budget is what the cheapest one spent.
    token_budget, second_budget = (min(costs[c.name][c.final] for c in contenders) for costs in (tokens, seconds))
    return Measured(
        Bench(results, docs, commit, comparison),
        tokens,
        seconds,
        token_budget,
        second_budget,
        at_equal_cost(contenders, BASELINE, tokens, token_budget),
        at_equal_cost(contenders, BASELINE, seconds, second_budget),
        distances(results, contenders, TASK, results / "warmups" / TEACHER / "policy.json"),
    )


def write_curves(found: Measured, pictures: Path) -> list[tuple[str, str]]:
    """One picture per family of methods, each with the baseline: pass@1 by student tokens and by seconds. Returns
    (file, what is on it)."""
    drawn = []
    by_family: dict[str, list[Contender]] = {family: [] for family in FAMILIES}
    baseline = next(c for c in found.bench.comparison.contenders if c.name == BASELINE)
    for c in found.bench.comparison.contenders:
        if c.name != BASELINE:
            by_family[family_of(c.recipe)].append(c)
    for family, members in by_family.items():
        for number, some in enumerate(_in_parts(members, svg.COLOURS - 1)):
            shown = [baseline, *some]
            panels = {
                "pass@1 by hundreds of student tokens": _lines(shown, found.tokens, 100.0),
                "pass@1 by processor seconds": _lines(shown, found.seconds, 1.0),
            }
            name = f"curves-{family}{f'-{number + 1}' if number else ''}.svg"
            write_text(pictures / name, render.panels_svg(panels))
            drawn.append((name, FAMILIES[family]))
    return drawn


def family_of(recipe: str) -> str:
    axes = load_recipe(recipe).axes
    return "outcome" if axes is None else axes.feedback


def _in_parts(members: Sequence[Contender], most: int) -> list[list[Contender]]:
    return [list(members[start : start + most]) for start in range(0, len(members), most)]


def _lines(shown: Sequence[Contender], costs: dict[str, Costs], unit: float) -> list[svg.Line]:
    return [
        svg.Line(
            c.name,
            n % svg.COLOURS,
            [Point(round(costs[c.name][at] / unit), v.value, v.low, v.high) for at, v in runs.learning_curve(c, 1)],
        )
        for n, c in enumerate(shown)
    ]


# ---- pages


def page(found: Measured, drawn: Sequence[tuple[str, str]]) -> list[str]:
    """The measured part of docs/distillation_bench.md."""
    bench = found.bench
    pictures = [f"![pass@1: {what}](images/distillation/{name})" for name, what in drawn]
    parts = [
        f"Code at commit `{bench.commit}`; {found.by_tokens[BASELINE].seeds} seeds, "
        f"{found.by_tokens[BASELINE].prompts} held-out prompts; intervals are 95 %, over seeds and prompts. As CSV: "
        "[at equal cost](distillation_bench/equal_cost.csv), [at the last round](distillation_bench/outcomes.csv).",
        "### Accuracy at equal student tokens and at equal seconds",
        f"Tokens: {found.token_budget:,.0f} that the student wrote. Seconds: {found.second_budget:,.0f} of processor "
        "time. Each is what the cheapest run spends in all, so none is taken past its end; warm-ups and evaluation are "
        "not counted. Between evaluations accuracy is taken to be linear.",
        cost_table(found),
        "### In words",
        *in_words(found),
        *pictures,
        "### Beside the teacher, after the last round",
        "On the policies' own held-out samples at temperature 1: KL(policy || teacher) and entropy in nats per token, "
        "length in tokens; intervals are Student's, over seeds. The teacher is the larger warm-up, reading the plain "
        "prompt, also for methods that never ask it.",
        distance_table(found),
        "### Teachers, before they were used",
        "What the stage `check_teacher` found before the first round that uses them, mean over seeds: right answers of "
        "the policy, and of the teacher in the context in which it is asked.",
        _table(bench, CHECKS),
        "### What stored teacher scores weigh",
        "In the score files, compressed, first seed.",
        table(
            ["run", "columns", "tokens", "bytes per token"],
            [[a, b, f"{n:,}", f"{x:.1f}"] for a, b, n, x in teacher_bytes(bench.results, bench.comparison.contenders)],
        ),
        "### Routes",
        "Which rollout got which loss: share of the batch by round, mean over seeds.",
        _table(bench, ROUTES),
    ]
    left = [f"- {sentence}" for sentence in bench.comparison.left_out]
    return [*parts, *(["Left out:", "\n".join(left)] if left else [])]


CHECKS = """
    SELECT regexp_replace(run, '-s[0-9]+$', '') AS run, scorer, count(DISTINCT run) AS seeds, count(*) AS answers,
           avg(policy_correct::INT) AS policy, avg(teacher_correct::INT) AS teacher,
           avg(teacher_correct::INT) FILTER (NOT policy_correct) AS "teacher where the policy is wrong"
    FROM (SELECT * FROM teacher_checks QUALIFY round = min(round) OVER (PARTITION BY run, scorer))
    GROUP BY 1, 2 ORDER BY 1, 2
"""
ROUTES = """
    SELECT regexp_replace(run, '-s[0-9]+$', '') AS run, round, route, avg(share) AS share
    FROM routes GROUP BY 1, 2, 3 ORDER BY 1, 2, 3
"""


def _table(bench: Bench, sql: str) -> str:
    rows = asked(bench.results, sql)
    return table(rows[0], rows[1:]) if len(rows) > 1 else "None."


def cost_table(found: Measured) -> str:
    header = ["run", "pass@1, equal tokens", "interval", "difference", "interval", "p (Holm)"]
    header += ["pass@1, equal seconds", "difference", "interval", "seconds in all"]
    lines = []
    for name in found.names:
        one, other = found.by_tokens[name], found.by_seconds[name]
        p = "-" if one.p_holm is None else f"{one.p_holm:.2g}"
        lines.append(
            [
                *(name, f"{one.value:.3f}", f"{one.low:.3f} to {one.high:.3f}", *difference(one), p),
                *(f"{other.value:.3f}", *difference(other), f"{found.seconds[name][found.final(name)]:.0f}"),
            ]
        )
    return table(header, lines)


def distance_table(found: Measured) -> str:
    lines = []
    for name in found.names:
        near, last = found.distances[name], found.bench.outcome(name, 1)
        eight = found.bench.outcome(name, 8)
        lines.append(
            [
                *(name, f"{last.value:.3f}", f"{eight.value:.3f} ({eight.low:.3f} to {eight.high:.3f})"),
                *(_mean(near.kl, 3), _mean(near.entropy, 3), _mean(near.length, 2)),
            ]
        )
    return table(["run", "pass@1", "pass@8", "KL to the teacher", "entropy", "length"], lines)


def _mean(mean: Mean, digits: int) -> str:
    return f"{mean.value:.{digits}f} ({mean.low:.{digits}f} to {mean.high:.{digits}f})"


def in_words(found: Measured) -> list[str]:
    """What the verdicts say, as a list: who is better or worse than the baseline, at which cost."""
    return [
        "\n".join(
            [
                *_verdicts(found.by_tokens, "At equal student tokens"),
                *_verdicts(found.by_seconds, "At equal seconds"),
                _extremes(found),
            ]
        )
    ]


def _verdicts(outcomes: dict[str, Outcome], where: str) -> list[str]:
    said = []
    for verdict, words in (("better", "ahead of GRPO"), ("worse", "behind GRPO")):
        names = [name for name, o in outcomes.items() if o.verdict == verdict]
        ordered = sorted(names, key=lambda n: -abs(outcomes[n].difference or 0.0))
        told = ", ".join(f"{n} ({outcomes[n].difference:+.3f})" for n in ordered)
        said.append(f"- {where}, {words}: {told or 'none'}.")
    rest = [name for name, o in outcomes.items() if o.verdict not in ("better", "worse", "baseline")]
    if rest:
        few = any("fewer than" in outcomes[n].verdict for n in rest)
        why = "too few seeds for a claim" if few else "no difference shown, which does not say that there is none"
        said.append(f"- {where}, {why}: {', '.join(rest)}.")
    return said


def _extremes(found: Measured) -> str:
    kl = {name: near.kl.value for name, near in found.distances.items()}
    entropy = {name: near.entropy.value for name, near in found.distances.items()}
    near, sharp = min(kl, key=lambda n: kl[n]), min(entropy, key=lambda n: entropy[n])
    return (
        f"- Nearest to the teacher ends {near} (KL {kl[near]:.3f} nats per token; GRPO {kl[BASELINE]:.3f}); the least "
        f"entropy has {sharp} ({entropy[sharp]:.3f}; GRPO {entropy[BASELINE]:.3f})."
    )


def of_method(found: Measured, name: str) -> list[str]:
    """The block under "Measured" on the page of a method."""
    one, other, near = found.by_tokens[name], found.by_seconds[name], found.distances[name]
    low, high = (f"{x:+.3f}" for x in (one.difference_low or 0.0, one.difference_high or 0.0))
    text = (
        f"On the [distillation bench](../distillation_bench.md), {one.seeds} seeds, code at commit "
        f"`{found.bench.commit}`, at equal student tokens: pass@1 {one.value:.3f} [{one.low:.3f}, {one.high:.3f}], "
        f"GRPO {found.by_tokens[BASELINE].value:.3f}, difference {one.difference or 0.0:+.3f} [{low}, {high}], "
        f"{one.verdict}; at equal seconds {other.value:.3f}, difference {other.difference or 0.0:+.3f}, "
        f"{other.verdict}. At the end KL to the large teacher {near.kl.value:.3f} nats per token, entropy "
        f"{near.entropy.value:.3f}."
    )
    parts = [f"![Held-out pass@1 and pass@8 by round, with intervals](../images/distillation/{name}.svg)", text]
    return [*parts, *(mechanism(found.bench, MECHANISMS[name]) if name in MECHANISMS else [])]


def _equal_cost(found: Measured) -> pa.Table:
    """A row per arm and cost."""
    rows = []
    for cost, outcomes, budget in (
        ("student_tokens", found.by_tokens, found.token_budget),
        ("processor_seconds", found.by_seconds, found.second_budget),
    ):
        for name in found.names:
            o, near = outcomes[name], found.distances[name]
            rows.append(
                {
                    "run": name,
                    "recipe": o.recipe,
                    "seeds": o.seeds,
                    "cost": cost,
                    "budget": budget,
                    "pass_1": o.value,
                    "low": o.low,
                    "high": o.high,
                    "difference": o.difference,
                    "difference_low": o.difference_low,
                    "difference_high": o.difference_high,
                    "p_holm": o.p_holm,
                    "verdict": o.verdict,
                    "kl_to_teacher": near.kl.value,
                    "entropy": near.entropy.value,
                    "length": near.length.value,
                }
            )
    return pa.Table.from_pylist(rows)


if __name__ == "__main__":
    main()
