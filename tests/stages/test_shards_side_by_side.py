"""Shards of a pass that end in the same moment."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pyarrow as pa
import pytest

from rollway.config.rollouts import RolloutConfig
from rollway.errors import RollwayError
from rollway.runtime.specs import RolloutSpec
from rollway.stages import rollout
from rollway.store import parquet
from rollway.store.tables import TABLES

SHARDS, TIMES = 4, 20
EMPTY = TABLES["rollouts"].schema().empty_table()


def test_each_has_a_folder_to_itself_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollway.store.atomic.flush", lambda path: None)  # waiting for the disk would part them
    folders: dict[int, set[str]] = {number: set() for number in range(SHARDS)}

    def shard(number: int) -> None:
        settings = RolloutConfig.model_validate({"shards": SHARDS, "part": 1})
        for time in range(TIMES):
            spec = RolloutSpec(
                rollout=settings, seed=0, round=0, pass_number=0, policy_round=0, shard=number, version=1
            )

            def generate(part: list[int], number: int = number) -> pa.Table:
                mine = tmp_path.glob(f".partial-key-{number}-of-{SHARDS}-*/part-*.parquet")
                folders[number] |= {path.parent.name for path in mine}
                return EMPTY

            out = tmp_path / f"rollouts-{number:03d}-{time}.parquet"
            rollout._in_parts(spec, out, "key", [time, -time], lambda opened, generate=generate: generate, {})

    with ThreadPoolExecutor(SHARDS) as pool:
        for done in [pool.submit(shard, number) for number in range(SHARDS)]:
            done.result()
    assert len(list(tmp_path.glob("rollouts-*.parquet"))) == SHARDS * TIMES
    assert not list(tmp_path.glob(".*"))
    assert [len(names) for names in folders.values()] == [1] * SHARDS
    assert len(set.union(*folders.values())) == SHARDS
    assert parquet.read(tmp_path / "rollouts-000-0.parquet").num_rows == 0


def test_a_shard_that_fails_before_its_first_part_leaves_nothing(tmp_path: Path) -> None:
    """Its policy may be damaged: made anew it has another digest, and nobody would look for these parts again."""
    spec = RolloutSpec(
        rollout=RolloutConfig(part=1), seed=0, round=0, pass_number=0, policy_round=0, shard=0, version=1
    )

    def fail(opened: ExitStack) -> Callable[[list[int]], pa.Table]:
        raise RollwayError("policy.json: damaged")

    with pytest.raises(RollwayError, match="damaged"):
        rollout._in_parts(spec, tmp_path / "rollouts-000.parquet", "key", [0], fail, {})
    assert list(tmp_path.iterdir()) == []

    def fail_at_the_second(opened: ExitStack) -> Callable[[list[int]], pa.Table]:
        return lambda part: EMPTY if part == [0] else fail(opened)  # type: ignore[return-value]

    with pytest.raises(RollwayError, match="damaged"):
        rollout._in_parts(spec, tmp_path / "rollouts-000.parquet", "key", [0, 1], fail_at_the_second, {})
    assert [path.name for path in tmp_path.rglob("part-*")] == ["part-00000.parquet"]
