"""Imitated rows and a renewed reference through the trainer, against log-probs of single rows and autograd."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from rollway.config.training import TrainConfig
from rollway.errors import RollwayError
from rollway.training.batch import TrainingBatch, training_batch
from rollway.training.gradients import Models, accumulate
from rollway.training.metrics import Metric
from rollway.training.precompute import precompute
from rollway.training.state import TrainState
from rollway.training.update import update
from training.tiny import gradients, largest_difference, naive_logp, random_batch, tiny

EXPO = {
    "ratio": "token",
    "gate": {"kind": "clip", "low": 0.2, "high": 0.2},
    "aggregate": "seq_mean_token_mean",
    "imitate": {"beta": 0.04},
}
COPIED = (3, 7)
"""One row of each of two groups."""


def config(objective: dict[str, Any] = EXPO, **given: Any) -> TrainConfig:
    return TrainConfig.model_validate({"objective": objective, "optimizer": {"lr": 1e-3}, **given})


def groups(seed: int = 0, advantage: float | None = None) -> TrainingBatch:
    """Three groups of four rows, explanations among them: these have no behaviour log-probs under that prompt."""
    batch = random_batch(12, seed)
    rows = [replace(row, route="policy") for row in batch.rows]
    rows = [row if advantage is None else replace(row, advantage=advantage) for row in rows]
    for n in COPIED:
        lost = np.full(len(rows[n].tokens), np.nan, dtype=np.float32)
        rows[n] = replace(rows[n], route="imitate", source="explanation", logprobs=lost, advantage=0.0)
    return replace(batch, rows=rows)


def test_the_gradient_is_that_of_equation_3() -> None:
    """-(mean over own rows of A x mean log-prob) - beta / groups x sum of the copied rows' log-probs, at ratio 1."""
    batch, policy = groups(), tiny()
    own = [row for row in batch.rows if row.route == "policy"]
    rl = torch.stack([row.advantage * naive_logp(policy, row).mean() for row in own]).mean()
    likelihood = torch.stack([naive_logp(policy, batch.rows[n]).sum() for n in COPIED]).sum() / 3
    (-(rl + 0.04 * likelihood)).backward()
    ours = tiny()
    fixed = precompute(ours, None, None, batch, config(), {}, 1.0)
    for micro in (20, 4096):
        ours.zero_grad(set_to_none=True)
        accumulate(Models(ours, None, 1.0, micro), fixed.rows, fixed.tokens, config().objective, {})
        assert largest_difference(gradients(ours), gradients(policy)) < 1e-10


def explained(answer: int) -> TrainingBatch:
    """A group of an own rollout and an explanation that read `answer`, as tables of a curation and of rollouts."""
    lists = {"prompt_tokens": pa.int32(), "tokens": pa.int32(), "logprobs": pa.float32(), "train_mask": pa.bool_()}
    lists |= {"train_prompt_tokens": pa.int32()}
    own = {"rollout_id": "own", "source": "policy", "prompt_tokens": [1, 2], "tokens": [4, 5], "logprobs": [-1.0, -2.0]}
    told = {"rollout_id": "told", "source": "explanation", "prompt_tokens": [1, 2, answer, 9], "tokens": [6, 7, 8]}
    told |= {"logprobs": [-0.1 * answer] * 3, "train_prompt_tokens": [1, 2]}
    rows = [row | {"group_id": "g", "train_mask": [True] * len(row["tokens"])} for row in (own, told)]
    names = ("rollout_id", "group_id", "source")
    types = {name: pa.string() for name in names} | {name: pa.list_(kind) for name, kind in lists.items()}
    schema = pa.schema({**types, "prefix_length": pa.int32()})
    routes = [{"rollout_id": "own", "route": "policy"}, {"rollout_id": "told", "route": "imitate"}]
    batch = [row | {"slot": 0, "advantage": 0.0, "weight": 1.0, "group_id": "g"} for row in routes]
    return training_batch(pa.Table.from_pylist(batch), pa.Table.from_pylist(rows, schema))


def test_what_the_explanation_read_leaves_no_trace() -> None:
    """Another answer in that prompt, with the log-probs it gave: the same trained ids, loss and gradient."""
    found = []
    for answer in (3, 11):
        batch, policy = explained(answer), tiny()
        assert [list(row.prompt_tokens) for row in batch.rows] == [[1, 2], [1, 2]]
        assert bool(np.isnan(batch.rows[1].logprobs).all())
        fixed = precompute(policy, None, None, batch, config(), {}, 1.0)
        accumulate(Models(policy, None, 1.0, 4096), fixed.rows, fixed.tokens, config().objective, {})
        found.append(gradients(policy))
    assert largest_difference(*found) == 0.0
    assert any(bool(g.any()) for g in found[0])


