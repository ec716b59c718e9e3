import pytest

from rollway.config.scorers import PythonScorer
from rollway.errors import RollwayError

CODE = """
import fractions, sys

def shorter(row, scale=1.0):
    return {"reward": scale / len(row["completion"]), "characters": len(row["completion"])}

def greedy(row):
    row["meta"]["seen"] = row["meta"].get("seen", 0) + 1
    row["messages"].clear()
    return row["meta"]["seen"]

def combined(row):
    return row["scores"]["exact"] + 0.5

def odd(row):
    return {
        "true": True, "half": fractions.Fraction(1, 2), "nan": float("nan"), "inf": float("inf"), "text": "1",
        "none": None, "list": [1], "bare": {"score": 1}, "part": {"reward": 1, "x": "y"},
        "nanpart": {"reward": 1, "x": float("nan")}, "prompt": float(row["prompt"] == "2+2="),
    }.get(row["completion"], 0) if row["completion"] not in ("raise", "exit") else (
        sys.exit(2) if row["completion"] == "exit" else 1 / 0)
"""


@pytest.fixture
def code(tmp_path):
    (tmp_path / "mine.py").write_text(CODE)
    return tmp_path


def test_components_and_params(code, make_row, run):
    rows = [make_row("ab", number=0), make_row("abcd", number=1)]
    found = run(PythonScorer(function="mine.py:shorter", params={"scale": 2}), rows)
    assert [row["reward"] for row in found] == [1.0, 0.5]
    assert [dict(row["components"]) for row in found] == [{"characters": 2.0}, {"characters": 4.0}]


def test_rows_cannot_change_each_other_and_duplicates_are_called_again(code, make_row, run):
    meta, messages = {"format": "plain"}, [{"role": "user", "content": "q"}]
    rows = [make_row("same", number=n, meta=meta, messages=messages) for n in range(3)]
    assert [row["reward"] for row in run(PythonScorer(function="mine.py:greedy"), rows)] == [1, 1, 1]
    assert meta == {"format": "plain"}


def test_scores_of_other_scorers(code, make_row, run):
    rows = [make_row("a", number=0), make_row("b", number=1)]
    config = PythonScorer(function="mine.py:combined", needs=["exact"])
    found = run(config, rows, needs={"exact": {"r1": 1.0, "r0": 0.0}})
    assert [row["reward"] for row in found] == [0.5, 1.5]
    with pytest.raises(RollwayError, match="exact"):
        run(config, rows)


@pytest.mark.parametrize(
    ("completion", "reward", "error"),
    [
        ("true", 1.0, None),
        ("half", 0.5, None),
        ("prompt", 1.0, None),
        ("nan", 0.0, "reward is nan"),
        ("inf", 0.0, "reward is inf"),
        ("nanpart", 0.0, "x is nan"),
        ("text", 0.0, "returned a str"),
        ("none", 0.0, "returned a NoneType"),
        ("list", 0.0, "returned a list"),
        ("bare", 0.0, "without 'reward' (its keys: score)"),
        ("part", 0.0, "returned a str as 'x'"),
        ("raise", 0.0, "mine.py line 21: ZeroDivisionError: division by zero"),
        ("exit", 0.0, "SystemExit: 2"),
    ],
)
def test_what_comes_back_is_checked(code, make_row, run, completion, reward, error):
    (found,) = run(PythonScorer(function="mine.py:odd", max_error_share=1.0), [make_row(completion)])
    assert found["reward"] == reward
    assert (found["error"] is None) if error is None else (error in found["error"])


def test_the_stage_stops_beyond_the_share_and_quotes_the_first(code, make_row, run):
    rows = [make_row(text, number=n) for n, text in enumerate(["true", "raise", "nan", "true"])]
    with pytest.raises(RollwayError) as caught:
        run(PythonScorer(function="mine.py:odd", max_error_share=0.25), rows)
    for words in ("2 of 4", "0.25", "rollout r1", "ZeroDivisionError", "score.scorers.s.max_error_share"):
        assert words in str(caught.value)
    assert len(run(PythonScorer(function="mine.py:odd", max_error_share=0.5), rows)) == 4


def test_dotted_paths(make_row, run):
    with pytest.raises(RollwayError, match="returned a str"):
        run(PythonScorer(function="json:dumps"), [make_row("4")])


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("nothing", "package.module:function"),
        ("nowhere.py:f", "no such file"),
        ("no_such_package.rewards:f", "cannot be imported"),
        ("mine.py:shorer", "shorter"),
        ("broken.py:f", "SyntaxError"),
        ("mine.py:fractions", "no function"),
    ],
)
def test_unusable_functions_stop_at_once(code, make_row, run, function, words):
    (code / "broken.py").write_text("def f(:\n")
    with pytest.raises(RollwayError, match="scorer s: ") as caught:
        run(PythonScorer(function=function, max_error_share=1.0), [make_row("4")])
    assert words in str(caught.value)
