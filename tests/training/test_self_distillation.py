"""A policy that is its own teacher, through the trainer: the moving average in memory and stored, the initial policy,
the policy itself, the trust region; clips and positions as they are logged."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import Qwen3ForCausalLM

from rollway.config.base import ConfigError
from rollway.config.divergences import ForwardKl
from rollway.config.recipes import load_recipe
from rollway.config.training import LiveTeacher, TrainConfig
from rollway.errors import RollwayError
from rollway.objectives.divergences import divergence, terms
from rollway.policies import head as head_module
from rollway.policies.head import Head
from rollway.training.batch import TrainingBatch, TrainingRow
from rollway.training.metrics import by_position
from rollway.training.state import TrainState
from rollway.training.teacher import Live
from rollway.training.update import update
from training.test_teacher import LIVE, config, logits_of, naive, privileged, said_by
from training.tiny import VOCABULARY, gradients, largest_difference, random_batch, tiny

PRIVATE = {**LIVE, "context": "privileged"}


def after(
    batch: TrainingBatch,
    train: TrainConfig,
    reference: Qwen3ForCausalLM | None = None,
    average: Qwen3ForCausalLM | None = None,
) -> tuple[Qwen3ForCausalLM, dict[str, float]]:
    """A fresh policy after the updates, and what was measured at the last one."""
    policy = tiny()
    _, metrics = update(policy, None, reference, batch, train, TrainState(seed=0), average=average)
    return policy, {m.name: m.value for m in metrics}


def moved(batch: TrainingBatch, train: TrainConfig, **models: Any) -> list[Tensor]:
    return [p.detach().clone() for p in after(batch, train, **models)[0].parameters()]


def gradient(
    batch: TrainingBatch,
    train: TrainConfig,
    reference: Qwen3ForCausalLM | None = None,
    average: Qwen3ForCausalLM | None = None,
) -> list[Tensor]:
    """Of one step, as the optimiser gets it."""
    policy, seen = tiny(), list[Tensor]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rollway.training.update.step", lambda *_: seen.extend(gradients(policy)))
        update(policy, None, reference, batch, train, TrainState(seed=0), average=average)
    return seen


def sdpo(**over: Any) -> TrainConfig:
    """The recipe over the whole tiny vocabulary, with a learning rate at which a step shows."""
    objective = {"distill": {"estimate": {"kind": "topk", "k": VOCABULARY}}, "correction": "none"}
    base = {"objective": objective, "optimizer": {"lr": 0.01, "schedule": {"warmup": 0}}, **over}
    return load_recipe("sdpo", {"train": base}).train


def stored(train: TrainConfig) -> TrainConfig:
    """The same with what scoring stored: the teacher's own likeliest tokens, once a round."""
    distill = train.objective.distill
    assert distill is not None
    part = {"estimate": {"kind": "topk", "k": VOCABULARY, "of": "teacher"}}
    dumped = train.model_dump()
    dumped["objective"]["distill"] |= part
    return TrainConfig.model_validate({**dumped, "teacher": None})


def as_stored(batch: TrainingBatch, teacher: Qwen3ForCausalLM) -> TrainingBatch:
    """With the columns that a scorer would have made of the teacher before the round."""
    rows = [replace(row, said=said_by(teacher, row, VOCABULARY, row.said.prompt_tokens)) for row in batch.rows]
    return replace(batch, rows=rows)


def test_the_stored_average_is_the_live_one_as_long_as_a_round_is_one_step() -> None:
    """The deviation in one number: with several steps a round the live teacher moves after each, the stored one not."""
    plain, average = privileged(random_batch(12)), tiny(seed=5)
    for minibatches, apart in ((1, False), (4, True)):
        live = sdpo(minibatches=minibatches)
        found = moved(plain, live, average=copy.deepcopy(average))
        from_file = moved(as_stored(plain, average), stored(live), average=copy.deepcopy(average))
        difference = largest_difference(found, from_file)
        # Columns are float32, and a whole vocabulary has no tail: its clamp is all that differs in one step.
        assert (difference > 1e-4) if apart else (difference < 2e-5)


