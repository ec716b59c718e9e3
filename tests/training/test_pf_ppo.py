"""PF-PPO through the trainer: weighted whitening, value loss and policy loss; and what weights and draws share."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from rollway.config import load_recipe
from rollway.config.curation import CurateConfig
from rollway.config.objectives import Objective
from rollway.config.training import TrainConfig
from rollway.curation import curate, given_values
from rollway.objectives import TokenBatch, initial_state, loss
from rollway.policies.critic import Critic
from rollway.policies.manifest import NamedPolicy
from rollway.training import update as module
from rollway.training.advantages import gae, whiten
from rollway.training.batch import TrainingBatch
from rollway.training.gradients import Models, accumulate
from rollway.training.precompute import precompute
from rollway.training.state import TrainState
from rollway.training.update import update
from training.tiny import gradients, largest_difference, random_batch, tiny

GROUPS, SAMPLES = 2, 5
WEIGHTS = {
    "none": [0.2] * 10,
    "br": [0.125, 0.5, 0.125, 0.125, 0.125, 0.5, 0.125, 0.125, 0.125, 0.125],
    "bw": [0.0, 0.5, 0.0, 0.0, 0.5, 0.5, 0.0, 0.0, 0.5, 0.0],
}


def weighted_rows(weights: list[float]) -> TrainingBatch:
    made = random_batch(GROUPS * SAMPLES, seed=4)
    return replace(made, rows=[replace(row, weight=w) for row, w in zip(made.rows, weights, strict=True)])


def critic() -> Critic:
    torch.manual_seed(5)
    return Critic(tiny(seed=2, dtype=torch.float32), NamedPolicy(kind="critic"))


def fixed(train: TrainConfig, rows: TrainingBatch) -> TokenBatch:
    return precompute(tiny(), critic(), tiny(seed=1), rows, train, {}, 1.0).tokens


def raw_advantage(tokens: TokenBatch) -> Tensor:
    """Eq. 4 before whitening, in the hyperparameters of the table: beta .01, gamma 1, lam .95."""
    return gae(
        tokens.reward,
        tokens.value_old,
        tokens.mask,
        gamma=1.0,
        lam=0.95,
        kl=0.01,
        logp_old=tokens.logp_old,
        logp_ref=tokens.logp_ref,
    )[0]


def test_the_recipe_is_ppo_with_weights_and_without_a_dual_clip() -> None:
    recipe = load_recipe("pf-ppo")
    assert recipe.rollout.group == 5
    advantage = recipe.train.advantage
    assert (advantage.kind, advantage.gamma, advantage.lam, advantage.kl) == ("gae", 1.0, 0.95, 0.01)
    assert advantage.whiten
    assert (recipe.train.objective.gate.kind, recipe.train.objective.value.clip) == ("clip", 0.2)
    plain = load_recipe("ppo", {"train": {"objective": {"gate": {"kind": "clip", "low": 0.2, "high": 0.2}}}})
    assert recipe.train == plain.train


@pytest.mark.parametrize("name", ["br", "bw"])
def test_whitening_uses_the_weights_of_the_batch(name: str) -> None:
    """Eq. 5: (A - mean_w) / (std_w + 1e-8), population moments over the tokens of weight > 0."""
    tokens = fixed(load_recipe("pf-ppo").train, weighted_rows(WEIGHTS[name]))
    a = raw_advantage(tokens)
    w = torch.tensor(WEIGHTS[name])[:, None].double().expand_as(a)[tokens.mask].numpy()
    values = a[tokens.mask].double().numpy()
    mean = np.average(values, weights=w)
    deviation = np.sqrt(np.average((values - mean) ** 2, weights=w))
    found = tokens.advantage[tokens.mask].numpy()[w > 0]
    wanted = ((values - mean) / (deviation + 1e-8))[w > 0]
    if name == "bw":
        # Rows that count alike are whitened as in PPO, with ddof 1: the one factor by which the two differ.
        n = int((w > 0).sum())
        wanted = wanted * np.sqrt((n - 1) / n)
    assert found == pytest.approx(wanted, rel=1e-6)
    plain = whiten(a, tokens.mask)[tokens.mask].numpy()[w > 0]
    assert np.abs(found - plain).max() > 1e-2


def test_weights_all_alike_are_ppo_on_all_responses() -> None:
    """w = none against PPO-M: advantages, policy gradient and critic gradient."""
    train = load_recipe("pf-ppo", {"curate": {"weight": {"keep": "none"}}}).train
    found = []
    for weights in (WEIGHTS["none"], [1.0] * 10):
        rows = weighted_rows(weights)
        tokens = fixed(train, rows)
        policy, values = tiny(seed=7), critic()
        models = Models(policy, values, 1.0, 30)
        got = accumulate(models, rows.rows, tokens, train.objective, initial_state(train.objective))
        found.append((tokens.advantage, gradients(policy), gradients(values), got.metrics["loss"]))
    a, b = found
    torch.testing.assert_close(a[0], b[0], rtol=1e-12, atol=1e-14)
    assert max(float(g.abs().max()) for g in b[1]) > 1e-4
    assert largest_difference(a[1], b[1]) < 1e-12
    assert max(float(g.abs().max()) for g in b[2]) > 1e-4
    assert largest_difference(a[2], b[2]) < 1e-6
    assert a[3] == pytest.approx(b[3], rel=1e-6)


def test_the_loss_is_the_weighted_token_mean_of_policy_and_critic() -> None:
    """Eq. 5 written out: sum_i w_i sum_t l_it / sum_i w_i n_i, of both losses."""
    train = load_recipe("pf-ppo").train
    tokens = fixed(train, weighted_rows(WEIGHTS["br"]))
    moved = replace(tokens, logp=tokens.logp + 0.3 * torch.sin(torch.arange(tokens.logp.numel())).view_as(tokens.logp))
    moved = replace(
        moved, value=tokens.value_old + 0.4 * torch.cos(torch.arange(tokens.logp.numel())).view_as(moved.logp)
    )
    top_policy = top_critic = bottom = 0.0
    for i, w in enumerate(WEIGHTS["br"]):
        for t in range(tokens.logp.shape[1]):
            if not tokens.mask[i, t]:
                continue
            a, r = float(tokens.advantage[i, t]), float((moved.logp[i, t] - tokens.logp_old[i, t]).exp())
            top_policy += w * max(-a * r, -a * min(max(r, 0.8), 1.2))
            v, old, target = (float(x[i, t]) for x in (moved.value, tokens.value_old, tokens.returns))
            clipped = min(max(v, old - 0.2), old + 0.2)
            top_critic += w * 0.5 * max((v - target) ** 2, (clipped - target) ** 2)
            bottom += w
    result = loss(moved, train.objective)
    assert float(result.metrics["loss/policy"]) == pytest.approx(top_policy / bottom, rel=1e-5)
    assert float(result.metrics["loss/value"]) == pytest.approx(top_critic / bottom, rel=1e-5)


def test_each_sample_is_used_three_times_with_three_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    used: Counter[str] = Counter()
    original = module.accumulate

    def counting(models: Models, rows: list, *rest: object) -> object:
        used.update(row.rollout_id for row in rows)
        return original(models, rows, *rest)

    monkeypatch.setattr(module, "accumulate", counting)
    train = load_recipe("pf-ppo", {"train": {"epochs": 3}}).train
    rows = weighted_rows(WEIGHTS["br"])
    policy = tiny(dtype=torch.float32)
    state, _ = update(policy, critic(), tiny(seed=1, dtype=torch.float32), rows, train, TrainState(seed=0))
    assert set(used.values()) == {3}
    assert len(used) == 10
    assert state.updates == 3 * train.minibatches


REWARDS = [[0.1, 0.7, -0.4, 0.7, -0.9], [0.9, -0.2, 0.3, -1.0, 0.0], [0.5, 0.4, -0.6, -0.5, 0.2]]


@pytest.mark.parametrize("keep", ["br", "bw"])
def test_many_draws_have_the_gradient_of_the_weights(keep: str) -> None:
    """Sampling mode, whitening included: a buffer of ever more copies of three prompts; the error falls as its root."""
    g = torch.Generator().manual_seed(0)
    mask = torch.arange(5)[None] < torch.randint(1, 6, (15, 1), generator=g)
    old = -torch.rand(15, 5, dtype=torch.float64, generator=g)
    rewards = torch.tensor(REWARDS, dtype=torch.float64).flatten()
    raw = torch.randn(15, 5, dtype=torch.float64, generator=g) + rewards[:, None]
    moved = old + 0.3 * torch.randn(15, 5, dtype=torch.float64, generator=g)
    objective = Objective.model_validate({"ratio": "token", "gate": "clip", "aggregate": "token_mean"})

    def slope(weight: list[float]) -> Tensor:
        logp, w = moved.clone().requires_grad_(), torch.tensor(weight, dtype=torch.float64)
        batch = TokenBatch(logp=logp, logp_old=old, mask=mask, weight=w, advantage=whiten(raw, mask, w))
        return torch.autograd.grad(loss(batch, objective).loss, logp)[0]

    wanted = slope(curated_copies(1, {"sql": "pf_ppo", "keep": keep}).column("weight").to_pylist())
    errors = {}
    for copies in (5, 500):
        drawn = curated_copies(copies, {"sql": "pf_ppo", "keep": keep}, {"sql": "resample"})
        assert drawn.num_rows == 15 * copies
        assert set(drawn.column("weight").to_pylist()) == {1.0}
        counts = Counter(name.split("/")[1] for name in drawn.column("rollout_id").to_pylist())
        found = slope([float(counts[f"{n}-{s}"]) for n in range(3) for s in range(5)])
        errors[copies] = float((found - wanted).norm() / wanted.norm())
    assert errors[500] < 0.06
    assert errors[500] < errors[5] / 3


def curated_copies(copies: int, weight: dict[str, str], select: dict[str, str] | None = None) -> pa.Table:
    """The batch of a buffer that holds each of the three prompts so many times; rollout 7/1-4 is of copy 7."""
    rows = [
        {"rollout_id": f"{c:03d}/{n}-{s}", "group_id": f"{c:03d}/{n}", "sample": s, "reward": r}
        for c in range(copies)
        for n, group in enumerate(REWARDS)
        for s, r in enumerate(group)
    ]
    config = CurateConfig.model_validate({"weight": weight, "select": select})
    return curate(pa.Table.from_pylist(rows), config, given=given_values(config, round=0, seed=1))
