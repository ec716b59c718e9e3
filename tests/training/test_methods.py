"""What methods ask of a round as a whole: dual variables, replayed rows, the last entropy, tokens chosen once."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rollway.config import load_recipe
from rollway.config.training import TrainConfig
from rollway.objectives import TokenBatch
from rollway.training import update as module
from rollway.training.batch import TrainingBatch
from rollway.training.metrics import Metric
from rollway.training.state import TrainState
from rollway.training.update import update
from training.tiny import largest_difference, naive_logp, random_batch, tiny


def of_recipe(name: str, **train: Any) -> TrainConfig:
    return load_recipe(name, {"train": {"optimizer": {"lr": 0.01}} | train}).train


def column(metrics: list[Metric], name: str) -> list[float]:
    return [m.value for m in metrics if m.name == name]


def weights(model: torch.nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def on_policy(policy: torch.nn.Module, batch: TrainingBatch) -> TrainingBatch:
    """The batch with behaviour log-probs of the policy itself."""
    with torch.no_grad():
        rows = [replace(row, logprobs=naive_logp(policy, row).float().numpy()) for row in batch.rows]
    return TrainingBatch(rows, batch.chosen, batch.rejected)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[TokenBatch]:
    """The tensors of each optimiser step, as they are handed to the gradient."""
    seen: list[TokenBatch] = []
    real = module.accumulate

    def spy(models: Any, rows: Any, tokens: TokenBatch, *rest: Any) -> Any:
        seen.append(tokens)
        return real(models, rows, tokens, *rest)

    monkeypatch.setattr(module, "accumulate", spy)
    return seen


# R2VPO


def test_each_dual_step_takes_the_variance_from_before_its_update() -> None:
    """Eq. 4: on-policy the first variance is 0, so that lam falls by eta delta whatever the update does to ratios."""
    policy = tiny()
    train = of_recipe("r2vpo", optimizer={"lr": 0.002})
    state, metrics = update(policy, None, None, on_policy(policy, random_batch(12)), train, TrainState(seed=0))
    lam, variance = column(metrics, "variance/lam"), column(metrics, "ratio/variance")
    assert len(lam) == 4
    assert lam[0] == 1.0
    assert variance[0] == pytest.approx(0.0, abs=1e-12)
    assert variance[1] > 1e-4
    for n, after in enumerate([*lam[1:], float(state.objective["variance/lam"])]):
        assert after == pytest.approx(min(100.0, max(0.0, lam[n] + variance[n] - 0.04)), rel=1e-6)
    _, later = update(policy, None, None, random_batch(12, seed=1), train, state)
    assert column(later, "variance/lam")[0] == float(state.objective["variance/lam"])


def test_once_a_round_the_dual_step_takes_the_variance_of_all_steps() -> None:
    train = of_recipe("r2vpo", objective={"gate": {"dual": {"every": "round"}}})
    state, metrics = update(tiny(), None, None, random_batch(12), train, TrainState(seed=0))
    assert column(metrics, "variance/lam") == [1.0] * 4
    tokens, variance = np.array(column(metrics, "tokens")), np.array(column(metrics, "ratio/variance"))
    assert float(state.objective["variance/lam"]) == pytest.approx(
        1.0 + (tokens * variance).sum() / tokens.sum() - 0.04, rel=1e-6
    )


def test_the_weight_of_the_fixed_form_stays() -> None:
    train = of_recipe("r2vpo", objective={"gate": {"lam": 0.04, "dual": "fixed"}})
    state, metrics = update(tiny(), None, None, random_batch(12), train, TrainState(seed=0))
    assert column(metrics, "variance/lam") == [0.04] * 4
    assert state.objective == {}


@pytest.mark.parametrize("before", ["fixed", "ascent"])
def test_another_fixed_weight_holds_from_the_next_round_on(before: str) -> None:
    """A schedule step to another weight, and a fork of a run whose weight ascended: the config's weight holds."""
    first = of_recipe("r2vpo", objective={"gate": {"lam": 0.04, "dual": before}})
    then = of_recipe("r2vpo", objective={"gate": {"lam": 5.0, "dual": "fixed"}})
    policy = tiny()
    state, _ = update(policy, None, None, random_batch(12), first, TrainState(seed=0))
    fresh = tiny()
    fresh.load_state_dict(policy.state_dict())
    after, metrics = update(policy, None, None, random_batch(12, seed=1), then, state)
    assert column(metrics, "variance/lam") == [5.0] * 4
    assert after.objective == {}
    # The same as if no round had left anything behind.
    update(fresh, None, None, random_batch(12, seed=1), then, replace(state, objective={}))
    assert largest_difference(weights(policy), weights(fresh)) == 0.0


