"""D3S: tokens with the largest |advantage| x entropy over the whole batch."""

import math
from dataclasses import replace

import pytest
import torch

from objectives.rows import padded, parse
from rollway.config import load_recipe
from rollway.errors import RollwayError
from rollway.objectives import TokenBatch, loss, prepare, select_tokens, totals
from rollway.objectives.selection import scheduled_share, signal_key, top_share

NAN = float("nan")
ADVANTAGE = [2.041236, -0.408247, 0.912869, -0.912869]
ENTROPY = [(0.1, 1.2, 0.4), (0.9, 0.05, 0.3), (0.6, 0.02, NAN), (0.8, 1.5, 0.25)]
CLIP = {"kind": "clip", "low": 0.2, "high": 0.2}


def d3s(share: float = 0.2, final: float | None = None, ratio: str = "token", aggregate: str = "token_mean") -> object:
    return parse(
        ratio=ratio, gate=CLIP, aggregate=aggregate, select={"kind": "signal_top", "share": share, "final": final}
    )


def worked(**fields: object) -> TokenBatch:
    entropy = padded(ENTROPY)
    old = torch.full_like(entropy, -1.0)
    shift = torch.linspace(-0.3, 0.3, 12, dtype=torch.float64).view(4, 3)
    given = {
        "logp": (old + shift).requires_grad_(),
        "logp_old": old,
        "mask": ~entropy.isnan(),
        "advantage": torch.tensor(ADVANTAGE, dtype=torch.float64),
        "entropy": entropy,
    }
    return TokenBatch(**(given | fields))


def places(keep: torch.Tensor) -> list[tuple[int, int]]:
    return [tuple(p) for p in keep.nonzero().tolist()]


def test_worked_selection() -> None:
    key = signal_key(worked().advantage, worked().entropy)
    assert key[0].tolist() == pytest.approx([0.204124, 2.449483, 0.816494], abs=1e-6)
    assert key[3].tolist() == pytest.approx([0.730295, 1.369304, 0.228217], abs=1e-6)
    assert places(select_tokens(worked(), d3s())) == [(0, 1), (0, 2), (3, 1)]
    result = loss(worked(), d3s())
    assert places(result.kept) == [(0, 1), (0, 2), (3, 1)]
    assert float(result.metrics["kept_share"]) == pytest.approx(3 / 11)
    kept = result.token_loss[result.kept]
    assert float(result.loss.detach()) == pytest.approx(float(kept.mean()), abs=1e-12)


def test_everything_kept_is_plain_grpo() -> None:
    plain = parse(ratio="token", gate=CLIP, aggregate="token_mean")
    assert torch.equal(loss(worked(), d3s(1.0)).loss, loss(worked(), plain).loss)


def test_schedule() -> None:
    assert scheduled_share(0.2, 1.0, 0.25) == pytest.approx(0.4)
    assert scheduled_share(0.2, 1.0, 0.5) == pytest.approx(0.6)
    assert int(select_tokens(worked(), d3s(0.2, 1.0), 0.5).sum()) == math.ceil(0.6 * 11)
    assert torch.equal(select_tokens(worked(), d3s(0.2, 1.0), 1.0), worked().mask)
    with pytest.raises(RollwayError, match="progress"):
        select_tokens(worked(), d3s(0.2, 1.0), 1.5)


def test_ties_go_to_the_lower_row_and_position() -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    assert places(top_share(torch.zeros(2, 3), mask, 0.5)) == [(0, 0), (0, 1), (0, 2)]
    assert places(top_share(torch.zeros(2, 3), ~mask, 0.5)) == []
    assert places(top_share(torch.ones(2, 3), mask, 1e-6)) == [(0, 0)]


def test_sequence_ratio_reads_all_valid_tokens_and_averages_kept_ones() -> None:
    objective = d3s(ratio="sequence", aggregate="seq_mean_token_mean")
    batch = worked()
    x = (batch.logp.detach() - batch.logp_old).mean(1)
    expected = 0.0
    for row in (0, 3):
        s, a = float(x[row].exp()), ADVANTAGE[row]
        expected += max(-a * s, -a * min(max(s, 0.8), 1.2)) / 2
    assert float(loss(batch, objective).loss.detach()) == pytest.approx(expected, abs=1e-12)


