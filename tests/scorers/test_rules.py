import json

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from rollway.config.scorers import ExactScorer, FormatScorer, LengthScorer, ReasoningGymScorer, ScoreConfig
from rollway.errors import RollwayError
from rollway.scorers import join, read_answer, score
from rollway.scorers.length import overlong
from rollway.store.tables import TABLES


def rewards(rows):
    return [row["reward"] for row in rows]


def test_the_table_has_the_declared_schema_even_when_empty(make_row, tmp_path):
    for rows in ([], [make_row("4")]):
        table = score("s", ExactScorer(), rows, needs={}, threads=1, root=tmp_path)
        assert table.schema.equals(TABLES["scores"].schema())
        assert table.num_rows == len(rows)


@pytest.mark.parametrize(
    ("settings", "completion", "answer", "reward"),
    [
        ({}, "4", "4", 1.0),
        ({}, " 4\n", "4", 1.0),
        ({"strip": False}, " 4", "4", 0.0),
        ({}, "44", "4", 0.0),
        ({}, "", "4", 0.0),
        ({}, "Yes", "yes", 0.0),
        ({"ignore_case": True}, "Yes", "yes", 1.0),
        ({"extract": "hash"}, "so 4\n#### 1,204", "1204", 1.0),
        ({"extract": "hash"}, "1204", "1204", 0.0),
        ({"extract": "boxed"}, r"\boxed{ \frac{1}{2} }", r"\frac{1}{2}", 1.0),
        ({"extract": "last_number"}, "3 and 4.", "4", 1.0),
        ({"extract": "regex:<a>(.*?)</a>"}, "<a>4</a>", "4", 1.0),
    ],
)
def test_exact(make_row, run, settings, completion, answer, reward):
    assert rewards(run(ExactScorer(**settings), [make_row(completion, answer)])) == [reward]


def test_exact_without_answer_is_an_error_that_stops_or_counts(make_row, run):
    rows = [make_row("4", number=0), make_row("4", None, number=1)]
    with pytest.raises(RollwayError, match=r"scorer s: failed on 1 of 2 .* rollout r1: the prompt has no answer"):
        run(ExactScorer(), rows)
    found = run(ExactScorer(max_error_share=0.5), rows)
    assert rewards(found) == [1.0, 0.0]
    assert [row["error"] for row in found] == [None, "the prompt has no answer"]


def test_answers_for_majority_votes():
    assert read_answer(ExactScorer(extract="hash"), "so\n#### 1,000") == "1000"
    assert read_answer(ExactScorer(ignore_case=True), " Yes ") == "yes"
    assert read_answer(ExactScorer(extract="hash"), "none") == ""
    assert read_answer(FormatScorer(pattern="x"), " x ") == "x"


def test_dapo_overlong_values(make_row, run):
    lengths = [10, 16, 17, 19, 20, 25]
    rows = [make_row("x", number=n, length=length) for n, length in enumerate(lengths)]
    assert rewards(run(LengthScorer(limit=20, cache=4), rows)) == [0, 0, -0.25, -0.75, -1, -1]
    with pytest.raises(ValidationError):
        LengthScorer(limit=3, cache=4)


@given(st.integers(1, 200), st.integers(1, 200), st.integers(0, 400))
def test_overlong_equals_the_three_cases_of_the_paper(limit, cache, length):
    cache = min(cache, limit)
    if length <= limit - cache:
        expected = 0.0
    elif length <= limit:
        expected = ((limit - cache) - length) / cache
    else:
        expected = -1.0
    assert overlong(length, limit, cache) == expected


def test_format(make_row, run):
    rows = [make_row(text, number=n) for n, text in enumerate(["<a>1</a>", "x <a>1</a>", "", "1"])]
    assert rewards(run(FormatScorer(pattern="<a>.*</a>"), rows)) == [1, 0, 0, 0]
    assert rewards(run(FormatScorer(pattern="<a>.*</a>", full=False), rows)) == [1, 1, 0, 0]
    with pytest.raises(ValidationError, match="regular expression"):
        FormatScorer(pattern="(")


