"""What the rollout stage writes where completions are stored (`rollout.engine: {kind: stored}`)."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from rollway.config import load_recipe
from rollway.config.rollouts import RolloutConfig
from rollway.curation import curate
from rollway.errors import RollwayError
from rollway.policies import causal_lm, manifest
from rollway.runtime.specs import STAGE_VERSION, RolloutSpec
from rollway.stages import rollout as stage
from rollway.store import parquet
from rollway.training.batch import training_batch
from rollway.training.state import TrainState
from rollway.training.update import update
from stages.test_expert_rollouts import Here, here

Rows = list[dict[str, Any]]


def replay(place: Here, files: list[Path], *, shard: int = 0, round: int = 0, **rollout: Any) -> Rows:
    given = {"prompts": 5, "group": 2, "engine": {"kind": "stored", "files": [str(file) for file in files]}} | rollout
    spec = RolloutSpec(
        version=STAGE_VERSION["rollout"],
        seed=0,
        round=round,
        pass_number=0,
        policy_round=0,
        shard=shard,
        rollout=RolloutConfig.model_validate(given),
    )
    out = place.folder / "replayed.parquet"
    inputs = {"prompts": place.prompts, "policy": place.policy, "stored": files}
    stage.run(spec, **inputs, rollouts=out, earlier_rollouts=[], earlier_scores=[])
    assert parquet.metadata(out)["rollway.table"] == "rollouts"
    return parquet.read(out).to_pylist()


@pytest.fixture
def place(tmp_path: Path) -> Here:
    """Besides prompts and policy, two files of rollouts of it: `a.parquet` and `b.parquet`."""
    made = here(tmp_path)
    made.rows("a", experts=0)
    made.rows("b", experts=0, sampling={"max_tokens": 4, "temperature": 0.5})
    return made


def both(place: Here) -> list[Path]:
    return [place.folder / "a.parquet", place.folder / "b.parquet"]


def test_rows_keep_their_origin_and_shards_change_nothing(place: Here) -> None:
    rows = replay(place, both(place))
    originals = {row["rollout_id"]: row for file in both(place) for row in parquet.read(file).to_pylist()}
    assert len(rows) == 10
    digest = manifest.digest(place.policy)
    for row in rows:
        original = originals[row["parent_id"]]
        changed = {name for name in row if str(row[name]) != str(original[name])}
        assert changed <= {"rollout_id", "round", "group_id", "sample", "source", "parent_id"}
        assert (row["policy"], row["source"], row["policy_round"]) == (digest, "offline", 1)
    temperatures = [row["sampling"] for row in rows]
    assert len(set(temperatures)) == 2, "of two behaviours, each with its own sampling"
    sharded = [row for shard in range(3) for row in replay(place, both(place), shard=shard, shards=3, part=2)]
    assert str(sharded) == str(rows)


def test_what_the_files_hold_names_the_rows_and_not_where_they_lie(place: Here) -> None:
    rows = replay(place, both(place))
    moved = place.folder / "elsewhere.parquet"
    moved.write_bytes(both(place)[0].read_bytes())
    assert str(replay(place, [moved, both(place)[1]])) == str(rows)
    other = replay(place, both(place)[::-1])
    assert {row["rollout_id"] for row in other}.isdisjoint(row["rollout_id"] for row in rows)
    assert {row["rollout_id"] for row in replay(place, both(place), round=1)}.isdisjoint(
        row["rollout_id"] for row in rows
    )


def test_experts_stand_beside_stored_completions(place: Here) -> None:
    rows = replay(place, both(place), experts=1)
    assert [row["source"] for row in rows] == ["offline", "offline", "expert"] * 5
    assert len({row["rollout_id"] for row in rows}) == 15
    plain = replay(place, both(place))
    assert str([row for row in rows if row["source"] == "offline"]) == str(plain)


def test_prompts_without_a_whole_group_are_left_out_and_counted(
    place: Here, capsys: pytest.CaptureFixture[str]
) -> None:
    table = parquet.read(both(place)[0])
    first = sorted(set(table["prompt_id"].to_pylist()))[:2]
    few = table.filter(pa.array([name in first for name in table["prompt_id"].to_pylist()]))
    parquet.write(place.folder / "few.parquet", few, "rollouts")
    rows = replay(place, [place.folder / "few.parquet"], prompts=4, group=3)
    assert {row["prompt_id"] for row in rows} == set(first)
    assert len({row["group_id"] for row in rows}) == 4, "each prompt twice, a group each time"
    assert "2 of 5 train prompts have 3 stored completions" in capsys.readouterr().err
    with pytest.raises(RollwayError, match="none with 4 completions"):
        replay(place, [place.folder / "few.parquet"], group=4)


@pytest.mark.parametrize("masked", [True, False])
def test_dagrpo_trains_on_stored_completions_and_their_anchors(place: Here, masked: bool) -> None:
    """Stored rows count as the group's own: one group of two fails and keeps its expert, the others lose theirs."""
    rows = replay(place, both(place), experts=1)
    groups = [rows[i : i + 3] for i in range(0, len(rows), 3)]
    scored = []
    for n, group in enumerate(groups):
        for row, reward, judge in zip(group, (float(n > 0), 0.0, 1.0), (5.0, 1.0, 10.0), strict=True):
            own = {name: row[name] for name in ("rollout_id", "group_id", "sample", "source")}
            scored.append({**own, "reward": reward, "correct": reward > 0, "judge": judge})
    changes = {} if masked else {"curate": {"filter": None}}
    recipe = load_recipe("dagrpo", changes)
    batch = curate(pa.Table.from_pylist(scored), recipe.curate)
    routes = dict(zip(batch["rollout_id"].to_pylist(), batch["route"].to_pylist(), strict=True))
    anchored = groups[:1] if masked else groups
    assert {name for name, route in routes.items() if route == "expert"} == {g[2]["rollout_id"] for g in anchored}
    assert {row["rollout_id"] for group in groups for row in group[:2]} <= routes.keys()
    policy = causal_lm.load(place.policy, train=True)
    before = {name: weight.detach().clone() for name, weight in policy.model.named_parameters()}
    made = training_batch(batch, parquet.read(place.folder / "replayed.parquet"))
    _, metrics = update(policy.model, None, None, made, recipe.train, TrainState(seed=0))
    found = {m.name: m.value for m in metrics}
    assert (found["rows"], found["skipped"]) == (11.0 if masked else 15.0, 0.0)
    assert any(not weight.equal(before[name]) for name, weight in policy.model.named_parameters())
