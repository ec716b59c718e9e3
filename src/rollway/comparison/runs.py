"""Runs of one results folder against each other: final pass@k, differences from a baseline, tokens and seconds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rollway.comparison import reading, statistics
from rollway.comparison.reading import Counts
from rollway.comparison.settings import evaluation_settings
from rollway.errors import RollwayError
from rollway.evaluation import Interval, holm, pass_at_k
from rollway.report import data
from rollway.store.lineage import Inherited, inherited, read_runs

SEEDS_FOR_A_CLAIM = 5
RESAMPLES = 10_000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Contender:
    """One key of `runs:` over the seeds that are evaluated. `evaluations[round][seed]`: only rounds all seeds have."""

    name: str
    recipe: str
    runs: list[data.Run]
    evaluations: dict[int, dict[int, Counts]]
    note: str

    @property
    def final(self) -> int:
        """The last round that every seed has evaluated."""
        return max(self.evaluations)

    @property
    def seeds(self) -> list[int]:
        return [run.seed for run in self.runs]


@dataclass(frozen=True)
class Outcome:
    """One run and one k. Shares in [0, 1]; ends of 95 % intervals; None where there is nothing to say."""

    name: str
    recipe: str
    k: int
    seeds: int
    round: int
    prompts: int
    value: float
    low: float
    high: float
    difference: float | None = None
    """From the baseline, on shared seeds and prompts."""
    difference_low: float | None = None
    difference_high: float | None = None
    paired_seeds: int = 0
    p_bootstrap: float | None = None
    """Over seeds and prompts."""
    p_seeds: float | None = None
    """Paired t-test over seeds alone."""
    p_holm: float | None = None
    """The larger of the two, corrected for all comparisons of the table."""
    tokens_per_seed: float | None = None
    """Length of all that policies sampled up to the final round, what a fork takes from its parent included."""
    seconds_per_seed: float | None = None
    """Wall time of the run's own rollout, score, curate and train jobs (not those of a reward model or a warm-up);
    None where logs are missing."""
    verdict: str = ""
    note: str = ""


@dataclass(frozen=True)
class RunComparison:
    """All outcomes, in the order of names and k; what was left out, in words."""

    baseline: str | None
    ks: list[int]
    contenders: list[Contender]
    outcomes: list[Outcome]
    left_out: list[str]


def compare_runs(
    results: Path, baseline: str | None, ks: Sequence[int] | None, only: Sequence[str] | None = None
) -> RunComparison:
    """Every evaluated run of the folder, and how it differs from `baseline` (a key of `runs:`).

    ks: None for those of 1 and 4 that the number of samples allows. only: keys of `runs:` besides the baseline, None
    for all; p-values are corrected for the comparisons that are made. Raises RollwayError when nothing is evaluated,
    the baseline or a run asked for is not there, or k exceeds the samples.
    """
    lineage = inherited(read_runs(results))
    contenders, left_out = read_contenders(reading.evaluations(results, lineage), data.read(results))
    if not contenders:
        raise RollwayError(f"{results}: no run is evaluated yet; run the workflow first")
    if only is not None:
        wanted = dict.fromkeys([*([] if baseline is None else [baseline]), *only])
        contenders = [_named(contenders, name, "--runs", results) for name in wanted]
    chosen = _ks(contenders, ks)
    spent = _tokens(results, lineage, contenders)
    forks = {i.run for i in lineage}
    base = None if baseline is None else _named(contenders, baseline, "--baseline", results)
    outcomes = []
    for contender in contenders:
        seconds = _seconds(results, contender)
        notes = [contender.note] if contender.note else []
        if seconds is not None and any(run.run in forks for run in contender.runs):
            notes.append("seconds without the rounds taken from the fork's parent")
        for k in chosen:
            outcome = replace(
                _outcome(contender, base, k),
                tokens_per_seed=spent[contender.name],
                seconds_per_seed=seconds,
                note="; ".join(notes),
            )
            outcomes.append(outcome)
    return RunComparison(baseline, chosen, contenders, judged(outcomes), left_out)


def read_contenders(
    found: Mapping[str, Mapping[int, Counts]], runs: Sequence[data.Run]
) -> tuple[list[Contender], list[str]]:
    """Runs grouped by their key in `runs:`, and sentences about those that cannot take part."""
    contenders, left_out = [], []
    for name in dict.fromkeys(run.name for run in runs):
        all_seeds = [run for run in runs if run.name == name]
        evaluated = [run for run in all_seeds if run.run in found]
        shared = set.intersection(*(set(found[run.run]) for run in evaluated)) if evaluated else set()
        if not shared:
            left_out.append(f"{name}: " + ("its seeds share no evaluated round" if evaluated else "not evaluated yet"))
            continue
        evaluations = {r: {run.seed: found[run.run][r] for run in evaluated} for r in sorted(shared)}
        for round, seeds in evaluations.items():
            if len({frozenset(counts) for counts in seeds.values()}) > 1:
                raise RollwayError(
                    f"{name}: its seeds are evaluated on different prompts in round {round}; "
                    "rerun their evaluate stage with one held-out split"
                )
        notes = [f"seed {run.seed} not evaluated" for run in all_seeds if run.run not in found]
        planned = {int(run.info["rounds"]) for run in evaluated if "rounds" in run.info}
        if any(max(shared) < rounds for rounds in planned):
            notes.append(f"unfinished: round {max(shared)} of {max(planned)}")
        recipe = str(evaluated[0].info.get("recipe", ""))
        contenders.append(Contender(name, recipe, evaluated, evaluations, "; ".join(notes)))
    return contenders, left_out


def _named(contenders: Sequence[Contender], name: str, option: str, results: Path) -> Contender:
    by_name = {c.name: c for c in contenders}
    if name not in by_name:
        near = get_close_matches(name, by_name, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(by_name)}"
        raise RollwayError(f"{option} {name}: is not an evaluated run of {results}; {hint}")
    return by_name[name]


def figures(contender: Contender, round: int, k: int) -> NDArray[np.float64]:
    """pass@k [S, P] of every seed on every prompt (prompts in order of their ids)."""
    evaluated = contender.evaluations[round]
    prompts = sorted(next(iter(evaluated.values())))
    counts = [[evaluated[seed][p] for p in prompts] for seed in contender.seeds]
    values = {pair: pass_at_k(*pair, k) for pair in {pair for row in counts for pair in row}}
    return np.array([[values[pair] for pair in row] for row in counts])


def learning_curve(contender: Contender, k: int, resamples: int = 2000) -> list[tuple[int, Interval]]:
    """pass@k with its interval over seeds and prompts in every round that all seeds have evaluated."""
    return [
        (round, statistics.crossed_interval(figures(contender, round, k), resamples, CONFIDENCE))
        for round in contender.evaluations
    ]


def judged(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The outcomes with p-values corrected over all comparisons (Holm 1979) and a verdict each.

    A verdict needs both sources of noise to be ruled out, so the larger of the two p-values counts. With fewer than 5
    shared seeds there is none.
    """
    larger = {
        f"{o.name}@{o.k}": max(o.p_bootstrap, 0.0 if o.p_seeds is None else o.p_seeds)
        for o in outcomes
        if o.p_bootstrap is not None
    }
    corrected = holm(larger)
    done = []
    for o in outcomes:
        p = corrected.get(f"{o.name}@{o.k}")
        if p is None or o.difference is None:
            done.append(o)
        elif o.paired_seeds < SEEDS_FOR_A_CLAIM:
            done.append(replace(o, p_holm=p, verdict=f"fewer than {SEEDS_FOR_A_CLAIM} seeds: screening only"))
        elif p >= 1 - CONFIDENCE or o.difference == 0.0:
            done.append(replace(o, p_holm=p, verdict="no difference shown"))
        else:
            done.append(replace(o, p_holm=p, verdict="better" if o.difference > 0 else "worse"))
    return done


