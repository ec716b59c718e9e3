"""What training makes of derived rollouts: other prompts, wider spans, and log-probs that are no longer theirs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from rollway.config.training import TrainConfig
from rollway.errors import RollwayError
from rollway.store import parquet
from rollway.store.payload import drawn
from rollway.store.tables import ROLLOUTS
from rollway.training.batch import TrainingBatch, training_batch
from rollway.training.precompute import precompute
from training.test_batch import batch, rollouts
from training.tiny import naive_logp, random_batch, tiny


def derived(trained: list[Any], prefixes: list[int | None] | None = None, **changed: list[Any]) -> pa.Table:
    table = rollouts(**changed)
    table = table.append_column("train_prompt_tokens", pa.array(trained, pa.list_(pa.int32())))
    return table.append_column("prefix_length", pa.array(prefixes or [None] * 3, pa.int32()))


def with_span(spans: list[str | None], **columns: list[Any]) -> pa.Table:
    return batch(span=spans, **columns)


def test_the_trained_prompt_replaces_the_one_that_was_read() -> None:
    made = training_batch(batch(rollout_id=["a", "c"]), derived([[7, 8, 9], None, None])).rows
    assert made[0].prompt_tokens.tolist() == [7, 8, 9]
    assert made[0].tokens.tolist() == [5, 6, 7]
    assert np.isnan(made[0].logprobs).all() and made[0].reworded
    assert made[1].prompt_tokens.tolist() == [3]
    assert made[1].logprobs.tolist() == [-2.0, -3.0] and not made[1].reworded


def test_a_turn_is_trained_from_its_prefix_on() -> None:
    """Two rows of the same ids: the revision's mask lies inside that of the turn, and neither holds the prompt."""
    stored = derived([None] * 3, [1, None, None], prompt_tokens=[[1, 2], [1, 2], [3]])
    made = training_batch(with_span(["completion", "turn"], rollout_id=["a", "a"], slot=[0, 1]), stored).rows
    ids = [[*row.prompt_tokens, *row.tokens] for row in made]
    assert ids[0] == ids[1] == [1, 2, 5, 6, 7]
    trained = [
        np.concatenate([np.zeros(len(row.prompt_tokens), bool), row.train_mask]) if len(row.tokens) else None
        for row in made
    ]
    assert trained[0].tolist() == [False, False, True, False, True]
    assert trained[1].tolist() == [False, True, True, False, True]
    assert (trained[1] | ~trained[0]).all()
    assert np.isnan(made[1].logprobs[0])
    assert made[1].logprobs[1:].tolist() == made[0].logprobs.tolist()
    assert not made[1].reworded


def test_a_turn_under_another_prompt() -> None:
    made = training_batch(with_span(["turn"], rollout_id=["a"]), derived([[9], None, None], [1, None, None])).rows[0]
    assert (made.prompt_tokens.tolist(), made.tokens.tolist()) == ([9], [2, 5, 6, 7])
    assert np.isnan(made.logprobs).all() and made.reworded


@pytest.mark.parametrize(
    ("curated", "stored", "message"),
    [
        (batch(rollout_id=["a"]), derived([[], None, None]), "rollout a is of a derived pass with `trained: never`"),
        (with_span(["all"], rollout_id=["a"]), derived([None] * 3), "rollout a has the span 'all'"),
        (with_span(["turn"], rollout_id=["a"]), derived([None] * 3), "its turn begins with the completion"),
        (with_span(["turn"], rollout_id=["a"]), rollouts(), "its turn begins with the completion"),
    ],
)
def test_refused_rows(curated: pa.Table, stored: pa.Table, message: str) -> None:
    with pytest.raises(RollwayError, match=message):
        training_batch(curated, stored)


def test_files_with_and_without_the_columns_are_read_together(tmp_path: Path) -> None:
    def row(name: str, **more: Any) -> dict[str, Any]:
        return {
            **{"rollout_id": name, "round": 0, "pass": 0, "policy": "p", "policy_round": 0, "group_id": "g"},
            **{"prompt_id": "p", "sample": 0, "source": "policy", "finish": "stop", "length": 1, "engine": "e"},
            **{"sampling": "{}", "prompt_tokens": [1, 2], "tokens": [3], "logprobs": [-1.0], "train_mask": [True]},
            **{"segments": [], "text": "t", **more},
        }

    added = ("train_prompt_tokens", "prefix_length")
    plain = pa.Table.from_pylist([row("a"), row("b")], ROLLOUTS.schema())
    made = pa.Table.from_pylist([row("c", train_prompt_tokens=[5], prefix_length=None)], ROLLOUTS.schema(added))
    parquet.write(tmp_path / "p0.parquet", plain, "rollouts")
    parquet.write(tmp_path / "p1.parquet", made, "rollouts")
    assert parquet.names(tmp_path / "p0.parquet") == ROLLOUTS.names()
    wanted = pa.chunked_array([["a", "c"]])
    both = drawn([tmp_path / "p0.parquet", tmp_path / "p1.parquet"], wanted)
    assert both["train_prompt_tokens"].to_pylist() == [None, [5]]
    assert "train_prompt_tokens" not in drawn([tmp_path / "p0.parquet"], wanted).column_names


def train(**objective: Any) -> TrainConfig:
    given = {"ratio": "token", "gate": {"kind": "clip"}, "aggregate": "token_mean"} | objective
    return TrainConfig.model_validate({"objective": given})


def reworded() -> TrainingBatch:
    made = random_batch(4)
    nan = [replace(row, logprobs=np.full(len(row.tokens), np.nan, np.float32), reworded=True) for row in made.rows[:2]]
    return replace(made, rows=[*nan, *made.rows[2:]])


def test_old_log_probs_are_the_trainers_under_the_trained_prompt() -> None:
    """A ratio to the old policy starts at 1 for every row, whatever the engine read."""
    policy, rows = tiny(), reworded()
    fixed = precompute(policy, None, None, rows, train(), {}, 1.0)
    for n, row in enumerate(rows.rows):
        expected = naive_logp(policy, row).detach()
        torch.testing.assert_close(fixed.tokens.logp[n, : len(expected)], expected, atol=1e-10, rtol=0)
        assert bool(fixed.behaviour[n, : len(expected)].isnan().all()) is row.reworded


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"ratio": {"kind": "token", "denominator": "behavior"}}, "its log-probs are of another context"),
        ({"correction": {"kind": "tis", "cap": 2.0}}, "its log-probs are of another context"),
        ({"distill": {"estimate": "sampled"}}, "takes it for a sample of the policy"),
    ],
)
def test_the_engines_log_probs_are_never_used_for_them(objective: dict[str, Any], message: str) -> None:
    with pytest.raises(RollwayError, match=message):
        precompute(tiny(), None, None, reworded(), train(**objective), {}, 1.0)
