"""CAPO: curvature-aware token rejection in the last layer."""

import math

import pytest
import torch

from objectives.rows import parse
from rollway.objectives import TokenBatch, initial_state, loss, next_state, separable, state_cadence, totals
from rollway.objectives.curvature import Moments, last_layer, predicted_changes

HEAD = torch.tensor([[1, 0.5], [0.2, -0.3], [-0.5, 0.8], [0, 0.1], [0.7, -1.0]], dtype=torch.float64)
HIDDEN = torch.tensor([[[1, -0.5], [2, 1]], [[0.3, 0.4], [-1, 3]]], dtype=torch.float64)
ACTIONS = torch.tensor([[4, 0], [2, 1]])
RATIOS = torch.tensor([[1, 1.1], [0.9, 1]], dtype=torch.float64)
CLIP = {"kind": "clip", "low": 0.2, "high": 0.2}
INF = math.inf


def capo(
    tau_f: float = 5e-4, tau_h: float = 0.05, direction: object = "sgd", aggregate: object = None, **more: object
) -> object:
    return parse(
        ratio="token",
        gate=CLIP,
        aggregate=aggregate or {"kind": "seq_mean_token_mean", "empty": "zero"},
        select={"kind": "curvature", "tau_f": tau_f, "tau_h": tau_h, "k": 3, "direction": direction, **more},
    )


def worked(**fields: object) -> TokenBatch:
    old = torch.full((2, 2), -1.0, dtype=torch.float64)
    given = {
        "logp": (old + RATIOS.log()).requires_grad_(),
        "logp_old": old,
        "mask": torch.ones(2, 2, dtype=torch.bool),
        "advantage": torch.tensor([0.7071, -0.7071], dtype=torch.float64),
        "hidden": HIDDEN,
        "lm_head": HEAD,
        "token_ids": ACTIONS,
        "lr": 0.1,
    }
    return TokenBatch(**(given | fields))


def near(expected: object) -> object:
    return pytest.approx(expected, abs=1.5e-6)


