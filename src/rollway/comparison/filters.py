"""PF-PPO's filters (arXiv 2409.06957) on stored scored rollouts: whose reward predicts the true score best."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rollway.comparison import stored as files
from rollway.comparison.stored import StoredRound
from rollway.config.curation import CurateConfig
from rollway.curation import curate
from rollway.errors import RollwayError
from rollway.evaluation import filter_fit
from rollway.evaluation.filter_fit import FilterFit, Numbers
from rollway.store import parquet


@dataclass(frozen=True)
class Filter:
    """A way to weight responses by their rewards: `curate.weight` of a recipe."""

    name: str
    weight: dict[str, Any]
    keeps_negatives: bool
    """Whether responses of low reward stay in the batch; without them the policy has nothing to move away from."""


@dataclass(frozen=True)
class FilterComparison:
    """Filters in order; those that could not be fitted have a sentence instead."""

    run: str
    rounds: list[int]
    reward: str
    truth: str
    bins: int
    rollouts: int
    groups: int
    failed: int
    """Rollouts on which one of the scorers failed: their score is stored as 0."""
    filters: list[Filter]
    fits: dict[str, FilterFit]
    reasons: dict[str, str]
    chosen: str | None


def filters(high: float | None, low: float | None) -> list[Filter]:
    """By rank and by power; by threshold where thresholds are given. Raises RollwayError on thresholds amiss."""
    found = [
        Filter("none", {"sql": "pf_ppo", "keep": "none"}, True),
        Filter("bon", {"sql": "pf_ppo", "keep": "bon"}, False),
        Filter("br", {"sql": "pf_ppo", "keep": "br"}, True),
        Filter("bw", {"sql": "pf_ppo", "keep": "bw"}, True),
        *(Filter(f"pow-{k}", {"sql": "power", "k": k}, True) for k in (1, 2, 3)),
    ]
    if high is None and low is not None:
        raise RollwayError("--low: needs --high, the least reward of the top")
    if high is not None and low is not None and low >= high:
        raise RollwayError(f"--low {low:g}: is not below --high {high:g}")
    if high is not None:
        found.append(Filter("top", {"sql": "threshold", "keep": "top", "high": high}, False))
        found.append(Filter("top_random", {"sql": "threshold", "keep": "top_random", "high": high}, True))
    if high is not None and low is not None:
        both = {"sql": "threshold", "keep": "top_bottom", "high": high, "low": low}
        found.append(Filter("top_bottom", both, True))
    return found


def compare_filters(
    results: Path,
    run: str,
    rounds: Sequence[int],
    reward: str,
    truth: str,
    *,
    bins: int = filter_fit.BINS,
    high: float | None = None,
    low: float | None = None,
) -> FilterComparison:
    """R^2 of every filter on the rollouts of these rounds, taken as one buffer, and the filter that it chooses.

    reward, truth: scorers whose scores are stored. high, low: rewards from and up to which the threshold filters keep.
    Raises RollwayError when run, round or scores are not there, or no filter can be fitted; what one filter alone lacks
    becomes its reason.
    """
    if reward == truth:
        raise RollwayError(f"--truth {truth}: is the reward itself; name the scorer of the true score")
    if not filter_fit.LEAST_BINS <= bins <= filter_fit.MOST_BINS:
        raise RollwayError(f"--bins {bins}: give {filter_fit.LEAST_BINS} to {filter_fit.MOST_BINS}")
    tried = filters(high, low)
    table, failed = scored(results, run, rounds, reward, truth)
    rewards = table.column("reward").to_numpy()
    if rewards.min() == rewards.max():
        raise RollwayError(
            f"--reward {reward}: every rollout of {run} has the reward {rewards[0]:g}, so no filter can be told from "
            "another; take other rounds or another scorer"
        )
    fits, reasons = {}, {}
    for one in tried:
        try:
            numbers = weighted(table, one.weight)
            if one.weight["sql"] == "threshold":
                _check_threshold(one, numbers)
            fits[one.name] = filter_fit.fit_filter(*numbers, bins=bins)
        except RollwayError as error:
            reasons[one.name] = str(error)
    if not fits:
        raise RollwayError(f"--reward {reward}, --truth {truth}: no filter can be fitted; {_each(reasons)}")
    return FilterComparison(
        run=run,
        rounds=list(rounds),
        reward=reward,
        truth=truth,
        bins=bins,
        rollouts=table.num_rows,
        groups=len(table.column("group_id").unique()),
        failed=failed,
        filters=tried,
        fits=fits,
        reasons=reasons,
        chosen=filter_fit.best_filter(fits, {one.name for one in tried if one.keeps_negatives}),
    )


def weighted(table: pa.Table, weight: dict[str, Any]) -> tuple[Numbers, Numbers, Numbers]:
    """Reward, true score and weight [N] of the rollouts, weighted by the SQL that a recipe's `curate.weight` names."""
    batch = curate(table, CurateConfig.model_validate({"weight": weight}))
    truth = dict(zip(table.column("rollout_id").to_pylist(), table.column("truth").to_pylist(), strict=True))
    ids = batch.column("rollout_id").to_pylist()
    return batch.column("reward").to_numpy(), np.array([truth[i] for i in ids]), batch.column("weight").to_numpy()


