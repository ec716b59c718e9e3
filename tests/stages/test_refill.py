"""What a later pass of a round samples: prompts in place of the groups that the filter drops."""

from pathlib import Path

import pyarrow as pa

from rollway.config.curation import SqlPart
from rollway.config.rollouts import RolloutConfig
from rollway.config.scorers import ScoreConfig
from rollway.runtime.specs import STAGE_VERSION, RolloutSpec
from rollway.stages import rollout as stage
from rollway.store import parquet
from stages.test_expert_rollouts import here

RISING = """-- Groups whose reward keeps up.
-- param progress: double, how far the run is
SELECT rollout_id FROM scored QUALIFY avg(reward) OVER (PARTITION BY group_id) >= $progress
"""


def test_a_filter_may_take_progress(tmp_path: Path) -> None:
    """Three groups with mean rewards 0, 1/3 and 2/3 in round 2: with a horizon of 4 (progress 1/2) one of them is
    left, with one of 8 (progress 1/4) two are."""
    place = here(tmp_path)
    (tmp_path / "rising.sql").write_text(RISING)
    rows = place.rows("p0", experts=0, prompts=3)
    scores = tmp_path / "exact-000.parquet"
    verdicts = {
        "rollout_id": [row["rollout_id"] for row in rows],
        "scorer": ["exact"] * 9,
        "reward": pa.array([0.0, 0, 0, 1, 0, 0, 1, 1, 0]),
        "components": pa.array([[]] * 9, pa.map_(pa.string(), pa.float64())),
    }
    parquet.write(scores, pa.table(verdicts), "scores")
    drawn = []
    for horizon in (4, 8):
        spec = RolloutSpec(
            version=STAGE_VERSION["rollout"],
            seed=0,
            round=2,
            pass_number=1,
            policy_round=1,
            shard=0,
            rollout=RolloutConfig.model_validate(
                {"prompts": 3, "group": 3, "sampling": {"max_tokens": 4}, "passes": 2, "refill": {}}
            ),
            score=ScoreConfig(),
            filter=SqlPart(sql=str(tmp_path / "rising.sql")),
            horizon=horizon,
        )
        out = tmp_path / f"p1-{horizon}.parquet"
        stage.run(
            spec,
            prompts=place.prompts,
            policy=place.policy,
            rollouts=out,
            earlier_rollouts=[tmp_path / "p0.parquet"],
            earlier_scores=[scores],
            stored=[],
        )
        drawn.append({row["prompt_id"] for row in parquet.read(out).to_pylist()})
    assert [len(prompts) for prompts in drawn] == [2, 1]
    assert all(prompts.isdisjoint(row["prompt_id"] for row in rows) for prompts in drawn)
