"""Recipes that read a teacher's top k and its log-probs of sampled tokens, at a sampling temperature other than 1."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rollway.config.base import ConfigError
from rollway.config.recipes import Recipe, load_recipe
from rollway.config.training import LiveTeacher
from rollway.objectives.divergences import divergence, renormalised, with_tail
from rollway.training.batch import Said, TrainingBatch, TrainingRow
from rollway.training.precompute import precompute
from rollway.training.state import TrainState
from rollway.training.update import update
from training.test_teacher import K, logits_of, top
from training.tiny import gradients, largest_difference, random_batch, tiny

T = 0.8


def recipe_at(name: str, **distill: Any) -> Recipe:
    over: dict[str, Any] = {
        "rollout": {"sampling": {"temperature": T}},
        "score": {"scorers": {"teacher": {"temperature": T, "top_k": K}}},
        "train": {"objective": {"distill": {"temperature": T, **distill}}},
    }
    return load_recipe(name, over)


@torch.no_grad()
def said_at(teacher: Any, row: TrainingRow) -> Said:
    """The columns that the scorer would have stored, all at T."""
    logp = (logits_of(teacher, row) / T).log_softmax(-1)
    best = logp.topk(K, dim=-1)
    own = logp.gather(1, torch.tensor(row.tokens.tolist())[:, None])[:, 0]
    entropy = -(logp.exp() * logp).sum(-1)
    return Said(own.float().numpy(), entropy.float().numpy(), best.indices.int().numpy(), best.values.float().numpy())


def batch_at() -> TrainingBatch:
    plain, teacher = random_batch(6), tiny(seed=5)
    return replace(plain, rows=[replace(row, said=said_at(teacher, row)) for row in plain.rows])


@pytest.mark.parametrize("outside", ["tail", "renormalise"])
@pytest.mark.parametrize("name", ["minillm", "eopd"])
def test_recipes_of_top_k_and_samples_at_a_temperature(name: str, outside: str) -> None:
    """One step's gradient against whole logits: both losses are of the policy that samples, softmax(z / T)."""
    threshold = {"emphasis": {"threshold": 1.0}} if name == "eopd" else {}
    # Renormalised, the stored top k can also be taken to a temperature of its own.
    t = T if outside == "tail" else 1.3
    recipe = recipe_at(name, estimate={"kind": "topk", "outside": outside}, temperature=t, **threshold)
    train, batch, policy = recipe.train, batch_at(), tiny()
    assert train.objective.distill is not None
    made = precompute(policy, None, None, batch, train, {}, T).tokens.advantage
    assert made is not None
    policy.zero_grad(set_to_none=True)
    close = with_tail if outside == "tail" else renormalised
    total: Tensor = torch.zeros((), dtype=torch.float64)
    for n, row in enumerate(batch.rows):
        assert row.said.topk_logprobs is not None
        assert row.said.entropy is not None
        z = logits_of(policy, row)
        logp = (z / T).log_softmax(-1).gather(1, torch.tensor(row.tokens.tolist())[:, None])[:, 0]
        stored = torch.tensor(row.said.topk_logprobs.tolist(), dtype=torch.float64) * (T / t)
        kl = divergence(close(stored), close(top((z / t).log_softmax(-1), row)), train.objective.distill.divergence)
        if name == "eopd":
            kl = torch.where(torch.tensor(row.said.entropy.astype(np.float64)) > 1.0, kl, 0.0)
        total = total + (kl - made[n, : len(row.tokens)] * logp).sum()
    rows, tokens = len(batch.rows), sum(len(row.tokens) for row in batch.rows)
    (total / (rows if name == "minillm" else tokens)).backward()
    wanted, seen = gradients(policy), list[list[Tensor]]()
    trained = tiny()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rollway.training.update.step", lambda *_: seen.append(gradients(trained)))
        update(trained, None, None, batch, train, TrainState(seed=0), temperature=T)
    assert train.epochs * train.minibatches == len(seen) == 1
    assert largest_difference(seen[0], wanted) < 1e-12


