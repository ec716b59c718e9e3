"""DaGRPO: masked rows in the denominator, anchors without a behaviour policy."""

import pytest
import torch

from objectives.rows import parse
from rollway.objectives import TokenBatch, loss, route_codes

LENGTHS = (4, 3, 5, 2, 3, 6)
KEEP = [0.0, 0.0, 0.0, 1.0, 0.0, 1.0]
ADVANTAGE = [0.5, 0.5, -0.5, -0.5, -0.5, 0.5]
CLIP = {"kind": "clip", "low": 0.2, "high": 0.2}


def batch(now: float = -1.0, **fields: object) -> TokenBatch:
    """The worked group; the last row is the anchor, whose old log-probs do not exist."""
    mask = torch.arange(6)[None] < torch.tensor(LENGTHS)[:, None]
    old = torch.full((6, 6), -1.0, dtype=torch.float64)
    old[5] = float("nan")
    return TokenBatch(
        logp=torch.full((6, 6), now, dtype=torch.float64).requires_grad_(),
        logp_old=old,
        mask=mask,
        advantage=torch.tensor(ADVANTAGE, dtype=torch.float64),
        weight=torch.tensor(KEEP, dtype=torch.float64),
        route=route_codes([None] * 5 + ["expert"]),
        **fields,
    )


def gradient(aggregate: object, anchors: object = "unit", now: float = -1.0) -> torch.Tensor:
    b = batch(now)
    result = loss(b, parse(ratio="token", gate=CLIP, aggregate=aggregate, anchors=anchors))
    return torch.autograd.grad(result.loss, b.logp)[0]


def per_row(g: torch.Tensor) -> list[float]:
    return [float(-g[n, 0]) for n in range(6)]


def test_coefficients_with_a_constant_length() -> None:
    got = gradient({"kind": "seq_sum_const", "l_max": 8, "weights": "numerator"})
    assert [8 * x for x in per_row(got)] == pytest.approx([0, 0, 0, -0.083333, 0, 0.083333], abs=1e-6)


def test_coefficients_with_the_length_of_each_row() -> None:
    got = gradient({"kind": "seq_mean_token_mean", "weights": "numerator"})
    assert per_row(got) == pytest.approx([0, 0, 0, -0.041667, 0, 0.013889], abs=1e-6)


def test_masked_rows_would_leave_the_denominator_if_weights_counted_there() -> None:
    got = gradient({"kind": "seq_mean_token_mean", "weights": "denominator"})
    assert per_row(got) == pytest.approx([0, 0, 0, -0.125, 0, 0.5 / 2 / 6], abs=1e-6)


def test_unit_anchor_has_value_minus_a_and_no_clip() -> None:
    b = batch(now=-0.2)
    objective = parse(
        ratio="token", gate=CLIP, aggregate={"kind": "seq_mean_token_mean", "weights": "numerator"}, anchors="unit"
    )
    result = loss(b, objective)
    assert result.token_loss[5].tolist() == [-0.5] * 6
    assert float(result.metrics["max/ratio"]) == pytest.approx(float(torch.tensor(0.8).exp()), abs=1e-6)
    g = torch.autograd.grad(result.loss, b.logp)[0]
    assert float(g[5, 0]) == pytest.approx(-0.5 / 6 / 6, abs=1e-12)


def test_shaped_anchor() -> None:
    gamma, p = 0.1, float(torch.tensor(-1.0, dtype=torch.float64).exp())
    got = gradient({"kind": "seq_mean_token_mean", "weights": "numerator"}, {"kind": "shaped", "gamma": gamma})
    slope = gamma * p / (p + gamma) ** 2
    assert float(-got[5, 0]) == pytest.approx(0.5 * slope / 36, abs=1e-12)
    assert per_row(got)[3] == pytest.approx(-0.041667, abs=1e-6)


def test_anchors_take_no_engine_correction() -> None:
    engine = batch().logp_old.clone() - 0.5
    b = batch(logp_behavior=engine)
    objective = parse(
        ratio="token", gate=CLIP, aggregate="token_mean", anchors="unit", correction={"kind": "tis", "cap": 9.0}
    )
    result = loss(b, objective)
    assert result.token_loss[5].tolist() == [-0.5] * 6
    assert result.token_loss[3, :2].tolist() == pytest.approx([0.5 * float(torch.tensor(0.5).exp())] * 2, abs=1e-6)


def test_identical_scores_mask_everything() -> None:
    b = TokenBatch(**(vars(batch()) | {"weight": torch.zeros(6, dtype=torch.float64)}))
    objective = parse(
        ratio="token",
        gate=CLIP,
        aggregate={"kind": "seq_sum_const", "l_max": 8, "weights": "numerator"},
        anchors="unit",
    )
    result = loss(b, objective)
    assert float(result.loss.detach()) == 0.0
    assert torch.equal(torch.autograd.grad(result.loss, b.logp)[0], torch.zeros(6, 6, dtype=torch.float64))
