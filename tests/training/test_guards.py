"""Steps that must not be taken: nothing of them stays, their rows can be looked at, and guards refuse what they say."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from rollway.config.base import ConfigError
from rollway.config.policies import CharTokenizer, ScratchPolicy
from rollway.config.recipes import parse
from rollway.config.training import Guard, TrainConfig
from rollway.errors import RollwayError
from rollway.policies import causal_lm, manifest
from rollway.policies.critic import Critic
from rollway.policies.manifest import NamedPolicy
from rollway.runtime.specs import STAGE_VERSION, TrainSpec, dump
from rollway.stages import train as stage
from rollway.store import parquet
from rollway.store.tables import TABLES
from rollway.training.batch import TrainingBatch
from rollway.training.determinism import deterministic
from rollway.training.gradients import Models, accumulate
from rollway.training.guards import MOST_IN_A_ROW, UpdateRefused, inspect, left_out, objection
from rollway.training.metrics import Metric
from rollway.training.precompute import precompute
from rollway.training.state import TrainState, load_state, save_state
from rollway.training.update import update
from stages.test_train_critic import SMALL, write_round
from training.tiny import gradients, largest_difference, random_batch, tiny

torch.set_num_threads(1)
GRPO = {"ratio": "token", "gate": "clip", "aggregate": "token_mean"}
PREFERENCE = {"preference": {"kind": "dpo", "beta": 0.1}}


def config(**given: Any) -> TrainConfig:
    objective = {**GRPO, **given.pop("objective", {})}
    return TrainConfig.model_validate({"objective": objective, "optimizer": {"lr": 0.01}, **given})


def weights(model: torch.nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def column(metrics: list[Metric], name: str) -> list[float]:
    return [m.value for m in metrics if m.name == name]


def with_advantage(count: int, at: int, advantage: float, seed: int = 0) -> TrainingBatch:
    batch = random_batch(count, seed=seed)
    batch.rows[at] = replace(batch.rows[at], advantage=advantage)
    return batch


def test_a_loss_that_is_not_finite_tells_of_its_rows() -> None:
    policy = tiny(dtype=torch.float32)
    before = weights(policy)
    with pytest.raises(UpdateRefused, match=r"the loss is .*rollouts r2, lower") as caught:
        update(policy, None, None, with_advantage(4, 2, 1e39), config(), TrainState(seed=0))
    assert caught.value.figures["what"] == "loss"
    worst, *others = caught.value.rows
    assert worst["rollout_id"] == "r2"
    assert not np.isfinite(worst["loss"])
    assert sorted(row["rollout_id"] for row in others) == ["r0", "r1", "r3"]
    assert all(np.isfinite(row["loss"]) for row in others)
    assert largest_difference(before, weights(policy)) == 0.0
    assert all(p.grad is None for p in policy.parameters())


def test_a_gradient_that_is_not_finite_tells_of_its_rows() -> None:
    """A finite loss whose gradient is too large for float32: its square, for the norm, is infinite."""
    policy = tiny(dtype=torch.float32)
    before = weights(policy)
    with pytest.raises(UpdateRefused, match="gradient norm of the policy is inf") as caught:
        update(policy, None, None, with_advantage(4, 1, 1e30), config(), TrainState(seed=0))
    assert np.isfinite([row["loss"] for row in caught.value.rows]).all()
    assert [row["rollout_id"] for row in caught.value.rows if not np.isfinite(row["gradient_norm"])] == ["r1"]
    assert largest_difference(before, weights(policy)) == 0.0


def test_weights_that_are_not_finite_after_the_round_are_not_passed_on() -> None:
    with pytest.raises(RollwayError, match=r"the policy's weight .* is not finite; nothing was saved"):
        update(
            tiny(dtype=torch.float32), None, None, random_batch(4), config(optimizer={"lr": 1e39}), TrainState(seed=0)
        )


@pytest.mark.parametrize("critic", [False, True])
def test_the_norms_of_rows_are_those_of_their_own_parts(critic: bool) -> None:
    """Independent: the same step with the advantages of all other rows 0 has the row's part of the gradient alone."""
    batch, train = random_batch(5), config()
    policy = tiny()
    if critic:
        train = config(objective={"value": {}}, critic={}, advantage={"kind": "gae"})
        values = Critic(tiny(seed=2), NamedPolicy(kind="critic"))
        fixed = precompute(policy, values, None, batch, train, {}, 1.0)
        models = Models(policy, values, 1.0, 4096)
        said = inspect(models, fixed.rows, fixed.tokens, train.objective, {})
        accumulate(models, fixed.rows, fixed.tokens, train.objective, {})
        whole = torch.cat([g.flatten() for g in [*gradients(policy), *gradients(values)]]).norm()
        assert all(row["gradient_norm"] > 0 for row in said)
        assert float(whole) <= sum(row["gradient_norm"] for row in said)
        return
    fixed = precompute(policy, None, None, batch, train, {}, 1.0)
    models = Models(policy, None, 1.0, 4096)
    said = {row["rollout_id"]: row for row in inspect(models, fixed.rows, fixed.tokens, train.objective, {})}
    assert all(p.grad is None for p in policy.parameters())
    for n, row in enumerate(batch.rows):
        alone = torch.where(torch.arange(5) == n, fixed.tokens.advantage, 0.0)
        policy.zero_grad(set_to_none=True)
        accumulate(models, fixed.rows, replace(fixed.tokens, advantage=alone), train.objective, {})
        norm = torch.cat([g.flatten() for g in gradients(policy)]).norm()
        assert said[row.rollout_id]["gradient_norm"] == pytest.approx(float(norm), rel=1e-9)
        assert said[row.rollout_id]["loss"] == pytest.approx(-row.advantage * len(row.tokens), rel=1e-6)
    norms = [row["gradient_norm"] for row in said.values()]
    assert norms == sorted(norms, reverse=True)


