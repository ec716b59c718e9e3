"""Every recipe trains through the real `update`, and cutting its batches differently changes nothing (INCIDENT 1)."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from incidents.trajectory import with_fewer_entries
from rollway.config.recipes import load_recipe, recipe_names
from rollway.policies.critic import Critic
from rollway.policies.manifest import NamedPolicy
from rollway.training.batch import TrainingBatch
from rollway.training.state import TrainState
from rollway.training.update import update
from training.test_teacher import said_by
from training.tiny import VOCABULARY, largest_difference, random_batch, tiny


def batch_with_everything(name: str) -> TrainingBatch:
    """Rows of several ages, every fourth an expert's; for domains, the same route throughout a group."""
    made = random_batch(16, seed=5, pairs=8)
    by_group = name == "fiberpo-domain"
    expert = [row.group % 2 == 1 if by_group else n % 4 == 3 for n, row in enumerate(made.rows)]
    distill = load_recipe(name).train.objective.distill
    other = "distill" if distill is not None and distill.rows == "routed" else "expert"
    routed = [replace(row, route=other if e else "policy") for row, e in zip(made.rows, expert, strict=True)]
    teacher = tiny(seed=6)
    routed = [replace(row, said=said_by(teacher, row)) for row in routed]
    # What a live teacher reads: the prompt twice.
    twice = [np.concatenate([row.prompt_tokens, row.prompt_tokens]) for row in routed]
    routed = [replace(row, said=replace(row.said, prompt_tokens=p)) for row, p in zip(routed, twice, strict=True)]
    return TrainingBatch([replace(row, age=n % 3) for n, row in enumerate(routed)], made.chosen, made.rejected)


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_trains_and_its_micro_batches_do_not_matter(name: str) -> None:
    train = with_fewer_entries(load_recipe(name).train, VOCABULARY)
    # No more steps than there are rows for.
    fewer = {"optimizer": train.optimizer.model_copy(update={"lr": 1e-3}), "minibatches": min(train.minibatches, 8)}
    found = []
    for micro in (25, 4096):
        policy = tiny()
        critic = Critic(tiny(seed=2, dtype=torch.float32), NamedPolicy(kind="critic")) if train.critic else None
        settings = train.model_copy(update={"micro_tokens": micro, **fewer})
        average = tiny(seed=4) if train.ema else None
        batch = batch_with_everything(name)
        state, metrics = update(policy, critic, tiny(seed=3), batch, settings, TrainState(seed=0), average=average)
        assert state.updates == settings.epochs * settings.minibatches
        assert all(torch.tensor(m.value).isfinite() for m in metrics)
        assert largest_difference(list(policy.parameters()), list(tiny().parameters())) > 0.0
        found.append([p.detach().clone() for p in policy.parameters()])
    assert largest_difference(*found) < (1e-9 if train.critic is None else 1e-5)