def test_the_students_likeliest_tokens_are_not_the_teachers() -> None:
    """The other half of the deviation: with K below V the two sets of ids are different tokens."""
    plain, average = privileged(random_batch(12)), tiny(seed=5)
    few = {"objective": {"distill": {"estimate": {"k": 3}}, "correction": "none"}}
    live = load_recipe("sdpo", {"train": {**few, "optimizer": {"lr": 0.01, "schedule": {"warmup": 0}}}}).train
    dumped = live.model_dump()
    dumped["objective"]["distill"]["estimate"]["of"] = "teacher"
    theirs = TrainConfig.model_validate({**dumped, "teacher": None})
    found = moved(plain, live, average=copy.deepcopy(average))
    other = moved(as_stored(plain, average), theirs, average=copy.deepcopy(average))
    assert largest_difference(found, other) > 1e-4


def test_the_average_follows_each_step() -> None:
    """theta' <- .95 theta' + .05 theta, after every step of the recipe's trainer."""
    average, batch = tiny(seed=5), privileged(random_batch(8))
    before = [p.detach().clone() for p in average.parameters()]
    policy, _ = after(batch, sdpo(), average=average)
    for mean, old, now in zip(average.parameters(), before, policy.parameters(), strict=True):
        torch.testing.assert_close(mean.detach(), 0.95 * old + 0.05 * now.detach())


def forward_kl_of(teacher: Qwen3ForCausalLM, t: float = 1.0) -> Any:
    def of_row(row: TrainingRow, logits: Tensor) -> Tensor:
        with torch.no_grad():
            lp = (logits_of(teacher, row, row.said.prompt_tokens) / t).log_softmax(-1)
        return divergence(lp, (logits / t).log_softmax(-1), ForwardKl())

    return of_row


OPSD = {"divergence": "forward_kl", "estimate": "exact"}


@pytest.mark.parametrize("t", [1.0, 1.3])
def test_the_policy_as_its_own_teacher_has_no_gradient_through_the_teacher(t: float) -> None:
    """OPSD's `live` teacher: at each step the policy in the private context, a constant."""
    batch = privileged(random_batch(6))
    train = config({**OPSD, "temperature": t}, teacher={**PRIVATE, "weights": "policy"})
    policy = tiny()
    wanted = naive(policy, batch, forward_kl_of(copy.deepcopy(policy), t))
    assert largest_difference(gradient(batch, train), wanted) < 1e-12
    assert max(float(g.abs().max()) for g in wanted) > 1e-3


def test_the_trust_region_lies_between_the_initial_policy_and_the_policy() -> None:
    """Logits (1 - mix) z_initial + mix z_policy, both in the private context; several blocks of the vocabulary."""
    batch, initial = privileged(random_batch(6)), tiny(seed=5)
    policy = tiny()
    fixed = copy.deepcopy(policy)

    def of_row(row: TrainingRow, logits: Tensor) -> Tensor:
        with torch.no_grad():
            z = [logits_of(model, row, row.said.prompt_tokens) for model in (initial, fixed)]
            lp = torch.lerp(*z, 0.3).log_softmax(-1)
        return divergence(lp, logits.log_softmax(-1), ForwardKl())

    wanted = naive(policy, batch, of_row)
    train = config(OPSD, teacher={**PRIVATE, "weights": "trust_region", "mix": 0.3})
    assert largest_difference(gradient(batch, train, initial), wanted) < 1e-12
    sampled = config({"divergence": "reverse_kl"}, teacher={**PRIVATE, "weights": "trust_region", "mix": 0.3})

    def of_sample(row: TrainingRow, logits: Tensor) -> Tensor:
        with torch.no_grad():
            z = [logits_of(model, row, row.said.prompt_tokens) for model in (initial, fixed)]
            lp = torch.lerp(*z, 0.3).log_softmax(-1)
        ids = torch.tensor(row.tokens.tolist())[:, None]
        logp = logits.log_softmax(-1).gather(1, ids)[:, 0]
        return (logp.detach() - lp.gather(1, ids)[:, 0]) * logp

    assert largest_difference(gradient(batch, sampled, initial), naive(policy, batch, of_sample)) < 1e-12


