"""A round's updates through the real `update` (INCIDENTS 8, 16, 26, 31 and what a round must refuse or pass on)."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rollway.config.training import TrainConfig
from rollway.errors import RollwayError
from rollway.policies.critic import Critic
from rollway.policies.manifest import NamedPolicy
from rollway.training import update as module
from rollway.training.batch import TrainingBatch
from rollway.training.gradients import Models, accumulate
from rollway.training.metrics import Metric
from rollway.training.packing import minibatches
from rollway.training.precompute import precompute
from rollway.training.state import TrainState, load_state, save_state
from rollway.training.update import update
from training.tiny import gradients, largest_difference, naive_logp, random_batch, states_equal, tiny

GRPO = {"ratio": "token", "gate": "clip", "aggregate": "token_mean"}


def config(**given: Any) -> TrainConfig:
    objective = {**GRPO, **given.pop("objective", {})}
    return TrainConfig.model_validate({"objective": objective, "optimizer": {"lr": 0.01}, **given})


def only(**objective: Any) -> dict[str, Any]:
    return {"objective": objective, "optimizer": {"lr": 0.01}}


def weights(model: torch.nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def column(metrics: list[Metric], name: str) -> list[float]:
    return [m.value for m in metrics if m.name == name]


@pytest.mark.parametrize(("epochs", "count"), [(1, 1), (1, 4), (2, 3)])
def test_micro_tokens_have_no_effect(epochs: int, count: int) -> None:
    batch, found = random_batch(10), []
    for micro in (1, 25, 4096):
        policy = tiny()
        train = config(
            objective={"kl": {"kind": "k3", "beta": 0.1}}, epochs=epochs, minibatches=count, micro_tokens=micro
        )
        update(policy, None, tiny(seed=4), batch, train, TrainState(seed=7))
        found.append(weights(policy))
    # Adam divides by the root of tiny second moments: gradients equal to 1e-16 leave weights equal to less than that.
    assert largest_difference(found[0], found[1]) < 1e-9
    assert largest_difference(found[0], found[2]) < 1e-9


def test_each_step_has_the_full_gradient_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps per batch and micro-batches per step are independent: no factor between them is lost or counted twice."""
    batch = random_batch(9)
    caught: list[tuple[list[Tensor], list[Tensor]]] = []
    real = module.step

    def spy(optimizer: Any, *rest: Any) -> None:
        caught.append((weights(policy), gradients(policy)))
        real(optimizer, *rest)

    monkeypatch.setattr(module, "step", spy)
    old_policy = tiny()
    for count, micro in ((1, 4096), (3, 4096), (3, 9), (9, 4096)):
        policy = tiny()
        caught.clear()
        update(policy, None, None, batch, config(minibatches=count, micro_tokens=micro), TrainState(seed=7))
        assert len(caught) == count
        for (before, found), rows in zip(caught, minibatches([[n] for n in range(9)], count, 7, 0), strict=True):
            now = tiny()
            with torch.no_grad():
                for p, value in zip(now.parameters(), before, strict=True):
                    p.copy_(value)
            total = torch.zeros((), dtype=torch.float64)
            for n in rows:
                row = batch.rows[n]
                ratio = (naive_logp(now, row) - naive_logp(old_policy, row).detach()).exp()
                total = total + torch.maximum(-row.advantage * ratio, -row.advantage * ratio.clamp(0.8, 1.2)).sum()
            (total / sum(len(batch.rows[n].tokens) for n in rows)).backward()
            assert largest_difference(found, gradients(now)) < 1e-10


