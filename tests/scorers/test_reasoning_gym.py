"""Verifiers of reasoning_gym that would evaluate an answer as Python, or never end, with hostile answers."""

import inspect
import re
from contextlib import suppress

import pytest
from reasoning_gym.factory import DATASETS

from rollway.config.scorers import ReasoningGymScorer
from rollway.config.tasks import ReasoningGymSource
from rollway.tasks.procedural import create, from_json, reasoning_gym_entries
from rollway.tasks.verifiers import AS_TEXT, EXPRESSIONS, LITERALS, Verifiers, compares_texts, is_arithmetic

LARGE = {"composite"}
"""Made of others by its params."""


def entry_of(dataset, **params):
    return reasoning_gym_entries(ReasoningGymSource(dataset=dataset, size=1, seed=3, params=params))[0][1]


def row_of(make_row, text, meta, number):
    return make_row(text, number=number, prompt_id=f"p{number}", meta={"format": "plain", **meta})


@pytest.mark.parametrize("dataset", sorted(set(DATASETS) - LARGE))
def test_no_verifier_evaluates_an_answer(dataset, tmp_path):
    """Each is shown programs that leave a mark where they are run, bare and in the forms that answers have."""
    mark = tmp_path / "run"
    program = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    meta, verifiers = entry_of(dataset), Verifiers()
    for text in (program, f"[{program}]", f"[[{program}]]", f"({program}, 1)", f"1 + {program}", f"x*{program}"):
        with suppress(Exception):
            verifiers.score(text, meta)
        assert not mark.exists(), text


def test_those_that_evaluate_are_the_ones_that_are_known():
    """By their sources, of the version that is installed: a new one has to be looked at."""
    evaluates = re.compile(r"(?<![\w.])(eval|exec|compile)\(|parse_expr\(answer|sympify\(|literal_eval\(answer")
    found = {name for name, (kind, _) in DATASETS.items() if evaluates.search(inspect.getsource(kind.score_answer))}
    # They evaluate what stands in their own entry.
    assert found - {"number_sorting", "bitwise_arithmetic"} == LITERALS | EXPRESSIONS
    assert set(DATASETS) >= AS_TEXT
    assert not any(compares_texts(name) for name in LITERALS | EXPRESSIONS | {"coin_flip", "composite", "no such"})


@pytest.mark.parametrize("dataset", sorted(LITERALS | EXPRESSIONS))
def test_true_answers_are_worth_what_the_library_says(dataset):
    """Of forty entries the answers that they hold, and others in the same form."""
    entries = [meta for _, meta in reasoning_gym_entries(ReasoningGymSource(dataset=dataset, size=40, seed=5))]
    own, verifiers = create(dataset, {"seed": 5, "size": 1}), Verifiers()
    for meta in entries:
        entry = from_json(meta["entry"])
        answers = [str(entry["answer"]), f" {entry['answer']} ", "1 + 2", "nonsense", "", None]
        if dataset in LITERALS:
            answers.append(repr([list(line.split()) for line in str(entry["answer"]).split("\n")]))
            answers.append(repr(str(entry["answer"]).split()))
        if "integration" in dataset:
            answers += ["x**2 + sin(x)/3 - 2.5", "Rational(1, 2)*x + C"]
        for answer in answers:
            assert verifiers.score(answer, meta) == own.score_answer(answer, entry), answer


@pytest.mark.parametrize(
    ("dataset", "attempts"),
    [
        ("countdown", ["({sum})*(E-E)+0b{target:b}", "({sum})*(pi-pi)+{ones}", "({sum})*0+{target}e0", "{sum}+x-x"]),
        ("puzzle24", ["1-1+1-1+0b11000", "1-1+1-1+24e0", "4*6*1*1*1/1", "24"]),
    ],
)
def test_puzzles_of_given_numbers_are_not_solved_by_others(dataset, attempts):
    """Digits in another base, exponents, constants and other numbers, of which the library counts some for nothing."""
    meta = entry_of(dataset)
    entry = from_json(meta["entry"])["metadata"]
    numbers, target = entry["numbers"], int(entry.get("target", 24))
    words = {"sum": "+".join(map(str, numbers)), "target": target, "ones": "+".join(["log(E)"] * target)}
    for attempt in attempts:
        assert Verifiers().score(attempt.format(**words), meta) < 0.1, attempt


