"""A fork's first round with `optimizer: fresh`: the policy goes on, its moments and counters do not."""

from pathlib import Path

import torch

from rollway.config.training import TrainConfig
from rollway.policies import causal_lm, manifest
from rollway.runtime.specs import STAGE_VERSION, TrainSpec
from rollway.stages import train as stage
from rollway.training.state import load_state
from stages.test_train_critic import weights, write_round
from stages.test_train_teacher import run_rounds

torch.set_num_threads(1)


def test_the_optimiser_is_left_behind(tmp_path: Path) -> None:
    """Its first step is Adam's first: of one size in every weight, as no carried moment would make it."""
    write_round(tmp_path)
    parts = {"ratio": "none", "gate": "sft", "aggregate": "token_mean"}
    given = {"objective": parts, "optimizer": {"lr": 1e-3, "weight_decay": 0.0}, "epochs": 2}
    train = TrainConfig.model_validate(given)
    run_rounds(tmp_path, train, 1)
    before = tmp_path / "r0001/policy.json"
    once = train.model_copy(update={"epochs": 1})
    for name, fresh in (("carried", False), ("fresh", True)):
        spec = TrainSpec(version=STAGE_VERSION["train"], seed=0, round=1, temperature=1.0, train=once, fresh=fresh)
        stage.run(
            spec,
            batch=tmp_path / "batch.parquet",
            rollouts=[tmp_path / "rollouts.parquet"],
            policy=before,
            reference=[],
            next_policy=tmp_path / name / "policy.json",
            metrics=tmp_path / name / "metrics.json",
        )
    carried, fresh = (load_state(tmp_path / name / "state") for name in ("carried", "fresh"))
    assert (carried.updates, fresh.updates) == (3, 1)
    assert manifest.read_manifest(tmp_path / "fresh/policy.json").updates == 1
    start, end, other = (
        weights(causal_lm.load(path).model)
        for path in (before, tmp_path / "fresh/policy.json", tmp_path / "carried/policy.json")
    )
    moved = torch.cat([(b - a).abs().flatten() for a, b in zip(start, end, strict=True)])
    assert float(moved.max()) <= 1e-3 * 1.01
    assert float((moved > 0.9e-3).double().mean()) > 0.5
    assert any(not torch.equal(a, b) for a, b in zip(end, other, strict=True))
