"""Exported rollouts are what TRL's formats ask for, and nothing of a row is lost on the way."""

import json
import math

import pyarrow.parquet as pq
import pytest

from rollway.cli import main
from rollway.errors import RollwayError
from rollway.exporting.rollouts import export_rollouts
from rollway.store.importing import import_rollouts
from store.synthetic import HOSTILE, make_results, rollout_rows, write


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_carry_tokens_logprobs_rewards_and_advantage(results, tmp_path):
    count, _ = export_rollouts(results, "a-s0", [0, 1], "rows", tmp_path / "rows.jsonl")
    rows = lines(tmp_path / "rows.jsonl")
    assert len(rows) == count == 24
    assert rows[0]["prompt"] == "0+0=" and rows[0]["completion"] == "abc" and rows[0]["tokens"] == [5, 6, 2]
    assert rows[0]["logprobs"] == pytest.approx([-0.1, -2.0, -4.0]) and rows[0]["train_mask"] == [True, True, False]
    assert rows[0]["reward"] == 7.0 and rows[0]["advantage"] == 0.5 and rows[0]["slots"] == 1
    assert [row["slots"] for row in rows if row["prompt_id"] == "train-2"] == [0] * 8, "curation dropped these"


def test_rows_come_back_by_import(results, tmp_path):
    export_rollouts(results, "a-s0", [0], "rows", tmp_path / "rows.jsonl")
    fields = (
        "completion",
        "prompt",
        "prompt_id",
        "prompt_tokens",
        "tokens",
        "logprobs",
        "train_mask",
        "reward",
        "answer",
    )
    back = import_rollouts(tmp_path / "rows.jsonl", {name: name for name in fields} | {"group": "group_id"})
    assert back.rollouts.num_rows == 12
    assert back.rollouts.column("tokens").to_pylist() == [[5, 6, 2]] * 12
    assert back.rollouts.column("train_mask").to_pylist() == [[True, True, False]] * 12


def test_sft_takes_what_is_right_unless_told_otherwise(results, tmp_path):
    count, _ = export_rollouts(results, "a-s0", [0], "sft", tmp_path / "sft.jsonl")
    assert count == 3 and lines(tmp_path / "sft.jsonl")[0] == {"prompt": "0+0=", "completion": "abc"}
    count, _ = export_rollouts(results, "a-s0", [0], "sft", tmp_path / "all.jsonl", where="sample < 2")
    assert count == 6


def test_preferences_are_best_and_worst_of_groups_that_differ(results, tmp_path):
    count, remark = export_rollouts(results, "a-s0", [0], "preference", tmp_path / "pairs.jsonl")
    # The batch gave groups 0 and 1 equal rewards; group 2, dropped, has its scorers' weighted sum.
    assert count == 1 and remark.startswith("1 of 3 groups")
    [pair] = lines(tmp_path / "pairs.jsonl")
    assert (pair["chosen_id"], pair["chosen_reward"]) == ("a-s0-0-2-0", 1.5)
    assert pair["rejected_reward"] == 0.5 and pair["prompt"] == "2+2=" and pair["chosen"] == "abc"


def test_preferences_are_the_batchs_pairs_where_it_has_some(results, tmp_path):
    sides = (("a-s0-0-0-0", "chosen"), ("a-s0-0-0-1", "rejected"), ("a-s0-0-1-0", "chosen"))
    rows = [
        {"rollout_id": name, "slot": 0, "pair_id": f"pair-{name[7]}", "role": role, "reward": 1.0}
        for name, role in sides
    ]
    write(results / "a-s0" / "r0000" / "batch.parquet", rows, "batch")
    count, remark = export_rollouts(results, "a-s0", [0], "preference", tmp_path / "pairs.parquet")
    assert count == 1 and remark == "1 of the batch's 1 pairs"
    [pair] = pq.read_table(tmp_path / "pairs.parquet").to_pylist()
    assert (pair["chosen_id"], pair["rejected_id"]) == ("a-s0-0-0-0", "a-s0-0-0-1")


