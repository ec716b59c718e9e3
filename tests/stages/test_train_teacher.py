"""A teacher through the train stage: its columns from the batch's file, and a moving average kept beside the policy."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from rollway.config.policies import CharTokenizer, ScratchPolicy
from rollway.config.training import TrainConfig
from rollway.errors import RollwayError
from rollway.policies import causal_lm, manifest
from rollway.runtime.specs import STAGE_VERSION, TrainSpec
from rollway.stages import train as stage
from rollway.store import parquet
from rollway.store.tables import TABLES
from rollway.training.batch import training_batch
from rollway.training.state import TrainState
from rollway.training.update import update
from stages.test_train_critic import SMALL, weights, write_round

torch.set_num_threads(1)


def write_teacher(folder: Path, columns: tuple[str, ...]) -> None:
    """The batch again, with what a teacher of another prompt and other likings would say."""
    rng = np.random.default_rng(1)
    rows: list[dict[str, Any]] = parquet.read(folder / "batch.parquet").to_pylist()
    for n, row in enumerate(rows):
        length = 3 + n % 3
        logp = np.log(rng.dirichlet([1.0] * 5, length)[:, :3])
        said = {
            "teacher_logprob": rng.normal(-2.0, 0.3, length).tolist(),
            "teacher_topk_ids": [[3, 4, 5]] * length,
            "teacher_topk_logprobs": (-np.sort(-logp, axis=1)).tolist(),
            "teacher_prompt_tokens": [5, 3, 4],
        }
        row |= {name: said[name] for name in columns}
    schema = TABLES["batch"].schema(list(columns))
    parquet.write(folder / "batch.parquet", pa.Table.from_pylist(rows, schema), "batch")


def run_rounds(folder: Path, train: TrainConfig, rounds: int) -> tuple[causal_lm.CausalPolicy, list[dict[str, float]]]:
    start = causal_lm.build(ScratchPolicy(**SMALL, tokenizer=CharTokenizer(alphabet="01234567")), [], 0, "cpu")
    first = folder / "r0000"
    named = {"main": causal_lm.save(first, start)}
    manifest.write_manifest(first / "policy.json", manifest.PolicyManifest("causal-lm", named))
    reported = []
    for number in range(rounds):
        before, after = folder / f"r{number:04d}/policy.json", folder / f"r{number + 1:04d}/policy.json"
        spec = TrainSpec(version=STAGE_VERSION["train"], seed=0, round=number, temperature=1.0, train=train)
        files = {"batch": folder / "batch.parquet", "rollouts": [folder / "rollouts.parquet"], "policy": before}
        reference = [folder / "r0000/policy.json"] if train.needs_reference() else []
        figures = after.parent / "metrics.json"
        stage.run(spec, **files, reference=reference, next_policy=after, metrics=figures)
        reported.append({m["name"]: m["value"] for m in json.loads(figures.read_text())["metrics"]})
    return start, reported


def test_stored_columns_come_from_the_batch(tmp_path: Path) -> None:
    write_round(tmp_path)
    write_teacher(tmp_path, ("teacher_topk_ids", "teacher_topk_logprobs"))
    part = {"divergence": "jsd", "estimate": "topk"}
    train = TrainConfig.model_validate(
        {"objective": {"distill": part, "aggregate": "token_mean"}, "optimizer": {"lr": 1e-2}, "epochs": 5}
    )
    _, reported = run_rounds(tmp_path, train, 2)
    assert reported[1]["distill/divergence"] < 0.9 * reported[0]["distill/divergence"]
    assert reported[0]["distill/share"] == 1.0


def test_the_average_is_carried_across_rounds(tmp_path: Path) -> None:
    """A live teacher that moves with every update and reads a prompt of its own: files and memory agree to the bit."""
    write_round(tmp_path)
    write_teacher(tmp_path, ("teacher_prompt_tokens",))
    train = TrainConfig.model_validate(
        {
            "objective": {"distill": {"divergence": "jsd", "estimate": "exact"}, "aggregate": "token_mean"},
            "teacher": {"kind": "live", "weights": "ema", "context": "privileged"},
            "ema": 0.3,
            "epochs": 2,
            "optimizer": {"lr": 1e-2},
        }
    )
    start, reported = run_rounds(tmp_path, train, 2)
    assert reported[0]["distill/divergence"] > 0.0
    policy = causal_lm.load(tmp_path / "r0000/policy.json", "main", train=True).model
    average, state = copy.deepcopy(start.model), TrainState(seed=0)
    for _ in range(2):
        rows = training_batch(parquet.read(tmp_path / "batch.parquet"), parquet.read(tmp_path / "rollouts.parquet"))
        state, _ = update(policy, None, None, rows, train, state, average=average)
    last = tmp_path / "r0002/policy.json"
    assert sorted(manifest.verify(last).policies) == ["ema", "main"]
    for name, expected in (("main", policy), ("ema", average)):
        found = causal_lm.load(last, name).model
        assert all(torch.equal(a, b) for a, b in zip(weights(found), weights(expected), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights(policy), weights(average), strict=True))


def test_a_live_teacher_of_another_model_comes_from_its_file(tmp_path: Path) -> None:
    """A larger warm-up beside the policy: the stage's weights are those of the update in memory; another tokenizer and
    a missing file are refused."""
    write_round(tmp_path)
    tokens = CharTokenizer(alphabet="01234567")
    wise = causal_lm.build(ScratchPolicy(**{**SMALL, "hidden": 24, "heads": 3}, tokenizer=tokens), [], 9, "cpu")
    manifest.write_manifest(
        tmp_path / "wise/policy.json",
        manifest.PolicyManifest("causal-lm", {"main": causal_lm.save(tmp_path / "wise", wise)}),
    )
    live = {"kind": "live", "model": {"kind": "warmup", "name": "wise"}}
    part = {"divergence": "forward_kl", "estimate": "exact"}
    train = TrainConfig.model_validate(
        {"objective": {"distill": part, "aggregate": "token_mean"}, "optimizer": {"lr": 1e-2}, "teacher": live}
    )
    start = causal_lm.build(ScratchPolicy(**SMALL, tokenizer=tokens), [], 0, "cpu")
    first = tmp_path / "r0000"
    manifest.write_manifest(
        first / "policy.json", manifest.PolicyManifest("causal-lm", {"main": causal_lm.save(first, start)})
    )

    def run(teacher: str | None) -> None:
        spec = TrainSpec(version=STAGE_VERSION["train"], seed=0, round=0, temperature=1.0, train=train, teacher=teacher)
        files = {"batch": tmp_path / "batch.parquet", "rollouts": [tmp_path / "rollouts.parquet"]}
        after = tmp_path / "r0001"
        stage.run(
            spec,
            **files,
            policy=first / "policy.json",
            reference=[],
            next_policy=after / "policy.json",
            metrics=after / "metrics.json",
        )

    run(str(tmp_path / "wise/policy.json"))
    curated = parquet.read(tmp_path / "batch.parquet")
    rows = training_batch(curated, parquet.read(tmp_path / "rollouts.parquet"))
    start.model.requires_grad_(True)
    update(start.model, None, None, rows, train, TrainState(seed=0), teacher=wise.model)
    made = causal_lm.load(tmp_path / "r0001/policy.json").model
    for here, there in zip(made.parameters(), start.model.parameters(), strict=True):
        torch.testing.assert_close(here, there, rtol=0, atol=0)
    with pytest.raises(RollwayError, match=r"train\.teacher\.model: the policy\.json of the teacher was not given"):
        run(None)
    stranger = causal_lm.build(ScratchPolicy(**SMALL, tokenizer=CharTokenizer(alphabet="76543210")), [], 0, "cpu")
    manifest.write_manifest(
        tmp_path / "stranger/policy.json",
        manifest.PolicyManifest("causal-lm", {"main": causal_lm.save(tmp_path / "stranger", stranger)}),
    )
    with pytest.raises(RollwayError, match=r"train\.teacher\.model: the teacher's tokenizer is not the policy's"):
        run(str(tmp_path / "stranger/policy.json"))