def test_a_pattern_that_explodes_is_an_error_of_its_row(make_row, run):
    rows = [make_row("a" * 60 + "b", number=0), make_row("a", number=1)]
    found = run(FormatScorer(pattern="(a|aa)+", max_error_share=0.5), rows)
    assert rewards(found) == [0, 1]
    assert "backtrack" in found[0]["error"]


def test_reasoning_gym_gives_partial_credit_and_reads_none(make_row, run):
    entry = {"question": "?", "answer": "olleh", "metadata": {}}
    meta = {"format": "plain", "dataset": "spell_backward", "params": {}, "entry": entry}
    texts = [" olleh\n", "ollxx", "", "<a>olleh</a>"]
    rows = [make_row(text, number=n, meta=meta) for n, text in enumerate(texts)]
    assert rewards(run(ReasoningGymScorer(), rows)) == pytest.approx([1.0, 0.6, 0.0, 0.0])
    assert rewards(run(ReasoningGymScorer(extract="regex:<a>(.*)</a>"), rows)) == [0, 0, 0, 1]
    with pytest.raises(RollwayError, match="no reasoning_gym entry"):
        run(ReasoningGymScorer(), [make_row("x")])


def test_rows_join_rollouts_with_prompts_by_id_not_position():
    prompts = pa.table(
        {
            "prompt_id": ["a", "b"],
            "task": ["t", "t"],
            "messages": [json.dumps([{"role": "user", "content": text}]) for text in "AB"],
            "answer": ["1", None],
            "meta": ['{"format": "plain"}', '{"format": "plain", "x": 1}'],
        }
    )
    rollouts = pa.table(
        {
            "rollout_id": ["r0", "r1"],
            "prompt_id": ["b", "a"],
            "group_id": ["g0", "g1"],
            "sample": [0, 0],
            "text": ["x", "y"],
            "length": [1, 1],
            "finish": ["stop", "length"],
            "tokens": [[1], [2]],
        }
    )
    rows = join(rollouts, prompts)
    assert [(r.rollout_id, r.messages[0]["content"], r.answer, r.completion) for r in rows] == [
        ("r0", "B", None, "x"),
        ("r1", "A", "1", "y"),
    ]
    assert rows[0].meta["x"] == 1
    with pytest.raises(RollwayError, match="r0: its prompt b"):
        join(rollouts, prompts.slice(0, 1))


@given(st.permutations(range(6)))
def test_order_of_rows_does_not_matter(order):
    from pathlib import Path

    from rollway.scorers import Row

    texts = ["4", "5", "4", "", " 4", "44"]
    rows = [Row(f"r{n}", "p", "g", n, texts[n], 1, "stop", [], "t", [{"content": "q"}], "4", {}) for n in order]
    found = score("s", ExactScorer(), rows, needs={}, threads=1, root=Path()).to_pylist()
    assert {r["rollout_id"]: r["reward"] for r in found} == {f"r{n}": float(texts[n].strip() == "4") for n in range(6)}


def test_objectives_keep_their_own_tables_before_they_are_summed(make_row, tmp_path):
    """Known bug 33: rewards summed before anyone can normalise them. Each scorer writes its own, unweighted."""
    config = ScoreConfig(
        scorers={"exact": ExactScorer(), "short": LengthScorer(limit=4, cache=4)},
        reward={"exact": 1.0, "short": 0.5},
    )
    rows = [make_row("4", number=0), make_row("four", number=1)]
    tables = {
        name: score(name, scorer, rows, needs={}, threads=1, root=tmp_path) for name, scorer in config.scorers.items()
    }
    assert tables["exact"].column("reward").to_pylist() == [1.0, 0.0]
    assert tables["short"].column("reward").to_pylist() == [-0.25, -1.0]


def test_needs_without_effect_are_refused(make_row, run):
    with pytest.raises(ValidationError, match="no effect"):
        ScoreConfig(scorers={"exact": ExactScorer(), "f": FormatScorer(pattern="x", needs=["exact"])})