def test_parts_of_a_batch_must_be_prepared() -> None:
    objective = d3s()
    with pytest.raises(RollwayError, match="prepare"):
        loss(worked().rows([0]), objective, totals=totals(worked(), objective))
    ready = prepare(worked(), objective)
    whole = totals(ready, objective)
    parts = [loss(ready.rows([n]), objective, totals=whole).loss for n in range(4)]
    assert float(sum(parts).detach()) == pytest.approx(float(loss(worked(), objective).loss.detach()), abs=1e-12)


def test_entropy_top_needs_no_advantage_to_choose() -> None:
    objective = parse(ratio="token", gate=CLIP, aggregate="token_mean", select={"kind": "entropy_top", "share": 0.2})
    assert places(loss(worked(), objective).kept) == [(0, 1), (1, 0), (3, 1)]


def test_masked_tokens_are_never_candidates_and_dead_rows_come_last() -> None:
    entropy = padded([(0.1, 9.0, 0.4), (0.9, 0.05, 0.3)])
    mask = torch.tensor([[True, False, True], [True, True, True]])
    advantage = torch.tensor([1.0, 0.0], dtype=torch.float64)
    batch = TokenBatch(logp=entropy, logp_old=entropy, mask=mask, advantage=advantage, entropy=entropy)
    assert places(select_tokens(batch, d3s(0.4))) == [(0, 0), (0, 2)]
    assert places(select_tokens(batch, d3s(0.6))) == [(0, 0), (0, 2), (1, 0)]
    assert places(select_tokens(batch, d3s(1.0))) == places(mask)


def test_advantages_may_differ_from_token_to_token() -> None:
    advantage = padded([(0.0, 0.0, 5.0), (1.0, 30.0, 0.0), (0.0,), (0.0,)], fill=0.0)
    assert places(select_tokens(worked(advantage=advantage), d3s(0.2))) == [(0, 2), (1, 0), (1, 1)]


def test_kl_acts_on_kept_tokens_only() -> None:
    objective = d3s()
    with_kl = parse(
        ratio="token",
        gate=CLIP,
        aggregate="token_mean",
        select={"kind": "signal_top", "share": 0.2, "final": None},
        kl={"kind": "k3", "beta": 0.5},
    )
    ref = torch.full((4, 3), -1.4, dtype=torch.float64)
    batch = worked(logp_ref=ref)
    x = (ref - batch.logp.detach())[select_tokens(batch, objective)]
    penalty = 0.5 * (x.exp() - x - 1).mean()
    assert float(loss(batch, with_kl).loss.detach()) == pytest.approx(
        float(loss(batch, objective).loss.detach() + penalty), abs=1e-12
    )


def test_kept_tokens_are_counted() -> None:
    assert float(loss(worked(), d3s()).metrics["kept_tokens"]) == 3
    assert float(loss(worked(), d3s()).metrics["kept_share"]) == pytest.approx(3 / 11)


def test_the_gspo_recipe_keeps_gspo_widths_and_row_means() -> None:
    """A row's kept tokens all carry its sequence ratio: the choice of tokens decides which rows count."""
    objective = load_recipe("d3s-gspo").train.objective
    batch = replace(worked(), extra={"progress": torch.tensor(0.25)})
    kept = select_tokens(batch, objective, 0.25)
    assert int(kept.sum()) == math.ceil(0.2 * 11)
    rows = kept.any(1).nonzero()[:, 0].tolist()
    assert 0 < len(rows) < 4
    x = torch.where(batch.mask, batch.logp.detach() - batch.logp_old, 0.0).sum(1) / batch.mask.sum(1)
    losses = [
        max(-a * s, -a * min(max(s, 1 - 3e-4), 1 + 4e-4)) for a, s in zip(ADVANTAGE, x.exp().tolist(), strict=True)
    ]
    expected = sum(losses[row] for row in rows) / len(rows)
    assert float(loss(batch, objective).loss.detach()) == pytest.approx(expected, abs=1e-12)
