"""The gradient of an optimiser batch equals that of the whole batch, however it is cut (INCIDENTS 1-6, 13, 21, 31)."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from rollway.config.objectives import Objective
from rollway.config.training import TrainConfig
from rollway.objectives import TokenBatch, initial_state, loss, separable, totals
from rollway.policies.critic import Critic
from rollway.policies.logprobs import token_logprobs
from rollway.policies.manifest import NamedPolicy
from rollway.training import gradients as module
from rollway.training.batch import TrainingBatch
from rollway.training.gradients import Models, accumulate
from rollway.training.precompute import precompute
from training.tiny import gradients, largest_difference, naive_logp, random_batch, random_row, tiny

GRPO = {"ratio": "token", "gate": "clip", "aggregate": "seq_mean_token_mean"}
OBJECTIVES = {
    "grpo": GRPO,
    "dapo": {"ratio": "token", "gate": {"kind": "clip", "low": 0.2, "high": 0.28}, "aggregate": "token_mean"},
    "gspo": {**GRPO, "ratio": "sequence"},
    "dr_grpo": {**GRPO, "aggregate": {"kind": "seq_sum_const", "l_max": 8}},
    "kl_and_entropy": {**GRPO, "kl": {"kind": "k3", "beta": 0.1}, "entropy_bonus": 0.05},
    "tis": {**GRPO, "correction": "tis"},
    "sft": {"ratio": "none", "gate": "sft", "aggregate": "token_mean"},
    "variance_about_mean": {**GRPO, "gate": {"kind": "variance", "centre": "mean"}},
    "fibre_domain": {"ratio": "fibre_domain", "gate": "none", "aggregate": "token_mean"},
    "dpo": {"preference": "dpo"},
    "copg_group": {"preference": {"kind": "copg", "form": "group"}},
    "curvature": {**GRPO, "select": {"kind": "curvature", "tau_f": 12.0, "tau_h": 20.0, "k": 6, "direction": "adam"}},
    "curvature_sequence": {
        **GRPO,
        "aggregate": {"kind": "seq_mean_token_mean", "empty": "zero"},
        "select": {"kind": "curvature", "level": "sequence", "tau_f": 2.0, "tau_h": 4.0, "k": 6},
    },
    "curvature_batch": {**GRPO, "select": {"kind": "curvature", "level": "batch", "tau_f": 0.6, "tau_h": 3.0, "k": 6}},
}


def fixed_quantities(
    batch: TrainingBatch, objective: Objective, drift: float = 0.05
) -> tuple[torch.nn.Module, TokenBatch]:
    """A policy that has moved a little from the one that the fixed quantities were computed with."""
    policy, reference = tiny(), tiny(seed=1)
    train = TrainConfig(objective=objective, micro_tokens=1000)
    tokens = precompute(policy, None, reference, batch, train, initial_state(objective), 1.0).tokens
    with torch.no_grad():
        for p in policy.parameters():
            p += drift * torch.randn_like(p)
    return policy, replace(tokens, lr=0.5)


def run(
    policy: torch.nn.Module, batch: TrainingBatch, tokens: TokenBatch, objective: Objective, micro: int
) -> list[Tensor]:
    policy.zero_grad(set_to_none=True)
    accumulate(Models(policy, None, 1.0, micro), batch.rows, tokens, objective, initial_state(objective))
    return gradients(policy)


def whole(policy: torch.nn.Module, batch: TrainingBatch, tokens: TokenBatch, objective: Objective) -> list[Tensor]:
    """Plain autograd through one forward of all rows."""
    policy.zero_grad(set_to_none=True)
    wants_hidden = objective.select.kind == "curvature"
    seen = token_logprobs(
        policy, batch.rows, temperature=1.0, micro_tokens=10**6, entropy=True, hidden=wants_hidden, grad=True
    )
    filled = replace(tokens, logp=seen.logp, entropy=seen.entropy)
    if wants_hidden:
        filled = replace(filled, hidden=seen.hidden.detach(), lm_head=policy.get_output_embeddings().weight.detach())
    loss(filled, objective).loss.backward()
    return gradients(policy)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_micro_batches_give_the_gradient_of_the_whole_batch(name: str) -> None:
    objective = Objective.model_validate(OBJECTIVES[name])
    batch = random_batch(8, pairs=4)
    policy, tokens = fixed_quantities(batch, objective)
    expected = whole(policy, batch, tokens, objective)
    assert max(float(g.abs().max()) for g in expected) > 1e-4
    for micro in (1, 15, 25, 1000):
        assert largest_difference(run(policy, batch, tokens, objective, micro), expected) < 1e-10


@pytest.mark.parametrize("name", ["grpo", "kl_and_entropy", "tis", "curvature", "curvature_sequence"])
def test_both_routes_to_the_gradient_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = Objective.model_validate({**OBJECTIVES[name]})
    batch = random_batch(6)
    policy, tokens = fixed_quantities(batch, objective)
    direct = run(policy, batch, tokens, objective, 20)
    monkeypatch.setattr(module, "separable", lambda objective: False)
    assert largest_difference(run(policy, batch, tokens, objective, 20), direct) < 1e-10


def closed_form(policy: torch.nn.Module, batch: TrainingBatch, old: list[Tensor], temperature: float) -> list[Tensor]:
    """GRPO with symmetric clipping, token mean: ten lines that know nothing of the trainer."""
    policy.zero_grad(set_to_none=True)
    total, tokens = 0.0, 0
    for row, before in zip(batch.rows, old, strict=True):
        mask = torch.tensor(row.train_mask.tolist())
        ratio = (naive_logp(policy, row, temperature) - before).exp()
        a = row.advantage
        total = total + row.weight * torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.2))[mask].sum()
        tokens += row.weight * int(mask.sum())
    (total / tokens).backward()
    return gradients(policy)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_gradient_equals_the_closed_form_with_scale_one(temperature: float) -> None:
    objective = Objective.model_validate({**GRPO, "aggregate": "token_mean"})
    batch = random_batch(7)
    batch.rows[2] = replace(batch.rows[2], weight=2.0)
    batch.rows[3] = random_row(np.random.default_rng(5), 3, length=4, train_mask=np.array([True, False, True, False]))
    policy = tiny()
    train = TrainConfig(objective=objective)
    tokens = precompute(policy, None, None, batch, train, {}, temperature).tokens
    with torch.no_grad():
        old = [naive_logp(policy, row, temperature) for row in batch.rows]
        for row, mine, naive in zip(batch.rows, tokens.logp_old, old, strict=True):
            assert torch.allclose(mine[: len(row.tokens)], naive, atol=1e-12)
        for p in policy.parameters():
            p += 0.05 * torch.randn_like(p)
    policy.zero_grad(set_to_none=True)
    accumulate(Models(policy, None, temperature, 20), batch.rows, tokens, objective, {})
    mine = gradients(policy)
    assert largest_difference(mine, closed_form(policy, batch, old, temperature)) < 1e-12


@pytest.mark.parametrize("aggregate", ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum"])
def test_ranks_with_unequal_token_counts_add_up(aggregate: str) -> None:
    objective = Objective.model_validate({**GRPO, "aggregate": aggregate, "kl": {"kind": "k2", "beta": 0.2}})
    batch = random_batch(9)
    policy, tokens = fixed_quantities(batch, objective)
    single = run(policy, batch, tokens, objective, 1000)
    denominators = totals(tokens, objective)
    for ranks in ([[0, 1, 2, 3, 4, 5, 6, 7], [8]], [[0, 5], [1, 2, 3, 4], [6, 7, 8]]):
        policy.zero_grad(set_to_none=True)
        for rank in ranks:
            seen = token_logprobs(policy, [batch.rows[n] for n in rank], temperature=1.0, micro_tokens=1000, grad=True)
            width = seen.logp.shape[1]
            own = tokens.rows(rank)
            padded = torch.nn.functional.pad(seen.logp, (0, own.logp.shape[1] - width))
            loss(replace(own, logp=padded), objective, totals=denominators).loss.backward()
        assert largest_difference(gradients(policy), single) < 1e-10


def test_value_gradient_does_not_depend_on_micro_batches() -> None:
    objective = Objective.model_validate(
        {**GRPO, "aggregate": "token_mean", "value": {"clip": 0.05, "coefficient": 0.5}}
    )
    batch = random_batch(8)
    policy = tiny(dtype=torch.float32)
    critic = Critic(tiny(seed=3, dtype=torch.float32), NamedPolicy(kind="critic"))
    train = TrainConfig.model_validate({"objective": objective, "advantage": {"kind": "gae"}, "critic": {}})
    tokens = precompute(policy, critic, None, batch, train, {}, 1.0).tokens
    with torch.no_grad():
        critic.value_head.weight += 0.1
    found = []
    for micro in (1, 30, 1000):
        critic.zero_grad(set_to_none=True)
        accumulate(Models(policy, critic, 1.0, micro), batch.rows, tokens, objective, {})
        found.append(gradients(critic))
    critic.zero_grad(set_to_none=True)
    value = critic(batch.rows)
    held = tokens.value_old + (value - tokens.value_old).clamp(-0.05, 0.05)
    error = torch.maximum((value - tokens.returns) ** 2, (held - tokens.returns) ** 2)
    (0.5 * 0.5 * error[tokens.mask].mean()).backward()
    found.append(gradients(critic))
    assert max(float(g.abs().max()) for g in found[0]) > 1e-3
    for other in found[1:]:
        assert largest_difference(found[0], other) < 1e-6


def test_kl_term_reaches_the_parameters() -> None:
    batch = random_batch(5, advantage=0.0)
    norms = []
    for beta in (0.1, 0.2):
        objective = Objective.model_validate({**GRPO, "kl": {"kind": "k3", "beta": beta}})
        policy, tokens = fixed_quantities(batch, objective, drift=0.0)
        norms.append(sum(float(g.square().sum()) for g in run(policy, batch, tokens, objective, 1000)) ** 0.5)
    assert norms[0] > 1e-4
    assert norms[1] == pytest.approx(2 * norms[0], rel=1e-9)


def test_masked_tokens_have_no_gradient_and_no_say() -> None:
    """Tool output is fed but not trained on: the logits that predict it get no gradient at all."""
    mask = np.array([True, False, False, True, True])
    batch = random_batch(3, length=5, train_mask=mask)
    objective = Objective.model_validate({**GRPO, "aggregate": "token_mean", "entropy_bonus": 0.1})
    policy, tokens = fixed_quantities(batch, objective)
    caught: list[Tensor] = []

    def watch(module: torch.nn.Module, inputs: tuple, output: Tensor) -> None:
        output.requires_grad_() if not output.requires_grad else None
        output.register_hook(caught.append)

    handle = policy.get_decoder().norm.register_forward_hook(watch)
    run(policy, batch, tokens, objective, 1000)
    handle.remove()
    # Rows run longest first; each hidden state that predicts a masked token must get exactly nothing.
    order = sorted(range(3), key=lambda n: (-batch.rows[n].length, n))
    for place, n in enumerate(order):
        start = len(batch.rows[n].prompt_tokens) - 1
        slopes = caught[0][place, start : start + 5].abs().sum(-1)
        assert not slopes[~torch.tensor(mask)].any()
        assert (slopes[torch.tensor(mask)] > 0).all()
    # Nothing follows from a row's last token: the model does not read it.
    assert caught[0].shape[1] == max(row.length for row in batch.rows) - 1


def test_masking_a_truncated_row_leaves_the_others_alone() -> None:
    objective = Objective.model_validate({**GRPO, "aggregate": "token_mean"})
    batch = random_batch(6, length=4)
    cut = [*batch.rows[:5], replace(batch.rows[5], train_mask=np.zeros(4, dtype=np.bool_))]
    policy, tokens = fixed_quantities(TrainingBatch(cut, batch.chosen, batch.rejected), objective)
    masked = run(policy, TrainingBatch(cut, batch.chosen, batch.rejected), tokens, objective, 20)
    without = TrainingBatch(cut[:5], batch.chosen, batch.rejected)
    assert largest_difference(run(policy, without, tokens.rows(list(range(5))), objective, 20), masked) < 1e-12
    assert totals(tokens, objective)["denominator"] == 20


def test_rows_of_weight_zero_leave_the_gradient_unchanged() -> None:
    objective = Objective.model_validate(GRPO)
    batch = random_batch(6)
    batch.rows[4] = replace(batch.rows[4], weight=0.0, advantage=100.0)
    policy, tokens = fixed_quantities(batch, objective)
    padded = run(policy, batch, tokens, objective, 20)
    kept = [0, 1, 2, 3, 5]
    without = TrainingBatch([batch.rows[n] for n in kept], batch.chosen, batch.rejected)
    assert largest_difference(run(policy, without, tokens.rows(kept), objective, 20), padded) < 1e-12


def test_objectives_of_this_file_cover_both_routes() -> None:
    kinds: dict[str, Callable[..., object]] = {n: Objective.model_validate(o) for n, o in OBJECTIVES.items()}
    assert {separable(o) for o in kinds.values()} == {True, False}


WITH_GRADIENT = {
    **dict.fromkeys(("kl_and_entropy", "sft", "variance_about_mean", "fibre_domain"), 9),
    "dpo": 4,
    "copg_group": 8,
    "curvature": 5,
}
"""Rows of nine that have one though a third have no advantage: all, those in pairs, those in groups of two or more,
those with a token kept."""


@pytest.mark.parametrize("name", OBJECTIVES)
def test_rows_without_signal_get_no_backward_pass_and_change_nothing(name: str) -> None:
    """Rows whose advantage is 0: the gradient is that of plain autograd through all rows, the log-probs are there."""
    objective = Objective.model_validate(OBJECTIVES[name])
    batch = random_batch(9, seed=3, pairs=2)
    rows = [replace(row, advantage=float(n % 3 - 1)) for n, row in enumerate(batch.rows)]
    batch = TrainingBatch(rows, batch.chosen, batch.rejected)
    policy, tokens = fixed_quantities(batch, objective)
    expected = whole(policy, batch, tokens, objective)
    with_gradient: list[int] = []
    watch = policy.get_decoder().register_forward_hook(
        lambda module, given, output: with_gradient.append(len(output.last_hidden_state) * torch.is_grad_enabled())
    )
    policy.zero_grad(set_to_none=True)
    got = accumulate(Models(policy, None, 1.0, 1000), batch.rows, tokens, objective, initial_state(objective))
    watch.remove()
    assert largest_difference(gradients(policy), expected) < 1e-10
    assert (got.logp[tokens.mask] < 0).all()
    assert sum(with_gradient) == WITH_GRADIENT.get(name, 6)
