"""Pairs of a run's rollouts, through the stage: ties and rollouts without a verdict teach nothing, and are counted."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rollway.config.curation import CurateConfig, SqlPart
from rollway.config.policies import CharTokenizer, ScratchPolicy
from rollway.config.reward_models import HuggingFaceBase, RewardModelConfig, RunPairs
from rollway.config.scorers import ScoreConfig
from rollway.errors import RollwayError
from rollway.policies import causal_lm
from rollway.runtime.specs import STAGE_VERSION, PairRound, RewardModelSpec
from rollway.stages.reward_model import run as stage
from store import synthetic

TEXTS = ("aa", "ab", "ba", "bb")
FAILED = "a scorer failed on chosen or rejected"
TIED = "chosen and rejected have the same reward"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three prompts with four rollouts each, a base model, and the current folder."""
    monkeypatch.chdir(tmp_path)
    config = ScratchPolicy(
        tokenizer=CharTokenizer(alphabet="ab>"), layers=1, hidden=8, heads=1, kv_heads=1, intermediate=8, context=16
    )
    causal_lm.save(tmp_path / "made", causal_lm.build(config, [], 0, device="cpu"))
    shutil.copytree(tmp_path / "made/weights/main", "base")
    prompts = [
        {
            "prompt_id": f"train-{i}",
            "task": "t",
            "split": "train",
            "messages": json.dumps([{"role": "user", "content": "a" * i + ">"}]),
            "meta": json.dumps({"format": "plain"}),
        }
        for i in range(synthetic.PROMPTS)
    ]
    synthetic.write(Path("prompts.parquet"), prompts, "prompts")
    rows = [{**row, "text": TEXTS[row["sample"]]} for row in synthetic.rollout_rows("mu-s0", 0)]
    synthetic.write(Path("mu-s0/r0000/p0/rollouts-000.parquet"), rows, "rollouts")
    return tmp_path


def learn(rewards: list[list[float | None]], pair: str, **score: Any) -> dict[str, Any]:
    """metrics.json of a model taught by pairs of rollouts with these rewards, by group; None: the scorer failed."""
    rows = []
    for row in synthetic.rollout_rows("mu-s0", 0):
        reward = rewards[int(row["prompt_id"][-1])][row["sample"]]
        error = "no verdict" if reward is None else None
        rows.append(
            {
                "rollout_id": row["rollout_id"],
                "scorer": "exact",
                "reward": reward or 0.0,
                "components": [],
                "error": error,
            }
        )
    scores = Path("mu-s0/r0000/p0/scores/exact-000.parquet")
    synthetic.write(scores, rows, "scores")
    part = SqlPart(sql=pair)
    config = RewardModelConfig(base=HuggingFaceBase(name="base"), pairs=RunPairs(run="mu", pair=part))
    rounds = [PairRound(round=0, score=ScoreConfig(**score), curate=CurateConfig(pair=part))]
    spec = RewardModelSpec(version=STAGE_VERSION["reward_model"], config=config, rounds=rounds)
    stage(
        spec,
        prompts=[Path("prompts.parquet")],
        rollouts=[Path("mu-s0/r0000/p0/rollouts-000.parquet")],
        scores=[scores],
        policy=[],
        reward_model=Path("rm/reward_model.json"),
        metrics=Path("rm/metrics.json"),
    )
    found: dict[str, Any] = json.loads(Path("rm/metrics.json").read_text())
    found["counts"] = {r["name"]: r["value"] for r in found["metrics"] if r["name"].startswith("pairs")}
    return found


@pytest.mark.parametrize(
    ("pair", "used", "tied"),
    # Rewards 1 0 0 0 in every group: of six pairs three are ties; of samples (0, 1) and (2, 3) the second; of the
    # best and the worst none.
    [("all_pairs", 9, 9), ("best_worst", 3, 0)],
)
def test_equal_rewards_are_no_preference(folder: Path, pair: str, used: int, tied: int) -> None:
    found = learn([[1.0, 0.0, 0.0, 0.0]] * 3, pair)
    assert found["counts"]["pairs_train"] + found["counts"]["pairs_heldout"] == used
    assert found["counts"]["pairs_skipped"] == tied
    assert found["skipped"] == ({TIED: tied} if tied else {})


def test_rollouts_without_a_verdict_are_in_no_pair(folder: Path) -> None:
    failed = learn([[1.0, None, 0.5, 0.5], [1.0, 0.0, 0.5, 0.5], [0.0, 1.0, 0.5, 0.5]], "best_worst")
    assert failed["skipped"] == {FAILED: 1}
    assert failed["counts"]["pairs_train"] + failed["counts"]["pairs_heldout"] == 2


def test_pairs_of_right_and_wrong_are_no_ties_where_no_reward_ranks(folder: Path) -> None:
    found = learn([[1.0, 0.0, 0.0, 0.0]] * 3, "right_wrong", reward={})
    assert found["counts"]["pairs_train"] + found["counts"]["pairs_heldout"] == 3
    assert found["skipped"] == {}


def test_only_ties_are_no_pairs_and_the_sentence_says_so(folder: Path) -> None:
    with pytest.raises(RollwayError, match=rf"rm: all_pairs makes no pair .* \(18 {TIED}\); name more rounds"):
        learn([[1.0] * 4] * 3, "all_pairs")
    assert not Path("rm").exists()