def test_a_list_in_place_of_the_text_still_gets_its_part():
    meta = entry_of("spiral_matrix")
    answer = "[" + ", ".join(from_json(meta["entry"])["answer"].split()) + "]"
    assert Verifiers().score(answer, meta) == 0.1


def test_the_parts_of_a_composite_are_kept_from_it_too(tmp_path):
    specs = [{"name": name, "weight": 1.0, "config": {}} for name in ("countdown", "spiral_matrix")]
    source = ReasoningGymSource(dataset="composite", size=6, seed=3, params={"datasets": specs})
    mark = tmp_path / "run"
    program = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    metas = [meta for _, meta in reasoning_gym_entries(source)]
    assert {meta["entry"]["metadata"]["source_dataset"] for meta in metas} == {"countdown", "spiral_matrix"}
    assert all(Verifiers().score(program, meta) < 0.1 for meta in metas)
    assert not mark.exists()


@pytest.mark.parametrize(
    "text", ["2*x + 3", "(1 + 2)/3!", "1.5e-3*sin(x)**2", "asinh(pi) - ln(2, 3)", "", "x1 + C", "-.5^2"]
)
def test_arithmetic(text):
    assert is_arithmetic(text)


@pytest.mark.parametrize(
    "text",
    [
        *("__import__('os')", "x.__class__", "'a'*9", "f'{x}'", "lambda: 1", "[1, 2]", "x if y else z", "os.system"),
        *("x\\ny", "\u0131mport", "(1).real", "Symbol(1)", "0 or exec", "x_y", "{1}", "1 == 2", "\uff05", "1;2"),
    ],
)
def test_what_is_not(text):
    assert not is_arithmetic(text)


def test_answers_without_end_cost_their_own_row_only(make_row, run):
    """A power that no machine holds, and a fraction of a billion digits; right answers beside them stay right."""
    sums, coins = entry_of("countdown"), entry_of("coin_flip")
    right = [str(from_json(meta["entry"])["answer"]) for meta in (sums, coins)]
    texts = [("9**9**9**9", sums), (right[0], sums), ("1e9999999999", coins), (right[1], coins)]
    rows = [row_of(make_row, text, meta, n) for n, (text, meta) in enumerate(texts)]
    found = run(ReasoningGymScorer(timeout=2.0, processes=1), rows)
    assert [row["reward"] for row in found] == [0.0, 1.0, 0.0, 1.0]
    assert [bool(dict(row["components"])) for row in found] == [True, False, True, False]
    assert {name for row in found for name in dict(row["components"])} <= {"timeout", "memory"}


def test_no_answer_ends_or_bends_the_process(make_row, run, tmp_path):
    meta = entry_of("spiral_matrix")
    module = DATASETS["spiral_matrix"][0].__module__
    bend = f"setattr(__import__({module!r}, fromlist=['x']).SpiralMatrixDataset, 'score_answer', lambda *a: 1.0)"
    texts = [bend, "__import__('os')._exit(0)", "rubbish"]
    found = run(ReasoningGymScorer(processes=1), [row_of(make_row, text, meta, n) for n, text in enumerate(texts)])
    assert [(row["reward"], row["error"]) for row in found] == [(0.0, None)] * 3


def test_an_unknown_dataset_is_its_rows_error(make_row, run):
    meta = {"format": "plain", "dataset": "no such", "params": {}, "entry": {}}
    (found,) = run(ReasoningGymScorer(max_error_share=1.0), [make_row("x", meta=meta)])
    assert "no dataset 'no such'" in found["error"]


def test_full_or_nothing_also_under_limits(make_row, run):
    meta = entry_of("countdown")
    answer = str(from_json(meta["entry"])["answer"])
    rows = [row_of(make_row, text, meta, n) for n, text in enumerate([answer, "1 + 1"])]
    assert [row["reward"] for row in run(ReasoningGymScorer(partial=False), rows)] == [1.0, 0.0]
    assert [row["reward"] for row in run(ReasoningGymScorer(), rows)] == [1.0, 0.05]
