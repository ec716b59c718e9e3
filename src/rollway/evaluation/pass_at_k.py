"""pass@k, avg@k and maj@k of one prompt's samples, and the area under pass@k."""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from math import comb, exp, log

import numpy as np

from rollway.errors import RollwayError


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k of n samples, drawn without replacement, hold one of the c right ones (arXiv 2107.03374, eq.
    1).

    Unbiased for the chance that k fresh samples solve the prompt. Raises RollwayError when k > n: no unbiased estimate
    exists.
    """
    _check(n, c, k, "pass")
    return 1.0 - comb(n - c, k) / comb(n, k)


def avg_at_k(correct: Sequence[bool]) -> float:
    """Share of right samples: avg@n of the n samples given, equal to pass@1."""
    if not correct:
        raise RollwayError("avg@k needs at least one sample")
    return sum(map(bool, correct)) / len(correct)


def pass_auc(curve: Mapping[int, float]) -> float:
    """Area under log pass@k over log k, k -> pass@k (a mean over prompts), as the pass@k it stands for: in [0, 1].

    exp of the trapezoid integral of log pass@k between the smallest and the largest k, divided by their distance in
    log k: the geometric mean of pass@k over log k, and pass@k itself where it is constant. 0 where some pass@k is 0.
    NGRPO (arXiv 2509.18851) names a log-log area; this form of it is reconstructed. Raises RollwayError with fewer than
    two k.
    """
    ks = sorted(curve)
    if len(ks) < 2:
        raise RollwayError("the area under pass@k needs at least two k; give evaluate.k more of them")
    if min(curve.values()) <= 0.0:
        return 0.0
    area = sum((log(curve[a]) + log(curve[b])) / 2 * log(b / a) for a, b in pairwise(ks))
    return exp(area / log(ks[-1] / ks[0]))


def maj_at_k(answers: Sequence[str], correct: Sequence[bool], k: int) -> float:
    """Chance that the most frequent answer of k samples is right (self-consistency, arXiv 2203.11171).

    The exact expectation over all C(n, k) subsets of the n samples, so no luck of the draw or of the order enters;
    answers that tie for most votes are equally likely to be taken. Answers are compared after `normalise`. An answer
    that the verifier judged differently from sample to sample counts with its share of right verdicts. Raises
    RollwayError when k > n.
    """
    n = len(answers)
    if len(correct) != n:
        raise RollwayError(f"maj@k: {n} answers but {len(correct)} verdicts")
    _check(n, 0, k, "maj")
    votes: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for answer, good in zip(answers, correct, strict=True):
        votes[normalise(answer)] += 1
        right[normalise(answer)] += bool(good)
    return _majority(tuple(sorted((votes[a], right[a] / votes[a]) for a in votes)), k)


def normalise(answer: str) -> str:
    """An answer as votes are counted: white space collapsed, case folded, a closing full stop dropped."""
    return " ".join(answer.split()).casefold().removesuffix(".").rstrip()


@lru_cache(maxsize=4096)
def _majority(classes: tuple[tuple[int, float], ...], k: int) -> float:
    """`classes`: (votes, share right) of each distinct answer.

    For every size m of the winning vote: ways[total, tied] counts the ways to draw `total` samples with no answer above
    m votes and `tied` answers at exactly m; good[total, tied] is the same, weighted by the sum of the tied answers'
    shares right.
    """
    expected = 0.0
    for m in range(1, k + 1):
        most_tied = k // m
        ways, good = np.zeros((k + 1, most_tied + 1)), np.zeros((k + 1, most_tied + 1))
        ways[0, 0] = 1.0
        for votes, share in classes:
            new_ways, new_good = ways.copy(), good.copy()
            for drawn in range(1, min(votes, m, k) + 1):
                choices, rest = float(comb(votes, drawn)), k + 1 - drawn
                if drawn < m:
                    new_ways[drawn:] += choices * ways[:rest]
                    new_good[drawn:] += choices * good[:rest]
                else:
                    new_ways[drawn:, 1:] += choices * ways[:rest, :-1]
                    new_good[drawn:, 1:] += choices * (good[:rest, :-1] + share * ways[:rest, :-1])
            ways, good = new_ways, new_good
        expected += sum(good[k, tied] / tied for tied in range(1, most_tied + 1))
    return float(min(1.0, expected / comb(sum(votes for votes, _ in classes), k)))


def _check(n: int, c: int, k: int, what: str) -> None:
    if k < 1:
        raise RollwayError(f"{what}@{k}: k must be at least 1")
    if k > n:
        raise RollwayError(
            f"{what}@{k} of {n} samples has no unbiased estimate: raise evaluate.samples to {k}, or lower evaluate.k"
        )
    if not 0 <= c <= n:
        raise RollwayError(f"{what}@{k}: {c} right of {n} samples is impossible")
