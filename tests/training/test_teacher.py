"""What a teacher says reaches the loss, from stored columns and live models, against whole logits and autograd."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import Qwen3ForCausalLM

from rollway.config.training import TrainConfig
from rollway.errors import RollwayError
from rollway.objectives.divergences import divergence, renormalised, with_tail
from rollway.policies import head as head_module
from rollway.training import gradients as module
from rollway.training.advantages import of_teacher
from rollway.training.batch import Said, TrainingBatch, TrainingRow, training_batch
from rollway.training.gradients import Models, accumulate
from rollway.training.precompute import precompute
from rollway.training.state import TrainState
from rollway.training.teacher import Live, follow
from rollway.training.update import update
from training.tiny import VOCABULARY, gradients, largest_difference, random_batch, random_row, tiny

K = 4


def config(distill: dict[str, Any] | None, **given: Any) -> TrainConfig:
    objective = {"aggregate": "token_mean", "distill": distill, **given.pop("objective", {})}
    return TrainConfig.model_validate({"objective": objective, "optimizer": {"lr": 0.01}, **given})


def logits_of(model: Qwen3ForCausalLM, row: TrainingRow, prompt: Any = None) -> Tensor:
    """[T, V] of a row's tokens, one row at a time, after its own prompt or another one."""
    start = list(row.prompt_tokens if prompt is None else prompt)
    ids = torch.tensor([[*map(int, start), *map(int, row.tokens)]])
    return model(input_ids=ids, use_cache=False).logits[0, len(start) - 1 : -1]


@torch.no_grad()
def said_by(teacher: Qwen3ForCausalLM, row: TrainingRow, k: int = K, prompt: Any = None) -> Said:
    """The columns that a scorer would have stored, in float32."""
    logp = logits_of(teacher, row, prompt).log_softmax(-1)
    best = logp.topk(k, dim=-1)
    own = logp.gather(1, torch.tensor(row.tokens.tolist())[:, None])[:, 0]
    entropy = -(logp.exp() * logp).sum(-1)
    return Said(own.float().numpy(), entropy.float().numpy(), best.indices.int().numpy(), best.values.float().numpy())


def taught(batch: TrainingBatch, teacher: Qwen3ForCausalLM, k: int = K) -> TrainingBatch:
    return replace(batch, rows=[replace(row, said=said_by(teacher, row, k)) for row in batch.rows])


def ours(
    policy: Qwen3ForCausalLM, batch: TrainingBatch, train: TrainConfig, micro: int, live: Qwen3ForCausalLM | None = None
) -> list[Tensor]:
    """Gradients of the trainer, from `precompute` on."""
    policy.zero_grad(set_to_none=True)
    fixed = precompute(policy, None, live, batch, train, {}, 1.0)
    teacher = None
    tokens = fixed.tokens
    if live is not None:
        assert train.teacher is not None
        teacher = Live(live, train.objective, 1.0, micro, train.teacher.context == "privileged")
        tokens, teacher = teacher.say(fixed.rows, tokens)
    assert train.objective.distill is not None
    models = Models(policy, None, 1.0, micro, train.objective.distill.temperature, teacher=teacher)
    accumulate(models, fixed.rows, tokens, train.objective, {})
    return gradients(policy)


def naive(
    policy: Qwen3ForCausalLM, batch: TrainingBatch, of_row: Callable[[TrainingRow, Tensor], Tensor]
) -> list[Tensor]:
    """Gradients of the token mean of `of_row`(row, logits [T, V]) [T], through whole logits."""
    policy.zero_grad(set_to_none=True)
    each = [of_row(row, logits_of(policy, row))[torch.tensor(row.train_mask.tolist())] for row in batch.rows]
    torch.cat(each).mean().backward()
    return gradients(policy)


def top(logp: Tensor, row: TrainingRow) -> Tensor:
    assert row.said.topk_ids is not None
    return logp.gather(1, torch.tensor(row.said.topk_ids.tolist()))