def test_a_mean_of_logits_needs_one_vocabulary_and_no_soft_cap() -> None:
    head = Head.of(tiny())
    with pytest.raises(RollwayError, match="12 tokens and the other 11"):
        Head.between(head, replace(head, weight=head.weight[:11]), 0.5)
    with pytest.raises(RollwayError, match="final_logit_softcapping"):
        Head.between(head, replace(head, softcap=30.0), 0.5)
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(5, 16, dtype=torch.float64, generator=g) for _ in range(2))
    bias = torch.randn(12, dtype=torch.float64, generator=g)
    left, right = replace(head, scale=2.0), replace(Head.of(tiny(seed=4)), bias=bias)
    found = Head.between(left, right, 0.25).logits(torch.cat([a, b], dim=1))
    torch.testing.assert_close(found, 0.75 * left.logits(a) + 0.25 * right.logits(b))


def test_teachers_that_would_say_nothing_are_refused() -> None:
    with pytest.raises(ValidationError, match="says what the policy says"):
        LiveTeacher(weights="policy")
    with pytest.raises(ValidationError, match="mix has no effect without"):
        LiveTeacher(weights="ema", mix=0.2)
    batch = privileged(random_batch(3))
    with pytest.raises(RollwayError, match="trust_region is an earlier policy, but no reference was given"):
        after(batch, config(OPSD, teacher={**PRIVATE, "weights": "trust_region"}))


@pytest.mark.parametrize("elements", [30, 2**21])
def test_clipped_entries_are_counted_and_have_no_gradient(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """OPSD's clip through a live teacher, against whole logits: gradient, raw divergence, share, by position."""
    monkeypatch.setitem(head_module.LOGIT_ELEMENTS, "cpu", elements)
    batch, initial, tau = privileged(random_batch(7)), tiny(seed=5), 0.05
    train = config({**OPSD, "clip": tau}, teacher=PRIVATE)

    def each(row: TrainingRow, logits: Tensor) -> Tensor:
        with torch.no_grad():
            lp = logits_of(initial, row, row.said.prompt_tokens).log_softmax(-1)
        return terms(lp, logits.log_softmax(-1), ForwardKl())

    policy = tiny()
    wanted = naive(policy, batch, lambda row, logits: each(row, logits).clamp(max=tau).sum(-1))
    assert largest_difference(gradient(batch, train, initial), wanted) < 1e-12
    _, found = after(batch, train, initial)
    with torch.no_grad():
        entries = [each(row, logits_of(policy, row))[torch.tensor(row.train_mask.tolist())] for row in batch.rows]
    together = torch.cat(entries)
    assert found["distill/raw_divergence"] == pytest.approx(float(together.sum(-1).mean()))
    assert found["distill/divergence"] == pytest.approx(float(together.clamp(max=tau).sum(-1).mean()))
    share = float((together > tau).double().mean())
    assert found["distill/clipped_entries"] == pytest.approx(share)
    assert 0.0 < share < 1.0
    first = torch.stack([x[0] for x in entries if len(x)]).clamp(max=tau).sum(-1).mean()
    assert found["distill/divergence_from_1"] == pytest.approx(float(first))
    late = torch.cat([x[1:3] for x in entries]).clamp(max=tau).sum(-1).mean()
    assert found["distill/divergence_from_2"] == pytest.approx(float(late))


def test_means_by_position() -> None:
    value = torch.arange(1.0, 15.0).reshape(2, 7)
    kept = torch.ones(2, 7, dtype=torch.bool)
    kept[1, 3:] = False
    kept[0, 0] = False
    found = by_position(value, kept)
    assert found == {
        "distill/divergence_from_1": 8.0,
        "distill/divergence_from_2": (2 + 3 + 9 + 10) / 4,
        "distill/divergence_from_4": (4 + 5 + 6 + 7) / 4,
    }
    kept[:, 3:] = False
    assert set(by_position(value, kept)) == {"distill/divergence_from_1", "distill/divergence_from_2"}


def test_both_routes_log_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Directly, and where the whole batch's loss is differentiated first."""
    batch, initial = privileged(random_batch(7)), tiny(seed=5)
    train = config({**OPSD, "clip": 0.05}, teacher=PRIVATE)
    _, direct = after(batch, train, initial)
    from rollway.training import gradients as module

    monkeypatch.setattr(module, "separable", lambda objective: False)
    _, through = after(batch, train, initial)
    for name in direct:
        if name.startswith("distill/"):
            assert through[name] == pytest.approx(direct[name]), name


def test_srpos_rows_of_the_policy_need_no_context() -> None:
    """Only routed rows have a context; entropies are of the whole vocabulary, though the loss is over a top k."""
    plain = privileged(random_batch(8))
    routed = [
        replace(
            row,
            route="distill" if n % 2 else "policy",
            said=row.said if n % 2 else replace(row.said, prompt_tokens=None),
        )
        for n, row in enumerate(plain.rows)
    ]
    over = {"objective": {"distill": {"estimate": {"k": 3}}, "correction": "none"}, "optimizer": {"lr": 0.01}}
    train = load_recipe("srpo", {"train": over}).train
    batch, average = replace(plain, rows=routed), tiny(seed=5)
    _, found = after(batch, train, average=copy.deepcopy(average))
    told = [row for row in routed if row.route == "distill"]
    with torch.no_grad():
        logp = torch.cat([logits_of(average, row, row.said.prompt_tokens).log_softmax(-1) for row in told])
    assert found["distill/teacher_entropy"] == pytest.approx(float(-(logp.exp() * logp).sum(-1).mean()))
    tokens = [int(np.sum(row.train_mask)) for row in routed]
    assert found["distill/share"] == pytest.approx(sum(tokens[1::2]) / sum(tokens))
    nobody = replace(batch, rows=[replace(row, route="policy") for row in routed])
    _, alone = after(nobody, train, average=copy.deepcopy(average))
    assert alone["distill/share"] == 0.0
    assert alone["loss/distill"] == 0.0


def srpo_batch(routes: str) -> TrainingBatch:
    """Rows routed to the teacher (d), to both (b) or to the policy's loss (p)."""
    names = {"d": "distill", "b": "both", "p": "policy"}
    plain = privileged(random_batch(len(routes)))
    rows = [replace(r, rollout_id=f"r{n}", route=names[routes[n]]) for n, r in enumerate(plain.rows)]
    return replace(plain, rows=rows)


def read_by(teacher: Qwen3ForCausalLM, batch: TrainingBatch, train: TrainConfig, **models: Any) -> list[list[int]]:
    """What the teacher's passes read during the round's updates: the tokens of each row, without padding."""
    seen: list[list[int]] = []
    passed = Live._pass

    def counted(self: Live, rows: Any, packed: bool, width: int) -> Any:
        seen.extend([*map(int, row.prompt_tokens), *map(int, row.tokens)] for row in rows)
        return passed(self, rows, packed, width)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Live, "_pass", counted)
        after(batch, train, average=teacher, **models)
    return seen


