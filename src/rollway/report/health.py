"""What looks wrong, in plain words: each check says what it saw of a run, or that it could not see it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import duckdb

from rollway.report import symptoms
from rollway.report.data import Point, Points, Run
from rollway.report.facts import Facts

Level = Literal["bad", "watch", "good"]
ORDER: dict[Level, int] = {"bad": 0, "watch": 1, "good": 2}


@dataclass(frozen=True)
class Verdict:
    """What a check says of one run, or of the folder where `run` is empty."""

    run: str
    level: Level
    text: str


@dataclass(frozen=True)
class Check:
    """One check over all runs; `unknown` lists the runs of which the data says nothing."""

    title: str
    meaning: str
    verdicts: list[Verdict]
    unknown: list[str]

    @property
    def level(self) -> Level | None:
        return min((v.level for v in self.verdicts), key=ORDER.__getitem__, default=None)


OfRun = Callable[[str, Points], tuple[Level, str] | None]


def check(
    catalog: duckdb.DuckDBPyConnection, runs: Sequence[Run], points: Points, facts: Facts, gaps: Mapping[str, str]
) -> list[Check]:
    """All checks, the worst first. `catalog` has the temporary tables `facts`, `counted` and `said`; gaps: run -> which
    rounds of which stages are missing."""
    found = [_each_run(title, meaning, judge, runs, points) for title, meaning, judge in OF_CURVES]
    found += [
        _from_rows(
            "Duplicates", "Rollouts that repeat another of their group word for word.", runs, _duplicates(catalog)
        ),
        _from_rows(
            "Reward parts",
            "Whether scorers, or the parts of one, disagree on the same rollouts: what one rewards, another punishes.",
            runs,
            _conflicts(catalog, runs, facts),
        ),
        _from_rows("Scorer errors", "Rollouts on which a scorer failed.", runs, _errors(catalog, facts)),
        Check("Leak", "Held-out prompts that are also trained on.", _worst_first(_leak(catalog, runs)), []),
        _whole(runs, gaps),
        *_checked(runs, points),
    ]
    return sorted(found, key=lambda c: 3 if c.level is None else ORDER[c.level])


def _each_run(title: str, meaning: str, judge: OfRun, runs: Sequence[Run], points: Points) -> Check:
    return _from_rows(title, meaning, runs, {run.run: found for run in runs if (found := judge(run.run, points))})


def _from_rows(title: str, meaning: str, runs: Sequence[Run], found: dict[str, tuple[Level, str]]) -> Check:
    verdicts = [Verdict(run.run, *found[run.run]) for run in runs if run.run in found]
    unknown = [run.run for run in runs if run.run not in found]
    return Check(title, meaning, _worst_first(verdicts), unknown)


def _worst_first(verdicts: Iterable[Verdict]) -> list[Verdict]:
    return sorted(verdicts, key=lambda v: ORDER[v.level])


def ends(series: Sequence[Point]) -> tuple[float, float, int]:
    """Mean of the first and of the last quarter of the rounds (at least one), and how many rounds a quarter is."""
    quarter = max(1, len(series) // 4)
    first, last = series[:quarter], series[-quarter:]
    return sum(p.value for p in first) / quarter, sum(p.value for p in last) / quarter, quarter


def level_of(value: float, watch: float, bad: float) -> Level:
    return "bad" if value > bad else "watch" if value > watch else "good"


def _series(points: Points, run: str, *names: tuple[str, str]) -> list[Point] | None:
    return next((points[name][run] for name in names if points.get(name, {}).get(run)), None)


def _when(quarter: int) -> str:
    return "In the last round" if quarter == 1 else f"Over the last {quarter} rounds"


def signal(run: str, points: Points) -> tuple[Level, str] | None:
    series = _series(points, run, ("curate", "groups_with_signal_share"))
    if series is None:
        return None
    first, last, quarter = ends(series)
    text = f"{_when(quarter)} {1 - last:.0%} of the groups taught nothing, because all their rewards were equal"
    text += f" (at the start {1 - first:.0%})."
    right, wrong, groups = (
        _series(points, run, ("curate", f"groups{name}")) for name in ("_all_correct", "_none_correct", "")
    )
    if right and wrong and groups and 1 - last > 0.5:
        easy, hard = (ends(part)[1] / max(1.0, ends(groups)[1]) for part in (right, wrong))
        text += f" {easy:.0%} were right throughout and {hard:.0%} wrong throughout:"
        text += " the prompts are too easy now." if easy > hard else " too hard for this policy, or it has collapsed."
    return level_of(1 - last, 0.5, 0.8), text


def entropy(run: str, points: Points) -> tuple[Level, str] | None:
    series = _series(points, run, ("train", "entropy_old"), ("train", "entropy"))
    if series is None:
        return None
    first, last, _ = ends(series)
    text = f"Entropy went from {first:.3g} to {last:.3g} nats per token."
    fallen = 1 - last / first if first > 0 else 0.0
    if fallen > 0.6:
        text += " Samples of one prompt hardly differ any more, so that little is left to compare."
    return level_of(fallen, 0.6, 0.9), text


def length(run: str, points: Points) -> tuple[Level, str] | None:
    lengths = _series(points, run, ("curate", "length_mean"))
    rewards = _series(points, run, ("curate", "reward_mean"), ("curate", "reward"))
    if lengths is None or rewards is None:
        return None
    (short, long, _), (before, after, _) = ends(lengths), ends(rewards)
    growth = long / short - 1 if short > 0 else 0.0
    text = f"Length went from {short:.4g} to {long:.4g} tokens, reward from {before:.3g} to {after:.3g}."
    gained = after - before > 0.02 * max(1.0, abs(before))
    if growth > 0.25 and not gained:
        return level_of(growth, 0.25, 1.0), f"{text} Completions grow and earn nothing by it."
    return "good", text


def truncated(run: str, points: Points) -> tuple[Level, str] | None:
    series = _series(points, run, ("curate", "truncated_share"), ("evaluate", "truncated"))
    if series is None:
        return None
    first, last, quarter = ends(series)
    text = f"{_when(quarter)} {last:.1%} of the rollouts were cut at the token limit (at the start {first:.1%})."
    if last > 0.1:
        text += " What was cut is mostly scored as wrong: raise `max_tokens`, or weigh length."
    return level_of(last, 0.1, 0.3), text


def mismatch(run: str, points: Points) -> tuple[Level, str] | None:
    series = _series(points, run, ("train", "gap_mean"))
    if series is None:
        return None
    worst = max(series, key=lambda point: point.value)
    text = f"The engine's and the trainer's log-probs differ by at most {worst.value:.2g} nats per token on average"
    text += f" (round {worst.round})."
    if worst.value > 0.05:
        text += " The rollouts are then not quite the policy's: `train.objective.correction` can weigh that."
    return level_of(worst.value, 0.05, 0.2), text


def clipped(run: str, points: Points) -> tuple[Level, str] | None:
    series = _series(points, run, ("train", "clip_share"), ("train", "gate_share"))
    if series is None:
        return None
    _, last, quarter = ends(series)
    return level_of(last, 0.3, 0.6), f"{_when(quarter)} the gate held back {last:.1%} of the tokens."


def gradient(run: str, points: Points) -> tuple[Level, str] | None:
    series = _series(points, run, ("train", "grad_norm"))
    if series is None:
        return None
    norms = sorted(point.value for point in series)
    median, worst = norms[len(norms) // 2], max(series, key=lambda point: point.value)
    spike = worst.value / median if median > 0 else 0.0
    text = f"Median norm {median:.3g}; the largest, {worst.value:.3g}, was in round {worst.round}."
    return level_of(spike, 10, 100), text


def heldout(run: str, points: Points) -> tuple[Level, str] | None:
    series = _series(points, run, ("evaluate", "pass@1"))
    if series is None or len(series) < 2:
        return None
    first, last, best = series[0], series[-1], max(series, key=lambda point: point.value)
    text = f"Held-out pass@1 went from {first.value:.3f} to {last.value:.3f}"
    text += f"; best {best.value:.3f} in round {best.round}."
    if last.high is not None and first.low is not None and last.high < first.low:
        return "bad", f"{text} The policy is now worse than the one it started from."
    if best.low is not None and last.value < best.low:
        return "watch", f"{text} It has fallen below the best round's interval since."
    return "good", text


OF_CURVES: tuple[tuple[str, str, OfRun], ...] = (
    ("Signal", "Groups whose rewards differ: only they teach a group-relative method anything.", signal),
    ("Entropy", "How much the policy still varies; when it collapses, exploration ends.", entropy),
    ("Length", "Whether completions grow without earning more reward.", length),
    ("Truncation", "Rollouts cut at the token limit.", truncated),
    ("Engine and trainer", "Whether both compute the same log-probs for the same tokens.", mismatch),
    ("Clipping", "Tokens whose policy ratio the gate holds back.", clipped),
    ("Gradient", "Spikes of the gradient norm, before clipping.", gradient),
    ("Held-out", "Whether what is learned holds on prompts that are not trained on.", heldout),
)


def _duplicates(catalog: duckdb.DuckDBPyConnection) -> dict[str, tuple[Level, str]]:
    found: dict[str, tuple[Level, str]] = {}
    for run, rounds, share, wrong, tokens in symptoms.duplicates(catalog):
        text = f"{_when(rounds)} {share:.0%} of the rollouts repeat another of their group word for word"
        text += "." if wrong is None else f"; among the wrong ones {wrong:.0%}."
        # Short right answers are the same by nature; long ones, or the same mistake again and again, are not.
        telling = max(share if tokens > 32 else 0.0, wrong or 0.0)
        found[run] = level_of(telling, 0.5, 0.9), text
    return found


def _conflicts(catalog: duckdb.DuckDBPyConnection, runs: Sequence[Run], facts: Facts) -> dict[str, tuple[Level, str]]:
    found: dict[str, tuple[Level, str]] = {}
    of_run = symptoms.correlations(catalog, list(combinations(facts.scorers, 2)))
    for run, pairs in symptoms.part_correlations(catalog, list(_teachers(runs))).items():
        of_run[run] = of_run.get(run, {}) | pairs
    for run, pairs in of_run.items():
        (one, other), lowest = min(pairs.items(), key=lambda pair: pair[1])
        text = f"Within groups, {one} and {other} correlate by {lowest:+.2f}."
        if lowest < -0.3:
            text += f" Rollouts that {one} rewards are those that {other} punishes."
        found[run] = level_of(-lowest, 0.3, 0.6), text
    return found


def _checked(runs: Sequence[Run], points: Points) -> list[Check]:
    """Of each run what the last look at each of its teachers found; no check at all where none was looked at."""
    scorers = [n.removesuffix("/better") for stage, n in points if stage == "check_teacher" and n.endswith("/better")]
    looks = [(run.run, s, points["check_teacher", f"{s}/better"].get(run.run)) for run in runs for s in scorers]
    verdicts = [_of_teacher(points, run, scorer, series[-1]) for run, scorer, series in looks if series]
    meaning = "Whether teachers are right more often than the policy that is trained on what they say."
    return [Check("Teacher", meaning, _worst_first(verdicts), [])] if verdicts else []


def _of_teacher(points: Points, run: str, scorer: str, better: Point) -> Verdict:
    def figure(name: str) -> Point | None:
        series = points.get(("check_teacher", f"{scorer}/{name}"), {}).get(run, [])
        return next((point for point in series if point.round == better.round), None)

    teacher, policy, difference = figure("teacher"), figure("policy"), figure("difference")
    if teacher is None or policy is None or difference is None:
        text = f"{scorer} could not be compared with the policy in round {better.round}: no rollout has its context."
        return Verdict(run, "watch", text)
    text = f"In round {better.round} {scorer} was right on {teacher.value:.1%} of the answers, the policy on "
    text += f"{policy.value:.1%}"
    if better.value:
        return Verdict(run, "good", f"{text}.")
    worse = difference.high is not None and difference.high < 0
    return Verdict(run, "bad" if worse else "watch", f"{text}: what it says cannot be expected to help.")


def _teachers(runs: Sequence[Run]) -> Iterable[tuple[str, str]]:
    """(run, scorer) of teachers: what they say of a rollout is not a reward in parts."""
    for run in runs:
        scorers = ((run.info.get("config") or {}).get("score") or {}).get("scorers") or {}
        yield from ((run.run, name) for name, scorer in scorers.items() if scorer.get("kind") == "teacher")


def _errors(catalog: duckdb.DuckDBPyConnection, facts: Facts) -> dict[str, tuple[Level, str]]:
    found: dict[str, tuple[Level, str]] = {}
    for run, scored, failed, scorer, example in symptoms.scorer_errors(catalog, facts.scorers):
        text = f"No scorer failed on any of {scored:,} verdicts."
        if failed:
            text = f"{failed:,} of {scored:,} verdicts failed; {scorer}, for example, said: {str(example)[:200]}"
        found[run] = level_of(failed / scored, 0.0, 0.05), text
    return found


def _leak(catalog: duckdb.DuckDBPyConnection, runs: Sequence[Run]) -> Iterable[Verdict]:
    for task, heldout_prompts, leaked, train_prompts, repeated, elsewhere in symptoms.leaks(catalog):
        text = f"Task {task}: {leaked:,} of {heldout_prompts:,} held-out prompts are also in its train split"
        text += "".join(f", {count:,} in that of {other}" for other, count in elsewhere.items())
        text += f"; {repeated:,} of {train_prompts:,} train prompts repeat another one."
        # Whether a run trains on another task's prompts is seen in its rollouts.
        level: Level = "bad" if leaked else "watch" if repeated or elsewhere else "good"
        yield Verdict("", level, text)
    known = {run.run for run in runs}
    for run, asked, leaked in symptoms.trained_on_heldout(catalog):
        if run in known:
            text = f"{leaked:,} of the {asked:,} prompts that it is evaluated on are among those of its rollouts."
            yield Verdict(run, "bad" if leaked else "good", text)


def _whole(runs: Sequence[Run], gaps: Mapping[str, str]) -> Check:
    behind = [Verdict(run.run, "watch", f"Missing: {gaps[run.run]}.") for run in runs if run.run in gaps]
    rest = [run for run in runs if run.run not in gaps]
    done = [Verdict(run.run, "good", "All rounds are there.") for run in rest if "rounds" in run.info]
    meaning = "Whether all rounds of the config are there; a run may be going on, have failed or have been stopped."
    return Check("Completeness", meaning, [*behind, *done], [run.run for run in rest if "rounds" not in run.info])