@pytest.mark.parametrize("micro", [1, 20, 1000])
@pytest.mark.parametrize("outside", ["tail", "renormalise"])
def test_stored_top_k_against_whole_logits(outside: str, micro: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head_module.LOGIT_ELEMENTS, "cpu", 30)
    policy, batch = tiny(), taught(random_batch(7), tiny(seed=5))
    t = 1.0 if outside == "tail" else 1.7
    part = {"divergence": "jsd", "estimate": {"kind": "topk", "outside": outside}, "temperature": t}
    train = config(part)
    close = with_tail if outside == "tail" else renormalised

    def of_row(row: TrainingRow, logits: Tensor) -> Tensor:
        assert row.said.topk_logprobs is not None
        lp = torch.tensor(row.said.topk_logprobs.tolist(), dtype=torch.float64) / t
        assert train.objective.distill is not None
        return divergence(close(lp), close(top((logits / t).log_softmax(-1), row)), train.objective.distill.divergence)

    assert largest_difference(ours(policy, batch, train, micro), naive(policy, batch, of_row)) < 1e-12


def test_stored_samples_against_whole_logits() -> None:
    policy, batch = tiny(), taught(random_batch(7), tiny(seed=5))

    def of_row(row: TrainingRow, logits: Tensor) -> Tensor:
        logp = logits.log_softmax(-1).gather(1, torch.tensor(row.tokens.tolist())[:, None])[:, 0]
        return (logp.detach() - torch.tensor(row.said.logprob.tolist(), dtype=torch.float64)) * logp

    assert largest_difference(ours(policy, batch, config({}), 20), naive(policy, batch, of_row)) < 1e-12


LIVE = {"kind": "live"}


@pytest.mark.parametrize("micro", [1, 20, 1000])
@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd", "skew_reverse"])
def test_live_divergence_against_whole_logits(kind: str, micro: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head_module.LOGIT_ELEMENTS, "cpu", 30)
    policy, teacher, batch = tiny(), tiny(seed=5), random_batch(7)
    train = config({"divergence": kind, "estimate": "exact", "temperature": 1.3}, teacher=LIVE)

    def of_row(row: TrainingRow, logits: Tensor) -> Tensor:
        with torch.no_grad():
            lp = (logits_of(teacher, row) / 1.3).log_softmax(-1)
        assert train.objective.distill is not None
        return divergence(lp, (logits / 1.3).log_softmax(-1), train.objective.distill.divergence)

    found = ours(policy, batch, train, micro, teacher)
    assert largest_difference(found, naive(policy, batch, of_row)) < 1e-12
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("of", ["teacher", "student"])
def test_live_top_k_against_whole_logits(of: str) -> None:
    policy, teacher, batch = tiny(), tiny(seed=5), random_batch(7)
    train = config({"estimate": {"kind": "topk", "k": 3, "of": of}, "divergence": "forward_kl"}, teacher=LIVE)

    def of_row(row: TrainingRow, logits: Tensor) -> Tensor:
        with torch.no_grad():
            lp = logits_of(teacher, row).log_softmax(-1)
        lq = logits.log_softmax(-1)
        ids = (lp if of == "teacher" else lq.detach()).topk(3, dim=-1).indices
        assert train.objective.distill is not None
        pair = (with_tail(x.gather(1, ids)) for x in (lp, lq))
        return divergence(*pair, train.objective.distill.divergence)

    for micro in (20, 1000):
        assert largest_difference(ours(policy, batch, train, micro, teacher), naive(policy, batch, of_row)) < 1e-12


def test_a_live_teacher_and_its_stored_columns_give_one_gradient() -> None:
    """Up to the float32 of the columns: sampled, top k, and the teacher's entropy as a weight."""
    policy, teacher = tiny(), tiny(seed=5)
    plain = random_batch(7)
    for part in (
        {},
        {"divergence": "jsd", "estimate": {"kind": "topk", "k": K}},
        {"estimate": {"kind": "topk", "k": K}, "emphasis": "entropy_weight"},
        {"emphasis": {"kind": "entropy_above", "threshold": 1.5}},
    ):
        stored = ours(policy, taught(plain, teacher), config(part), 20)
        live = ours(policy, plain, config(part, teacher=LIVE), 20, teacher)
        assert largest_difference(stored, live) < 1e-7
        assert max(float(g.abs().max()) for g in live) > 1e-3


