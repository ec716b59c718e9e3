"""Logs of other tools come in with the names that those tools wrote; fixtures are small files of our own making."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rollway.cli import main
from rollway.errors import RollwayError
from rollway.store.foreign import FORMATS
from rollway.store.importing import import_rollouts


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Letters:
    """Decodes token 1 as a, 2 as b, ..."""

    def decode(self, tokens: list[int]) -> str:
        return "".join(chr(96 + token) for token in tokens)


def rows_of(found, *columns):
    return [tuple(row[c] for c in columns) for row in found.rollouts.to_pylist()]


def rewards(found):
    return found.scores.column("reward").to_pylist()


def test_trl_completions(tmp_path):
    table = {
        "step": [5, 5],
        "prompt": ["1+1=", "1+1="],
        "completion": ["2", "3"],
        "exact": [1.0, 0.0],
        "advantage": [1.0, -1.0],
    }
    pq.write_table(pa.table(table), tmp_path / "completions_00005.parquet")
    found = import_rollouts(tmp_path / "completions_00005.parquet", {}, tool="trl")
    assert rows_of(found, "text", "sample") == [("2", 0), ("3", 1)] and rewards(found) == [1.0, 0.0]


def test_trl_with_several_rewards_asks_which(tmp_path):
    table = {"step": [5], "prompt": ["p"], "completion": ["2"], "exact": [1.0], "length": [0.5], "advantage": [1.0]}
    pq.write_table(pa.table(table), tmp_path / "c.parquet")
    with pytest.raises(RollwayError, match=r"exact, length; say which is the reward: --map reward=exact"):
        import_rollouts(tmp_path / "c.parquet", {}, tool="trl")
    assert rewards(import_rollouts(tmp_path / "c.parquet", {"reward": "length"}, tool="trl")) == [0.5]


def test_what_trl_itself_writes_is_read(tmp_path):
    """The columns come from TRL's own code where it is installed."""
    source = pytest.importorskip("trl.trainer.grpo_trainer", reason="TRL is an extra: pip install 'rollway[bench]'")
    text = Path(source.__file__).read_text()
    for column in ('"step"', '"prompt"', '"completion"', '"advantage"', "completions_"):
        assert column in text


def test_verl_rollout_data(tmp_path):
    row = {"input": "1+1=", "output": "2", "gts": "2", "score": 1.0, "step": 3}
    found = import_rollouts(jsonl(tmp_path / "3.jsonl", [row]), {}, tool="verl")
    assert rows_of(found, "text") == [("2",)] and rewards(found) == [1.0]
    assert found.prompts.column("answer").to_pylist() == ["2"]
    without = {key: value for key, value in row.items() if key != "gts"}
    assert import_rollouts(jsonl(tmp_path / "4.jsonl", [without]), {}, tool="verl").prompts["answer"].to_pylist() == [
        None
    ]


def test_open_instruct_traces_keep_tokens_and_logprobs(tmp_path):
    row = {
        "prompt_tokens": [1, 2],
        "response_tokens": [3, 4],
        "logprobs": [-0.5, -1.0],
        "reward": 10.0,
        "advantage": 0.3,
        "finish_reason": "stop",
        "dataset": "d",
        "ground_truth": ["cd"],
    }
    path = jsonl(tmp_path / "t.jsonl", [row])
    found = import_rollouts(path, {}, tool="open-instruct", tokenizer=Letters())
    assert rows_of(found, "text", "tokens", "prompt_tokens", "logprobs", "finish") == [
        ("cd", [3, 4], [1, 2], [-0.5, -1.0], "stop")
    ]
    assert json.loads(found.prompts["messages"][0].as_py())[0]["content"] == "ab"
    assert found.prompts["answer"].to_pylist() == ['["cd"]']
    with pytest.raises(RollwayError, match="give --tokenizer"):
        import_rollouts(path, {}, tool="open-instruct")


