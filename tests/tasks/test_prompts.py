import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from rollway.config.scorers import ExactScorer, JudgeScorer, LengthScorer, MathVerifyScorer, ReasoningGymScorer
from rollway.config.tasks import TaskConfig
from rollway.errors import RollwayError
from rollway.store.tables import TABLES
from rollway.tasks import prepare, require_answers

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def numbers(count, start=0):
    return [{"question": f"What is {n} + 1?", "answer": n + 1} for n in range(start, start + count)]


def task(path="data.jsonl", **settings):
    settings.setdefault("splits", {"heldout": 2})
    return TaskConfig(**{"source": {"kind": "jsonl", "path": path}, **settings})


def prepared(tmp_path, rows, **settings):
    write_jsonl(tmp_path / "data.jsonl", rows)
    return prepare("t", task(**settings), tmp_path)


def texts(table):
    return [json.loads(m)[-1]["content"] for m in table.column("messages").to_pylist()]


def test_tables_have_the_declared_schema_and_every_prompt_lands_in_one_split(tmp_path):
    done = prepared(tmp_path, numbers(10))
    for split, table in (("train", done.train), ("heldout", done.heldout)):
        assert table.schema.equals(TABLES["prompts"].schema())
        assert set(table.column("split").to_pylist()) == {split}
    assert sorted(texts(done.train) + texts(done.heldout)) == sorted(r["question"] for r in numbers(10))
    assert done.counts == {"rows": 10, "duplicates": 0, "conflicts": 0, "leaks": 0, "train": 8, "heldout": 2}
    row = done.train.to_pylist()[0]
    assert json.loads(row["meta"]) == {"format": "plain", "demonstration": row["answer"]}
    assert (
        done.train.column("prompt_id").to_pylist()
        == prepared(tmp_path, numbers(10)).train.column("prompt_id").to_pylist()
    )


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=8), st.randoms(use_true_random=False), st.integers(0, 3))
def test_splits_do_not_depend_on_the_order_of_the_source(tmp_path_factory, values, rng, seed):
    folder = tmp_path_factory.mktemp("order")
    rows = [{"question": f"q{v // 2}", "answer": f"{v}"} for v in values]
    if len({r["question"] for r in rows}) < 3:
        return
    settings = {"splits": {"heldout": 2, "seed": seed}}
    first = prepared(folder, rows, **settings)
    rng.shuffle(rows)
    assert prepared(folder, rows, **settings) == first
    assert not set(texts(first.train)) & set(texts(first.heldout))
    assert len(texts(first.train)) + 2 == len({r["question"] for r in rows})


def test_seeds_give_different_splits(tmp_path):
    splits = [set(texts(prepared(tmp_path, numbers(40), splits={"heldout": 10, "seed": s}).heldout)) for s in (0, 1)]
    assert splits[0] != splits[1]


def test_a_smaller_training_split_is_a_part_of_the_larger_one(tmp_path):
    small, large = (prepared(tmp_path, numbers(40), splits={"heldout": 5, "train": n}) for n in (10, 20))
    assert texts(large.train)[:10] == texts(small.train)
    assert texts(large.heldout) == texts(small.heldout)


def test_duplicates_are_dropped_and_counted(tmp_path):
    rows = [
        *numbers(10),
        {"question": "What is 3 + 1?  \r\n", "answer": 4},
        {"question": "What is 4 + 1?", "answer": 0},
    ]
    done = prepared(tmp_path, rows)
    assert (done.counts["duplicates"], done.counts["conflicts"], done.counts["train"]) == (2, 1, 8)


def test_duplicates_can_be_refused_with_their_lines(tmp_path):
    with pytest.raises(RollwayError, match=r"line 11: same prompt as data.jsonl line 4"):
        prepared(tmp_path, [*numbers(10), numbers(10)[3]], on_duplicate="refuse")


def test_a_heldout_prompt_wins_over_a_training_prompt(tmp_path):
    write_jsonl(tmp_path / "data.jsonl", numbers(10))
    write_jsonl(tmp_path / "test.jsonl", numbers(5, start=8))
    source = {"kind": "jsonl", "path": "test.jsonl"}
    done = prepare("t", task(heldout_source=source, splits={"heldout": None}), tmp_path)
    assert done.counts == {"rows": 15, "duplicates": 0, "conflicts": 0, "leaks": 2, "train": 8, "heldout": 5}
    assert not set(texts(done.train)) & set(texts(done.heldout))
    part = prepare("t", task(heldout_source=source, splits={"heldout": 1}), tmp_path)
    assert texts(part.train) == texts(done.train)
    with pytest.raises(RollwayError, match="held out"):
        prepare("t", task(heldout_source=source, splits={"heldout": None}, on_duplicate="refuse"), tmp_path)