def test_both_routes_to_the_gradient_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, teacher, batch = tiny(), tiny(seed=5), random_batch(7)
    cases = [
        (config({"estimate": "topk", "divergence": "jsd"}), None),
        (config({"estimate": "exact"}, teacher=LIVE), teacher),
        (config({"estimate": {"kind": "topk", "k": 3, "of": "student"}}, teacher=LIVE), teacher),
    ]
    direct = [ours(policy, taught(batch, teacher), train, 20, live) for train, live in cases]
    monkeypatch.setattr(module, "separable", lambda objective: False)
    for (train, live), expected in zip(cases, direct, strict=True):
        assert largest_difference(ours(policy, taught(batch, teacher), train, 20, live), expected) < 1e-12


def privileged(batch: TrainingBatch) -> TrainingBatch:
    """Each row's teacher reads a hint of its own length before the prompt."""
    rng = np.random.default_rng(3)
    hints = [rng.integers(0, VOCABULARY, int(rng.integers(1, 9))).astype(np.int32) for _ in batch.rows]
    prompts = [np.concatenate([hint, row.prompt_tokens]) for hint, row in zip(hints, batch.rows, strict=True)]
    rows = [
        replace(row, said=replace(row.said, prompt_tokens=prompt))
        for row, prompt in zip(batch.rows, prompts, strict=True)
    ]
    return replace(batch, rows=rows)


@pytest.mark.parametrize(
    "estimate", ["exact", {"kind": "topk", "k": VOCABULARY}, {"kind": "topk", "k": 3, "of": "student"}]
)
def test_positions_are_those_of_the_tokens_whatever_the_teacher_reads(estimate: Any) -> None:
    policy, teacher, batch = tiny(), tiny(seed=5), privileged(random_batch(7))
    train = config({"divergence": "jsd", "estimate": estimate}, teacher={**LIVE, "context": "privileged"})

    def of_row(row: TrainingRow, logits: Tensor) -> Tensor:
        with torch.no_grad():
            lp = logits_of(teacher, row, row.said.prompt_tokens).log_softmax(-1)
        lq = logits.log_softmax(-1)
        if estimate != "exact" and "of" in estimate:
            ids = lq.detach().topk(3, dim=-1).indices
            lp, lq = (with_tail(x.gather(1, ids)) for x in (lp, lq))
        assert train.objective.distill is not None
        return divergence(lp, lq, train.objective.distill.divergence)

    found, expected = ours(policy, batch, train, 20, teacher), naive(policy, batch, of_row)
    assert largest_difference(found, expected) < 1e-6
    same = {row.rollout_id: logits_of(teacher, row) for row in batch.rows}
    moved = {row.rollout_id: logits_of(teacher, row, row.said.prompt_tokens) for row in batch.rows}
    assert all(float((same[n] - moved[n]).detach().abs().max()) > 0.1 for n in same)


def test_a_teacher_that_is_the_policy_with_its_own_prompt_moves_nothing() -> None:
    policy, batch = tiny(), random_batch(6)
    for estimate in ("exact", {"kind": "topk", "k": 3, "of": "student"}, "sampled"):
        train = config({"divergence": "reverse_kl", "estimate": estimate}, teacher=LIVE)
        found = ours(policy, batch, train, 20, tiny())
        assert max(float(g.abs().max()) for g in found) < 1e-12


def test_routed_rows_need_a_teacher_and_the_others_do_not() -> None:
    teacher, plain = tiny(seed=5), random_batch(8)
    routes = ["policy", "distill", "both", None] * 2
    routed = [replace(row, route=route) for row, route in zip(plain.rows, routes, strict=True)]
    some = [replace(row, said=said_by(teacher, row)) if row.route in ("distill", "both") else row for row in routed]
    part = {"estimate": "topk", "rows": "routed", "divergence": "jsd"}
    train = config(part, objective={"ratio": "token", "gate": "none"})
    batch = replace(plain, rows=some)
    found = [ours(tiny(), batch, train, micro) for micro in (20, 1000)]
    assert largest_difference(*found) < 1e-12
    assert all(bool(g.isfinite().all()) for g in found[0])
    with pytest.raises(RollwayError, match=r"r1, slot 0\) has no teacher_topk_ids"):
        ours(tiny(), replace(plain, rows=routed), train, 20)


