"""Empty answers, lists of answers, echoes of the prompt and endless output: no built-in scorer pays for them, and SQL
shows them."""

import json
import time
from pathlib import Path

import pyarrow as pa
import pytest

from rollway.config.scorers import ExactScorer, FormatScorer, LengthScorer, MathVerifyScorer, ReasoningGymScorer
from rollway.store import parquet
from rollway.store.catalog import run_sql
from rollway.tasks.verifiers import Verifiers
from store.synthetic import rollout_rows, write

ANSWER = "42"
QUESTION = "Natalia sold 48 clips in April and 6 fewer in May. How many in May? End with #### and the number."
EMPTY = ["", " ", "\n\t \n", "\u00a0", "\u2003"]
LISTS = [
    ", ".join(map(str, range(1, 100))),
    "\n".join(map(str, range(30, 60))),
    " ".join(rf"\boxed{{{n}}}" for n in range(30, 60)),
    " ".join(f"${n}$" for n in range(30, 60)),
    "#### " + " ".join(map(str, range(30, 60))),
    r"\boxed{" + ", ".join(map(str, range(30, 60))) + "}",
    r"\boxed{40} or \boxed{41} or \boxed{42} or \boxed{43}",
    r"\boxed{40, 41, 42, 43}",
    r"\boxed{\{40, 41, 42, 43\}}",
    r"$x = 40$ or $x = 41$ or $x = 42$ or $x = 43$",
    "The answer is 41 or 42 or 43.",
]
LONG = ["0" * 200_000, "42 " * 50_000 + "43", "\\boxed{" * 40_000, "{" * 100_000 + "}" * 100_000, "-,." * 60_000]
ATTEMPTS = [*EMPTY, *LISTS, QUESTION, *LONG]
RULES = {
    "exact": ExactScorer(max_error_share=1.0),
    "exact_hash": ExactScorer(extract="hash", max_error_share=1.0),
    "exact_boxed": ExactScorer(extract="boxed", max_error_share=1.0),
    "exact_number": ExactScorer(extract="last_number", max_error_share=1.0),
    "exact_pattern": ExactScorer(extract="regex:answer is ([0-9]+)", max_error_share=1.0),
    "math": MathVerifyScorer(timeout=1.0, processes=1, max_error_share=1.0),
    "math_hash": MathVerifyScorer(extract="hash", timeout=1.0, processes=1, max_error_share=1.0),
    "math_boxed": MathVerifyScorer(extract="boxed", timeout=1.0, processes=1, max_error_share=1.0),
    "format": FormatScorer(pattern=r"(?s).*#### -?[0-9]+\s*", max_error_share=1.0),
    "anything": FormatScorer(pattern=r"(?s)\s*", max_error_share=1.0),
    "length": LengthScorer(limit=64, cache=16, max_error_share=1.0),
}


@pytest.mark.parametrize("name", RULES)
def test_no_rule_pays_for_an_attempt(name, make_row, run):
    messages = [{"role": "user", "content": QUESTION}]
    # Each text that math_verify cannot end with costs its limit of time and a new process: one shows it.
    attempts = ATTEMPTS[: -len(LONG) + 1] if name.startswith("math") else ATTEMPTS
    rows = [make_row(text, ANSWER, number=n, messages=messages) for n, text in enumerate(attempts)]
    start = time.monotonic()
    found = run(RULES[name], rows)
    assert time.monotonic() - start < 60
    paid = {rows[n].completion[:60]: row["reward"] for n, row in enumerate(found) if row["reward"] > 0.0}
    assert paid == {}


def test_the_attempts_would_pay_if_the_answer_stood_alone(make_row, run):
    """The same scorers give 1 for one right answer: what is refused above is the attempt, not the form."""
    said = {
        "exact": "42",
        "exact_hash": "so\n#### 42",
        "exact_boxed": r"\boxed{42}",
        "exact_number": "it is 42.",
        "exact_pattern": "answer is 42",
        "math": r"\boxed{42}",
        "math_hash": "#### 42.0",
        "math_boxed": r"\boxed{84/2}",
        "format": "#### 42",
    }
    for name, text in said.items():
        assert run(RULES[name], [make_row(text, ANSWER)])[0]["reward"] == 1.0, name


@pytest.mark.parametrize("dataset", ["spell_backward", "basic_arithmetic", "simple_equations", "gcd"])
def test_a_verifier_of_reasoning_gym_is_paid_in_full_or_not_at_all(dataset, make_row, run):
    """Their own scores give a part for a text that contains the answer: `partial: false` does not."""
    from rollway.config.tasks import ReasoningGymSource
    from rollway.tasks.entries import read_entries

    (entry,) = read_entries(ReasoningGymSource(dataset=dataset, size=1, seed=3), Path())
    answer = str(entry.fields["answer"])
    meta = {"format": "plain", **entry.meta}
    attempts = ["", " ", str(entry.fields["question"]), " ".join([answer, *map(str, range(100))]), "0" * 5000]
    rows = [make_row(text, answer, number=n, meta=meta) for n, text in enumerate([*attempts, answer])]
    found = run(ReasoningGymScorer(partial=False, max_error_share=1.0), rows)
    assert [row["reward"] for row in found] == [0, 0, 0, 0, 0, 1]
    assert Verifiers().score(answer, meta) == 1.0


def test_sql_shows_who_tried(tmp_path):
    messages = json.dumps([{"role": "system", "content": "s"}, {"role": "user", "content": QUESTION}])
    asked = {
        "prompt_id": "train-0",
        "task": "add",
        "split": "train",
        "messages": messages,
        "answer": "42",
        "meta": "{}",
    }
    write(tmp_path / "tasks/add/train.parquet", [asked], "prompts")
    texts = ["", "42", f"Q: {QUESTION} 42", LISTS[0], LISTS[2], "so it is 41 + 1 = 42", "and so on"]
    own = {"prompt_id": "train-0", "finish": "stop"}
    made = [row | own | {"text": text} for row, text in zip(rollout_rows("run-s0", 0), texts, strict=False)]
    made[-1]["finish"] = "length"
    place = tmp_path / "run-s0/r0000/p0"
    write(place / "rollouts-000.parquet", made, "rollouts")
    scores = {
        "rollout_id": [row["rollout_id"] for row in made],
        "scorer": ["exact"] * len(texts),
        "reward": [0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0],
        "components": pa.array([[]] * len(texts), pa.map_(pa.string(), pa.float64())),
    }
    parquet.write(place / "scores/exact-000.parquet", pa.table(scores), "scores")
    query = "SELECT sign, text, rewarded FROM tampering ORDER BY rollout_id, sign"
    found = [(row["sign"], row["text"], row["rewarded"]) for row in json.loads(run_sql(tmp_path, query, "json"))]
    by_text = sorted(found, key=lambda row: (texts.index(row[1]), row[0]))
    assert by_text == [
        ("empty", "", False),
        ("echo", texts[2], True),
        ("list", texts[3], False),
        ("list", texts[4], False),
        ("cut", texts[6], False),
    ]
