"""train: a batch, the rollouts it draws on, and policy r -> policy r+1 and the metrics of its updates."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from rollway.config.objectives import Objective
from rollway.runtime import phases
from rollway.runtime.notice import notice, progress
from rollway.runtime.specs import TrainSpec
from rollway.store import parquet
from rollway.store.atomic import write_json

if TYPE_CHECKING:
    from rollway.policies.causal_lm import CausalPolicy

PAYLOAD = ["rollout_id", "prompt_tokens", "tokens", "logprobs", "train_mask", "source", "group_id"]


def run(
    spec: TrainSpec,
    *,
    batch: Path,
    rollouts: list[Path],
    policy: Path,
    reference: list[Path],
    next_policy: Path,
    metrics: Path,
) -> None:
    """Writes the metrics and, last, policy.json, when the weights and the training state beside it are in place."""
    from rollway.policies import causal_lm, critic, manifest
    from rollway.policies.kernels import use_liger
    from rollway.training.batch import training_batch
    from rollway.training.memory import names_micro_tokens
    from rollway.training.state import TrainState, load_state, save_state
    from rollway.training.update import update

    train = spec.train
    before = manifest.verify(policy)
    main = causal_lm.load(policy, "main", train=True)
    values = None
    if train.critic is not None:
        has_critic = "critic" in before.policies
        values = critic.load_critic(policy, train=True) if has_critic else critic.build_critic(main, spec.seed)
    referred = causal_lm.load(reference[0], "main").model if reference else None
    average = None if train.ema is None else _average(policy, "ema" in before.policies)
    if train.kernels == "liger":
        others = (None if values is None else values.backbone, None if average is None else average.model)
        for model in (main.model, referred, *others):
            if model is not None:
                use_liger(model)
    state = load_state(policy.parent / "state") if before.state else TrainState(seed=spec.seed)
    curated = parquet.read(batch)
    rows = training_batch(curated, _drawn(batch, rollouts))
    if _weights_cancel(curated.column("weight"), train.objective):
        notice(f"round {spec.round}: all rows have the same weight, which cancels: curate.weight changes nothing")

    phases.mark("work")
    checkpointing = main.spec.gradient_checkpointing
    with (
        progress(f"train r{spec.round}", train.epochs * train.minibatches) as advance,
        names_micro_tokens(train.micro_tokens, checkpointing),
    ):
        after, measured = update(
            main.model,
            values,
            referred,
            rows,
            train,
            state,
            temperature=spec.temperature,
            average=None if average is None else average.model,
            progress=advance,
        )
    figures = {metric.name: metric.value for metric in measured}
    if figures["skipped"]:
        notice(f"round {spec.round}: no rollout carries a signal; the policy is passed on unchanged")

    phases.mark("write")
    named = {"main": causal_lm.save(next_policy.parent, main)}
    if values is not None:
        named["critic"] = critic.save_critic(next_policy.parent, values)
    if average is not None:
        named["ema"] = causal_lm.save(next_policy.parent, average, "ema")
    files = save_state(next_policy.parent / "state", after)
    rows_of_metrics = [metric.row() for metric in measured]
    write_json(metrics, {"round": spec.round, "stage": "train", "metrics": rows_of_metrics})
    manifest.write_manifest(
        next_policy, manifest.PolicyManifest("causal-lm", named, state=files, updates=after.updates)
    )


def _average(policy: Path, held: bool) -> "CausalPolicy":
    """The moving average of the weights so far, at first the policy itself; in float32, where small steps last."""
    from rollway.policies import causal_lm

    found = causal_lm.load(policy, "ema" if held else "main")
    if found.spec.dtype != "float32":
        found.model.float()
        found.spec = replace(found.spec, dtype="float32")
    return found


def _weights_cancel(weights: pa.ChunkedArray, objective: Objective) -> bool:
    """Whether rows were given weights other than 1, all alike, and the loss is divided by their sum."""
    if objective.aggregate is not None and objective.aggregate.weights != "denominator":
        return False
    different = pc.unique(weights).to_pylist()
    return len(weights) > 1 and len(different) == 1 and different[0] not in (None, 0.0, 1.0)


def _drawn(batch: Path, rollouts: list[Path]) -> pa.Table:
    """The rollouts that the batch draws on; the others are not kept in memory."""
    wanted = parquet.read(batch, ["rollout_id"]).column("rollout_id")
    return pa.concat_tables([parquet.read_rows(path, PAYLOAD, "rollout_id", wanted) for path in rollouts])