def columns(batch: TrainingBatch, **said: Any) -> tuple[pa.Table, pa.Table]:
    """Batch and rollout tables of these rows, with teacher columns."""
    ids = [row.rollout_id for row in batch.rows]
    rollouts = pa.table(
        {
            "rollout_id": ids,
            "prompt_tokens": pa.array([row.prompt_tokens.tolist() for row in batch.rows], pa.list_(pa.int32())),
            "tokens": pa.array([row.tokens.tolist() for row in batch.rows], pa.list_(pa.int32())),
            "logprobs": pa.array([row.logprobs.tolist() for row in batch.rows], pa.list_(pa.float32())),
            "train_mask": pa.array([row.train_mask.tolist() for row in batch.rows], pa.list_(pa.bool_())),
            "source": ["policy"] * len(ids),
            "group_id": ids,
        }
    )
    given = {"rollout_id": ids, "slot": [0] * len(ids), "weight": [1.0] * len(ids)}
    return pa.table(given | said), rollouts


def test_columns_are_read_from_the_batch_table() -> None:
    batch = random_batch(5)
    own = taught(batch, tiny(seed=5)).rows
    flat, nested = pa.list_(pa.float32()), pa.list_(pa.list_(pa.int32()))
    said: dict[str, Any] = {
        "teacher_logprob": pa.array([None if n == 2 else row.said.logprob.tolist() for n, row in enumerate(own)], flat),
        "teacher_entropy": pa.array([row.said.entropy.tolist() for row in own], flat),
        "teacher_topk_ids": pa.array([None if n == 2 else r.said.topk_ids.tolist() for n, r in enumerate(own)], nested),
        "teacher_topk_logprobs": pa.array(
            [None if n == 2 else row.said.topk_logprobs.tolist() for n, row in enumerate(own)],
            pa.list_(pa.list_(pa.float32())),
        ),
        "teacher_prompt_tokens": pa.array([[1, 2, n] for n in range(5)], pa.list_(pa.int32())),
    }
    table, rollouts = columns(batch, **said)
    # As slices of larger tables and in several chunks, as a Parquet file may come back.
    table = pa.concat_tables([table.slice(0, 1), table.slice(1, 3), table.slice(4)])
    for n, row in enumerate(training_batch(table, rollouts).rows):
        assert row.said.prompt_tokens.tolist() == [1, 2, n]
        assert row.said.entropy.tolist() == own[n].said.entropy.tolist()
        if n == 2:
            assert row.said.logprob is row.said.topk_ids is row.said.topk_logprobs is None
            continue
        assert row.said.logprob.tolist() == own[n].said.logprob.tolist()
        assert row.said.topk_ids.tolist() == own[n].said.topk_ids.tolist()
        assert row.said.topk_logprobs.tolist() == own[n].said.topk_logprobs.tolist()
    plain, rollouts = columns(batch)
    assert training_batch(plain, rollouts).rows[0].said == Said()


def test_damaged_columns_name_the_row() -> None:
    batch = random_batch(2, length=3)
    flat, nested = pa.list_(pa.float32()), pa.list_(pa.list_(pa.float32()))
    for said, message in (
        ({"teacher_logprob": pa.array([[0.0] * 3, [0.0] * 2], flat)}, r"r1, slot 0\): teacher_logprob does not hold"),
        ({"teacher_entropy": pa.array([[0.0] * 3, [0.0, float("nan"), 0.0]], flat)}, "teacher_entropy holds NaN"),
        (
            {"teacher_topk_logprobs": pa.array([[[0.0, 1.0]] * 3, [[0.0], [0.0, 1.0], [0.0]]], nested)},
            r"r1, slot 0\): teacher_topk_logprobs does not hold one entry \(of equal width\)",
        ),
    ):
        with pytest.raises(RollwayError, match=message):
            training_batch(*columns(batch, **said))


