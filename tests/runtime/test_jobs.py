"""Which jobs hold a GPU; `CUDA_VISIBLE_DEVICES` stands for a machine with two."""

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from rollway.config.scorers import ExactScorer, RewardModelScorer, Scorer
from rollway.runtime.jobs import run_stage
from rollway.runtime.specs import STAGE_VERSION, ScoreSpec, dump


@pytest.mark.parametrize(
    ("scorer", "seen"),
    [(ExactScorer(), "6,7"), (RewardModelScorer(name="m"), "6"), (RewardModelScorer(trained="m"), "6")],
)
def test_scoring_holds_a_gpu_where_a_model_scores(
    scorer: Scorer, seen: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stage(
        spec: Any, *, prompts: Path, rollouts: Path, needs: list[Path], scores: Path, cache: Path, threads: int = 1
    ) -> None:
        found.append((os.environ["CUDA_VISIBLE_DEVICES"], threads, sorted(p.name for p in tmp_path.glob("*/gpu-*"))))

    found: list[tuple[str, int, list[str]]] = []
    monkeypatch.setattr("rollway.stages.score.run", stage)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,7")
    monkeypatch.delenv("ROLLWAY_DEVICE", raising=False)
    spec = dump(ScoreSpec(version=STAGE_VERSION["score"], scorer="s", config=scorer))
    files = [word for name in ("prompts", "rollouts", "scores", "cache") for word in (f"--{name}", "x")]
    assert run_stage(["score", "--spec", spec, "--threads", "2", *files]) == 0
    assert found == [(seen, 2, ["gpu-6.lock"] if seen == "6" else [])]
