"""DCPO: advantages mixed towards a target entropy."""

import pytest
import torch

from objectives.rows import padded, parse
from rollway.objectives import (
    TokenBatch,
    dcpo_temperature,
    initial_state,
    loss,
    next_state,
    prepare,
    state_cadence,
    state_metrics,
    totals,
)
from rollway.objectives.mixing import mixing_weight

OLD = [(-0.5, -1.0), (-1.2, -0.3), (-0.8, -0.4), (-0.6, -0.2)]
HOT = [(-0.6, -0.95), (-1.15, -0.45), (-0.85, -0.5), (-0.7, -0.3)]
NOW = [(-0.3, -1.0), (-1.2, -0.1), (-1.2, -0.4), (-0.6, float("nan"))]
ADVANTAGE = [0.866024, -0.866024, -0.866024, 0.866024]
DCPO = parse(
    ratio="token",
    gate={"kind": "dual_clip", "low": 0.2, "high": 0.2, "c": 3.0},
    aggregate="token_mean",
    mixing={"kind": "target_entropy", "entropy": 0.5},
)
LAST = {"mixing/entropy": torch.tensor(0.35, dtype=torch.float64)}


def near(expected: object) -> object:
    return pytest.approx(expected, abs=1.5e-6)


def worked(**fields: object) -> TokenBatch:
    given = {
        "logp": padded(NOW).requires_grad_(),
        "logp_old": padded(OLD),
        "logp_old_temp": padded(HOT),
        "mask": ~padded(NOW).isnan(),
        "advantage": torch.tensor(ADVANTAGE, dtype=torch.float64),
        "correct": torch.tensor([1, 0, 0, 1]),
    }
    return TokenBatch(**(given | fields))


def test_worked() -> None:
    batch = prepare(worked(), DCPO, state=LAST)
    assert dcpo_temperature(DCPO, LAST) == 1.2
    assert float(batch.extra["mixing/alpha"]) == near(0.166667)
    assert batch.extra["mixing/rho"][0].tolist() == near([0.904837, 1.051271])
    assert batch.extra["mixing/rho"][3, 0] == near(0.904837)
    assert batch.advantage[:3].tolist() == [near([0.872493, 0.896898]), *[near([-0.721687, -0.721687])] * 2]
    assert batch.advantage[3, 0] == near(0.872493)
    for b in (worked(), batch):
        result = loss(b, DCPO, state=LAST)
        assert result.token_loss[:3].tolist() == [
            near([-1.046991, -0.896898]),
            near([0.721687, 0.881470]),
            near([0.577349, 0.721687]),
        ]
        assert result.token_loss[3].tolist() == near([-0.872493, 0.0])
        assert float(result.loss.detach()) == near(0.012259)


def test_entropy_of_the_step_feeds_the_next() -> None:
    result = loss(worked(), DCPO, state=LAST)
    logp = padded(NOW)[~padded(NOW).isnan()]
    assert float(result.state["mixing/entropy"]) == near(float(-logp.mean()))
    assert state_cadence(DCPO) == "round"
    whole = totals(worked(), DCPO, LAST)
    parts = [loss(worked().rows([n]), DCPO, state=LAST, totals=whole).partials for n in range(4)]
    summed = {k: sum(p[k] for p in parts) for k in parts[0]}
    assert float(next_state(DCPO, LAST, summed)["mixing/entropy"]) == near(float(-logp.mean()))


def test_temperature_follows_the_last_entropy() -> None:
    at = {"mixing/entropy": torch.tensor(0.5, dtype=torch.float64)}
    above = {"mixing/entropy": torch.tensor(0.500001, dtype=torch.float64)}
    assert dcpo_temperature(DCPO, initial_state(DCPO)) == 1.2
    assert dcpo_temperature(DCPO, at) == 1.2
    assert dcpo_temperature(DCPO, above) == 0.8


def test_at_the_target_it_is_dual_clipped_grpo() -> None:
    state = {"mixing/entropy": torch.tensor(0.5, dtype=torch.float64)}
    plain = parse(ratio="token", gate={"kind": "dual_clip"}, aggregate="token_mean")
    assert torch.equal(loss(worked(), DCPO, state=state).loss, loss(worked(), plain).loss)