def test_replayed_rows_with_the_old_policys_log_probs_are_on_policy_rows() -> None:
    """The ratio reads each row's own behaviour: with the old policy's there, it is the ratio to the old policy."""
    found = []
    for denominator, behaviour in (("old", False), ("behavior", True), ("behavior", False)):
        policy = tiny(dtype=torch.float32)
        batch = random_batch(12, age=2)
        given = on_policy(policy, batch) if behaviour else batch
        train = of_recipe("r2vpo", objective={"ratio": {"denominator": denominator}}, optimizer={"lr": 0.002})
        state, metrics = update(policy, None, None, given, train, TrainState(seed=0))
        found.append((weights(policy), float(state.objective["variance/lam"]), column(metrics, "loss")))
    assert found[0][2] == pytest.approx(found[1][2], rel=1e-5, abs=1e-5)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)
    assert largest_difference(found[0][0], found[1][0]) < 1e-4
    assert largest_difference(found[0][0], found[2][0]) > 1e-2


def test_dual_variables_by_age_move_with_their_own_rows() -> None:
    policy = tiny(dtype=torch.float32)
    fresh = on_policy(policy, random_batch(6))
    stale = random_batch(6, seed=3, age=2)
    none = np.zeros(0, dtype=np.int64)
    batch = TrainingBatch([*fresh.rows, *stale.rows], none, none)
    train = of_recipe("r2vpo", minibatches=1, objective={"gate": {"dual": {"versions": 3}}})
    state, metrics = update(policy, None, None, batch, train, TrainState(seed=0))
    now = tiny(dtype=torch.float32)
    with torch.no_grad():
        x = torch.cat([naive_logp(now, row) - torch.from_numpy(row.logprobs) for row in stale.rows])
    expected = [0.96, 1.0, 1.0 + float((x.exp() - 1).square().mean()) - 0.04]
    assert state.objective["variance/lam"].tolist() == pytest.approx(expected, abs=1e-5)
    assert [column(metrics, f"variance/lam_{age}") for age in range(3)] == [[1.0]] * 3


def test_effective_sample_size_falls_with_stale_rows() -> None:
    policy = tiny()
    fresh = on_policy(policy, random_batch(8))
    train = of_recipe("r2vpo")
    _, metrics = update(tiny(), None, None, fresh, train, TrainState(seed=0))
    assert column(metrics, "ess")[0] == pytest.approx(1.0, abs=1e-6)
    _, metrics = update(tiny(), None, None, random_batch(8), train, TrainState(seed=0))
    assert column(metrics, "ess")[0] < 0.9


# DCPO


def dcpo(entropy: float = 1.5, **train: Any) -> TrainConfig:
    return of_recipe("dcpo", objective={"mixing": {"entropy": entropy}}, **train)


def test_one_temperature_share_and_weight_for_a_whole_round(parts: list[TokenBatch]) -> None:
    """rho is of logits / T over the whole vocabulary, of the policy before the first step, in every mini-batch."""
    policy, batch = tiny(), random_batch(10)
    state = TrainState(seed=0, objective={"mixing/entropy": torch.tensor(1.54, dtype=torch.float64)})
    _, metrics = update(policy, None, None, batch, dcpo(), state)
    share = sum(bool(row.correct) for row in batch.rows) / 10
    alpha = 0.04 / share / (1 + 0.04 / share)
    assert 0.0 < share < 1.0
    assert column(metrics, "mixing/temperature") == [0.8] * 4
    assert column(metrics, "mixing/last_entropy") == pytest.approx([1.54] * 4)
    assert column(metrics, "mixing/correct_share") == pytest.approx([share] * 4)
    assert column(metrics, "mixing/alpha") == pytest.approx([alpha] * 4, abs=1e-6)
    old = tiny()
    with torch.no_grad():
        expected = {}
        for row in batch.rows:
            rho = (naive_logp(old, row, 0.8) - naive_logp(old, row)).exp()
            expected[float(row.advantage)] = (1 - alpha) * row.advantage + alpha * bool(row.correct) * rho
    seen = [a[m] for part in parts for a, m in zip(part.advantage, part.mask, strict=True)]
    assert len(seen) == 10
    for a in seen:
        assert any(len(a) == len(e) and torch.allclose(a.double(), e, atol=1e-5) for e in expected.values())


