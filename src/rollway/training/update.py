"""One round's updates: epochs x optimiser batches, each a step with the exact gradient of its rows."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from rollway.config.objectives import Objective
from rollway.config.training import TrainConfig
from rollway.errors import RollwayError
from rollway.objectives import (
    next_state,
    prepare,
    remembered,
    requirements,
    separable,
    state_cadence,
    state_metrics,
    whole_batch_metrics,
)
from rollway.objectives.imitation import at_progress
from rollway.policies.critic import Critic
from rollway.runtime.notice import notice, tick
from rollway.training.batch import TrainingBatch
from rollway.training.gradients import Gathered, Models, NotFinite, accumulate
from rollway.training.guards import MOST_IN_A_ROW, UpdateRefused, inspect, left_out, objection
from rollway.training.metrics import Metric, critic_fit, engine_gap, step_metrics
from rollway.training.optimizer import Adam, adam, clear, gradient_norm, learning_rate, step, tensors
from rollway.training.packing import minibatches, units
from rollway.training.precompute import Round, precompute
from rollway.training.signal import has_signal
from rollway.training.state import TrainState
from rollway.training.teacher import Live, follow


def update(
    policy: PreTrainedModel,
    critic: Critic | None,
    reference: PreTrainedModel | None,
    batch: TrainingBatch,
    train: TrainConfig,
    state: TrainState,
    *,
    temperature: float = 1.0,
    average: PreTrainedModel | None = None,
    teacher: PreTrainedModel | None = None,
    progress: Callable[[int, str], None] = lambda steps, info: None,
) -> tuple[TrainState, list[Metric]]:
    """Trains `policy` (and `critic`) in place on a round's batch; returns the state for the next round, and metrics.

    `average` goes with `train.ema`: it follows the policy after each update, in place. The live teacher is the average,
    the reference, the policy itself or, with `train.teacher.model`, `teacher`, and never in training mode.

    Old log-probs are the policy's own before the first step, at the sampling `temperature`; dropout is off, so that
    they are those of the policy that sampled. `reference` may be None where nothing refers to it. `progress(1, info)`
    is called after each step. The result is a function of the arguments and, in its last bits, of torch's threads.
    A batch without signal changes neither weights nor state, and is reported as `skipped`.
    Raises RollwayError when a row lacks what the objective needs or a weight is no longer finite, and UpdateRefused
    when a loss or gradient is not finite or `train.guard` says stop: the models must then be thrown away.
    """
    objective = train.objective
    _check_models(critic, average, train)
    live = _live_teacher(policy, reference, average, teacher, train, temperature)
    memory = remembered(objective, state.objective)
    if not batch.rows:
        return state, [Metric(state.steps, "rows", 0.0), Metric(state.steps, "skipped", 1.0)]
    trained = [policy] if critic is None else [policy, critic.backbone]
    for model in trained:
        model.eval()
    unmoved = one_step(train)
    fixed = precompute(policy, critic, reference, batch, train, memory, temperature, old=not unmoved)
    for model in trained:
        _without_dropout(model)
    selects = objective.select.kind in ("entropy_top", "signal_top")
    if objective.mixing.kind != "none" or selects or objective.imitate is not None:
        fixed = replace(fixed, tokens=prepare(fixed.tokens, objective, state=memory, progress=_progress(train, state)))
    signal = has_signal(objective, fixed.tokens)
    metrics = [
        Metric(state.steps, "rows", float(len(batch.rows))),
        Metric(state.steps, "skipped", float(train.skip_without_signal and not signal)),
        *([] if unmoved else engine_gap(state.steps, fixed)),
        *critic_fit(state.steps, fixed),
    ]
    if train.skip_without_signal and not signal:
        return state, metrics
    models = Models(
        policy,
        critic,
        temperature,
        train.micro_tokens,
        distill_temperature=1.0 if objective.distill is None else objective.distill.temperature,
        unmoved=unmoved,
        teacher=live,
    )
    return _epochs(models, fixed, batch, train, state, memory, metrics, progress, average)


def _epochs(
    models: Models,
    fixed: Round,
    batch: TrainingBatch,
    train: TrainConfig,
    state: TrainState,
    memory: dict[str, Tensor],
    metrics: list[Metric],
    progress: Callable[[int, str], None],
    average: PreTrainedModel | None,
) -> tuple[TrainState, list[Metric]]:
    objective = train.objective
    optimizers = _optimizers(models, train, state)
    together = _units(batch, objective)
    cadence = state_cadence(objective)
    seen = Gathered(fixed.tokens.logp)
    skipped: list[str] = []
    for _ in range(train.epochs):
        for rows in minibatches(together, train.minibatches, state.seed, state.shuffles):
            frozen = train.critic is not None and state.critic_updates < train.critic.warmup_updates
            lr = learning_rate(train.optimizer, state.updates)
            part = replace(fixed.tokens.rows(torch.from_numpy(rows).to(fixed.tokens.logp.device)), lr=lr)
            part = at_progress(part, objective, _progress(train, state))
            chosen = [fixed.rows[n] for n in rows]
            now = replace(models, freeze_policy=frozen, seed=state.seed, step=state.updates)
            if now.teacher is not None:
                part, told = now.teacher.say(chosen, part)
                now = replace(now, teacher=told)
            try:
                got = accumulate(now, chosen, part, objective, memory)
                norms = _norms(optimizers, frozen, [row.rollout_id for row in chosen])
            except NotFinite as error:
                figures = {"what": error.what, "value": error.value, "update": state.updates}
                raise UpdateRefused(str(error), figures, inspect(now, chosen, part, objective, memory)) from None
            if train.guard is not None and (refused := objection(train.guard, state.losses, part, got)) is not None:
                state = left_out(train.guard, state, refused)
                if train.guard.then == "stop" or state.skipped >= MOST_IN_A_ROW:
                    figures = {"what": refused.what, "value": refused.value, "update": state.updates}
                    rows_of_step = inspect(now, chosen, part, objective, memory)
                    many = f", and so were {state.skipped - 1} steps before it, one after the other; raise that bound"
                    said = f"train: update {state.updates}: {refused}{many if state.skipped >= MOST_IN_A_ROW else ''}"
                    raise UpdateRefused(said, figures, rows_of_step)
                skipped.append(f"update {state.updates}: {refused}")
                _forget(optimizers)
                progress(1, str(refused))
                continue
            _step(optimizers, train, lr, norms)
            if train.guard is not None and train.guard.loss_spike is not None:
                state = replace(state, losses=(*state.losses, got.metrics["loss"])[-train.guard.window :])
            if average is not None and train.ema is not None and not frozen:
                follow(average, models.policy, train.ema)
            state = replace(
                state,
                skipped=0,
                updates=state.updates + (0 if frozen else 1),
                critic_updates=state.critic_updates + (0 if models.critic is None else 1),
            )
            if models.unmoved:
                part = replace(part, logp_old=got.logp, entropy=got.entropy)
                metrics += engine_gap(state.steps - 1, replace(fixed, tokens=part))
            metrics += step_metrics(state.steps, part, got, norms, lr)
            metrics += [Metric(state.steps, n, value) for n, value in state_metrics(objective, memory).items()]
            whole = replace(part, logp=got.logp)
            metrics += [Metric(state.steps, n, value) for n, value in whole_batch_metrics(whole, objective).items()]
            tick(0, tokens=sum(row.length for row in chosen))
            progress(1, f"loss {got.metrics['loss']:.4f}")
            for name, value in got.partials.items():
                seen.partials[name] = seen.partials[name] + value if name in seen.partials else value
            if cadence == "update" and not frozen:
                memory = next_state(objective, memory, got.partials)
        state = replace(state, shuffles=state.shuffles + 1)
    if cadence == "round" and seen.partials:
        memory = next_state(objective, memory, seen.partials)
    if train.guard is not None:
        metrics.append(Metric(state.steps, "guard_skipped", float(len(skipped))))
    if skipped:
        notice(f"train.guard: {len(skipped)} steps were left out; the first, {skipped[0]}")
    _check_weights(optimizers)
    kept = {name: tensors(optimizer) for name, optimizer in optimizers.items()}
    return replace(state, optimizer=kept["policy"], critic=kept.get("critic", {}), objective=memory), metrics


def _progress(train: TrainConfig, state: TrainState) -> float:
    """Share in [0, 1] of the updates over which the objective's schedule runs."""
    return min(1.0, state.updates / train.objective_horizon) if train.objective_horizon else 0.0