def rows(comparison: RunComparison) -> pa.Table:
    """The outcomes as a table, one row per run and k."""
    text, whole = ("name", "recipe", "verdict", "note"), ("k", "seeds", "round", "prompts", "paired_seeds")
    kinds = {name: pa.string() for name in text} | {name: pa.int64() for name in whole}
    schema = pa.schema([(field.name, kinds.get(field.name, pa.float64())) for field in fields(Outcome)])
    return pa.Table.from_pylist([asdict(outcome) for outcome in comparison.outcomes], schema=schema)


def _outcome(contender: Contender, base: Contender | None, k: int) -> Outcome:
    own = figures(contender, contender.final, k)
    over = statistics.crossed_interval(own, RESAMPLES, CONFIDENCE)
    outcome = Outcome(
        name=contender.name,
        recipe=contender.recipe,
        k=k,
        seeds=len(contender.seeds),
        round=contender.final,
        prompts=own.shape[1],
        value=over.value,
        low=over.low,
        high=over.high,
    )
    if base is None:
        return replace(outcome, verdict="no baseline named")
    if base.name == contender.name:
        return replace(outcome, verdict="baseline")
    obstacle = _obstacle(contender, base)
    if obstacle:
        return replace(outcome, verdict=f"not compared: {obstacle}")
    shared = sorted(set(contender.seeds) & set(base.seeds))
    pick = [[c.seeds.index(seed) for seed in shared] for c in (contender, base)]
    gaps = own[pick[0]] - figures(base, base.final, k)[pick[1]]
    means = statistics.crossed_means(gaps, RESAMPLES)
    low, high = statistics.ends(means, CONFIDENCE)
    p_seeds = statistics.seed_p(gaps.mean(axis=1))
    return replace(
        outcome,
        difference=float(gaps.mean()),
        difference_low=low,
        difference_high=high,
        paired_seeds=len(shared),
        p_bootstrap=statistics.bootstrap_p(means),
        p_seeds=None if math.isnan(p_seeds) else p_seeds,
    )