@pytest.mark.parametrize(
    "parts", [{}, {"correction": "tis"}, {"kl": {"kind": "k3", "beta": 0.1}, "entropy_bonus": 0.01}]
)
def test_the_short_cut_of_a_single_step_is_exact(parts: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for short in (True, False):
        policy, train = tiny(), config(objective=parts, micro_tokens=30)
        monkeypatch.setattr(module, "one_step", lambda train, short=short: short)
        _, metrics = update(policy, None, tiny(seed=3), random_batch(9), train, TrainState(seed=0))
        values = {(m.step, m.name): m.value for m in metrics if m.name != "entropy"}
        found.append((weights(policy), values))
    assert largest_difference(found[0][0], found[1][0]) < 1e-9
    assert found[0][1] == pytest.approx(found[1][1], abs=1e-9)


def test_only_a_single_step_takes_the_short_cut() -> None:
    assert module.one_step(config())
    assert not module.one_step(config(minibatches=2))
    assert not module.one_step(config(epochs=2))
    assert not module.one_step(config(advantage={"kind": "returns"}))
    assert not module.one_step(config(objective={"mixing": "target_entropy"}))
    assert not module.one_step(config(objective={"gate": {"kind": "variance", "centre": "mean"}}))


def test_every_row_is_used_exactly_once_per_epoch() -> None:
    policy, batch = tiny(dtype=torch.float32), random_batch(7)
    _, metrics = update(policy, None, None, batch, config(minibatches=3, epochs=2), TrainState(seed=0))
    tokens = sum(len(row.tokens) for row in batch.rows)
    assert sum(column(metrics, "tokens")) == 2 * tokens
    assert [m.step for m in metrics if m.name == "loss"] == [1, 2, 3, 4, 5, 6]


def test_ratio_is_one_in_the_first_minibatch_and_moves_in_the_second() -> None:
    policy = tiny(dtype=torch.float32)
    _, metrics = update(policy, None, None, random_batch(8), config(minibatches=2), TrainState(seed=0))
    largest, kl = column(metrics, "max/ratio"), column(metrics, "kl_old")
    assert largest[0] == pytest.approx(1.0, abs=1e-5)
    assert kl[0] == pytest.approx(0.0, abs=1e-9)
    assert abs(largest[1] - 1.0) > 1e-3
    assert kl[1] > 1e-6


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_behaviour_and_recomputed_log_probs_agree_at_the_sampling_temperature(temperature: float) -> None:
    policy, batch = tiny(dtype=torch.float32), random_batch(6)
    with torch.no_grad():
        rows = [replace(row, logprobs=naive_logp(policy, row, temperature).numpy()) for row in batch.rows]
    exact = TrainingBatch(rows, batch.chosen, batch.rejected)
    train = config(objective={"correction": "tis"})
    _, metrics = update(policy, None, None, exact, train, TrainState(seed=0), temperature=temperature)
    assert column(metrics, "gap_max")[0] < 1e-5
    assert column(metrics, "ess")[0] == pytest.approx(1.0, abs=1e-6)
    _, metrics = update(policy, None, None, exact, train, TrainState(seed=0), temperature=1.3 * temperature)
    assert column(metrics, "gap_mean")[0] > 0.05


STATEFUL = {
    "grpo": config(minibatches=3),
    "schedule": config(
        minibatches=3,
        optimizer={"lr": 0.01, "weight_decay": 0.1, "schedule": {"kind": "cosine", "warmup": 2, "horizon": 9}},
    ),
    "variance_dual": config(objective={"gate": {"kind": "variance", "centre": "mean"}}, minibatches=3),
    "target_entropy": config(objective={"mixing": "target_entropy"}, minibatches=3),
    "curvature": config(
        objective={"select": {"kind": "curvature", "tau_f": 1.0, "tau_h": 1.0, "direction": "adam"}}, minibatches=3
    ),
    "ppo": config(
        objective={"value": {}}, advantage={"kind": "gae"}, critic={"lr": 0.01, "warmup_updates": 2}, minibatches=3
    ),
}


def two_rounds(train: TrainConfig, between: Callable[[TrainState], TrainState]) -> tuple[list[Tensor], TrainState]:
    policy = tiny(dtype=torch.float32)
    critic = Critic(tiny(seed=2, dtype=torch.float32), NamedPolicy(kind="critic")) if train.critic else None
    state = TrainState(seed=11)
    for seed in (0, 1):
        state, _ = update(policy, critic, None, random_batch(8, seed=seed), train, state)
        state = between(state)
    return [*weights(policy), *(weights(critic) if critic else [])], state


@pytest.mark.parametrize("name", STATEFUL)
def test_three_updates_saved_and_three_more_are_six_bitwise(name: str, tmp_path: Path) -> None:
    train = STATEFUL[name]

    def through_files(state: TrainState) -> TrainState:
        digests = save_state(tmp_path / "state", state)
        assert sorted(digests) == sorted(f"state/{p.name}" for p in (tmp_path / "state").iterdir())
        return load_state(tmp_path / "state")

    straight, state = two_rounds(train, lambda state: state)
    resumed, again = two_rounds(train, through_files)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))
    assert (state.updates, state.critic_updates, state.shuffles) == (
        again.updates,
        again.critic_updates,
        again.shuffles,
    )
    assert state.steps == 6
    assert states_equal(dict(state.optimizer), dict(again.optimizer))
    assert states_equal(dict(state.objective), dict(again.objective))
    assert all(value.numel() for value in state.objective.values())