def one_step(train: TrainConfig) -> bool:
    """Whether the round is a single step that needs nothing of the old policy beforehand.

    The old policy is then the current one, and its log-probs come from the step's own forward pass: exact, and a
    quarter of the work less. With a second step this would be wrong (ratios stuck at 1): old log-probs are made first.
    """
    objective = train.objective
    return (
        train.epochs * train.minibatches == 1
        and separable(objective)
        and not (train.refers() and train.reference == "round")
        and objective.mixing.kind == "none"
        and objective.select.kind in ("all", "curvature")
        and objective.value is None
        and (train.advantage is None or train.advantage.kind == "whiten")
    )


def _without_dropout(model: PreTrainedModel) -> None:
    """Evaluation mode, or an unchanged policy's ratio would not be 1; only checkpointed layers count as training.

    Those look at no more than their own flag; the attention and dropout inside them stay in evaluation mode.
    """
    model.eval()
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = layer.gradient_checkpointing


def _check_models(critic: Critic | None, average: PreTrainedModel | None, train: TrainConfig) -> None:
    if (critic is None) != (train.critic is None):
        raise RollwayError("train: a critic model goes with train.critic; give both, or neither")
    if (average is None) != (train.ema is None):
        raise RollwayError("train: an average of the weights goes with train.ema; give both, or neither")