def test_rows_of_an_objective_whose_rows_interact() -> None:
    train = TrainConfig.model_validate({"objective": PREFERENCE, "optimizer": {"lr": 0.01}})
    policy, batch = tiny(), random_batch(4, pairs=2)
    fixed = precompute(policy, None, tiny(seed=1), batch, train, {}, 1.0)
    models = Models(policy, None, 1.0, 4096)
    said = {r["rollout_id"]: r["gradient_norm"] for r in inspect(models, fixed.rows, fixed.tokens, train.objective, {})}
    accumulate(models, fixed.rows, fixed.tokens, train.objective, {})
    whole = float(torch.cat([g.flatten() for g in gradients(policy)]).norm())
    assert set(said) == {"r0", "r1", "r2", "r3"}
    assert min(said.values()) > 0.0
    assert whole <= sum(said.values()) * (1 + 1e-12)


SPIKE = {"loss_spike": 5.0, "window": 8}


def quiet_rounds(train: TrainConfig, count: int) -> tuple[Any, TrainState]:
    policy, state = tiny(dtype=torch.float32), TrainState(seed=0)
    for seed in range(count):
        state, _ = update(policy, None, None, random_batch(4, seed=seed), train, state)
    return policy, state


def test_a_loss_spike_stops_or_is_left_out() -> None:
    for then in ("stop", "skip"):
        train = config(guard={**SPIKE, "then": then})
        policy, state = quiet_rounds(train, 9)
        assert len(state.losses) == 8
        before = weights(policy)
        spiked = with_advantage(4, 0, 500.0, seed=20)
        if then == "stop":
            with pytest.raises(UpdateRefused, match=r"update 9: the loss is .*guard\.loss_spike 5 x") as caught:
                update(policy, None, None, spiked, train, state)
            assert caught.value.rows[0]["rollout_id"] == "r0"
            continue
        after, metrics = update(policy, None, None, spiked, train, state)
        assert largest_difference(before, weights(policy)) == 0.0
        assert column(metrics, "guard_skipped") == [1.0]
        mean, spread = np.mean(state.losses), np.std(state.losses, ddof=1)
        assert (after.updates, after.skipped, after.losses[:-1]) == (state.updates, 1, state.losses[1:])
        assert abs(after.losses[-1] - mean) == pytest.approx(5.0 * spread), "the spike counts as far as the bound"
        again, metrics = update(policy, None, None, random_batch(4, seed=21), train, after)
        assert column(metrics, "guard_skipped") == [0.0]
        assert (again.updates, again.skipped) == (state.updates + 1, 0)
        assert largest_difference(before, weights(policy)) > 0.0


LEAPS = [(1.0, 8), (1.0, 32), (2.0, 8), (2.0, 32), (2.0, 128), (3.0, 8), (3.0, 32), (3.0, 64), (3.0, 128)]
LEAPS += [(6.0, 32), (6.0, 1000), (12.0, 32)]