def test_bfloat16_weights_are_resumed_from_their_float32_copies(tmp_path: Path) -> None:
    found = []
    for resumed in (False, True):
        policy, state = tiny(dtype=torch.bfloat16), TrainState(seed=3)
        for seed in (0, 1):
            state, _ = update(policy, None, None, random_batch(6, seed=seed), config(minibatches=2), state)
            if resumed:
                save_state(tmp_path, state)
                state = load_state(tmp_path)
        assert policy.dtype == torch.bfloat16
        assert state.optimizer["lm_head.weight/weight"].dtype == torch.float32
        found.append(weights(policy))
    assert largest_difference(*found) == 0.0


def test_of_a_lora_only_the_adapter_moves_and_is_remembered() -> None:
    policy = tiny(dtype=torch.float32)
    get_peft_model(policy, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    state, _ = update(policy, None, None, random_batch(6), config(minibatches=2), TrainState(seed=0))
    moved = {name for name, p in policy.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)
    assert {key.rsplit("/", 1)[0] for key in state.optimizer} == {name for name in before if "lora_" in name}


def test_resuming_without_the_moments_would_show() -> None:
    straight, _ = two_rounds(STATEFUL["grpo"], lambda state: state)
    forgotten, _ = two_rounds(STATEFUL["grpo"], lambda state: replace(state, optimizer={}))
    assert largest_difference(straight, forgotten) > 1e-4


def test_the_policy_waits_for_the_critic() -> None:
    policy = tiny(dtype=torch.float32)
    critic = Critic(tiny(seed=2, dtype=torch.float32), NamedPolicy(kind="critic"))
    before, values = weights(policy), weights(critic)
    train = config(
        objective={"value": {}}, advantage={"kind": "gae"}, critic={"lr": 0.01, "warmup_updates": 3}, minibatches=3
    )
    state, metrics = update(policy, critic, None, random_batch(8), train, TrainState(seed=0))
    assert largest_difference(before, weights(policy)) == 0.0
    assert largest_difference(values, weights(critic)) > 0.0
    assert (state.updates, state.critic_updates, state.steps) == (0, 3, 3)
    assert "grad_norm_critic" in {m.name for m in metrics}
    state, _ = update(policy, critic, None, random_batch(8), train, state)
    assert largest_difference(before, weights(policy)) > 0.0
    assert (state.updates, state.critic_updates) == (3, 6)


def test_the_critic_learns_the_rewards_of_its_batch() -> None:
    """With a frozen policy: its loss falls, its values explain more and more of their targets; both are metrics."""
    policy = tiny(dtype=torch.float32)
    critic = Critic(tiny(seed=2, dtype=torch.float32), NamedPolicy(kind="critic"))
    train = config(objective={"value": {}}, advantage={"kind": "gae"}, critic={"lr": 0.003, "warmup_updates": 100})
    state, losses, explained = TrainState(seed=0), [], []
    for _ in range(20):
        state, metrics = update(policy, critic, None, random_batch(8), train, state)
        losses += column(metrics, "loss/value")
        explained += column(metrics, "value_explained")
    assert losses[-1] < 0.3 * losses[0]
    assert explained[0] < 0.2 < 0.7 < explained[-1] <= 1.0
    assert state.updates == 0


def test_what_a_method_watches_is_in_the_metrics_of_each_step() -> None:
    """SAPO, FiberPO and the corrections, over the whole optimiser batch, whatever the micro-batches."""
    watched = {
        "soft/weight_p01": {"gate": "soft"},
        "fibre/rows_passed": {"ratio": "fibre", "gate": "none"},
        "correction/ess": {"correction": {"kind": "tis", "level": "sequence"}},
    }
    for name, parts in watched.items():
        found = []
        for micro in (10, 4096):
            policy = tiny(dtype=torch.float32)
            train = config(objective=parts, minibatches=2, micro_tokens=micro)
            _, metrics = update(policy, None, None, random_batch(9), train, TrainState(seed=0))
            found.append(column(metrics, name))
            assert len(found[-1]) == 2, name
        assert found[0] == pytest.approx(found[1], rel=1e-4), name


def no_rows() -> TrainingBatch:
    none = np.zeros(0, dtype=np.int64)
    return TrainingBatch([], none, none)


@pytest.mark.parametrize(
    "batch",
    [
        no_rows(),
        random_batch(5, advantage=0.0),
        random_batch(5, weight=0.0),
        random_batch(5, length=3, train_mask=np.zeros(3, dtype=np.bool_)),
        random_batch(5, length=0),
    ],
    ids=["no rows", "no advantage", "no weight", "all masked", "no tokens"],
)
def test_a_batch_without_signal_passes_policy_and_state_on(batch: TrainingBatch) -> None:
    policy = tiny(dtype=torch.float32)
    state, _ = update(policy, None, None, random_batch(8), config(), TrainState(seed=0))
    before = weights(policy)
    after, metrics = update(policy, None, None, batch, config(), state)
    assert column(metrics, "skipped") == [1.0]
    assert after == state
    assert all(torch.equal(a, b) for a, b in zip(before, weights(policy), strict=True))


def test_a_group_without_signal_still_feels_its_kl_term() -> None:
    policy = tiny(dtype=torch.float32)
    before = weights(policy)
    train = config(objective={"kl": {"kind": "k2", "beta": 0.1}})
    _, metrics = update(
        policy, None, tiny(seed=9, dtype=torch.float32), random_batch(5, advantage=0.0), train, TrainState(0)
    )
    assert column(metrics, "skipped") == [0.0]
    assert largest_difference(before, weights(policy)) > 0.0


def test_skipping_can_be_turned_off() -> None:
    policy, batch = tiny(dtype=torch.float32), random_batch(5, advantage=0.0)
    state, _ = update(policy, None, None, random_batch(8), config(), TrainState(seed=0))
    before = weights(policy)
    state, _ = update(policy, None, None, batch, config(skip_without_signal=False), state)
    assert state.updates == 2
    assert largest_difference(before, weights(policy)) > 0.0


def test_pairs_and_groups_stay_together() -> None:
    policy, reference = tiny(dtype=torch.float32), tiny(seed=1, dtype=torch.float32)
    dpo = TrainConfig.model_validate({**only(preference="dpo"), "minibatches": 3})
    _, metrics = update(policy, None, reference, random_batch(8, pairs=4, advantage=None), dpo, TrainState(seed=0))
    assert len(column(metrics, "loss")) == 3
    copg = TrainConfig.model_validate({**only(preference={"kind": "copg", "form": "group"}), "minibatches": 2})
    _, metrics = update(policy, None, reference, random_batch(8, advantage=None), copg, TrainState(seed=0))
    assert len(column(metrics, "loss")) == 2


def test_training_raises_the_probability_of_what_was_rewarded() -> None:
    policy, batch = tiny(dtype=torch.float32), random_batch(8, advantage=1.0)
    state, seen = TrainState(seed=0), []
    for _ in range(5):
        state, metrics = update(policy, None, None, batch, config(), state)
        seen += column(metrics, "logp")
    assert seen == sorted(seen)
    assert seen[-1] - seen[0] > 0.05


@pytest.mark.parametrize(
    ("given", "train", "words"),
    [
        ({"advantage": None}, config(), "r0.*has no advantage"),
        ({"reward": None}, config(advantage={"kind": "returns", "kl": 0.0}), "r0.*has no reward"),
        ({"correct": None}, config(objective={"mixing": "target_entropy"}), "r0.*has no correct"),
        ({"route": "elsewhere"}, config(objective={"anchors": "unit"}), "elsewhere"),
        (
            {"length": 3, "logprobs": np.array([-1.0, np.nan, -1.0], dtype=np.float32)},
            config(objective={"correction": "tis"}),
            "rollout r0.*without a behaviour log-prob",
        ),
        ({}, config(objective={"kl": {"kind": "k3", "beta": 0.1}}), "reference"),
    ],
    ids=["advantage", "reward", "correct", "route", "behaviour", "reference"],
)
def test_rows_that_lack_what_the_objective_needs_are_refused(given: dict, train: TrainConfig, words: str) -> None:
    with pytest.raises(RollwayError, match=words):
        update(tiny(dtype=torch.float32), None, None, random_batch(3, **given), train, TrainState(seed=0))


def test_a_missing_behaviour_log_prob_is_no_matter_where_none_is_needed() -> None:
    batch = random_batch(3, length=2, logprobs=np.full(2, np.nan, dtype=np.float32))
    policy = tiny(dtype=torch.float32)
    _, metrics = update(policy, None, None, batch, config(), TrainState(seed=0))
    assert column(metrics, "gap_mean") == []
    assert all(p.isfinite().all() for p in weights(policy))


def test_a_loss_that_is_not_finite_names_the_rollouts() -> None:
    batch = random_batch(4)
    batch.rows[2] = replace(batch.rows[2], advantage=1e39)
    with pytest.raises(RollwayError, match=r"loss is .*rollouts r2,"):
        update(tiny(dtype=torch.float32), None, None, batch, config(), TrainState(seed=0))


def test_a_gradient_that_is_not_finite_stops_before_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny(dtype=torch.float32)
    before = weights(policy)
    monkeypatch.setattr(module, "gradient_norm", lambda optimizer: float("nan"))
    with pytest.raises(RollwayError, match="gradient norm of the policy is nan"):
        update(policy, None, None, random_batch(4), config(), TrainState(seed=0))
    assert largest_difference(before, weights(policy)) == 0.0


def test_token_advantages_of_the_sql_and_of_the_trainer() -> None:
    policy = tiny(dtype=torch.float32)
    batch = random_batch(4, length=3, token_advantage=np.array([0.5, -0.5, 2.0], dtype=np.float32))
    update(policy, None, None, batch, config(), TrainState(seed=0))
    for kind in ({"kind": "returns", "kl": 0.01}, {"kind": "whiten"}):
        _, metrics = update(
            policy, None, tiny(seed=1, dtype=torch.float32), random_batch(6), config(advantage=kind), TrainState(0)
        )
        assert column(metrics, "skipped") == [0.0]


def test_whitened_returns_skip_what_the_policy_did_not_write() -> None:
    """Masked tokens neither enter mean and standard deviation nor get an advantage; rewards reach across the hole."""
    mask = np.array([True, False, False, True])
    batch = random_batch(5, length=4, train_mask=mask)
    train = config(advantage={"kind": "returns", "kl": 0.0})
    made = precompute(tiny(dtype=torch.float32), None, None, batch, train, {}, 1.0).tokens.advantage
    reward = torch.tensor([row.reward for row in batch.rows for _ in range(2)], dtype=torch.float64)
    expected = (reward - reward.mean()) / (reward.var(correction=1) + 1e-8).sqrt()
    assert torch.allclose(made[:, mask].double().flatten(), expected, atol=1e-6)
    assert not made[:, ~mask].any()


def test_dropout_is_off_and_the_models_modes_do_not_matter() -> None:
    found = []
    for training in (True, False):
        policy = tiny(dtype=torch.float32).train(training)
        update(policy, None, None, random_batch(5), config(), TrainState(seed=0))
        assert not policy.training
        found.append(weights(policy))
    assert largest_difference(*found) == 0.0


def test_gradient_checkpointing_takes_place_and_changes_nothing() -> None:
    found, calls = [], []
    for checkpointing in (True, False):
        policy = tiny(dtype=torch.float32)
        for layer in policy.get_decoder().layers if checkpointing else []:
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = lambda run, *inputs: (
                calls.append(run) or checkpoint(run, *inputs, use_reentrant=False)
            )
        update(policy, None, None, random_batch(5), config(), TrainState(seed=0))
        found.append(weights(policy))
    assert len(calls) == 2
    assert largest_difference(*found) < 1e-6


def test_accumulate_leaves_a_frozen_policy_without_gradient() -> None:
    policy, batch = tiny(dtype=torch.float32), random_batch(4)
    fixed = precompute(policy, None, None, batch, config(), {}, 1.0)
    accumulate(Models(policy, None, 1.0, 100, freeze_policy=True), batch.rows, fixed.tokens, config().objective, {})
    assert not any(g.any() for g in gradients(policy))
