"""The critic through the train stage: named in policy.json, read back in the next round, trained on from there."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from rollway.config import load_recipe
from rollway.config.policies import CharTokenizer, ScratchPolicy
from rollway.config.training import TrainConfig
from rollway.policies import causal_lm, manifest
from rollway.policies.critic import build_critic, load_critic
from rollway.runtime.specs import STAGE_VERSION, TrainSpec
from rollway.stages import train as stage
from rollway.store import parquet
from rollway.store.tables import TABLES
from rollway.training.batch import training_batch
from rollway.training.state import TrainState
from rollway.training.update import update

torch.set_num_threads(1)

SMALL = {"layers": 1, "hidden": 16, "heads": 2, "kv_heads": 1, "intermediate": 24, "context": 32}


def settings() -> TrainConfig:
    over = {"minibatches": 2, "optimizer": {"lr": 1e-3}, "critic": {"lr": 1e-2, "warmup_updates": 1}}
    return load_recipe("ppo", {"train": over}).train


def write_round(folder: Path) -> tuple[Path, Path]:
    """Rollouts of eight rows and the batch of all of them."""
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for n in range(8):
        length = 3 + n % 3
        rows.append(
            dict.fromkeys(("policy", "engine", "sampling", "text"), "x")
            | dict.fromkeys(("round", "pass", "policy_round"), 0)
            | {"rollout_id": f"r{n}", "group_id": f"g{n // 4}", "prompt_id": "p", "sample": n % 4, "source": "policy"}
            | {"finish": "stop", "length": length, "prompt_tokens": [3, 4], "segments": []}
            | {"tokens": rng.integers(3, 8, length).tolist(), "train_mask": [True] * length}
            | {"logprobs": [-1.0] * length}
        )
    batch = [{"rollout_id": f"r{n}", "slot": 0, "reward": float(n % 2), "group_id": f"g{n // 4}"} for n in range(8)]
    parquet.write(folder / "rollouts.parquet", pa.Table.from_pylist(rows), "rollouts")
    parquet.write(folder / "batch.parquet", pa.Table.from_pylist(batch, TABLES["batch"].schema()), "batch")
    return folder / "rollouts.parquet", folder / "batch.parquet"


def weights(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach() for p in model.parameters()]


def test_the_critic_is_carried_across_rounds(tmp_path: Path) -> None:
    """Two rounds through files are two rounds in memory, bit for bit; round 2 learns on from round 1."""
    start = causal_lm.build(ScratchPolicy(**SMALL, tokenizer=CharTokenizer(alphabet="01234567")), [], 0, "cpu")
    folder = tmp_path / "r0000"
    named = {"main": causal_lm.save(folder, start)}
    manifest.write_manifest(folder / "policy.json", manifest.PolicyManifest("causal-lm", named))
    rollouts, batch = write_round(tmp_path)
    train = settings()
    reported = []
    for number in (0, 1):
        before, after = tmp_path / f"r{number:04d}/policy.json", tmp_path / f"r{number + 1:04d}/policy.json"
        spec = TrainSpec(version=STAGE_VERSION["train"], seed=0, round=number, temperature=1.0, train=train)
        figures = after.parent / "metrics.json"
        reference = [tmp_path / "r0000/policy.json"]
        files = {"batch": batch, "rollouts": [rollouts], "policy": before, "reference": reference}
        stage.run(spec, **files, next_policy=after, metrics=figures)
        assert sorted(manifest.verify(after).policies) == ["critic", "main"]
        reported.append({m["name"]: m["value"] for m in json.loads(figures.read_text())["metrics"]})

    policy = causal_lm.load(tmp_path / "r0000/policy.json", "main", train=True)
    reference = copy.deepcopy(policy.model)
    state = TrainState(seed=0)
    critic = build_critic(policy, 0)
    for _ in range(2):
        rows = training_batch(parquet.read(batch), parquet.read(rollouts))
        state, _ = update(policy.model, critic, reference, rows, train, state)
    last = tmp_path / "r0002/policy.json"
    for found, expected in ((causal_lm.load(last, "main").model, policy.model), (load_critic(last), critic)):
        assert all(torch.equal(a, b) for a, b in zip(weights(found), weights(expected), strict=True))
    assert (state.updates, state.critic_updates) == (3, 4)
    assert reported[1]["value_explained"] > reported[0]["value_explained"]
    assert {"loss/value", "grad_norm_critic"} <= reported[1].keys()
