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
from rollway.stages.refused import told_of
from rollway.store import parquet, provenance
from rollway.store.atomic import write_json
from rollway.store.payload import drawn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rollway.policies.causal_lm import CausalPolicy


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
    """Writes the metrics and, last, policy.json, when the weights and the training state beside it are in place.

    Where a step must not be taken nothing of that is written, and its rows go into `failed/train.json` beside it.
    """
    from rollway.policies import causal_lm, critic, manifest
    from rollway.policies.kernels import use_liger
    from rollway.training.batch import training_batch
    from rollway.training.determinism import deterministic
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
    other = _other_teacher(spec, main)
    average = None if train.ema is None else _average(policy, "ema" in before.policies)
    if train.kernels == "liger":
        others = (None if values is None else values.backbone, None if average is None else average.model)
        for model in (main.model, referred, other, *others):
            if model is not None:
                use_liger(model)
    held = bool(before.state) and not spec.fresh
    state = load_state(policy.parent / "state") if held else TrainState(seed=spec.seed)
    curated = parquet.read(batch)
    rows = training_batch(curated, drawn(rollouts, curated.column("rollout_id")))
    if _weights_cancel(curated.column("weight"), train.objective):
        notice(f"round {spec.round}: all rows have the same weight, which cancels: curate.weight changes nothing")
    if unused := _unused_losses(curated.column("route"), train.objective):
        notice(f"round {spec.round}: no row is routed to {unused}, which adds nothing this round: see curate.route")

    phases.mark("work")
    checkpointing = main.spec.gradient_checkpointing
    with (
        progress(f"train r{spec.round}", train.epochs * train.minibatches) as advance,
        names_micro_tokens(train.micro_tokens, checkpointing),
        deterministic(train.deterministic),
        told_of(next_policy, "train", spec.round),
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
            teacher=other,
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
    write_json(metrics, {"round": spec.round, "stage": "train", "metrics": rows_of_metrics, **provenance.said()})
    manifest.write_manifest(
        next_policy, manifest.PolicyManifest("causal-lm", named, state=files, updates=after.updates)
    )


def _other_teacher(spec: TrainSpec, policy: "CausalPolicy") -> "PreTrainedModel | None":
    """A live teacher's own model. Raises RollwayError where its tokenizer or vocabulary is not the policy's."""
    from rollway.policies import causal_lm
    from rollway.scorers.teacher import check_same, load_teacher

    live = spec.train.teacher
    if live is None or live.model is None:
        return None
    who = "train.teacher.model"
    found = load_teacher(who, live.model, Path.cwd(), Path(spec.teacher) if spec.teacher else None)
    assert found is not None
    check_same(who, causal_lm.reader_of(found), causal_lm.reader_of(policy))
    return found.model


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


def _unused_losses(routes: pa.ChunkedArray, objective: Objective) -> str:
    """Losses of an objective that goes by the rows' routes and that no row has, in words; empty where each has some."""
    if not len(routes) or not objective.is_distill_routed():
        return ""
    met = set(pc.unique(routes).to_pylist())
    own = {"policy", "both", None} if objective.gate is not None or objective.ratio is not None else met
    used = {"the teacher's loss": met & {"distill", "both"}, "the policy's own loss": met & own}
    return " or ".join(loss for loss, found in used.items() if not found)