def test_given_ids_are_kept_and_must_be_unique(tmp_path):
    rows = [{**row, "nr": i} for i, row in enumerate(numbers(6))]
    done = prepared(tmp_path, rows, id="nr")
    ids = done.train.column("prompt_id").to_pylist() + done.heldout.column("prompt_id").to_pylist()
    assert sorted(ids) == [str(i) for i in range(6)]
    rows[5]["nr"] = 2
    with pytest.raises(RollwayError, match=r"line 6: id '2' was already given at data.jsonl line 3"):
        prepared(tmp_path, rows, id="nr")
    rows[5]["nr"] = None
    with pytest.raises(RollwayError, match="line 6: id field 'nr'"):
        prepared(tmp_path, rows, id="nr")


def test_chat_prompts_and_given_conversations(tmp_path):
    done = prepared(tmp_path, numbers(4), format="chat", system="Be brief.")
    assert json.loads(done.train.column("messages")[0].as_py())[0] == {"role": "system", "content": "Be brief."}
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"m": [*talk, {"role": "user", "content": f"c{n}"}], "answer": "1"} for n in range(4)]
    done = prepared(tmp_path, rows, format="chat", messages="m")
    assert len(json.loads(done.train.column("messages")[0].as_py())) == 3
    for bad in ([], talk, "x", [{"role": "user"}]):
        with pytest.raises(RollwayError, match="line 1: field 'm'"):
            prepared(tmp_path, [{"m": bad, "answer": "1"}], format="chat", messages="m")


def test_meta_fields_demonstrations_and_missing_answers(tmp_path):
    rows = [{**row, "level": 3, "how": "add one"} for row in numbers(4)]
    done = prepared(tmp_path, rows, meta=["level"], demonstration="{how}: {answer}", answer=None)
    meta = json.loads(done.train.column("meta")[0].as_py())
    assert meta["level"] == 3
    assert meta["demonstration"].startswith("add one: ")
    assert done.train.column("answer").null_count == done.train.num_rows
    with pytest.raises(RollwayError, match="rename"):
        prepared(tmp_path, [{**row, "format": 1} for row in numbers(4)], meta=["format"])


