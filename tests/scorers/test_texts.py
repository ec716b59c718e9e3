"""Scorers of texts and lengths, by row groups: the verdicts of the same scorers row by row."""

from pathlib import Path

import pyarrow as pa
import pytest

from rollway.config.scorers import ExactScorer, FormatScorer, LengthScorer
from rollway.errors import RollwayError
from rollway.runtime.notice import progress
from rollway.scorers import TextScorer, join, score, score_texts
from rollway.store.parquet import write
from rollway.store.tables import TABLES

PROMPTS = pa.table(
    {
        "prompt_id": ["p0", "p1", "p2"],
        "task": ["t"] * 3,
        "messages": ['[{"role": "user", "content": "?"}]'] * 3,
        "answer": ["4", "5", None],
        "meta": ["{}"] * 3,
    }
)


def rollouts(rows: int) -> pa.Table:
    return pa.table(
        {
            "rollout_id": pa.array([f"r{n}" for n in range(rows)], pa.string()),
            "prompt_id": pa.array([f"p{n % 3}" for n in range(rows)], pa.string()),
            "group_id": pa.array([f"g{n % 3}" for n in range(rows)], pa.string()),
            "sample": pa.array(range(rows), pa.int32()),
            "text": pa.array([f"so it is {n % 7}" if n % 5 else "" for n in range(rows)], pa.string()),
            "length": pa.array([n % 20 for n in range(rows)], pa.int32()),
            "finish": pa.array(["stop"] * rows, pa.string()),
        }
    )


@pytest.mark.parametrize(
    "config",
    [
        ExactScorer(extract="last_number", max_error_share=1.0),
        ExactScorer(max_error_share=1.0),
        FormatScorer(pattern="so it is [0-3]"),
        FormatScorer(pattern="[46]", full=False),
        FormatScorer(pattern=r"(\w+\s?)*(so it is 6)?x", max_error_share=1.0),
        LengthScorer(limit=18, cache=6),
    ],
    ids=lambda config: config.kind,
)
@pytest.mark.parametrize("rows", [0, 1, 61])
def test_the_verdicts_row_by_row(config: TextScorer, rows: int, tmp_path: Path) -> None:
    table = rollouts(rows)
    expected = score("s", config, join(table, PROMPTS), needs={}, threads=1, root=tmp_path)
    for size in (7, 100):
        parts = [table.slice(start, size) for start in range(0, rows, size)]
        found = score_texts("s", config, parts, PROMPTS)
        assert found.schema.equals(TABLES["scores"].schema())
        assert found.to_pylist() == expected.to_pylist()
        write(tmp_path / "by_parts.parquet", found, "scores")
        write(tmp_path / "whole.parquet", expected, "scores")
        assert (tmp_path / "by_parts.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()


@pytest.mark.parametrize("at_once", [True, False])
def test_the_bar_has_the_reward_so_far(at_once: bool) -> None:
    config, table = FormatScorer(pattern="[46]", full=False), rollouts(40)
    with progress("score f", table.num_rows) as bar:
        if at_once:
            scores = score("f", config, join(table, PROMPTS), needs={}, threads=1, root=Path())
        else:
            parts = [table.slice(0, 30), table.slice(30, 0), table.slice(30)]
            scores = score_texts("f", config, parts, PROMPTS)
    mean = sum(scores.column("reward").to_pylist()) / 40
    assert 0 < mean < 1
    assert bar.done == 40
    assert bar.said() == f"reward {mean:.3f}"


def test_errors_are_counted_over_all_parts(tmp_path: Path) -> None:
    table = rollouts(9)
    parts = [table.slice(0, 5), table.slice(5)]
    with pytest.raises(RollwayError, match=r"scorer s: failed on 3 of 9 .* rollout r2: the prompt has no answer"):
        score_texts("s", ExactScorer(), parts, PROMPTS)
    with pytest.raises(RollwayError, match=r"rollout r2: its prompt p2 is not among"):
        score_texts("s", ExactScorer(), parts, PROMPTS.slice(0, 2))