def test_groups_without_contrast_still_move_the_policy() -> None:
    """All advantages 0: a step of the explanations alone; without them the round is skipped."""
    policy = tiny()
    _, metrics = update(policy, None, None, groups(advantage=0.0), config(), TrainState(seed=0))
    named = {m.name: m.value for m in metrics}
    assert named["skipped"] == 0.0
    assert named["imitate/share"] == pytest.approx(2 / 3)
    before = tiny()
    with torch.no_grad():
        total = torch.cat([naive_logp(before, groups().rows[n]) for n in COPIED])
    assert named["imitate/nll"] == pytest.approx(-float(total.mean()), rel=1e-6)
    assert named["loss"] == pytest.approx(-0.04 * float(total.sum()) / 3, rel=1e-6)
    with torch.no_grad():
        after = torch.cat([naive_logp(policy, groups().rows[n]) for n in COPIED])
    assert float(after.sum()) > float(total.sum())
    rest = groups(advantage=0.0)
    rest = replace(rest, rows=[row for row in rest.rows if row.route == "policy"])
    _, metrics = update(tiny(), None, None, rest, config(), TrainState(seed=0))
    assert {m.name: m.value for m in metrics}["skipped"] == 1.0


def test_beta_is_annealed_over_updates() -> None:
    objective = {**EXPO, "imitate": {"beta": 0.04, "final": 0.0}}
    train = config(objective, objective_horizon=4, skip_without_signal=True)
    state, seen = TrainState(seed=0), []
    policy = tiny()
    for _ in range(6):
        state, metrics = update(policy, None, None, groups(advantage=0.0), train, state)
        seen += [m.value for m in metrics if m.name == "max/imitate_beta"] or [None]
    assert seen[:4] == pytest.approx([0.04, 0.03, 0.02, 0.01])
    assert seen[4:] == [None, None]
    assert state.updates == 4


def test_beta_falls_within_a_round() -> None:
    """The line is over updates: each of a round's four steps has its own weight, and one of several epochs too."""
    objective = {**EXPO, "imitate": {"beta": 0.04, "final": 0.0}}
    train = config(objective, objective_horizon=8, epochs=2, minibatches=2)
    state, metrics = update(tiny(), None, None, groups(), train, TrainState(seed=0))
    seen = [m.value for m in metrics if m.name == "max/imitate_beta"]
    assert seen == pytest.approx([0.04, 0.035, 0.03, 0.025])
    assert state.updates == 4


def test_an_expert_that_is_not_routed_to_imitation_is_refused() -> None:
    batch = groups()
    for route in ("imitate", "policy"):
        rows = [replace(row, source="expert", route=route) if n == 3 else row for n, row in enumerate(batch.rows)]
        if route == "imitate":
            assert precompute(tiny(), None, None, replace(batch, rows=rows), config(), {}, 1.0).rows
        else:
            with pytest.raises(RollwayError, match="source: expert"):
                precompute(tiny(), None, None, replace(batch, rows=rows), config(), {}, 1.0)


def preferences(metrics: list[Metric], name: str = "loss") -> list[float]:
    return [m.value for m in metrics if m.name == name]


def test_a_renewed_reference_is_the_policy_that_the_round_starts_from() -> None:
    """ln 2 at each round's first step, no model beside the policy; later steps as with that policy as reference."""
    train = config({"preference": {"kind": "dpo", "beta": 0.1}}, minibatches=2, reference="round")
    assert not train.needs_reference()
    policy, state = tiny(), TrainState(seed=0)
    for seed in range(2):
        start = tiny()
        start.load_state_dict(policy.state_dict())
        other = tiny()
        other.load_state_dict(policy.state_dict())
        batch = random_batch(8, seed, pairs=4)
        given = train.model_copy(update={"reference": "initial"})
        _, expected = update(other, None, start, batch, given, replace(state))
        state, metrics = update(policy, None, None, batch, train, state)
        losses = preferences(metrics)
        assert losses[0] == pytest.approx(math.log(2), abs=1e-12)
        assert losses[1] != pytest.approx(math.log(2), abs=1e-6)
        assert losses == pytest.approx(preferences(expected), abs=1e-12)
        assert largest_difference(list(policy.parameters()), list(other.parameters())) < 1e-12