def _check_threshold(one: Filter, numbers: tuple[Numbers, Numbers, Numbers]) -> None:
    """Raises RollwayError where all rollouts weigh the same: the line would be that of `none` under another name."""
    reward, _, weight = numbers
    if weight.min() < weight.max():
        return
    high = one.weight["high"]
    if reward.max() < high:
        raise RollwayError(f"no reward reaches {high:g} (the largest is {reward.max():g}), so all weigh the same")
    raise RollwayError("it keeps every rollout, so all weigh the same, as under none")


def scored(results: Path, run: str, rounds: Sequence[int], reward: str, truth: str) -> tuple[pa.Table, int]:
    """rollout_id, group_id, sample, reward and truth of the rounds' rollouts, and on how many a scorer failed.

    Raises RollwayError.
    """
    tables, failed = [], 0
    for round in dict.fromkeys(rounds):
        stored = files.open_round(results, run, round, imported=True)
        narrow = [parquet.read(path, ["rollout_id", "group_id", "sample"]) for path in stored.rollouts(round)]
        table = pa.concat_tables(narrow)
        if table.num_rows == 0:
            raise RollwayError(f"--rounds {round}: run {run} has no rollouts in that round")
        ids = table.column("rollout_id").to_pylist()
        bad: set[str] = set()
        for column, scorer, option in (("reward", reward, "--reward"), ("truth", truth, "--truth")):
            verdicts, errors = _scores(stored, round, scorer, option)
            missing = [i for i in ids if i not in verdicts]
            if missing:
                raise RollwayError(
                    f"{option} {scorer}: {len(missing)} rollouts of round {round} have no score (the first: "
                    f"{missing[0]}); run its score jobs again"
                )
            unknown = [i for i in ids if not math.isfinite(verdicts[i])]
            if unknown:
                raise RollwayError(
                    f"{option} {scorer}: the score of rollout {unknown[0]} is {verdicts[unknown[0]]} ({len(unknown)} "
                    f"in round {round}); mend the scorer"
                )
            bad |= errors & set(ids)
            table = table.append_column(column, pa.array([verdicts[i] for i in ids], pa.float64()))
        failed += len(bad)
        tables.append(table)
    return pa.concat_tables(tables), failed


def _scores(stored: StoredRound, round: int, scorer: str, option: str) -> tuple[dict[str, float], set[str]]:
    """Scores of one scorer by rollout, and the rollouts on which it failed."""
    paths = stored.scores(round, scorer)
    if not paths:
        known = stored.scorers(round)
        raise RollwayError(
            f"{option} {scorer}: run {stored.run} has no scores of it in round {round}; "
            + (f"it has {', '.join(known)}" if known else "it has none")
        )
    verdicts, errors = {}, set()
    for path in paths:
        for row in parquet.read(path, ["rollout_id", "reward", "error"]).to_pylist():
            verdicts[row["rollout_id"]] = row["reward"]
            if row["error"] is not None:
                errors.add(row["rollout_id"])
    return verdicts, errors


def rows(comparison: FilterComparison) -> pa.Table:
    """One row per filter; numbers are null where there is a reason."""
    out = []
    for one in comparison.filters:
        fit = comparison.fits.get(one.name)
        numbers: dict[str, Any] = {}
        if fit is not None:
            numbers = {"r2": fit.line.r2, "slope": fit.line.slope, "intercept": fit.line.intercept}
            numbers |= {"bins": fit.bins, "rows": fit.rows}
            numbers |= {"mean_reward": fit.mean_reward, "mean_truth": fit.mean_truth}
        flags = {"keeps_negatives": one.keeps_negatives, "chosen": one.name == comparison.chosen}
        out.append({"filter": one.name, **numbers, **flags, "reason": comparison.reasons.get(one.name)})
    kinds = {
        **{"filter": pa.string(), "r2": pa.float64(), "slope": pa.float64(), "intercept": pa.float64()},
        **{"bins": pa.int64(), "rows": pa.int64(), "mean_reward": pa.float64(), "mean_truth": pa.float64()},
        **{"keeps_negatives": pa.bool_(), "chosen": pa.bool_(), "reason": pa.string()},
    }
    return pa.Table.from_pylist(out, pa.schema(list(kinds.items())))


def _each(reasons: dict[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