def test_prime_rl_messages(tmp_path):
    row = {
        "example_id": 7,
        "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "1+1"}],
        "completion": [{"role": "assistant", "content": "2"}],
        "answer": "2",
        "reward": 1.0,
    }
    found = import_rollouts(jsonl(tmp_path / "r.jsonl", [row]), {}, tool="prime-rl")
    assert rows_of(found, "text") == [("2",)]
    assert [m["role"] for m in json.loads(found.prompts["messages"][0].as_py())] == ["system", "user"]


TURNS = [
    {"role": "assistant", "content": "call"},
    {"role": "tool", "content": "TOOL SAYS"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "ans"},
]


@pytest.mark.parametrize(
    ("completion", "says"),
    [
        (TURNS, "has turns of tool, user, which would pass for the policy's own text; map `tokens` and `train_mask`"),
        ([{"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}], "calls tools in turn 0: such a call is"),
        ([TURNS[0], {"role": "assistant", "content": "x", "tool_calls": [{"id": 1}]}], "calls tools in turn 1"),
        ([{"role": "assistant", "content": [{"type": "text"}]}], "has no text as `content` of turn 0"),
    ],
)
def test_what_others_wrote_is_not_taken_for_the_policys_text(tmp_path, completion, says):
    row = {"prompt": "p", "completion": completion, "reward": 1.0}
    with pytest.raises(RollwayError) as raised:
        import_rollouts(jsonl(tmp_path / "r.jsonl", [row]), {}, tool="prime-rl")
    assert f"line 1: column 'completion' (completion) {says}" in str(raised.value)


def test_turns_of_the_assistant_and_turns_that_a_mask_tells_apart(tmp_path):
    row = {"prompt": "p", "completion": [TURNS[0], {**TURNS[3], "tool_calls": []}], "reward": 1.0}
    assert rows_of(import_rollouts(jsonl(tmp_path / "a.jsonl", [row]), {}, tool="prime-rl"), "text") == [("callans",)]
    masked = {**row, "completion": TURNS, "ids": [1, 2, 3, 4], "mask": [1, 0, 0, 1]}
    mapping = {"tokens": "ids", "train_mask": "mask"}
    found = import_rollouts(jsonl(tmp_path / "m.jsonl", [masked]), mapping, tool="prime-rl")
    assert rows_of(found, "text", "train_mask") == [("callTOOL SAYSand?ans", [True, False, False, True])]
    without = jsonl(tmp_path / "t.jsonl", [masked])
    with pytest.raises(RollwayError, match="has turns of tool, user"):
        import_rollouts(without, {"tokens": "ids"}, tool="prime-rl")


def lm_eval_row(responses, filtered, right, **more):
    return {
        "doc_id": 0,
        "doc": {"question": "1+1"},
        "target": "2",
        "arguments": {"gen_args_0": {"arg_0": "Q: 1+1 A:", "arg_1": {"until": ["\n"]}}},
        "resps": [responses],
        "filtered_resps": [filtered],
        "metrics": ["exact_match"],
        "exact_match": right,
        **more,
    }


def test_lm_eval_samples_one_row_per_response(tmp_path):
    """What a filter makes of several responses has one verdict: it is the reward of none of them."""
    one = [lm_eval_row(["2"], "2", 1.0), lm_eval_row(["3"], "3", 0.0)]
    found = import_rollouts(jsonl(tmp_path / "samples_x.jsonl", one), {}, tool="lm-eval")
    assert rows_of(found, "text", "sample") == [("2", 0), ("3", 1)] and found.prompts.num_rows == 1
    assert rewards(found) == [1.0, 0.0]
    row = lm_eval_row(["2", "3"], "2", 1.0)
    found = import_rollouts(jsonl(tmp_path / "samples_y.jsonl", [row]), {}, tool="lm-eval")
    assert rows_of(found, "text", "sample") == [("2", 0), ("3", 1)] and found.prompts.num_rows == 1
    assert rewards(found) == []
    choice = {**row, "resps": [[[-1.0, True]]]}
    with pytest.raises(RollwayError, match="only generation can be imported"):
        import_rollouts(jsonl(tmp_path / "c.jsonl", [choice]), {}, tool="lm-eval")
    with pytest.raises(RollwayError, match="not a sample of lm-eval"):
        import_rollouts(jsonl(tmp_path / "d.jsonl", [{"a": 1}]), {}, tool="lm-eval")


def test_lm_eval_filters_are_told_apart(tmp_path, capsys):
    """gsm8k's log: every response once per filter, with that filter's verdict."""
    rows = [
        lm_eval_row(["It is 2."], filtered, right, filter=name)
        for name, filtered, right in (("strict-match", "[invalid]", 0.0), ("flexible-extract", "2", 1.0))
    ]
    path = jsonl(tmp_path / "samples_gsm8k.jsonl", rows)
    both = r"each of the filters strict-match, flexible-extract; say whose verdicts are meant: --filter strict-match"
    with pytest.raises(RollwayError, match=both):
        import_rollouts(path, {}, tool="lm-eval")
    for name, right in (("strict-match", 0.0), ("flexible-extract", 1.0)):
        found = import_rollouts(path, {}, tool="lm-eval", filter=name)
        assert rows_of(found, "text") == [("It is 2.",)] and rewards(found) == [right]
    with pytest.raises(RollwayError, match="has no rows of filter 'loose'; it has strict-match, flexible-extract"):
        import_rollouts(path, {}, tool="lm-eval", filter="loose")
    given = ["import", str(path), "--run", "g", "--from", "lm-eval", "--results", str(tmp_path / "results")]
    assert main(given) == 1
    assert main([*given, "--filter", "flexible-extract"]) == 0
    assert "1 rollouts, 1 scores, 1 prompts" in capsys.readouterr().out
    with pytest.raises(RollwayError, match="--filter loose chooses among the rows of lm-eval; leave it out"):
        import_rollouts(jsonl(tmp_path / "3.jsonl", [{"input": "p", "output": "c"}]), {}, tool="verl", filter="loose")


def test_a_log_that_is_not_there(tmp_path):
    for tool in FORMATS:
        with pytest.raises(RollwayError, match="no such file"):
            import_rollouts(tmp_path / "nowhere.jsonl", {}, tool=tool)


def test_a_column_per_model(tmp_path):
    row = {"problem": "1+1=", "big_solution": "2", "big_correct": True, "small_solution": "3", "small_correct": False}
    mapping = {"prompt": "problem", "completion": "{model}_solution", "reward": "{model}_correct"}
    found = import_rollouts(jsonl(tmp_path / "m.jsonl", [row]), mapping, models=["big", "small"])
    assert rows_of(found, "policy", "text", "sample") == [("big", "2", 0), ("small", "3", 1)]
    assert rewards(found) == [1.0, 0.0] and len(set(found.rollouts["group_id"].to_pylist())) == 1
    with pytest.raises(RollwayError, match=r"needs a column with \{model\}"):
        import_rollouts(tmp_path / "m.jsonl", {"prompt": "problem", "completion": "big_solution"}, models=["big"])
    with pytest.raises(RollwayError, match="no column 'huge_solution'"):
        import_rollouts(tmp_path / "m.jsonl", mapping, models=["huge"])


def test_the_command_line_knows_every_format(tmp_path, capsys):
    row = {"input": "1+1=", "output": "2", "score": 1.0}
    path = str(jsonl(tmp_path / "3.jsonl", [row]))
    assert main(["import", path, "--from", "verl", "--run", "v", "--results", str(tmp_path / "results")]) == 0
    assert "1 rollouts, 1 scores, 1 prompts" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["import", path, "--from", "nobody", "--run", "v"])
    message = capsys.readouterr().err
    assert all(name in message for name in FORMATS)


def test_a_log_of_another_tool_is_named(tmp_path):
    with pytest.raises(RollwayError, match="no column 'input'"):
        import_rollouts(jsonl(tmp_path / "x.jsonl", [{"prompt": "p", "completion": "c"}]), {}, tool="verl")
    with pytest.raises(RollwayError, match="holds no rows"):
        import_rollouts(jsonl(tmp_path / "e.jsonl", []), {}, tool="verl")