def test_what_the_columns_cannot_give_is_refused() -> None:
    teacher, plain = tiny(seed=5), random_batch(4)
    part: dict[str, Any] = {"estimate": {"kind": "topk", "k": K + 1}}
    with pytest.raises(RollwayError, match=r"top 4, and train.objective.distill.estimate.k is 5"):
        ours(tiny(), taught(plain, teacher), config(part), 20)
    mixed = taught(plain, teacher).rows[:2] + taught(plain, teacher, 3).rows[2:]
    with pytest.raises(RollwayError, match="top 3 and 4"):
        ours(tiny(), replace(plain, rows=mixed), config({"estimate": "topk"}), 20)
    ours(tiny(), replace(plain, rows=mixed), config({"estimate": {"kind": "topk", "k": 3}}), 20)
    own = taught(plain, teacher).rows
    foreign = replace(own[0], said=replace(own[0].said, topk_ids=own[0].said.topk_ids + VOCABULARY))
    with pytest.raises(RollwayError, match="another vocabulary"):
        ours(tiny(), replace(plain, rows=[foreign, *own[1:]]), config({"estimate": "topk"}), 20)
    with pytest.raises(RollwayError, match="has no teacher_logprob"):
        ours(tiny(), plain, config({}), 20)
    with pytest.raises(RollwayError, match="has no teacher_prompt_tokens"):
        ours(tiny(), plain, config({"estimate": "exact"}, teacher={**LIVE, "context": "privileged"}), 20, teacher)


def test_fewer_of_the_stored_top_k_are_the_likeliest() -> None:
    teacher, plain = tiny(seed=5), random_batch(4)
    wide, narrow = taught(plain, teacher, 6), taught(plain, teacher, 2)
    shuffled = [
        replace(
            row,
            said=replace(row.said, topk_ids=row.said.topk_ids[:, ::-1], topk_logprobs=row.said.topk_logprobs[:, ::-1]),
        )
        for row in wide.rows
    ]
    part: dict[str, Any] = {"estimate": {"kind": "topk", "k": 2}}
    found = ours(tiny(), replace(wide, rows=shuffled), config(part), 20)
    assert largest_difference(found, ours(tiny(), narrow, config(part), 20)) < 1e-12


def test_worked_rewards_of_a_teacher() -> None:
    """Reverse KL as reward, MiniLLM's means (future and reward-to-go), discounts, extrapolation, holes in the mask."""
    q = torch.tensor([[0.2, 0.5]], dtype=torch.float64).log()
    p = torch.tensor([[0.6, 0.3]], dtype=torch.float64).log()
    both = torch.ones(1, 2, dtype=torch.bool)
    assert of_teacher(p, q, None, both)[0].tolist() == pytest.approx([1.098612, -0.510826], abs=1e-6)
    r = torch.tensor([[0.182322, -0.287682, -0.693147]], dtype=torch.float64)
    zero, three = torch.zeros_like(r), torch.ones(1, 3, dtype=torch.bool)
    found = of_teacher(r, zero, None, three, gamma=1.0, mean=True)[0].tolist()
    assert found == pytest.approx([-0.266169, -0.490415, -0.693147], abs=1e-6)
    found = of_teacher(r, zero, None, three, gamma=1.0, mean=True, from_next=True)[0].tolist()
    assert found == pytest.approx([-0.490415, -0.693147, 0.0], abs=1e-6)
    found = of_teacher(r, zero, None, three, gamma=0.5, kappa=2.0)[0].tolist()
    last = 2 * -0.693147
    assert found == pytest.approx([2 * 0.182322 + 0.5 * (2 * -0.287682 + 0.5 * last), 2 * -0.287682 + 0.5 * last, last])
    found = of_teacher(r, zero, None, three, gamma=0.5, mean=True)[0].tolist()
    assert found[0] == pytest.approx((0.182322 - 0.5 * 0.287682 - 0.25 * 0.693147) / 1.75)
    holed = torch.tensor([[True, False, True]])
    found = of_teacher(r.masked_fill(~holed, torch.nan), zero, None, holed, gamma=1.0, mean=True)[0].tolist()
    assert found == pytest.approx([(0.182322 - 0.693147) / 2, 0.0, -0.693147])
    ref = torch.tensor([[0.1, 0.2, -0.3]], dtype=torch.float64)
    found = of_teacher(r, zero, ref, three, extrapolate=1.5)
    torch.testing.assert_close(found, 1.5 * (r - ref) - (zero - ref))
    with pytest.raises(ValueError, match="reference"):
        of_teacher(r, zero, None, three, extrapolate=1.5)


