import json
import math

import pyarrow.parquet as pq
import pytest

from rollway.errors import RollwayError
from rollway.printable import printable
from rollway.store.catalog import describe, run_sql
from rollway.store.show import show
from store.synthetic import HOSTILE, make_results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return make_results(tmp_path_factory.mktemp("queries"), {"a-s0": 1}, text=HOSTILE)


def test_table(results):
    text = run_sql(results, "SELECT run, count(*) AS n, avg(length) AS mean, NULL AS nothing FROM scored GROUP BY run")
    header, rule, row, count = text.split("\n")
    assert header.split() == ["run", "n", "mean", "nothing"]
    assert row.split() == ["a-s0", "12", "3"]
    assert set(rule) == {"-", " "}
    assert count == "(1 row)"


def test_long_answers_are_cut_and_counted(results):
    text = run_sql(results, "SELECT * FROM range(250), (SELECT repeat('x', 100) AS long)")
    assert "... 50 more rows" in text
    assert "x" * 61 not in text


def test_control_characters_cannot_reach_the_terminal(results):
    text = run_sql(results, "SELECT text FROM rollouts LIMIT 1")
    assert "\x1b" not in text
    assert r"\x1b[31m" in text
    assert printable("a\u202eb\x00") == r"a\u202eb\x00"


def test_csv_and_json(results):
    query = "SELECT 'a,b' AS t, [1, 2] AS l, 0.1::DOUBLE AS x, 'nan'::DOUBLE AS bad, map {'k': 1.5::DOUBLE} AS m"
    assert run_sql(results, query, "csv").split("\n") == ["t,l,x,bad,m", '"a,b","[1, 2]",0.1,nan,"{""k"": 1.5}"']
    expected = {"t": "a,b", "l": [1, 2], "x": 0.1, "bad": None, "m": {"k": 1.5}}
    assert json.loads(run_sql(results, query, "json")) == [expected]
    assert json.loads(run_sql(results, query, "jsonl")) == expected


def test_files(results, tmp_path):
    out = tmp_path / "answer.parquet"
    assert run_sql(results, "SELECT rollout_id FROM rollouts", "parquet", out) == f"{out}: 12 rows"
    assert pq.read_table(out).num_rows == 12
    run_sql(results, "SELECT 1 AS x", "csv", tmp_path / "answer.csv")
    assert (tmp_path / "answer.csv").read_text() == "x\n1\n"


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("FROM rolouts", 'did you mean "rollouts"?'),
        ("FROM maj_at_k", "it is a macro, for example SELECT run, round, maj FROM maj_at_k"),
        ("SELECT pas_at_k(4, 1, 2)", 'did you mean "pass_at_k"?'),
        ("SELECT advantage FROM rollouts", '"advantage" in what is read here; it is a column of batch'),
        ("SELECT run FROM groups GROUP BY round", 'column "run" must appear in the GROUP BY'),
        ("SELECT perplexity('x')", "sql: "),
        ("FROM nowhere_at_all", "there are: batch,"),
        ("SELECT rewrd FROM scored", '"reward"'),
        ("SELEC 1", 'syntax error at or near "SELEC"; did you mean SELECT?'),
        ("SELECT 1; SELECT 2", "one question at a time"),
        ("", "0 statements"),
        ("DROP VIEW scored", "read-only"),
        ("CREATE TABLE x AS SELECT 1", "read-only"),
        ("COPY (SELECT 1) TO 'x.csv'", "read-only"),
        ("INSERT INTO rollouts SELECT * FROM rollouts", "read-only"),
        ("ATTACH 'x.db'", "read-only"),
        ("SET threads = 1", "read-only"),
        ("SELECT pass_at_k(2, 1, 3)", "smaller k"),
    ],
)
def test_mistakes_are_explained(results, query, says):
    with pytest.raises(RollwayError, match=r"^sql: ") as caught:
        run_sql(results, query)
    message, *place = str(caught.value).split("\n")
    assert says in message
    assert len(place) in (0, 2)


def test_mistakes_are_shown_where_they_are(results):
    query = "SELECT 'äöü' AS t,\n       rewrd\nFROM scored"
    with pytest.raises(RollwayError) as caught:
        run_sql(results, query)
    assert str(caught.value).split("\n") == [
        'sql: line 2, column 8: there is no column "rewrd" in what is read here; did you mean "reward"?',
        "           rewrd",
        "           ^^^^^",
    ]
    with pytest.raises(RollwayError, match=r"^sql: questions\.sql:1:20: there is no view"):
        run_sql(results, "SELECT 'ü', 1 FROM nowhere_at_all", name="questions.sql")
    with pytest.raises(RollwayError) as caught:
        run_sql(results, f"SELECT {', '.join(['reward'] * 50)}, rewrd, {', '.join(['reward'] * 50)} FROM scored")
    _, line, caret = str(caught.value).split("\n")
    assert line[caret.index("^") : caret.rindex("^") + 1] == "rewrd"
    assert len(line) < 120


def test_a_mistake_inside_a_macro_has_no_place_in_the_query(results):
    with pytest.raises(RollwayError) as caught:
        run_sql(results, "SELECT repetition(3, 'x')")
    assert "^" not in str(caught.value)
    with pytest.raises(RollwayError, match=r"\^\^\^\^\^"):
        run_sql(results, "SELECT pass_at_k(4, 2, 1), rewrd FROM scored")


def test_formats_are_checked(results):
    with pytest.raises(RollwayError, match=r"is not one of"):
        run_sql(results, "SELECT 1", "xml")
    with pytest.raises(RollwayError, match="--output"):
        run_sql(results, "SELECT 1", "parquet")


def test_describe_names_columns_and_macros(results):
    text = describe(results)
    assert "scored(run varchar" in text
    assert "pass_at_k(n, c, k)" in text
    assert "columns: run varchar, round integer, pass integer, group_id varchar" in text
    only = describe(results, "repeti")
    assert "example: SELECT rollout_id, repetition(tokens, 4)" in only
    assert "scored(" not in only
    with pytest.raises(RollwayError, match="no view or macro"):
        describe(results, "nothing_like_it")


def test_show(results):
    text = show(results, "a-s0-0-1-0")
    for part in (
        "0-1",
        "1+1=",
        "answer 2",
        "exact 1",
        "part 0.25",
        "advantage 0.5",
        "-0.1000",
        f"{math.exp(-4):.4f}",
        "its group",
    ):
        assert part in text, part
    assert "a-s0-0-1-3" in text
    assert "\x1b" not in text
    assert "\x1b[" in show(results, "a-s0-0-1-0", colour=True)


def test_show_of_a_dropped_rollout_and_an_unknown_one(results):
    assert "in no batch" in show(results, "a-s0-0-2-0")
    with pytest.raises(RollwayError, match="a-s0-0-1-0"):
        show(results, "a-s0-0-1-00")


def test_show_finds_the_tokenizer_of_the_warm_up(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    make_results(tmp_path, {"a-s0": 1})
    folder = tmp_path / "warmups" / "tiny-s0" / "weights" / "main"
    folder.mkdir(parents=True)
    Tokenizer(WordLevel({"<pad>": 0, "five": 5, "six": 6}, "<pad>")).save(str(folder / "tokenizer.json"))
    (folder.parents[1] / "policy.json").write_text(json.dumps({"policies": {"main": {"folder": "weights/main"}}}))
    assert "five" in show(tmp_path, "a-s0-0-0-0")
