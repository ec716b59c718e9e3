"""D3S: tokens with the largest |advantage| x entropy over the whole batch."""

import math

import pytest
import torch

from objectives.rows import padded, parse
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