def test_reward_form_and_sampled_form_have_one_gradient_on_policy() -> None:
    """Equation 6 at rho = 1, gamma = 0 against sg(r) ln Q."""
    policy, batch = tiny(), taught(random_batch(7), tiny(seed=5))
    sampled = ours(policy, batch, config({}), 20)
    given = {"ratio": "token", "gate": "none", "aggregate": "token_mean"}
    train = TrainConfig.model_validate({"objective": given, "advantage": {"kind": "teacher"}})
    policy.zero_grad(set_to_none=True)
    fixed = precompute(policy, None, None, batch, train, {}, 1.0)
    accumulate(Models(policy, None, 1.0, 20), fixed.rows, fixed.tokens, train.objective, {})
    assert largest_difference(sampled, gradients(policy)) < 1e-12


def test_curated_advantages_are_added_to_a_teachers() -> None:
    policy, batch = tiny(), taught(random_batch(5), tiny(seed=5))
    given = {"ratio": "token", "gate": "none", "aggregate": "token_mean"}
    alone, both = (
        precompute(
            policy,
            None,
            None,
            batch,
            TrainConfig.model_validate({"objective": given, "advantage": {"kind": "teacher", "with_curated": added}}),
            {},
            1.0,
        ).tokens
        for added in (False, True)
    )
    curated = torch.tensor([row.advantage for row in batch.rows], dtype=torch.float64)
    torch.testing.assert_close(both.advantage - alone.advantage, curated[:, None] * alone.mask)


@pytest.mark.parametrize("live", [None, "initial", "ema"])
def test_distillation_brings_the_policy_to_its_teacher(live: str | None) -> None:
    """Through `update`: 40 steps on the same rows lower the reverse KL to a tenth, whoever holds the teacher."""
    policy, teacher, batch = tiny(), tiny(seed=5), random_batch(6, seed=2)
    part: dict[str, Any] = {"estimate": "topk"} if live is None else {"estimate": "exact"}
    given: dict[str, Any] = {} if live is None else {"teacher": {**LIVE, "weights": live}}
    given |= {"ema": 1e-9} if live == "ema" else {}
    train = config(part, epochs=40, **given)
    average = tiny(seed=5) if live == "ema" else None
    rows = taught(batch, teacher, VOCABULARY) if live is None else batch
    _, metrics = update(policy, None, teacher, rows, train, TrainState(seed=0), average=average)
    course = [m.value for m in metrics if m.name == "distill/divergence"]
    assert course[-1] < 0.1 * course[0]
    assert {m.value for m in metrics if m.name == "distill/share"} == {1.0}
    with torch.no_grad():
        rest = [
            divergence(
                logits_of(teacher, r).log_softmax(-1),
                logits_of(policy, r).log_softmax(-1),
                train.objective.distill.divergence,
            )
            for r in batch.rows
        ]
    assert float(torch.cat(rest).mean()) < 0.1 * course[0]


def test_the_average_follows_each_update() -> None:
    """average <- (1 - rate) average + rate policy, after every step and no more often; frozen in training of others."""
    policy, average = tiny(), tiny(seed=4)
    expected = [p.detach().clone() for p in average.parameters()]
    batch = taught(random_batch(6), tiny(seed=5))
    seen: list[list[Tensor]] = []

    def watch(steps: int, info: str) -> None:
        seen.append([p.detach().clone() for p in policy.parameters()])

    train = config({}, epochs=2, minibatches=2, ema=0.25)
    update(policy, None, None, batch, train, TrainState(seed=0), average=average, progress=watch)
    assert len(seen) == 4
    for now in seen:
        expected = [0.75 * mean + 0.25 * p for mean, p in zip(expected, now, strict=True)]
    assert largest_difference(expected, list(average.parameters())) < 1e-14
    follow(average, policy, 0.5)
    expected = [0.5 * (mean + p) for mean, p in zip(expected, seen[-1], strict=True)]
    assert largest_difference(expected, list(average.parameters())) < 1e-14
    for wrong, given in ((None, train), (average, config({}))):
        with pytest.raises(RollwayError, match=r"train\.ema"):
            update(policy, None, None, batch, given, TrainState(seed=0), average=wrong)


