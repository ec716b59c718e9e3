"""The join of a curated batch to its rollouts: nothing is tokenised, nothing is guessed, slots become rows."""

import numpy as np
import pyarrow as pa
import pytest

from rollway.errors import RollwayError
from rollway.store.parquet import conform
from rollway.training.batch import training_batch


def rollouts(**changed: list) -> pa.Table:
    n = 3
    columns = {
        "rollout_id": ["a", "b", "c"],
        "prompt_tokens": [[1, 2], [1, 2], [3]],
        "tokens": [[5, 6, 7], [8], [9, 10]],
        "logprobs": [[-0.5, -0.25, -1.0], [float("nan")], [-2.0, -3.0]],
        "train_mask": [[True, False, True], [True], [True, True]],
        "source": ["policy", "expert", "policy"],
        "group_id": ["g1", "g0", "g1"],
    }
    columns |= changed
    types = {
        "prompt_tokens": pa.list_(pa.int32()),
        "tokens": pa.list_(pa.int32()),
        "logprobs": pa.list_(pa.float32()),
        "train_mask": pa.list_(pa.bool_()),
    }
    assert all(len(v) == n for v in columns.values())
    return pa.table({name: pa.array(v, types.get(name)) for name, v in columns.items()})


def batch(**columns: list) -> pa.Table:
    given = {"slot": [0] * len(columns["rollout_id"]), **columns}
    return conform(pa.table({name: pa.array(v) for name, v in given.items()}), "batch")


def test_rows_follow_the_batch_and_take_token_ids_as_they_are() -> None:
    curated = batch(rollout_id=["c", "a", "a"], slot=[0, 0, 1], advantage=[1.0, None, -0.5], weight=[None, 2.0, 3.0])
    made = training_batch(curated, rollouts())
    assert [(r.rollout_id, r.slot, r.advantage, r.weight) for r in made.rows] == [
        ("c", 0, 1.0, 1.0),
        ("a", 0, None, 2.0),
        ("a", 1, -0.5, 3.0),
    ]
    assert made.rows[1].tokens.tolist() == [5, 6, 7]
    assert made.rows[1].prompt_tokens.tolist() == [1, 2]
    assert made.rows[1].logprobs.tolist() == [-0.5, -0.25, -1.0]
    assert made.rows[1].train_mask.tolist() == [True, False, True]
    assert [r.length for r in made.rows] == [3, 5, 5]


def test_groups_come_from_the_batch_or_else_from_the_rollouts() -> None:
    ids = ["a", "b", "c"]
    assert [r.group for r in training_batch(batch(rollout_id=ids), rollouts()).rows] == [0, 1, 0]
    regrouped = batch(rollout_id=ids, group_id=["x", "y", "z"])
    assert [r.group for r in training_batch(regrouped, rollouts()).rows] == [0, 1, 2]


def test_rollouts_in_several_chunks_and_an_empty_batch() -> None:
    chunks = pa.concat_tables([rollouts().slice(0, 1), rollouts().slice(1)])
    assert training_batch(batch(rollout_id=["c"]), chunks).rows[0].tokens.tolist() == [9, 10]
    empty = batch(rollout_id=["a"]).slice(0, 0)
    assert training_batch(empty, rollouts()).rows == []


def test_pairs_are_row_numbers() -> None:
    curated = batch(
        rollout_id=["a", "b", "a", "c"],
        slot=[0, 0, 1, 0],
        pair_id=["p", "p", "q", "q"],
        role=["rejected", "chosen", "chosen", "rejected"],
    )
    made = training_batch(curated, rollouts())
    assert np.stack([made.chosen, made.rejected]).tolist() == [[1, 2], [0, 3]]


@pytest.mark.parametrize(
    ("curated", "words"),
    [
        ({"rollout_id": ["a", "lost"]}, "rollout lost .*run curate again"),
        ({"rollout_id": ["a"], "advantage": [float("nan")]}, r"\(a, slot 0\): its advantage is not finite"),
        ({"rollout_id": ["a"], "token_advantage": [[1.0]]}, "3 tokens but 1 token advantages"),
        ({"rollout_id": ["a"], "weight": [float("inf")]}, "weight inf"),
        ({"rollout_id": ["a"], "reward": [float("nan")]}, "reward nan"),
        ({"rollout_id": ["a"], "pair_id": ["p"], "role": ["chosen"]}, "pair p has only chosen"),
        (
            {"rollout_id": ["a", "b"], "pair_id": ["p", "p"], "role": ["chosen", "chosen"]},
            "pair p has role 'chosen' twice",
        ),
    ],
)
def test_mistakes_are_named(curated: dict, words: str) -> None:
    with pytest.raises(RollwayError, match=words):
        training_batch(batch(**curated), rollouts())


def test_lists_of_different_lengths_are_named() -> None:
    broken = rollouts(logprobs=[[-0.5], [-1.0], [-2.0, -3.0]])
    with pytest.raises(RollwayError, match="3 tokens but 1 logprobs"):
        training_batch(batch(rollout_id=["a"]), broken)
    with pytest.raises(RollwayError, match="no prompt token"):
        training_batch(batch(rollout_id=["b"]), rollouts(prompt_tokens=[[1], [], [2]]))