@pytest.mark.parametrize("estimate", [{"kind": "topk", "k": 3, "of": "student"}, {"kind": "exact"}])
def test_the_teacher_reads_routed_rows_alone_and_once(estimate: dict[str, Any]) -> None:
    """Rows of all passes are counted: each routed row after its own context, nobody else's; none without a route."""
    over = {"objective": {"distill": {"estimate": estimate}, "correction": "none"}, "optimizer": {"lr": 0.01}}
    train = load_recipe("srpo", {"train": over}).train
    batch = srpo_batch("pdpbppdp")
    told = [row for row in batch.rows if row.route != "policy"]
    wanted = sorted([*map(int, row.said.prompt_tokens), *map(int, row.tokens)] for row in told)  # type: ignore[arg-type]
    assert sorted(read_by(tiny(seed=5), batch, train)) == wanted
    # Without emphasis nothing is asked before the policy's pass.
    plain = load_recipe(
        "srpo",
        {"train": {**over, "objective": {**over["objective"], "distill": {"estimate": estimate, "emphasis": "none"}}}},
    )
    assert sorted(read_by(tiny(seed=5), batch, plain.train)) == wanted
    # Where the rows are several micro-batches their states are not held: entropies are of a pass of their own.
    small = train.model_copy(update={"micro_tokens": 24})
    assert sorted(read_by(tiny(seed=5), batch, small)) == sorted(wanted * 2)
    assert read_by(tiny(seed=5), srpo_batch("pppp"), train) == []