def _obstacle(a: Contender, b: Contender) -> str | None:
    """Why two runs cannot be compared fairly, if so."""
    if not set(a.seeds) & set(b.seeds):
        return "no seed in common with the baseline"
    prompts = [set(next(iter(c.evaluations[c.final].values()))) for c in (a, b)]
    if prompts[0] != prompts[1]:
        return f"other held-out prompts ({len(prompts[0] & prompts[1])} of {len(prompts[0] | prompts[1])} shared)"
    mine, theirs = (evaluation_settings(c.runs[0].info, c.final) for c in (a, b))
    other = [f"{name} {mine[name]} against {theirs[name]}" for name in mine if mine[name] != theirs[name]]
    return f"evaluated with other settings ({', '.join(other)})" if other else None


def _ks(contenders: Sequence[Contender], ks: Sequence[int] | None) -> list[int]:
    least = {c.name: min(n for seed in c.evaluations[c.final].values() for n, _ in seed.values()) for c in contenders}
    name = min(least, key=lambda n: least[n])
    if ks is None:
        return [k for k in (1, 4) if k <= least[name]]
    if min(ks) < 1:
        raise RollwayError(f"--k {min(ks)}: pass@k needs a k of at least 1")
    if max(ks) > least[name]:
        raise RollwayError(
            f"--k {max(ks)}: run {name} has {least[name]} samples of some prompt; lower --k or raise evaluate.samples"
        )
    return sorted(set(ks))


def _tokens(results: Path, lineage: Sequence[Inherited], contenders: Sequence[Contender]) -> dict[str, float | None]:
    """Tokens sampled per seed before the final round; None where the rollouts of a round are not there."""
    rounds = {(run.run, r) for c in contenders for run in c.runs for r in range(c.final)}
    found = reading.sampled_tokens(results, lineage, rounds)
    spent: dict[str, float | None] = {}
    for c in contenders:
        per_seed = [[found.get((run.run, r)) for r in range(c.final)] for run in c.runs]
        known = [n for seed in per_seed for n in seed if n is not None]
        whole = len(known) == len(c.runs) * c.final
        spent[c.name] = sum(known) / len(c.runs) if whole else None
    return spent


def _seconds(results: Path, contender: Contender) -> float | None:
    """Mean over seeds; None where one of them is not known."""
    # The workflow writes them beside the default results folder, and inside any other.
    logs = next((folder for folder in (results / "logs", results.parent / "logs") if folder.is_dir()), results / "logs")
    jobs: list[float] = []
    for run in contender.runs:
        seconds = reading.job_seconds(results, logs, run.run)
        if seconds is None:
            return None
        jobs += seconds
    return sum(jobs) / len(contender.runs)