def test_scorers_that_need_answers_refuse_prompts_without(tmp_path):
    rows = [*numbers(5), {"question": "?", "answer": None}]
    train = pa.concat_tables([(done := prepared(tmp_path, rows)).train, done.heldout])
    judge = JudgeScorer(url="http://x", model="m", prompt="{completion} {answer}")
    for scorer in (ExactScorer(), MathVerifyScorer(), judge):
        with pytest.raises(RollwayError, match=r"scorer s .*1 of 6 prompts have no answer"):
            require_answers(train, {"s": scorer})
    with pytest.raises(RollwayError, match=r"6 of 6 prompts have no reasoning_gym entry"):
        require_answers(train, {"s": ReasoningGymScorer()})
    require_answers(train, {"s": LengthScorer(limit=4, cache=2)})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"question": "a", "answer": 1}\n{"question": \n', ["line 2", "not JSON"]),
        (b'{"question": "a", "answer": 1}\n[1]\n', ["line 2", "list", "not an object"]),
        (b'{"question": "a", "answer": 1}\n\n{"question": "\xff"}', ["line 3", "UTF-8"]),
        (b'{"question": "a"}\n', ["line 1", "'answer'", "question"]),
        (b'{"q": "a", "answer": 1}\n', ["line 1", "'question'", "q, answer"]),
        (b"", ["no entries"]),
        (b"\n\n", ["no entries"]),
        (b'{"question": "a", "answer": 1}\n', ["task t", "1 prompts", "2 held out", "splits"]),
        (b'{"question": " ", "answer": 1}\n', ["line 1", "empty"]),
        (b'{"question": "\\ud800", "answer": 1}\n', ["line 1", "surrogate"]),
    ],
)
def test_bad_files_are_refused_by_line(tmp_path, content, words):
    (tmp_path / "data.jsonl").write_bytes(content)
    with pytest.raises(RollwayError) as caught:
        prepare("t", task(), tmp_path)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_missing_files_and_unextractable_answers(tmp_path):
    for kind in ("jsonl", "parquet"):
        with pytest.raises(RollwayError, match="nowhere: no such file"):
            prepare("t", TaskConfig(source={"kind": kind, "path": "nowhere"}), tmp_path)
    with pytest.raises(RollwayError, match="line 1: extract hash finds no answer"):
        prepared(tmp_path, numbers(4), extract="hash")
    with pytest.raises(RollwayError, match="did you mean reversed_addition"):
        prepare("t", TaskConfig(source={"kind": "builtin", "name": "reversed_adition"}), tmp_path)


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    lines = "".join(json.dumps(row) + "\r\n" for row in numbers(4))
    (tmp_path / "data.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    assert prepare("t", task(), tmp_path).counts["rows"] == 4


def test_parquet_gives_the_same_prompts_and_truncation_is_named(tmp_path):
    expected = prepared(tmp_path, numbers(6))
    path = tmp_path / "data.parquet"
    pq.write_table(pa.Table.from_pylist(numbers(6)), path)
    config = task(source={"kind": "parquet", "path": "data.parquet"})
    assert prepare("t", config, tmp_path) == expected
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(RollwayError, match=r"data.parquet: not a whole Parquet file"):
        prepare("t", config, tmp_path)


@pytest.mark.parametrize("kind", ["json", "parquet", "csv"])
def test_huggingface_loads_local_folders(tmp_path, monkeypatch, kind):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = numbers(6)
    expected = prepared(tmp_path, rows)
    folder = tmp_path / "set"
    folder.mkdir()
    match kind:
        case "json":
            write_jsonl(folder / "train.jsonl", rows)
        case "parquet":
            pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
        case "csv":
            lines = [f"{row['question']},{row['answer']}" for row in rows]
            (folder / "train.csv").write_text("\n".join(["question,answer", *lines]))
    assert prepare("t", task(source={"kind": "huggingface", "path": "set"}), tmp_path) == expected
    with pytest.raises(RollwayError, match=r"set: datasets.load_dataset failed .*test"):
        prepare("t", task(source={"kind": "huggingface", "path": "set", "split": "test"}), tmp_path)


def test_huggingface_builder_with_data_files(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    expected = prepared(tmp_path, numbers(6))
    source = {"kind": "huggingface", "path": "json", "data_files": "data.jsonl"}
    assert prepare("t", task(source=source), tmp_path) == expected
    with pytest.raises(RollwayError, match=r"json: datasets.load_dataset failed"):
        prepare("t", task(source={**source, "data_files": "nowhere.jsonl"}), tmp_path)


def test_builtin_sums_are_right():
    done = prepare("sums", TaskConfig(source={"kind": "builtin", "name": "reversed_addition"}), Path())
    assert done.counts["rows"] == 4000
    assert done.counts["duplicates"] == 0
    for text, answer in zip(texts(done.train), done.train.column("answer").to_pylist(), strict=True):
        first, second = text.removesuffix("=").split("+")
        assert int(answer[::-1]) == int(first) + int(second)


@pytest.mark.parametrize(
    "settings",
    [
        {"system": "x"},
        {"messages": "m"},
        {"messages": "m", "format": "chat", "prompt": "{q}"},
        {"answer": None, "extract": "hash"},
        {"extract": "hsh"},
        {"extract": "regex:("},
        {"splits": {"heldout": None}},
        {"source": {"kind": "reasoning_gym", "dataset": "x", "params": {"seed": 1}}},
    ],
)
def test_options_without_effect_or_sense_are_refused(settings):
    with pytest.raises(ValidationError):
        task(**settings)


GSM8K = {
    "source": {"kind": "jsonl", "path": "gsm8k/train.jsonl"},
    "heldout_source": {"kind": "jsonl", "path": "gsm8k/test.jsonl"},
    "format": "chat",
    "extract": "hash",
    "demonstration": "{answer}",
    "splits": {"heldout": None},
}


@pytest.mark.skipif(not REAL.is_dir(), reason="no public task data beside the checkout (../shared/data)")
@pytest.mark.parametrize(
    ("settings", "train", "heldout"),
    [
        (GSM8K, 7473, 1319),
        (
            {
                "source": {"kind": "jsonl", "path": "svamp/test.jsonl"},
                "prompt": "{Body} {Question}",
                "answer": "{Answer}",
                "id": "ID",
                "splits": {"heldout": 200},
            },
            800,
            200,
        ),
        (
            {
                "source": {"kind": "jsonl", "path": "amc23/test.jsonl"},
                "heldout_source": {"kind": "jsonl", "path": "aime24/test.jsonl"},
                "prompt": "{problem}",
                "splits": {"heldout": None},
            },
            40,
            30,
        ),
    ],
)
def test_public_maths_sets(settings, train, heldout):
    done = prepare("maths", TaskConfig(**settings), REAL)
    assert (done.counts["train"], done.counts["heldout"]) == (train, heldout)
    for answer in done.train.column("answer").to_pylist() + done.heldout.column("answer").to_pylist():
        float(answer)
        assert not answer.endswith(".0")


def test_large_shuffled_sources_stay_in_step(tmp_path):
    rows = numbers(500)
    first = prepared(tmp_path, rows, splits={"heldout": 100})
    random.Random(1).shuffle(rows)
    assert prepared(tmp_path, rows, splits={"heldout": 100}) == first
