"""Dynamic sampling (DAPO): what is missing after the last pass is said; what is too much is cut, latest draws first."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from curation.tables import column
from rollway.config.curation import CurateConfig
from rollway.config.scorers import ScoreConfig
from rollway.curation import Curated, curate_files
from rollway.runtime.specs import CurateSpec
from rollway.stages import curate as stage
from rollway.store.parquet import write

MIXED = CurateConfig.model_validate({"filter": {"sql": "informative_groups"}, "advantage": {"sql": "grpo"}})
Pass = list[list[float]]
Files = tuple[list[Path], list[Path]]


@pytest.fixture
def files(tmp_path: Path) -> Callable[[list[list[Pass]]], Files]:
    """Rollouts and scores of rounds of passes of groups of rewards; the key of a pass sorts against its number."""

    def make(rounds: list[list[Pass]]) -> Files:
        rollouts, scores = [], []
        for number, passes in enumerate(rounds):
            for p, groups in enumerate(passes):
                rows = [row(number, p, g, s) for g, group in enumerate(groups) for s in range(len(group))]
                folder = tmp_path / f"r{number}/p{p}"
                rollouts.append(folder / "rollouts-000.parquet")
                write(rollouts[-1], pa.Table.from_pylist(rows), "rollouts")
                verdicts = {
                    "rollout_id": [r["rollout_id"] for r in rows],
                    "scorer": ["exact"] * len(rows),
                    "reward": pa.array([r for group in groups for r in group], pa.float64()),
                    "components": pa.array([[]] * len(rows), pa.map_(pa.string(), pa.float64())),
                }
                scores.append(folder / "scores/exact-000.parquet")
                write(scores[-1], pa.table(verdicts), "scores")
        return rollouts, scores

    return make


def row(number: int, p: int, group: int, sample: int) -> dict:
    text = dict.fromkeys(("policy", "engine", "sampling", "text"), "x")
    name = f"{chr(ord('z') - p)}{number}-{group:05d}"
    return {
        **text,
        "rollout_id": f"{name}-{sample}",
        "round": number,
        "pass": p,
        "policy_round": number,
        "group_id": name,
        "prompt_id": name,
        "sample": sample,
        "source": "policy",
        "finish": "stop",
        "length": 1,
        "prompt_tokens": [1],
        "tokens": [2],
        "logprobs": [-0.5],
        "train_mask": [True],
        "segments": [],
    }


def curated(made: Files, config: CurateConfig = MIXED, round: int = 0) -> Curated:
    rollouts, scores = made
    return curate_files(rollouts, {"exact": scores}, ScoreConfig(), config, round=round)


def groups_of(found: Curated) -> list[str]:
    return sorted(set(column(found.batch, "group_id")))


def test_what_is_missing_after_all_passes(files: Callable) -> None:
    found = curated(files([[[[1, 0], [1, 1], [0, 0], [0, 1]], [[1, 1], [0, 1]]]]))
    assert groups_of(found) == ["y0-00001", "z0-00000", "z0-00003"]
    assert {n: found.metrics[n] for n in ("passes", "groups", "batch_groups", "groups_missing", "groups_surplus")} == {
        "passes": 2,
        "groups": 6,
        "batch_groups": 3,
        "groups_missing": 1,
        "groups_surplus": 0,
    }


def test_surplus_is_cut_from_the_end_before_the_advantage(files: Callable) -> None:
    """Two of three groups are asked of the second pass, three survive there: the last one drawn leaves."""
    first, second = [[1, 0], [1, 1], [0, 0]], [[0, 1], [1, 0], [0, 1]]
    found = curated(files([[first, second]]))
    assert groups_of(found) == ["y0-00000", "y0-00001", "z0-00000"]
    assert (found.metrics["groups_missing"], found.metrics["groups_surplus"]) == (0, 1)
    baseline = CurateConfig.model_validate(
        {"filter": {"sql": "informative_groups"}, "advantage": {"sql": "reinforce", "baseline": "batch"}}
    )
    cut = curated(files([[first, [[0, 1], [1, 0], [0, 1, 1, 1, 1]]]]), baseline)
    assert set(column(cut.batch, "advantage")) == {0.5, -0.5}


def test_replayed_groups_neither_count_nor_leave(files: Callable) -> None:
    config = CurateConfig.model_validate(MIXED.model_dump(exclude_none=True) | {"replay": 1})
    old, new = [[[1, 0], [0, 1]]], [[[1, 0]], [[0, 1], [1, 0]]]
    found = curated(files([old, new]), config, round=1)
    assert groups_of(found) == ["z0-00000", "z0-00001", "z1-00000"]
    assert found.metrics["groups_surplus"] == 2


def test_without_a_filter_nothing_is_counted(files: Callable) -> None:
    found = curated(files([[[[1, 0], [1, 1]]]]), CurateConfig.model_validate({"advantage": {"sql": "grpo"}}))
    assert found.metrics["passes"] == 1
    assert "groups_missing" not in found.metrics


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ([[0, 1], [1, 0]], "after 2 passes 0 groups of the prompt batch are missing; 1 groups beyond"),
        ([[1, 1]], "after 2 passes 1 groups of the prompt batch are missing\n"),
    ],
)
def test_the_stage_says_it(
    files: Callable, tmp_path: Path, capfd: pytest.CaptureFixture, second: Pass, said: str
) -> None:
    rollouts, scores = files([[[[1, 0], [0, 0]], second]])
    spec = CurateSpec(version=1, seed=0, round=0, score=ScoreConfig(), curate=MIXED)
    out = {"batch": tmp_path / "batch.parquet", "metrics": tmp_path / "curate.json"}
    stage.run(spec, prompts=tmp_path / "unread.parquet", rollouts=rollouts, scores=scores, **out)
    assert said in capfd.readouterr().err
    assert "groups_missing" in out["metrics"].read_text(encoding="utf-8")


def test_without_a_filter_a_refilled_round_is_its_first_pass(files: Callable) -> None:
    """As a fork of it reads the round: no more groups than were asked for, those of the first pass."""
    made = files([[[[1, 0], [1, 1], [0, 0]], [[1, 1], [0, 1]], [[0, 1]]]])
    found = curated(made, CurateConfig.model_validate({"advantage": {"sql": "grpo"}}))
    assert groups_of(found) == ["z0-00000", "z0-00001", "z0-00002"]
    assert (found.metrics["groups_missing"], found.metrics["groups_surplus"]) == (0, 3)
    alone = curated(files([[[[1, 0], [1, 1], [0, 0]]]]), CurateConfig.model_validate({"advantage": {"sql": "grpo"}}))
    assert "groups_surplus" not in alone.metrics