def changes(lr: float = 0.1, moments: Moments | None = None, k: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    advantage = torch.tensor([0.7071, 0.7071, -0.7071, -0.7071], dtype=torch.float64)
    hidden = HIDDEN.flatten(0, 1)
    return predicted_changes(last_layer(hidden, HEAD, ACTIONS.flatten(), k), hidden, advantage, lr, moments)


def test_last_layer_of_the_first_token() -> None:
    layer = last_layer(HIDDEN[0, :1], HEAD, ACTIONS[0, :1], 3)
    assert layer.ids.tolist() == [[4, 0, 1]]
    assert layer.probability[0].tolist() == near([0.484251, 0.308772, 0.206976])
    assert layer.v[0].tolist() == near([0.515749, -0.308772, -0.206976])


def test_predicted_changes() -> None:
    m_h, m_f = changes()
    assert m_h.tolist() == near([0.025285, 0.011308, 0.009154, 0.288144])
    assert m_f.tolist() == near([0.000638, 0.000136, 0.000084, 0.139476])


def test_sampled_token_outside_the_largest_logits() -> None:
    layer = last_layer(HIDDEN[1, 1:], HEAD, ACTIONS[1, 1:], 3)
    assert layer.ids.tolist() == [[2, 0, 3]]
    torch.testing.assert_close(layer.v, -layer.probability)


def test_ties_of_logits_go_to_the_lower_id() -> None:
    hidden, head = torch.ones(1, 1), torch.tensor([[1.0], [2.0], [1.0], [1.0]])
    assert sorted(last_layer(hidden, head, torch.tensor([0]), 3).ids[0].tolist()) == [0, 1, 2]


def test_worked_loss() -> None:
    result = loss(worked(), capo())
    assert result.kept.tolist() == [[False, True], [True, False]]
    assert result.token_loss.flatten().tolist() == near([-0.7071, -0.77781, 0.63639, 0.7071])
    assert float(result.loss.detach()) == near(-0.070710)
    assert float(loss(worked(), capo(INF, INF)).loss.detach()) == near(-0.035355)
    assert float(result.metrics["kept_share"]) == 0.5
    assert result.state == {}


def test_chunks_change_nothing() -> None:
    a, b = loss(worked(), capo(direction="adam", chunk=1)), loss(worked(), capo(direction="adam"))
    assert torch.equal(a.kept, b.kept)
    for name in a.state:
        torch.testing.assert_close(a.state[name], b.state[name], atol=1e-15, rtol=0)


def test_adam_moments_and_direction() -> None:
    objective = capo(direction="adam")
    result = loss(worked(), objective, state=initial_state(objective))
    assert result.kept.tolist() == [[False, True], [True, False]]
    state = result.state
    assert state["curvature/ids"].tolist() == [0, 1, 2, 3, 4]
    mean = state["curvature/first"] / 0.1
    expected = [
        [0.169379, 0.122298],
        [-0.105750, -0.052875],
        [-0.147240, -0.196320],
        [0.056980, 0.075973],
        [-0.142748, -0.071374],
    ]
    assert mean.tolist() == [near(row) for row in expected]
    torch.testing.assert_close(state["curvature/second"], 0.001 * mean.square(), atol=1e-12, rtol=0)
    assert int(state["curvature/steps"]) == 1
    assert state_cadence(objective) == "update"
    moments = Moments(state["curvature/ids"], state["curvature/first"], state["curvature/second"], 1, 0.9, 0.999, 1e-8)
    m_h, m_f = changes(0.01, moments)
    assert float(m_h[0]) == near(0.006432)
    assert float(m_f[0]) == near(0.000041)


def test_partials_of_parts_give_the_same_moments() -> None:
    objective = capo(direction="adam")
    whole = totals(worked(), objective)
    parts = [loss(worked().rows([n]), objective, totals=whole) for n in range(2)]
    summed = {k: parts[0].partials[k] + parts[1].partials[k] for k in parts[0].partials}
    state = next_state(objective, initial_state(objective), summed)
    for name, x in loss(worked(), objective).state.items():
        torch.testing.assert_close(state[name], x, atol=1e-15, rtol=0)


def test_steps_count_even_when_nothing_is_kept() -> None:
    objective = capo(tau_f=0.0, direction="adam")
    result = loss(worked(), objective)
    assert float(result.loss.detach()) == 0.0
    assert not bool(result.kept.any())
    assert int(result.state["curvature/steps"]) == 1
    empty = loss(worked(mask=torch.zeros(2, 2, dtype=torch.bool)), objective)
    assert int(empty.state["curvature/steps"]) == 1


def test_open_thresholds_are_plain_grpo() -> None:
    plain = parse(ratio="token", gate=CLIP, aggregate="seq_mean_token_mean")
    assert torch.equal(loss(worked(), capo(INF, INF)).loss, loss(worked(), plain).loss)


def test_constant_denominator_form() -> None:
    """Dr.CAPO: sum over kept tokens / l_max, mean over all rows."""
    objective = capo(aggregate={"kind": "seq_sum_const", "l_max": 4})
    assert float(loss(worked(), objective).loss.detach()) == near((-0.77781 + 0.63639) / 4 / 2)
    assert separable(objective)
    assert separable(capo())
    assert not separable(capo(aggregate="token_mean"))


def test_fully_rejected_rows_count_as_zero() -> None:
    b = worked(advantage=torch.tensor([0.7071, -30.0], dtype=torch.float64))
    result = loss(b, capo())
    assert result.kept.tolist() == [[False, True], [False, False]]
    assert float(result.loss.detach()) == near(-0.77781 / 2)


def test_without_advantage_nothing_changes() -> None:
    hidden = HIDDEN.flatten(0, 1)
    zero = torch.zeros(4, dtype=torch.float64)
    m_h, m_f = predicted_changes(last_layer(hidden, HEAD, ACTIONS.flatten(), 3), hidden, zero, 0.1, None)
    assert not bool(m_h.any())
    assert not bool(m_f.any())


def test_policy_change_grows_with_the_square_of_the_step() -> None:
    (_, small), (_, large) = changes(0.1), changes(0.2)
    torch.testing.assert_close(large, 4 * small)


def test_one_sided_trust() -> None:
    """Momentum against the first token's gradient predicts that its step makes things worse."""
    hidden, advantage = HIDDEN[0, :1], torch.tensor([0.7071], dtype=torch.float64)
    layer = last_layer(hidden, HEAD, ACTIONS[0, :1], 3)
    first = torch.zeros(5, 2, dtype=torch.float64)
    first[layer.ids[0]] = -9 * advantage * layer.v[0, :, None] * hidden
    state = {
        "curvature/ids": torch.arange(5),
        "curvature/first": first,
        "curvature/second": first.square(),
        "curvature/steps": torch.tensor(5),
    }
    m_h, _ = predicted_changes(
        layer, hidden, advantage, 0.01, Moments(torch.arange(5), first, first.square(), 5, 0.9, 0.999, 1e-8)
    )
    assert -0.05 < float(m_h[0]) < 0.0
    two = loss(worked(lr=0.01), capo(INF, 0.05, "adam"), state=state).kept
    one = loss(worked(lr=0.01), capo(INF, 0.05, "adam", sided="one"), state=state).kept
    assert bool(two[0, 0])
    assert not bool(one[0, 0])


@pytest.mark.parametrize("token", range(3))
def test_prediction_against_the_real_step(token: int) -> None:
    """k = V: A (pi_new / pi - 1) = m_H + O(lr^3), KL(pi || pi_new) = lr^2/2 u'Fu + O(lr^3)."""
    h, a = torch.tensor([0.7, -0.4], dtype=torch.float64), 0.9
    layer = last_layer(h[None], HEAD, torch.tensor([token]), 5)
    pi = (HEAD @ h).softmax(0)
    onehot = torch.nn.functional.one_hot(torch.tensor(token), 5).double()
    gradient = a * (onehot - pi)[:, None] * h[None]
    errors = []
    for lr in (1e-2, 5e-3):
        m_h, _ = predicted_changes(layer, h[None], torch.tensor([a], dtype=torch.float64), lr, None)
        new = ((HEAD + lr * gradient) @ h).softmax(0)
        errors.append(abs(float(a * (new[token] / pi[token] - 1) - m_h)))
        u = gradient @ h
        fisher = float((pi * u.square()).sum() - (pi * u).sum().square())
        assert float((pi * (pi / new).log()).sum()) == pytest.approx(lr**2 / 2 * fisher, rel=0.02)
    assert errors[1] < errors[0] / 7