@pytest.mark.parametrize("name", ["minillm", "eopd"])
def test_each_refusal_is_mended_by_what_it_says(name: str) -> None:
    at = {"rollout": {"sampling": {"temperature": T}}}
    with pytest.raises(
        ConfigError, match=r"scorers.teacher.temperature: 1 differs from rollout.sampling.temperature 0.8"
    ):
        load_recipe(name, at)
    scored = {**at, "score": {"scorers": {"teacher": {"temperature": T}}}}
    with pytest.raises(
        ConfigError,
        match=r"distill.temperature: 1 differs .* set it to 0.8, or use `estimate: .kind: topk, outside: renormalise.`",
    ):
        load_recipe(name, scored)
    load_recipe(name, {**scored, "train": {"objective": {"distill": {"temperature": T}}}})
    load_recipe(
        name, {**scored, "train": {"objective": {"distill": {"estimate": {"kind": "topk", "outside": "renormalise"}}}}}
    )


LIVE = {"kind": "live", "model": {"kind": "warmup", "name": "teacher"}}


@pytest.mark.parametrize(
    ("name", "estimate"), [("minillm", "exact"), ("eopd", {"kind": "topk", "k": K}), ("g-opd", {"kind": "exact"})]
)
def test_a_live_divergence_beside_stored_rewards_is_of_the_same_policy(name: str, estimate: Any) -> None:
    """Both parts of the loss are of softmax(z / T): a live divergence at 1 beside them would be of another policy."""
    over: dict[str, Any] = {
        "rollout": {"sampling": {"temperature": T}},
        "score": {"scorers": {"teacher": {"temperature": T}}},
        "train": {"teacher": LIVE, "objective": {"distill": {"estimate": estimate}}},
    }
    with pytest.raises(
        ConfigError, match=r"distill\.temperature: 1 differs .* 0\.8, .* the same policy .*set it to 0.8"
    ):
        load_recipe(name, over)
    over["train"]["objective"]["distill"]["temperature"] = T
    load_recipe(name, over)


@pytest.mark.parametrize("form", ["eopd", "sampled"])
def test_a_live_teachers_entropy_is_that_at_the_sampling_temperature(form: str) -> None:
    """As a stored one's: one step beside the live model, and from the columns of the same model."""
    above = {"emphasis": {"kind": "entropy_above", "threshold": 1.5}}
    batch, teacher, found = batch_at(), tiny(seed=5), []
    entropies = np.concatenate([row.said.entropy for row in batch.rows if row.said.entropy is not None])
    assert 0.1 < np.mean(entropies > 1.5) < 0.9
    for live in (False, True):
        if form == "eopd":
            recipe = recipe_at(form, estimate={"kind": "topk", "k": K}, **above)
        else:
            recipe = load_recipe(
                "opd",
                {
                    "rollout": {"sampling": {"temperature": T}},
                    "score": {"scorers": {"teacher": {"temperature": T}}},
                    "train": {"objective": {"distill": above}},
                },
            )
        given = recipe.train.model_copy(update={"teacher": LiveTeacher.model_validate(LIVE) if live else None})
        policy, seen = tiny(), list[list[Tensor]]()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("rollway.training.update.step", lambda *_, p=policy, s=seen: s.append(gradients(p)))
            update(
                policy, None, None, batch, given, TrainState(seed=0), temperature=T, teacher=teacher if live else None
            )
        found.append(seen[0])
    assert largest_difference(*found) < 1e-6


def test_a_top_k_without_samples_is_stored_at_1() -> None:
    """`gkd` reads no log-prob of the sampled token: its teacher's temperature stays 1 whatever the rollouts' is."""
    at = {
        "rollout": {"sampling": {"temperature": T}},
        "score": {"scorers": {"teacher": {"temperature": T, "top_k": 4}}},
    }
    topk = {"train": {"objective": {"distill": {"divergence": "forward_kl", "estimate": {"kind": "topk"}}}}}
    with pytest.raises(ConfigError, match="the top k are stored at 1"):
        load_recipe("gkd", {**at, **topk})
    load_recipe("gkd", {"rollout": at["rollout"], "score": {"scorers": {"teacher": {"top_k": 4}}}, **topk})
