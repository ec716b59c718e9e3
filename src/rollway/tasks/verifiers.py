"""The verifiers that come with `reasoning_gym`'s datasets, kept from running what they are given.

Some of them hand an answer to Python: four read it as a list by `eval`, five as an expression by SymPy's `parse_expr`,
which evaluates it too. A policy would find that. Here the four read literals alone, and the five are shown nothing but
arithmetic.
"""

import ast
import re
import sys
from typing import Any

from rollway.tasks.procedural import create, from_json

LITERALS = {"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"}
"""Their verifiers call `eval` on an answer to read a list."""
EXPRESSIONS = {"countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration"}
"""Their verifiers call SymPy's `parse_expr` on an answer."""
AS_TEXT = {"chain_sum", "dice", "gsm_symbolic", "letter_jumble", "products", "spell_backward", "word_sorting"}
"""Their own verifiers, read by hand, compare texts or decimal numbers, in time proportional to the answer."""
# Where a puzzle's numbers are to be used, they are counted in the text: nothing else may stand for one (0b11, 1e0).
_SUM = re.compile(r"(?:[0-9]++(?![\w.])|[-+*/()\s])*+")
_TOKEN = re.compile(r"\s+|\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+|[-+*/^(),!]|([A-Za-z]+)")
_NAMES = (
    {"pi", "sqrt", "exp", "log", "ln", "abs", "Abs", "Rational", "Integer"}
    | {f"{arc}{name}{hyperbolic}" for arc in ("", "a") for name in ("sin", "cos", "tan") for hyperbolic in ("", "h")}
    | {"sec", "csc", "cot"}
)


class Verifiers:
    """The datasets' own verifiers, each built once."""

    def __init__(self) -> None:
        self._datasets: dict[str, Any] = {}

    def score(self, answer: str | None, meta: dict[str, Any]) -> float:
        """Score of an answer, 0 to 1, by the verifier of the dataset that `meta` names; one that is no expression where
        one is due counts as none, and so is one of other numbers than the puzzle's."""
        entry = from_json(meta["entry"])
        if answer is not None and judging(meta) in EXPRESSIONS and not _may_be_read(answer, judging(meta), entry):
            answer = None
        return float(self._dataset(meta).score_answer(answer, entry))

    def _dataset(self, meta: dict[str, Any]) -> Any:
        key = repr((meta["dataset"], sorted(meta["params"].items())))
        if key not in self._datasets:
            made = create(meta["dataset"], {**meta["params"], "seed": 0, "size": 1})
            for each in (made, *(made.datasets.values() if meta["dataset"] == "composite" else ())):
                _read_literals(type(each))
            self._datasets[key] = made
        return self._datasets[key]


def compares_texts(dataset: str) -> bool:
    """Whether its verifier compares texts or numbers, and so needs no limits; false where there is no such dataset."""
    from reasoning_gym.dataset import ProceduralDataset
    from reasoning_gym.factory import DATASETS

    known = DATASETS.get(dataset)
    return known is not None and (known[0].score_answer is ProceduralDataset.score_answer or dataset in AS_TEXT)


def judging(meta: dict[str, Any]) -> str:
    """The dataset whose verifier judges: of a composite one the entry's own."""
    if meta["dataset"] != "composite":
        return str(meta["dataset"])
    return str(meta["entry"]["metadata"]["source_dataset"])


def _may_be_read(answer: str, judge: str, entry: dict[str, Any]) -> bool:
    """Whether an answer may be shown to a verifier that evaluates it: the entry's own may."""
    if answer.strip() == str(entry["answer"]).strip():
        return True
    if judge == "puzzle24":
        given = [int(number) for number in entry["metadata"]["numbers"]]
        return is_sum(answer) and sorted(map(int, re.findall(r"\d+", answer))) == sorted(given)
    return is_sum(answer) if judge == "countdown" else is_arithmetic(answer)


def is_sum(answer: str) -> bool:
    """Whether it holds nothing but whole numbers in decimal digits, the four operations and brackets."""
    return _SUM.fullmatch(answer) is not None


def is_arithmetic(answer: str) -> bool:
    """Whether it holds nothing but numbers, operators, functions of mathematics and names of one letter."""
    at = 0
    while at < len(answer):
        found = _TOKEN.match(answer, at)
        if found is None or (found[1] is not None and len(found[1]) > 1 and found[1] not in _NAMES):
            return False
        at = found.end()
    return True


def _read_literals(dataset: type) -> None:
    module = sys.modules[dataset.__module__]
    if module.__name__.rpartition(".")[2] in LITERALS:
        # A name of the module stands before Python's own.
        vars(module)["eval"] = ast.literal_eval