@pytest.mark.parametrize("micro", [9, 4096])
def test_the_rounds_sampled_entropy_sets_the_next_rounds_temperature(micro: int) -> None:
    """The mean over all tokens of the round's steps, however they were cut; it is 0 before the first round."""
    policy = tiny()
    train = dcpo(entropy=1.5, micro_tokens=micro)
    state, metrics = update(policy, None, None, random_batch(10), train, TrainState(seed=0))
    assert column(metrics, "mixing/last_entropy") == [0.0] * 4
    assert column(metrics, "mixing/temperature") == [1.2] * 4
    tokens, logp = np.array(column(metrics, "tokens")), np.array(column(metrics, "logp"))
    entropy = float(state.objective["mixing/entropy"])
    assert entropy == pytest.approx(-(tokens * logp).sum() / tokens.sum(), abs=1e-6)
    _, metrics = update(policy, None, None, random_batch(10, seed=1), train, state)
    assert column(metrics, "mixing/last_entropy") == [entropy] * 4
    assert column(metrics, "mixing/temperature") == [0.8 if entropy > 1.5 else 1.2] * 4


def test_a_round_without_right_rollouts_is_grpo() -> None:
    found = []
    for train in (dcpo(), of_recipe("dcpo", objective={"mixing": "none"})):
        policy = tiny(dtype=torch.float32)
        _, metrics = update(policy, None, None, random_batch(8, correct=False), train, TrainState(seed=0))
        found.append(weights(policy))
    assert largest_difference(*found) == 0.0
    assert "mixing/alpha" not in {m.name for m in metrics}


# D3S


@pytest.mark.parametrize("name", ["d3s", "d3s-gspo"])
def test_tokens_are_chosen_once_by_the_policy_before_the_round(name: str, parts: list[TokenBatch]) -> None:
    """One pool over all rows of the round, also where several updates are made of it."""
    policy, batch = tiny(), random_batch(10)
    train = of_recipe(name, minibatches=3, objective_horizon=40)
    state = TrainState(seed=0, updates=10)
    _, metrics = update(policy, None, None, batch, train, state)
    old, keys = tiny(), []
    for n, row in enumerate(batch.rows):
        ids = torch.tensor([[*row.prompt_tokens.tolist(), *row.tokens.tolist()]])
        with torch.no_grad():
            logp = old(input_ids=ids, use_cache=False).logits[0, len(row.prompt_tokens) - 1 : -1].log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        keys += [(abs(row.advantage) * float(h), n, t) for t, h in enumerate(entropy)]
    share = 0.75 * 0.1 + 0.25 * 0.5
    wanted = sorted(keys, key=lambda k: (-k[0], k[1], k[2]))[: int(np.ceil(share * len(keys) - 1e-9))]
    by_advantage = {np.float32(row.advantage): n for n, row in enumerate(batch.rows)}
    found = set()
    for part in parts:
        for i, t in part.extra["keep"].nonzero().tolist():
            found.add((by_advantage[np.float32(part.advantage[i])], t))
    assert found == {(n, t) for _, n, t in wanted}
    assert sum(column(metrics, "kept_tokens")) == len(wanted)
    assert len(column(metrics, "grad_norm")) == 3


# NGRPO


def test_negative_advantages_are_held_tighter_than_positive_ones() -> None:
    train = of_recipe("ngrpo")
    assert (train.objective.gate.low, train.objective.gate.high) == (0.16, 0.24)
    assert train.minibatches == 4
    _, metrics = update(tiny(), None, None, random_batch(12), train, TrainState(seed=0))
    assert column(metrics, "entropy_old")[0] > 0
    assert len(column(metrics, "clip_share")) == 4