@pytest.mark.parametrize(("loss_spike", "window"), LEAPS)
@pytest.mark.parametrize("leap", [0.5, -40.0])
def test_a_loss_that_stays_where_it_leapt_to_is_soon_no_spike(loss_spike: float, window: int, leap: float) -> None:
    guard = Guard(loss_spike=loss_spike, window=window, then="skip")
    tokens = SimpleNamespace(mask=torch.ones(1, 1, dtype=torch.bool), logp_old=None, logp_ref=None)

    def refused(loss: float, state: TrainState) -> Any:
        got = SimpleNamespace(metrics={"loss": loss}, logp=torch.zeros(1, 1))
        return objection(guard, state.losses, cast(Any, tokens), cast(Any, got))

    state = TrainState(seed=0, losses=tuple(0.1 + 0.001 * (n % 8) for n in range(window)))
    assert refused(1e6, state), "one spike, however high, does not let the next one through"
    once = left_out(guard, state, refused(1e6, state))
    assert refused(1e6, once)
    assert once.losses[-1] == refused(1e6, state).bound < 0.2
    while (said := refused(leap, state)) is not None:
        state = left_out(guard, state, said)
    assert 0 < state.skipped <= window / (1 + loss_spike**2) + 12
    assert state.skipped < MOST_IN_A_ROW
    assert min(0.1, leap) <= min(state.losses)
    assert max(state.losses) <= max(0.1071, leap), "no loss counts as further than it was"


def test_steps_left_out_one_after_the_other_stop_in_the_end(tmp_path: Path) -> None:
    """A policy beyond the bound stays there: no step that is left out brings it back."""
    train = config(objective={"kl": {"kind": "k3", "beta": 0.1}}, guard={"kl_reference": 1e-9, "then": "skip"})
    policy, reference = tiny(dtype=torch.float32), tiny(dtype=torch.float32, seed=1)
    state, metrics = update(policy, None, reference, random_batch(4), train, TrainState(seed=0))
    assert (state.updates, state.skipped, column(metrics, "guard_skipped")) == (0, 1, [1.0])
    save_state(tmp_path, replace(state, skipped=MOST_IN_A_ROW - 1))
    with pytest.raises(UpdateRefused, match=r"KL to the reference .* and so were 63 steps before it.*raise that bound"):
        update(policy, None, reference, random_batch(4), train, load_state(tmp_path))


def test_the_first_steps_are_never_called_spikes() -> None:
    train = config(guard=SPIKE)
    policy, state = quiet_rounds(train, 7)
    state, metrics = update(policy, None, None, with_advantage(4, 0, 500.0), train, state)
    assert column(metrics, "guard_skipped") == [0.0]
    assert len(state.losses) == 8


def test_the_losses_that_are_compared_with_go_through_files(tmp_path: Path) -> None:
    _, state = quiet_rounds(config(guard=SPIKE), 3)
    save_state(tmp_path, state)
    assert load_state(tmp_path).losses == state.losses
    assert len(state.losses) == 3
    plain = replace(state, losses=())
    save_state(tmp_path, plain)
    assert "losses" not in json.loads((tmp_path / "counters.json").read_text())
    assert load_state(tmp_path).losses == ()


def test_kl_from_the_old_policy_leaves_out_the_steps_beyond() -> None:
    """With the guard the round is the unguarded one up to the first step whose KL is above."""
    batch, epochs = random_batch(8), 6
    free = config(epochs=epochs, optimizer={"lr": 0.05})
    unguarded = tiny(dtype=torch.float32)
    _, metrics = update(unguarded, None, None, batch, free, TrainState(seed=0))
    kl = column(metrics, "kl_old")
    assert kl[0] == 0.0
    bound = (max(kl[:3]) + kl[3]) / 2
    assert max(kl[:3]) < bound < kl[3]
    guarded = tiny(dtype=torch.float32)
    train = config(epochs=epochs, optimizer={"lr": 0.05}, guard={"kl": bound, "then": "skip"})
    state, metrics = update(guarded, None, None, batch, train, TrainState(seed=0))
    assert column(metrics, "kl_old") == kl[:3]
    assert column(metrics, "guard_skipped") == [3.0]
    assert (state.updates, state.skipped) == (3, 0), "the next round begins with a KL of 0"
    three = tiny(dtype=torch.float32)
    update(three, None, None, batch, config(epochs=3, optimizer={"lr": 0.05}), TrainState(seed=0))
    assert largest_difference(weights(guarded), weights(three)) == 0.0


