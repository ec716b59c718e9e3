import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rollway.config.tasks import TaskConfig
from rollway.errors import RollwayError
from rollway.store.catalog import run_sql
from rollway.store.importing import import_into, import_rollouts
from rollway.tasks import prepare
from store.synthetic import make_results

MAPPING = {
    "prompt": "question",
    "completion": "output.text",
    "reward": "score",
    "tokens": "ids",
    "logprobs": "lp",
    "answer": "gold",
}


def line(**changes):
    base = {"question": "1+1=", "output": {"text": "2"}, "score": 1, "ids": [5, 2], "lp": [-0.5, -0.1], "gold": "2"}
    return json.dumps({**base, **changes})


def jsonl(tmp_path, *lines):
    path = tmp_path / "other.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_rows_groups_and_ids(tmp_path):
    path = jsonl(tmp_path, line(), line(output={"text": "3"}, score=False), line(question="2+2="), line())
    found = import_rollouts(path, MAPPING)
    rows = found.rollouts.to_pylist()
    assert [row["sample"] for row in rows] == [0, 1, 0, 2]
    assert len({row["group_id"] for row in rows}) == 2
    assert len({row["rollout_id"] for row in rows}) == 4, "equal rows stay two rollouts"
    assert rows[0]["source"] == "offline"
    assert rows[0]["logprobs"] == pytest.approx([-0.5, -0.1])
    assert [score["reward"] for score in found.scores.to_pylist()] == [1.0, 0.0, 1.0, 1.0]
    assert [prompt["answer"] for prompt in found.prompts.to_pylist()] == ["2", "2"]
    again = import_rollouts(path, MAPPING)
    assert again.rollouts.equals(found.rollouts)


