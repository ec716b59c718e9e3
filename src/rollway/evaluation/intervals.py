"""Bootstrap intervals over prompts, paired differences between runs, and correction for many comparisons."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rollway.errors import RollwayError

_CHUNK = 64


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its interval, in the units of the values."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """Mean of b - a over shared prompts, its interval, a two-sided bootstrap p-value, and prompts that moved."""

    value: float
    low: float
    high: float
    p_value: float
    prompts: int
    better: int
    worse: int


def bootstrap_means(values: NDArray[np.float64], resamples: int, seed: int = 0) -> NDArray[np.float64]:
    """Means of `resamples` draws with replacement. values [P] or [P, M] (M figures of the same P prompts) ->
    [resamples] or [resamples, M].

    Prompts are the unit that is drawn: samples of one prompt are not independent. Seeded; the same on every machine.
    """
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        raise RollwayError("bootstrap: there are no prompts to draw from")
    rng = np.random.Generator(np.random.PCG64(seed))
    means = []
    for start in range(0, resamples, _CHUNK):
        drawn = rng.integers(len(values), size=(min(_CHUNK, resamples - start), len(values)))
        means.append(values[drawn].mean(axis=1))
    return np.concatenate(means)


def interval(
    values: Sequence[float] | NDArray[np.float64], resamples: int, confidence: float, seed: int = 0
) -> Interval:
    """The mean over prompts with its percentile bootstrap interval (Efron and Tibshirani 1993, section 13.3)."""
    array = np.asarray(values, dtype=np.float64)
    low, high = _ends(bootstrap_means(array, resamples, seed), confidence)
    return Interval(float(array.mean()), low, high)


def paired_difference(
    a: Mapping[str, float], b: Mapping[str, float], resamples: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> Difference:
    """b - a over the same prompts: both are drawn together, so the prompts' difficulty cancels.

    a, b: prompt_id -> figure (pass@1 of that prompt, say). Raises RollwayError when they are not over the same prompts.
    """
    if a.keys() != b.keys():
        only = sorted(a.keys() ^ b.keys())
        raise RollwayError(
            f"paired comparison: {len(only)} prompts are in one run only ({', '.join(only[:3])}); "
            "evaluate both on the same prompts"
        )
    gaps = np.array([b[prompt] - a[prompt] for prompt in sorted(a)], dtype=np.float64)
    means = bootstrap_means(gaps, resamples, seed)
    low, high = _ends(means, confidence)
    # Both tails of the resampled means around 0, with the +1 that keeps a finite number of draws from claiming p = 0.
    tail = min(np.count_nonzero(means <= 0), np.count_nonzero(means >= 0))
    p_value = min(1.0, 2 * (tail + 1) / (resamples + 1))
    moved = [int(np.count_nonzero(gaps > 0)), int(np.count_nonzero(gaps < 0))]
    return Difference(float(gaps.mean()), low, high, float(p_value), len(gaps), *moved)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjusted p-values (Holm 1979): those below alpha hold together with error at most alpha."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    ordered = sorted(p_values.items(), key=lambda item: (item[1], item[0]))
    for rank, (name, p_value) in enumerate(ordered):
        largest = max(largest, min(1.0, (len(ordered) - rank) * p_value))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def _ends(means: NDArray[np.float64], confidence: float) -> tuple[float, float]:
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
