"""What a difference between runs is worth: a bootstrap over seeds and prompts together, and a t-test over seeds."""

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from rollway.errors import RollwayError
from rollway.evaluation import Interval

_CHUNK = 512


def crossed_means(values: NDArray[np.float64], resamples: int) -> NDArray[np.float64]:
    """Means of `resamples` draws of seeds and, independently, of prompts, both with replacement. values [S, P] -> [R].

    Every seed is evaluated on the same prompts, so both are drawn once per resample and the cells where they cross are
    averaged (the pigeonhole bootstrap: Owen 2007, arXiv 0712.1111). One seed is drawn as it is: prompts alone vary.
    """
    values = np.asarray(values, dtype=np.float64)
    if not values.size:
        raise RollwayError("bootstrap: there are no seeds or no prompts to draw from")
    seeds, prompts = _draws(*values.shape, resamples)
    means = [
        ((seeds[start : start + _CHUNK] @ values) * prompts[start : start + _CHUNK]).sum(axis=1)
        for start in range(0, resamples, _CHUNK)
    ]
    return np.concatenate(means) / values.size


@lru_cache(maxsize=2)
def _draws(seeds: int, prompts: int, resamples: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """How often each seed [R, S] and each prompt [R, P] is drawn; the same for every run, on every machine."""
    rng = np.random.Generator(np.random.PCG64(0))
    drawn = [rng.multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float32) for n in (seeds, prompts)]
    return drawn[0], drawn[1]


def crossed_interval(values: NDArray[np.float64], resamples: int, confidence: float) -> Interval:
    """The mean over seeds and prompts with its percentile interval. values [S, P]."""
    low, high = ends(crossed_means(values, resamples), confidence)
    return Interval(float(np.mean(values)), low, high)


def ends(means: NDArray[np.float64], confidence: float) -> tuple[float, float]:
    """Percentiles of resampled means that hold `confidence` of them."""
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def bootstrap_p(means: NDArray[np.float64]) -> float:
    """Two-sided: both tails of the resampled means around 0, with the +1 that keeps R draws from claiming p = 0."""
    tail = min(np.count_nonzero(means <= 0), np.count_nonzero(means >= 0))
    return float(min(1.0, 2 * (tail + 1) / (len(means) + 1)))


def seed_p(gaps: NDArray[np.float64]) -> float:
    """Two-sided p of Student's paired t-test over seeds. gaps [S], one mean difference per seed; NaN for one seed.

    Few resampled seeds vary too little (by (S - 1) / S, and with normal tails), which makes a bootstrap alone too sure.
    """
    count = len(gaps)
    if count < 2:
        return math.nan
    mean, deviation = float(np.mean(gaps)), float(np.std(gaps, ddof=1))
    if deviation == 0.0:
        return 1.0 if mean == 0.0 else 0.0
    return student_tails(mean / (deviation / math.sqrt(count)), count - 1)


def student_tails(t: float, degrees: int) -> float:
    """P(|T| >= |t|) for whole degrees of freedom (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4)."""
    angle = math.atan(abs(t) / math.sqrt(degrees))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = degrees % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for n in range(2 + odd, degrees + 1, 2):
        total += term
        term *= square * (n - 1) / n
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return min(1.0, max(0.0, 1.0 - inside))