def test_all_wrong_is_zero_and_all_right_only_regularises() -> None:
    zero = torch.zeros(4, dtype=torch.float64)
    wrong = loss(worked(advantage=zero, correct=torch.zeros(4)), DCPO, state=LAST)
    assert float(wrong.loss.detach()) == 0.0
    right = prepare(worked(advantage=zero, correct=torch.ones(4)), DCPO, state=LAST)
    alpha = 0.1 / 1.1
    assert float(right.extra["mixing/alpha"]) == near(alpha)
    assert torch.allclose(right.advantage[right.mask], alpha * right.extra["mixing/rho"][right.mask])


@pytest.mark.parametrize(("share", "expected"), [(0.5, 1 / 6), (0.1, 0.5), (0.0, 0.0)])
def test_weight_is_bounded(share: float, expected: float) -> None:
    alpha = mixing_weight(torch.tensor(0.0), torch.tensor(share), 5.0, 0.1)
    assert float(alpha) == near(expected)


def test_expected_ratio_to_the_target_is_one() -> None:
    z = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)
    rho = ((z / 1.2).log_softmax(0) - z.log_softmax(0)).exp()
    batch = prepare(
        TokenBatch(
            logp=z.log_softmax(0)[:, None],
            logp_old=z.log_softmax(0)[:, None],
            logp_old_temp=(z / 1.2).log_softmax(0)[:, None],
            mask=torch.ones(3, 1, dtype=torch.bool),
            advantage=torch.zeros(3, dtype=torch.float64),
            correct=torch.ones(3),
        ),
        DCPO,
        state=LAST,
    )
    assert batch.extra["mixing/rho"][:, 0].tolist() == near([0.925925, 1.093851, 1.292232])
    assert torch.equal(batch.extra["mixing/rho"][:, 0], rho)
    assert float((z.softmax(0) * rho).sum()) == near(1.0)


def test_a_colder_target_favours_the_top_tokens() -> None:
    """Eq. 6 reversed: with T < 1 rho falls where the old policy is unsure, and its mean stays 1."""
    z = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)
    rho = ((z / 0.8).log_softmax(0) - z.log_softmax(0)).exp()
    assert rho[0] > 1 > rho[1] > rho[2]
    assert float((z.softmax(0) * rho).sum()) == near(1.0)


def test_at_temperature_one_rho_is_one() -> None:
    batch = prepare(worked(logp_old_temp=padded(OLD)), DCPO, state=LAST)
    assert torch.equal(batch.extra["mixing/rho"][batch.mask], torch.ones(7, dtype=torch.float64))


def test_wrong_rollouts_never_meet_rho() -> None:
    """Whatever the second pass says of them, and however far."""
    other = padded(HOT)
    other[1:3] += 5.0
    for b in (worked(), worked(logp_old_temp=other)):
        advantage = prepare(b, DCPO, state=LAST).advantage
        assert advantage[1:3].tolist() == [near([-0.721687] * 2)] * 2


def test_rho_is_not_clipped_and_its_extremes_are_logged() -> None:
    """An old log-prob of -20 at T = 1.2: rho is about exp(20 / 6)."""
    old, hot = padded(OLD), padded(HOT)
    old[0, 0], hot[0, 0] = -20.0, -20.0 / 1.2
    result = loss(worked(logp_old=old, logp_old_temp=hot), DCPO, state=LAST)
    assert float(result.metrics["max/mixing_rho"]) == pytest.approx(28.031625, abs=1e-6)
    usual = loss(worked(), DCPO, state=LAST).metrics
    rho = torch.tensor([n - o for h, p in zip(HOT, OLD, strict=True) for n, o in zip(h, p, strict=True)][:7]).exp()
    assert float(usual["mixing/rho"]) == near(float(rho.mean()))
    assert float(usual["max/mixing_rho"]) == near(float(rho.max()))
    assert float(usual["mixing/alpha"]) == near(1 / 6)
    assert float(usual["mixing/correct_share"]) == near(0.5)
    assert state_metrics(DCPO, LAST) == {"mixing/last_entropy": 0.35, "mixing/temperature": 1.2}


def test_dual_clip_reads_the_mixed_advantage_of_the_token() -> None:
    """A wrong rollout at r = 5 costs 3 |(1 - alpha) A|; a right one of negative A may turn positive by alpha rho."""
    now = padded(OLD)
    now[1, 0] += 1.6094379124341003
    result = loss(worked(logp=now), DCPO, state=LAST)
    assert float(result.token_loss[1, 0]) == near(3 * 0.721687)
    turned = prepare(worked(advantage=torch.tensor([-0.1] * 4, dtype=torch.float64)), DCPO, state=LAST)
    assert float(turned.advantage[0, 0]) == near(5 / 6 * -0.1 + 0.904837 / 6)