def test_kl_to_the_reference_stops() -> None:
    objective = {"kl": {"kind": "k3", "beta": 0.1}}
    train = config(objective=objective, guard={"kl_reference": 1e-6})
    policy, reference = tiny(dtype=torch.float32), tiny(dtype=torch.float32)
    state, _ = update(policy, None, reference, random_batch(4), train, TrainState(seed=0))
    with pytest.raises(UpdateRefused, match=r"KL to the reference is .*above guard\.kl_reference"):
        update(policy, None, reference, random_batch(4), train, state)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"guard": {}}, "looks at nothing"),
        ({"guard": {"kl": 0.1, "window": 16}, "epochs": 2}, "window has no effect"),
        ({"guard": {"kl": 0.1}}, "a round of one step"),
        ({"guard": {"kl_reference": 0.1}}, "nothing refers to a reference"),
        ({"guard": {"loss_spike": 0}}, "greater than 0"),
        ({"guard": {"loss_spike": 5.0, "window": 4}}, "greater than or equal to 8"),
    ],
)
def test_guards_without_effect_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse(TrainConfig, {"objective": GRPO, **given}, "train")


def test_without_guards_specs_are_what_they_were() -> None:
    spec = TrainSpec(version=1, seed=0, round=0, temperature=1.0, train=config())
    assert not {"guard", "deterministic", "losses"} & set(json.loads(dump(spec))["train"])
    assert not {"guard", "deterministic"} & set(config().model_dump())


def test_the_stage_keeps_the_last_good_policy_and_writes_the_rows(tmp_path: Path) -> None:
    start = causal_lm.build(ScratchPolicy(**SMALL, tokenizer=CharTokenizer(alphabet="01234567")), [], 0, "cpu")
    good = tmp_path / "r0000/policy.json"
    named = {"main": causal_lm.save(good.parent, start)}
    manifest.write_manifest(good, manifest.PolicyManifest("causal-lm", named))
    held = {path: path.read_bytes() for path in sorted(good.parent.rglob("*")) if path.is_file()}
    rollouts, batch = write_round(tmp_path)
    out = tmp_path / "r0001"

    def trained(advantage: float) -> None:
        rows = parquet.read(batch).to_pylist()
        rows = [{**row, "advantage": advantage if n == 5 else 0.5 - n % 2} for n, row in enumerate(rows)]
        import pyarrow as pa

        parquet.write(batch, pa.Table.from_pylist(rows, TABLES["batch"].schema()), "batch")
        stage.run(
            TrainSpec(version=STAGE_VERSION["train"], seed=0, round=0, temperature=1.0, train=config()),
            batch=batch,
            rollouts=[rollouts],
            policy=good,
            reference=[],
            next_policy=out / "policy.json",
            metrics=out / "metrics.json",
        )

    with pytest.raises(RollwayError, match=r"the loss is .*are in .*r0001/failed/train\.json") as caught:
        trained(1e39)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in out.rglob("*") if path.is_file()) == ["train.json"]
    told = json.loads((out / "failed/train.json").read_text())
    assert (told["round"], told["stage"], told["what"], told["update"]) == (0, "train", "loss", 0)
    assert told["value"] in ("nan", "inf", "-inf")
    assert len(told["rows"]) == 8
    assert told["rows"][0]["rollout_id"] == "r5"
    assert told["rows"][0]["loss"] in ("nan", "inf", "-inf")
    assert isinstance(told["rows"][1]["gradient_norm"], float)
    assert {path: path.read_bytes() for path in held} == held
    manifest.verify(good)
    trained(0.5)
    assert not (out / "failed").exists()
    manifest.verify(out / "policy.json")


def test_deterministic_is_torchs_promise_and_ends_with_the_block() -> None:
    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(RollwayError, match=r"train\.deterministic: .*put_"), deterministic(True):
        torch.zeros(4).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
    assert not torch.are_deterministic_algorithms_enabled()


def test_on_the_cpu_two_rounds_give_the_same_bits_with_it_and_without() -> None:
    found = []
    for wanted in (False, True, True):
        policy, state = tiny(dtype=torch.float32), TrainState(seed=5)
        with deterministic(wanted):
            for seed in (0, 1):
                state, _ = update(policy, None, None, random_batch(8, seed=seed), config(minibatches=2), state)
        found.append([*weights(policy), *state.optimizer.values()])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.gpu
def test_on_a_gpu_two_rounds_give_the_same_bits_and_the_cpus_within_tolerance() -> None:
    found = []
    for device in ("cuda", "cuda", "cpu"):
        policy, state = tiny(dtype=torch.float32).to(device), TrainState(seed=5)
        with deterministic(True):
            for seed in (0, 1):
                state, _ = update(policy, None, None, random_batch(8, seed=seed), config(minibatches=2), state)
        found.append([w.cpu() for w in weights(policy)])
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    assert largest_difference(found[0], found[2]) < 1e-3