def test_a_moving_teacher_is_asked_before_every_step() -> None:
    """Two steps with an average that moves by half: the second step's gradient is against the moved teacher."""
    train = config({"estimate": "exact"}, epochs=2, teacher={**LIVE, "weights": "ema"}, ema=0.5)
    batch, policy, average = random_batch(5), tiny(), tiny(seed=4)
    _, metrics = update(policy, None, None, batch, train, TrainState(seed=0), average=average)
    course = [m.value for m in metrics if m.name == "distill/divergence"]
    still = tiny(seed=4)
    _, metrics = update(
        tiny(), None, still, batch, config({"estimate": "exact"}, epochs=2, teacher=LIVE), TrainState(seed=0)
    )
    fixed = [m.value for m in metrics if m.name == "distill/divergence"]
    assert course[0] == fixed[0]
    assert course[1] < 0.7 * fixed[1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"objective": {"distill": {"estimate": "exact"}}}, "asks for what stored columns do not hold"),
        ({"objective": {"distill": {"estimate": {"kind": "topk", "of": "student", "k": 3}}}}, "stored columns"),
        ({"objective": {"distill": {"estimate": "topk"}}, "teacher": LIVE}, "needs to know how many"),
        ({"objective": {"distill": {"estimate": "topk", "temperature": 2.0}}}, "another temperature is unknown"),
        ({"objective": {"distill": {}}, "teacher": {**LIVE, "weights": "ema"}}, "set train.ema"),
        ({"objective": {"ratio": "token", "gate": "clip"}, "teacher": LIVE}, "nothing asks it"),
        ({"objective": {"distill": {}}, "ema": 1.0}, "less than 1"),
        (
            {"objective": {"ratio": "token", "gate": "none"}, "advantage": {"kind": "teacher", "mean": True}},
            "gamma is 0",
        ),
    ],
)
def test_options_without_effect_are_refused(given: dict[str, Any], message: str) -> None:
    objective = {"aggregate": "token_mean", **given.pop("objective")}
    with pytest.raises(ValidationError, match=message):
        TrainConfig.model_validate({"objective": objective, **given})


def test_what_training_reads_of_a_teacher() -> None:
    assert config({}).reads_teacher() == {"teacher_logprob"}
    assert config({"estimate": "exact"}, teacher=LIVE).reads_teacher() == set()
    assert config({"estimate": "exact"}, teacher={**LIVE, "context": "privileged"}).reads_teacher() == {
        "teacher_prompt_tokens"
    }
    both = config(
        {"estimate": "topk"},
        objective={"ratio": "token", "gate": "none"},
        advantage={"kind": "teacher", "extrapolate": 1.2},
    )
    assert both.reads_teacher() == {"teacher_logprob", "teacher_topk_ids", "teacher_topk_logprobs"}
    assert both.needs_reference()
    assert "advantage" not in both.reads()


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        sizes = [x.numel() for x in (made if isinstance(made, tuple | list) else [made]) if isinstance(x, Tensor)]
        self.elements = max([self.elements, *sizes])
        return made


@pytest.mark.parametrize("estimate", ["exact", {"kind": "topk", "k": 2, "of": "student"}, {"kind": "topk", "k": 2}])
def test_all_logits_never_exist_together(estimate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A live step over 40 rows: no tensor of tokens x vocabulary, whatever the estimate."""
    monkeypatch.setitem(head_module.LOGIT_ELEMENTS, "cpu", 500)
    rng = np.random.default_rng(0)
    batch = TrainingBatch([random_row(rng, n, length=16) for n in range(40)], *(np.zeros(0, dtype=np.int64),) * 2)
    train = config({"estimate": estimate}, teacher=LIVE)
    wide = {"vocab_size": 400, "hidden_size": 4, "intermediate_size": 4}
    policy, teacher = (Qwen3ForCausalLM(type(tiny().config)(**{**tiny().config.to_dict(), **wide})) for _ in range(2))
    with Largest() as seen:
        ours(policy, batch, train, 10**6, teacher)
    assert seen.elements < 40 * 16 * 400 / 4
