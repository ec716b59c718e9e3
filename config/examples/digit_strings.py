"""`python` scorers for data/digit_strings.jsonl: what a completion is truly worth, and a judge's grade of it.

`judge` is a program in the place of a language model: it grades the working against the demonstration (the stand-in
of DaGRPO, arXiv 2512.06337, where every digit is an intermediate result).
"""

from typing import Any


def share(row: dict[str, Any]) -> float:
    """Share of digits that are right, of as many as there should be or were written: 0 to 1."""
    truth, given = row["answer"], row["completion"].strip()
    return sum(a == b for a, b in zip(truth, given, strict=False)) / max(len(truth), len(given))


def judge(row: dict[str, Any]) -> float:
    """1 + 6 x share of right digits + 3 x last digit right: 1 to 10. A near miss comes close to a right completion."""
    return 1 + 6 * share(row) + 3 * (row["completion"].strip()[-1:] == row["answer"][-1])
