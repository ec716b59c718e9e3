from collections import Counter
from itertools import combinations
from statistics import mean

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollway.errors import RollwayError
from rollway.evaluation.pass_at_k import avg_at_k, maj_at_k, normalise, pass_at_k, pass_auc


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_mean_over_all_subsets(n):
    for c in range(n + 1):
        samples = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            assert pass_at_k(n, c, k) == pytest.approx(mean(any(s) for s in combinations(samples, k)), abs=1e-12)


def test_pass_at_k_is_unbiased():
    # Sum over the binomial distribution of c: the expectation must be the closed form 1 - (1 - p)^k.
    from math import comb

    n, p = 9, 0.3
    for k in range(1, n + 1):
        expected = sum(comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
        assert expected == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


def test_pass_at_k_of_many_samples_is_exact():
    assert pass_at_k(4096, 1, 1024) == pytest.approx(0.25, abs=1e-12)


@pytest.mark.parametrize("call", [lambda: pass_at_k(4, 2, 5), lambda: maj_at_k(["a"] * 4, [True] * 4, 5)])
def test_k_above_n_is_refused(call):
    with pytest.raises(RollwayError, match=r"raise evaluate\.samples to 5"):
        call()


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0)])
def test_impossible_counts_are_refused(n, c, k):
    with pytest.raises(RollwayError):
        pass_at_k(n, c, k)


def by_enumeration(answers, right, k):
    chances = []
    for chosen in combinations(range(len(answers)), k):
        votes = Counter(answers[i] for i in chosen)
        top = [a for a, v in votes.items() if v == max(votes.values())]
        chances.append(sum(a in right for a in top) / len(top))
    return mean(chances)


@settings(max_examples=80, deadline=None)
@given(answers=st.lists(st.sampled_from("abcd"), min_size=1, max_size=8), right=st.sets(st.sampled_from("abcd")))
def test_maj_at_k_is_the_mean_over_all_subsets(answers, right):
    for k in range(1, len(answers) + 1):
        found = maj_at_k(answers, [a in right for a in answers], k)
        assert found == pytest.approx(by_enumeration(answers, right, k), abs=1e-10)


def test_maj_at_1_is_avg():
    answers, correct = ["4", "5", "4", "6"], [True, False, True, False]
    assert maj_at_k(answers, correct, 1) == pytest.approx(avg_at_k(correct)) == pytest.approx(0.5)


def test_maj_at_k_of_many_samples_is_fast_and_in_range():
    rng = np.random.default_rng(0)
    answers = [str(a) for a in rng.integers(0, 40, 64)]
    assert 0.0 <= maj_at_k(answers, [a == "3" for a in answers], 64) <= 1.0


def test_votes_are_counted_over_normalised_answers():
    assert normalise("  The  Answer. ") == normalise("the answer")
    assert maj_at_k(["Yes.", " yes", "no"], [True, True, False], 3) == 1.0


def test_avg_needs_samples():
    with pytest.raises(RollwayError):
        avg_at_k([])


def test_pass_auc_is_a_mean_of_log_pass_at_k_over_log_k():
    assert pass_auc({1: 0.3, 4: 0.3, 256: 0.3}) == pytest.approx(0.3)
    # A power law is a straight line: the area is the value in the middle, 0.1 * 16^0.25 at k = 16.
    line = {k: 0.1 * k**0.25 for k in (1, 2, 4, 8, 16, 32, 64, 128, 256)}
    assert pass_auc(line) == pytest.approx(0.2)
    assert pass_auc({1: line[1], 256: line[256]}) == pytest.approx(0.2)
    # Unequal steps weigh by their width in log k: (3/4) of the way at 0.4, by hand.
    assert pass_auc({1: 0.1, 2: 0.4, 16: 0.4}) == pytest.approx((0.1 * 0.4) ** (0.5 / 4) * 0.4 ** (3 / 4))
    # More k on the same curve come closer to its integral.
    curve = {k: 1 - 0.97**k for k in range(1, 257)}
    fine, coarse = pass_auc(curve), pass_auc({k: curve[k] for k in (1, 2, 4, 8, 16, 32, 64, 128, 256)})
    assert coarse == pytest.approx(fine, rel=0.02)
    assert curve[1] < coarse < curve[256]


def test_pass_auc_of_a_curve_that_starts_at_zero_is_zero():
    assert pass_auc({1: 0.0, 2: 0.5, 4: 0.9}) == 0.0


def test_pass_auc_needs_a_curve():
    with pytest.raises(RollwayError, match="at least two k"):
        pass_auc({4: 0.5})
