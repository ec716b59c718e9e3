"""SD-Zero (arXiv 2604.12002): both phases' worked example, the gradient of eq. 6, and what the reviser reads."""

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from objectives.rows import padded, parse
from objectives.test_distillation import of_distributions
from rollway.config import load_recipe
from rollway.config.curation import CurateConfig
from rollway.curation import curate
from rollway.objectives import TokenBatch, loss
from rollway.training.batch import Said, TrainingBatch
from rollway.training.state import TrainState
from rollway.training.teacher import Live
from rollway.training.update import update
from training.tiny import gradients, random_batch, tiny

Q = ((0.5, 0.3, 0.2), (0.1, 0.6, 0.3))
P = ((0.5, 0.25, 0.25), (0.7, 0.2, 0.1))


def srt_batch(per: str, rows: list[tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]]) -> TokenBatch:
    """Trajectories (y_init, phrase, revision) as log-probs, through the recipe's SQL."""
    scored = pa.table(
        {
            "rollout_id": [f"r{n}" for n in range(len(rows))],
            "group_id": [f"g{n}" for n in range(len(rows))],
            "sample": [0] * len(rows),
            "reward": [1.0] * len(rows),
            "correct": [True] * len(rows),
            "length": [len(revision) for *_, revision in rows],
            "prefix_length": [len(first) + len(phrase) for first, phrase, _ in rows],
        }
    )
    config = CurateConfig.model_validate({"filter": {"sql": "srt"}, "weight": {"sql": "srt", "per": per}})
    table = curate(scored, config).to_pylist()
    logp = []
    for row in table:
        first, phrase, revision = rows[int(row["rollout_id"][1:])]
        logp.append(revision if row["span"] == "completion" else (*first, *phrase, *revision))
    values = padded(logp)
    weight = torch.tensor([row["weight"] for row in table], dtype=torch.float64)
    return TokenBatch(logp=values.nan_to_num().requires_grad_(), mask=values.isfinite(), weight=weight)


def test_self_revision_training_worked() -> None:
    """Token means of the revision (.3) and of the whole turn (.433333), added; and the sums."""
    one = [((-1.0, -0.8), (-0.1, -0.1), (-0.4, -0.2))]
    objective = load_recipe("sd-zero-srt").train.objective
    found = loss(srt_batch("tokens", one), objective)
    assert float(found.loss.detach()) == pytest.approx(0.733333, abs=1e-6)
    sums = parse(ratio="none", gate="sft", aggregate={"kind": "seq_mean_token_sum", "weights": "numerator"}, kl="none")
    assert float(loss(srt_batch("trajectories", one), sums).loss.detach()) == pytest.approx(0.6 + 2.6, abs=1e-12)


def test_self_revision_training_over_several_trajectories() -> None:
    """Each term is a token mean over its own mask in the whole batch."""
    rows = [((-1.0,), (-0.5, -0.25), (-2.0,)), ((-3.0, -1.0), (-0.5,), (-0.125, -0.25, -4.0))]
    revision = [x for *_, part in rows for x in part]
    turn = [x for row in rows for part in row for x in part]
    expected = -float(np.mean(revision)) - float(np.mean(turn))
    batch = srt_batch("tokens", rows)
    found = loss(batch, load_recipe("sd-zero-srt").train.objective).loss
    assert float(found.detach()) == pytest.approx(expected, abs=1e-12)
    slope = torch.autograd.grad(found, batch.logp)[0]
    for n, row in enumerate(batch.mask.sum(1).tolist()):
        whole = len(turn) if row in (4, 6) else len(revision)
        assert slope[n][batch.mask[n]].tolist() == pytest.approx([-1 / whole] * row, abs=1e-15)


