"""NGRPO: asymmetric clipping."""

from collections.abc import Callable

import pytest
import torch

from objectives.rows import at_ratio, parse
from rollway.objectives import loss

NGRPO = parse(ratio="token", gate={"kind": "clip", "low": 0.16, "high": 0.24}, aggregate="token_mean", kl="none")
RATIOS = [(0.5, 0.83, 1.0, 1.3)]


@pytest.mark.parametrize(
    ("advantage", "expected"),
    [
        (1.763830, [-0.881915, -1.463979, -1.763830, -2.187149]),
        (-0.503951, [0.423319, 0.423319, 0.503951, 0.655136]),
    ],
)
def test_token_losses(advantage: float, expected: list[float]) -> None:
    result = loss(at_ratio(RATIOS, [advantage]), NGRPO)
    assert result.token_loss[0].tolist() == pytest.approx(expected, abs=1.5e-6)
    assert float(result.loss.detach()) == pytest.approx(sum(expected) / 4, abs=1.5e-6)


def test_gradient_is_zero_beyond_the_clip_only() -> None:
    batch = at_ratio([(0.83, 0.85, 1.3), (1.23, 1.25, 0.5)], [-1.0, 1.0])
    gradient = torch.autograd.grad(loss(batch, NGRPO).loss, batch.logp)[0]
    assert (gradient == 0).tolist() == [[True, False, False], [False, True, False]]


def test_sequence_mean_as_printed_leaves_out_rows_without_tokens() -> None:
    batch = at_ratio([(0.5, 0.83, 1.0, 1.3), (float("nan"),)], [1.763830, 0.3])
    printed = parse(ratio="token", gate={"kind": "clip", "low": 0.16, "high": 0.24}, aggregate="seq_mean_token_mean")
    assert float(loss(batch, printed).loss.detach()) == pytest.approx(
        -(0.881915 + 1.463979 + 1.763830 + 2.187149) / 4, abs=1e-6
    )


@pytest.mark.parametrize(("advantage", "flat"), [(-0.503951, lambda r: r < 0.84), (1.763830, lambda r: r > 1.24)])
def test_where_the_gradient_is_zero(advantage: float, flat: Callable[[float], bool]) -> None:
    ratios = tuple(0.5 + 0.013 * n for n in range(80))
    batch = at_ratio([ratios], [advantage])
    gradient = torch.autograd.grad(loss(batch, NGRPO).loss, batch.logp)[0][0]
    expected = [0.0 if flat(r) else -advantage * r / 80 for r in ratios]
    assert gradient.tolist() == pytest.approx(expected, abs=1e-9)


def test_nothing_kept_is_zero() -> None:
    assert float(loss(at_ratio([(1.0,)], [0.5]).rows([]), NGRPO).loss.detach()) == 0.0