@pytest.mark.parametrize("estimate", [{"kind": "topk", "k": 3, "of": "student"}, {"kind": "exact"}])
@pytest.mark.parametrize("whole", [True, False])
def test_routed_rows_teach_the_same_whoever_shares_their_micro_batch(estimate: dict[str, Any], whole: bool) -> None:
    """One micro-batch with held states, many without, and the loss through leaves: one gradient."""
    over = {"objective": {"distill": {"estimate": estimate}, "correction": "none"}, "optimizer": {"lr": 0.01}}
    train = load_recipe("srpo", {"train": over}).train
    batch, average = srpo_batch("pdpbppdp"), tiny(seed=5)
    wanted = gradient(batch, train, average=copy.deepcopy(average))
    assert max(float(g.abs().max()) for g in wanted) > 1e-3
    with pytest.MonkeyPatch.context() as patch:
        if whole:
            for module in ("gradients", "update"):
                patch.setattr(f"rollway.training.{module}.separable", lambda objective: False)
        small = train.model_copy(update={"micro_tokens": 24})
        found = gradient(batch, small, average=copy.deepcopy(average))
    assert largest_difference(found, wanted) < 1e-12


@pytest.mark.parametrize("t", [1.0, 1.3])
def test_opsds_sampled_form_against_whole_logits(t: float) -> None:
    """(8) as the page writes it, loaded as a recipe: both log-probs at T_d, whatever the sampler's own."""
    form = {"divergence": "reverse_kl", "estimate": {"kind": "sampled", "at": "distill"}, "clip": None}
    over = {"objective": {"distill": {**form, "temperature": t}}, "optimizer": {"lr": 0.01}}
    recipe = load_recipe("opsd", {"train": over})
    assert (recipe.rollout.sampling.temperature, recipe.rollout.sampling.top_p) == (1.1, 0.95)
    batch, initial, policy = privileged(random_batch(6)), tiny(seed=5), tiny()

    def of_row(row: TrainingRow, logits: Tensor) -> Tensor:
        ids = torch.tensor(row.tokens.tolist())[:, None]
        with torch.no_grad():
            lp = (logits_of(initial, row, row.said.prompt_tokens) / t).log_softmax(-1).gather(1, ids)[:, 0]
        lq = (logits / t).log_softmax(-1).gather(1, ids)[:, 0]
        # The mean of rollouts' means: the token mean of `naive`, undone.
        share = sum(len(r.tokens) for r in batch.rows) / (len(batch.rows) * len(row.tokens))
        return -(lp - lq.detach()) * lq * share

    wanted = naive(policy, batch, of_row)
    seen = list[Tensor]()
    for whole in (False, True):
        trained = tiny()
        with pytest.MonkeyPatch.context() as patch:
            if whole:
                for module in ("gradients", "update"):
                    patch.setattr(f"rollway.training.{module}.separable", lambda objective: False)
            patch.setattr("rollway.training.update.step", lambda *_, of=trained: seen.extend(gradients(of)))
            update(trained, None, initial, batch, recipe.train, TrainState(seed=0), temperature=1.1)
        assert largest_difference(seen, wanted) < 1e-12
        seen.clear()


def test_the_sampled_form_at_its_own_temperature_is_refused_where_it_cannot_be_had() -> None:
    at = {"kind": "sampled", "at": "distill"}
    with pytest.raises(ValidationError, match="stored ones are at the rollouts'"):
        config({"estimate": at})
    with pytest.raises(ValidationError, match="divides by log-probs at the rollouts'"):
        config({"estimate": at, "importance": "ratio"}, teacher=LIVE)
    with pytest.raises(ConfigError, match="truncate what is sampled"):
        load_recipe("opsd", {"train": {"objective": {"distill": {"estimate": {**at, "at": "rollouts"}, "clip": None}}}})
    truncated = {"estimate": at, "importance": {"kind": "truncated"}, "clip": None}
    with pytest.raises(ConfigError, match="truncate what is sampled"):
        load_recipe("opsd", {"train": {"objective": {"distill": truncated}}})