def test_a_chat_is_a_list_of_messages_as_trl_has_them(results, tmp_path):
    rows = [
        {
            "prompt_id": "train-0",
            "task": "add",
            "split": "train",
            "messages": json.dumps([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]),
            "answer": "0",
            "meta": json.dumps({"format": "chat"}),
        }
    ]
    write(results / "tasks" / "add" / "train.parquet", rows, "prompts")
    export_rollouts(results, "a-s0", [0], "sft", tmp_path / "sft.jsonl")
    [row] = lines(tmp_path / "sft.jsonl")
    assert row["prompt"] == [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert row["completion"] == [{"role": "assistant", "content": "abc"}]


def test_parquet_loads_as_a_dataset(results, tmp_path):
    datasets = pytest.importorskip("datasets")
    export_rollouts(results, "a-s0", [0], "sft", tmp_path / "sft.parquet")
    loaded = datasets.Dataset.from_parquet(str(tmp_path / "sft.parquet"), cache_dir=str(tmp_path / "cache"))
    assert loaded.column_names == ["prompt", "completion"] and loaded.num_rows == 3


def test_hostile_text_survives_as_text(tmp_path):
    results = make_results(tmp_path / "results", {"a-s0": 1}, text=HOSTILE)
    export_rollouts(results, "a-s0", [0], "sft", tmp_path / "sft.jsonl")
    assert lines(tmp_path / "sft.jsonl")[0]["completion"] == HOSTILE


@pytest.mark.parametrize("form", ["rows", "sft", "preference"])
def test_what_is_no_number_becomes_null_in_json(results, tmp_path, form):
    """Rewards and log-probs that are NaN or infinite, alone and in lists; in Parquet they stay."""
    values = [math.nan, -math.inf, 0.5, 1.5]
    rows = rollout_rows("a-s0", 0)
    for row in rows:
        row["logprobs"] = [-math.inf, math.nan, -0.5]
    write(results / "a-s0/r0000/p0/rollouts-000.parquet", rows[:6], "rollouts")
    batch = [
        {"rollout_id": row["rollout_id"], "slot": 0, "reward": values[row["sample"]], "correct": True, "advantage": 1.0}
        for row in rows
    ]
    write(results / "a-s0/r0000/batch.parquet", batch, "batch")
    export_rollouts(results, "a-s0", [0], form, tmp_path / "out.jsonl")
    found = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "out.jsonl").open()]
    if form == "rows":
        assert found[0]["logprobs"] == [None, None, -0.5]
        assert [row["reward"] for row in found[:4]] == [None, None, 0.5, 1.5]
        export_rollouts(results, "a-s0", [0], form, tmp_path / "out.parquet")
        kept = pq.read_table(tmp_path / "out.parquet").column("reward").to_pylist()[:2]
        assert math.isnan(kept[0]) and kept[1] == -math.inf
    if form == "preference":
        assert [(pair["chosen_reward"], pair["rejected_reward"]) for pair in found] == [(1.5, 0.5)] * 3


def test_rollouts_without_their_prompt_are_counted(results, tmp_path, capsys):
    path = results / "tasks/add/train.parquet"
    pq.write_table(pq.read_table(path, filters=[("prompt_id", "!=", "train-1")]), path)
    left_out = f"4 of 12 rollouts are left out, whose prompts are not in {results / 'tasks'}"
    out = tmp_path / "rows.jsonl"
    assert export_rollouts(results, "a-s0", [0], "rows", out) == (8, left_out)
    assert {row["prompt_id"] for row in lines(out)} == {"train-0", "train-2"}
    count, remark = export_rollouts(results, "a-s0", [0], "preference", tmp_path / "pairs.jsonl")
    assert count == 1 and remark.startswith("1 of 2 groups") and remark.endswith(f"; {left_out}")
    path.unlink()
    arguments = ["export", "rollouts", "a-s0", "--results", str(results), "--rounds", "0", "--out"]
    assert main([*arguments, str(tmp_path / "none.jsonl")]) == 1
    assert "12 of 12 rollouts are left out, whose prompts are not in" in capsys.readouterr().err
    assert not (tmp_path / "none.jsonl").exists()


def test_mistakes_are_one_sentence_and_leave_nothing(results, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    arguments = ["export", "rollouts", "a-s0", "--results", str(results), "--rounds", "0", "--out"]
    assert main([*arguments, str(tmp_path / "out.csv")]) == 1
    assert "end it in .jsonl or .parquet" in capsys.readouterr().err
    for where in ("rewrad > 1", "reward > 1); DROP VIEW scored; SELECT (1", "reward > 1 --", "reward > 99"):
        assert main([*arguments, str(out), "--where", where]) == 1, where
        assert capsys.readouterr().err.startswith("rollway: error: "), where
        assert not out.exists()
    with pytest.raises(RollwayError, match="no rollout"):
        export_rollouts(results, "nobody-s0", [0], "rows", out)
    equal = "sample < 2 AND prompt_id <> 'train-2'"
    with pytest.raises(RollwayError, match="0 of 2 groups have rewards that differ"):
        export_rollouts(results, "a-s0", [0], "preference", out, where=equal)