def _live_teacher(
    policy: PreTrainedModel,
    reference: PreTrainedModel | None,
    average: PreTrainedModel | None,
    other: PreTrainedModel | None,
    train: TrainConfig,
    temperature: float,
) -> Live | None:
    asked = train.teacher
    if asked is None or train.objective.distill is None:
        return None
    if (asked.model is None) != (other is None):
        raise RollwayError("train: a teacher's own model goes with train.teacher.model; give both, or neither")
    own = {"ema": average, "policy": policy}
    model = own.get(asked.weights, reference) if other is None else other
    if model is None:
        raise RollwayError(f"train.teacher: {asked.weights} is an earlier policy, but no reference was given")
    model.eval()
    near = policy if asked.weights == "trust_region" else None
    rows = len(policy.get_output_embeddings().weight)
    return Live(
        model,
        train.objective,
        temperature,
        train.micro_tokens,
        privileged=asked.context == "privileged",
        near=near,
        mix=asked.mix,
        entropy_temperature=train.entropy_temperature(temperature),
        vocabulary=None if other is None else min(rows, len(other.get_output_embeddings().weight)),
    )


def _units(batch: TrainingBatch, objective: Objective) -> list[list[int]]:
    """Rows that one optimiser batch must hold together: pairs, or the groups that the objective compares within."""
    needs = requirements(objective)
    pairs = list(zip(batch.chosen.tolist(), batch.rejected.tolist(), strict=True)) if "pair_chosen" in needs else []
    return units([r.group for r in batch.rows] if "group" in needs else None, pairs, len(batch.rows))


def _optimizers(models: Models, train: TrainConfig, state: TrainState) -> dict[str, Adam]:
    out = {"policy": adam(models.policy, train.optimizer, state.optimizer)}
    if models.critic is not None:
        out["critic"] = adam(models.critic, train.optimizer, state.critic)
    return out


def _norms(optimizers: dict[str, Adam], frozen: bool, rollout_ids: Sequence[str]) -> dict[str, float]:
    """Gradient norms of the models that are about to step. Raises NotFinite."""
    norms = {name: gradient_norm(o) for name, o in optimizers.items() if not (frozen and name == "policy")}
    for name, norm in norms.items():
        if not math.isfinite(norm):
            raise NotFinite(f"gradient norm of the {name}", norm, list(rollout_ids))
    return norms


def _step(optimizers: dict[str, Adam], train: TrainConfig, lr: float, norms: dict[str, float]) -> None:
    for name, norm in norms.items():
        rate = lr if name == "policy" or train.critic is None else train.critic.lr
        step(optimizers[name], rate, norm, train.optimizer.max_grad_norm)


def _forget(optimizers: dict[str, Adam]) -> None:
    """Gradients of a step that is left out."""
    for optimizer in optimizers.values():
        clear(optimizer)


def _check_weights(optimizers: dict[str, Adam]) -> None:
    """A finite gradient can still be too much for the numbers that hold the weights."""
    for name, optimizer in optimizers.items():
        for parameter, value in zip(optimizer.names, optimizer.parameters, strict=True):
            if not bool(value.isfinite().all()):
                raise RollwayError(
                    f"train: after the round the {name}'s weight {parameter} is not finite; nothing was saved. Lower "
                    "train.optimizer.lr, or set train.optimizer.max_grad_norm"
                )