def test_rows_without_tokens_and_chat_prompts_from_parquet(tmp_path):
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1+1="}]
    path = tmp_path / "other.parquet"
    pq.write_table(
        pa.table(
            {"chat": [chat], "text": ["2"], "r": [None]},
            pa.schema(
                [
                    ("chat", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
                    ("text", pa.string()),
                    ("r", pa.float64()),
                ]
            ),
        ),
        path,
    )
    found = import_rollouts(path, {"prompt": "chat", "completion": "text", "reward": "r"})
    row = found.rollouts.to_pylist()[0]
    assert (row["tokens"], row["logprobs"], row["segments"], row["length"]) == ([], [], [], 0)
    assert json.loads(found.prompts.to_pylist()[0]["messages"]) == chat
    assert "no reward" in found.scores.to_pylist()[0]["error"]


def test_a_prompt_has_the_id_that_a_task_gives_it(tmp_path):
    """Whatever the import is called, and however white space ends the prompt; so runs find imported completions."""
    file = tmp_path / "task.jsonl"
    file.write_text('{"question": "1+1=", "answer": "2"}\n{"question": "2+2=", "answer": "4"}\n')
    source = {"kind": "jsonl", "path": str(file)}
    task = prepare("sums", TaskConfig.model_validate({"source": source, "splits": {"heldout": 1}}), tmp_path)
    ids = {*task.train.column("prompt_id").to_pylist(), *task.heldout.column("prompt_id").to_pylist()}
    path = jsonl(tmp_path, line(question="1+1= \n"), line(question="2+2="))
    found = import_rollouts(path, MAPPING, task="another name")
    assert set(found.rollouts.column("prompt_id").to_pylist()) == ids
    given = import_rollouts(jsonl(tmp_path, line(id="mine")), {**MAPPING, "prompt_id": "id"})
    assert given.rollouts.column("prompt_id").to_pylist() == ["mine"], "an id of its own wins"


def test_tokens_without_log_probs_or_text(tmp_path):
    class Letters:
        def decode(self, tokens):
            return "".join(chr(t) for t in tokens)

    path = jsonl(tmp_path, json.dumps({"id": "p1", "ids": [104, 105]}))
    row = import_rollouts(path, {"prompt_id": "id", "tokens": "ids"}, tokenizer=Letters()).rollouts.to_pylist()[0]
    assert (row["text"], row["prompt_id"]) == ("hi", "p1")
    assert all(math.isnan(v) for v in row["logprobs"])
    with pytest.raises(RollwayError, match="line 1: column 'completion'"):
        import_rollouts(path, {"prompt_id": "id", "tokens": "ids"})


@pytest.mark.parametrize(
    ("second", "says"),
    [
        ("{broken", "line 2: not valid JSON"),
        ("[1]", "line 2: holds list"),
        (line(lp=[-0.5]), "line 2: column 'lp' (logprobs) has 1 entries for 2 tokens"),
        (line(lp=[0.9, 0.5]), "are they probabilities"),
        (line(ids=[1.5, 2]), "line 2: column 'ids' (tokens) is not a list of token ids"),
        (line(score="good"), "line 2: column 'score' (reward) is 'good'"),
        (line(score=10**400), "line 2: column 'score' (reward) is a number too large to store"),
        (line(lp=[-(10**400), 0]), "line 2: column 'lp' (logprobs) holds a number too large to store"),
        ('{"question": ' + "[" * 100_000, "line 2: JSON nested too deeply; mend or remove the line"),
        (line(question="\ud800"), "line 2: column 'question' (prompt) holds a lone surrogate"),
        (line(output={"text": "2\udc00"}), "line 2: column 'output.text' (completion) holds a lone surrogate"),
        (line(gold="\ud800"), "line 2: column 'gold' (answer) holds a lone surrogate"),
        (line(question=7), "line 2: column 'question' (prompt) is int"),
        (line(question=[{"content": "1+1="}]), "line 2: column 'question' (prompt) has a message without a role"),
        (line(question=[{"role": "user", "content": 7}]), "line 2: column 'question' (prompt) is list"),
        (
            json.dumps({"question": "x", "outputs": {"text": "y"}}),
            "line 2: no column 'output.text'; did you mean 'outputs'",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path, second, says):
    with pytest.raises(RollwayError) as caught:
        import_into(tmp_path / "results", jsonl(tmp_path, line(), second), "other", MAPPING)
    assert says in str(caught.value)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("field", ["prompt_id", "group", "finish", "policy"])
def test_labels_are_text_that_can_be_stored(tmp_path, field):
    path = jsonl(tmp_path, line(), line(mine="\ud800"))
    with pytest.raises(RollwayError, match="line 1: no column 'mine'"):
        import_rollouts(path, {**MAPPING, field: "mine"})
    path = jsonl(tmp_path, line(mine=7), line(mine="\ud800"))
    with pytest.raises(RollwayError, match=rf"line 2: column 'mine' \({field}\) holds a lone surrogate"):
        import_rollouts(path, {**MAPPING, field: "mine"})
    number = import_rollouts(jsonl(tmp_path, line(mine=7)), {**MAPPING, field: "mine"}).rollouts.to_pylist()[0]
    assert number[{"group": "group_id"}.get(field, field)] == {"group": "0-7"}.get(field, "7")


@pytest.mark.parametrize("scorer", ["../../../evil", "a/b", "", "*", "a--b", "reward"])
def test_a_scorer_is_named_as_in_a_recipe(tmp_path, scorer):
    with pytest.raises(RollwayError, match="import: --scorer"):
        import_into(tmp_path / "results", jsonl(tmp_path, line()), "other", MAPPING, scorer=scorer)
    assert [path.name for path in tmp_path.iterdir()] == ["other.jsonl"]


@pytest.mark.parametrize("run", ["tasks", "warmups", "logs", "reward_models", "..", ".hidden"])
def test_folders_of_the_workflow_are_no_runs(tmp_path, run):
    with pytest.raises(RollwayError, match="cannot be a run's name"):
        import_into(tmp_path / "results", jsonl(tmp_path, line()), run, MAPPING)
    assert not (tmp_path / "results").exists()


def test_a_task_of_the_workflow_is_not_overwritten(tmp_path):
    results = make_results(tmp_path / "results", {"a-s0": 1})
    prompts = (results / "tasks" / "add" / "train.parquet").read_bytes()
    with pytest.raises(RollwayError, match=r"tasks/add belongs to a task of the workflow; choose another name"):
        import_into(results, jsonl(tmp_path, line()), "add", MAPPING)
    assert (results / "tasks" / "add" / "train.parquet").read_bytes() == prompts
    assert not (results / "add").exists()


def test_parquet_text_that_is_not_utf8(tmp_path):
    broken = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff\xfe"]).buffers())
    pq.write_table(pa.table({"question": ["1+1="], "text": broken}), tmp_path / "x.parquet")
    with pytest.raises(RollwayError, match="row 0 or soon after: text that is not UTF-8"):
        import_rollouts(tmp_path / "x.parquet", {"prompt": "question", "completion": "text"})


@pytest.mark.parametrize(
    ("mapping", "says"),
    [
        ({"prompt": "question", "completions": "x"}, "did you mean 'completion'"),
        ({"prompt": "question"}, "map `completion`"),
        ({"completion": "output.text"}, "map `prompt`"),
    ],
)
def test_a_bad_mapping_is_explained(tmp_path, mapping, says):
    with pytest.raises(RollwayError) as caught:
        import_rollouts(jsonl(tmp_path, line()), mapping)
    assert says in str(caught.value)


def test_bad_files(tmp_path):
    with pytest.raises(RollwayError, match="no such file"):
        import_rollouts(tmp_path / "none.jsonl", MAPPING)
    with pytest.raises(RollwayError, match="holds no rows"):
        import_rollouts(jsonl(tmp_path, ""), MAPPING)
    (tmp_path / "x.csv").write_text("a\n")
    with pytest.raises(RollwayError, match="can be imported"):
        import_rollouts(tmp_path / "x.csv", MAPPING)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(RollwayError, match="not a whole Parquet file"):
        import_rollouts(tmp_path / "x.parquet", MAPPING)


def test_import_into_results(tmp_path):
    results = make_results(tmp_path / "results", {"a-s0": 1})
    message = import_into(results, jsonl(tmp_path, line(), line()), "published", MAPPING)
    assert "2 rollouts, 2 scores, 1 prompts" in message
    assert run_sql(results, "SELECT run, count(*), avg(reward) FROM scored GROUP BY ALL ORDER BY ALL", "csv").endswith(
        "published,2,1.0"
    )
    before = {path: path.read_bytes() for path in (results / "published").rglob("*.parquet")}
    import_into(results, jsonl(tmp_path, line(), line()), "published", MAPPING)
    assert {path: path.read_bytes() for path in before} == before
    with pytest.raises(RollwayError, match="belongs to a run of the workflow"):
        import_into(results, jsonl(tmp_path, line()), "a-s0", MAPPING)
    with pytest.raises(RollwayError, match="cannot be a run's name"):
        import_into(results, jsonl(tmp_path, line()), "../x", MAPPING)