def test_phase_two_worked() -> None:
    batch = of_distributions([P], [Q])
    found = loss(batch, load_recipe("sd-zero").train.objective)
    assert found.token_loss[0].tolist() == pytest.approx([0.010068, 0.794160], abs=1e-6)
    assert float(found.loss.detach()) == pytest.approx(0.402114, abs=1e-6)
    enumerated = [sum(q * np.log(q / p) for q, p in zip(*pair, strict=True)) for pair in zip(Q, P, strict=True)]
    assert found.token_loss[0].tolist() == pytest.approx(enumerated, abs=1e-12)
    q, p = torch.tensor(Q).double().log(), torch.tensor(P).double().log()
    s = [float(q[t, y] - p[t, y]) for t, y in enumerate((0, 1))]
    assert s == pytest.approx([0.0, 1.098612], abs=1e-6)


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl"])
def test_logit_gradient_is_equation_6(kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    q, p = (torch.randn(2, 3, 5, dtype=torch.float64, generator=generator).softmax(-1) for _ in range(2))
    batch = of_distributions(p.tolist(), q.tolist())
    part = {"divergence": kind, "estimate": "exact"}
    found = loss(batch, parse(distill=part, aggregate="token_mean")).loss
    assert float(found.detach()) > 0.0
    slope = torch.autograd.grad(found, batch.logits)[0]
    kl = (q * (q / p).log()).sum(-1, keepdim=True)
    expected = q * ((q / p).log() - kl) if kind == "reverse_kl" else q - p
    torch.testing.assert_close(slope, expected / 6, atol=1e-12, rtol=0)


def with_prompts(batch: TrainingBatch, prompts: list[Any]) -> TrainingBatch:
    said = [Said(prompt_tokens=np.asarray(ids, dtype=np.int32)) for ids in prompts]
    return replace(batch, rows=[replace(row, said=s) for row, s in zip(batch.rows, said, strict=True)])


def test_a_reviser_that_reads_what_the_student_reads_changes_nothing() -> None:
    policy, batch = tiny(), random_batch(5)
    batch = with_prompts(batch, [row.prompt_tokens for row in batch.rows])
    before = [p.detach().clone() for p in policy.parameters()]
    train = load_recipe("sd-zero", {"train": {"skip_without_signal": False}}).train
    _, metrics = update(policy, None, tiny(), batch, train, TrainState(seed=0))
    reported = {m.name: m.value for m in metrics}
    assert reported["distill/divergence"] == pytest.approx(0.0, abs=1e-14)
    assert reported["grad_norm"] == pytest.approx(0.0, abs=1e-12)
    moved = max(float((a - b.detach()).abs().max()) for a, b in zip(before, policy.parameters(), strict=True))
    assert moved < 1e-5


def test_the_reviser_is_read_at_the_second_copy() -> None:
    """What it says of y depends on the first copy of y, and is the forward of prompt, y, phrase, y at the last y."""
    reviser, batch = tiny(seed=3), random_batch(3, length=4)
    phrase = [1, 2]
    objective = load_recipe("sd-zero").train.objective
    part = parse(distill={"divergence": "reverse_kl", "estimate": "sampled"}, aggregate="token_mean")
    live = Live(reviser, part, 1.0, 512, True)
    like = TokenBatch(logp=torch.zeros(3, 4, dtype=torch.float64), mask=torch.ones(3, 4, dtype=torch.bool))
    contexts = [[*row.prompt_tokens, *row.tokens, *phrase] for row in batch.rows]
    said = live.say(with_prompts(batch, contexts).rows, like)[0].teacher_logp
    assert said is not None
    for n, (row, context) in enumerate(zip(batch.rows, contexts, strict=True)):
        ids = torch.tensor([[*map(int, context), *map(int, row.tokens)]])
        logits = reviser(input_ids=ids, use_cache=False).logits[0, len(context) - 1 : -1]
        own = logits.log_softmax(-1).gather(1, torch.tensor(row.tokens.tolist())[:, None])[:, 0]
        torch.testing.assert_close(said[n], own.detach(), atol=1e-10, rtol=0)
    other = [[*row.prompt_tokens, *((row.tokens + 1) % 12), *phrase] for row in batch.rows]
    changed = live.say(with_prompts(batch, other).rows, like)[0].teacher_logp
    assert changed is not None
    assert float((changed - said).abs().min()) > 1e-6
    assert objective.distill is not None and objective.distill.estimate.kind == "exact"


def test_the_student_learns_what_the_reviser_knows() -> None:
    """Reverse KL to a frozen reviser that reads more falls, while the reviser stays as it is."""
    policy, reviser, batch = tiny(), tiny(), random_batch(6)
    with torch.no_grad():
        for weight in reviser.parameters():
            weight.mul_(1.5)
    kept = [p.detach().clone() for p in reviser.parameters()]
    batch = with_prompts(batch, [[*row.prompt_tokens, *row.tokens, 1, 2] for row in batch.rows])
    given = {"train": {"optimizer": {"lr": 1e-2}, "epochs": 10}}
    _, metrics = update(policy, None, reviser, batch, load_recipe("sd-zero", given).train, TrainState(seed=0))
    values = [m.value for m in metrics if m.name == "distill/divergence"]
    assert values[-1] < 0.5 * values[0]
    assert all(torch.equal(a, b) for a, b in zip(kept, reviser.parameters(), strict=True))
    assert all(float(g.abs().max()) == 0.0 for g in gradients(reviser))
