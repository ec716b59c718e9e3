"""CAPO: curvature-aware token rejection in the last layer."""

import math

import pyarrow as pa
import pytest
import torch

from objectives.rows import parse
from rollway.config import load_recipe
from rollway.curation import curate
from rollway.objectives import TokenBatch, initial_state, loss, next_state, separable, state_cadence, totals
from rollway.objectives.curvature import Moments, adam_direction, last_layer, predicted_changes

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
    u = 0.7071 * layer.v[0] * HIDDEN[0, 0].square().sum()
    assert u.tolist() == near([0.455857, -0.272916, -0.182941])


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
    layer = last_layer(HIDDEN[0, :1], HEAD, ACTIONS[0, :1], 3)
    g = 0.7071 * layer.v[0, :, None] * HIDDEN[0, 0]
    direction = adam_direction(g[None], layer.ids, moments)[0]
    wanted = [[0.448860, -0.937118], [-0.177475, 0.995442], [-0.995568, 0.210953]]
    assert direction.tolist() == [near(row) for row in wanted]
    assert (direction @ HIDDEN[0, 0]).tolist() == near([0.917419, -0.675196, -1.101044])
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


def test_momentum_moves_the_policy_without_an_advantage() -> None:
    state = loss(worked(), capo(INF, INF, "adam")).state
    moments = Moments(state["curvature/ids"], state["curvature/first"], state["curvature/second"], 1, 0.9, 0.999, 1e-8)
    hidden, zero = HIDDEN.flatten(0, 1), torch.zeros(4, dtype=torch.float64)
    m_h, m_f = predicted_changes(last_layer(hidden, HEAD, ACTIONS.flatten(), 3), hidden, zero, 0.1, moments)
    assert not bool(m_h.any())
    assert bool((m_f > 0).any())


def test_closed_forms_of_the_gradient_direction() -> None:
    """<g, G> = A^2 |v|^2 |h|^2, d = A |v|^2 |h|^2; of m_H the first order grows with the rate, the rest with its
    square."""
    (h1, f1), (h2, f2) = changes(0.1), changes(0.2)
    torch.testing.assert_close(f2, 4 * f1)
    hidden, advantage = HIDDEN.flatten(0, 1), torch.tensor([0.7071, 0.7071, -0.7071, -0.7071], dtype=torch.float64)
    size = last_layer(hidden, HEAD, ACTIONS.flatten(), 3).v.square().sum(1) * hidden.square().sum(1)
    torch.testing.assert_close(f1, 0.1**2 / 2 * (advantage * size).square())
    first = (4 * h1 - h2) / 2
    torch.testing.assert_close(first, 0.1 * advantage.square() * size)


def test_squared_score_along_the_step_is_the_fisher_term_on_average() -> None:
    """Eq. 10: E_a[d^2] = u^T F u for a fixed u, k = V."""
    h, u = torch.tensor([[0.7, -0.4]], dtype=torch.float64), torch.tensor([0.3, -0.2, 0.5, 0.1, -0.7]).double()
    pi = (HEAD @ h[0]).softmax(0)
    expected = 0.0
    for action in range(5):
        layer = last_layer(h, HEAD, torch.tensor([action]), 5)
        d = float((layer.v[0] * u[layer.ids[0]]).sum())
        expected += float(pi[action]) * d**2
    assert expected == pytest.approx(float(u @ (torch.diag(pi) - torch.outer(pi, pi)) @ u), abs=1e-15)


def test_moments_are_kept_of_seen_ids_alone() -> None:
    """Memory O(seen ids x H): a vocabulary of 5,000, four tokens of k = 3."""
    head = torch.randn(5000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    result = loss(worked(lm_head=head), capo(INF, INF, "adam"))
    seen = last_layer(HIDDEN.flatten(0, 1), head, ACTIONS.flatten(), 3).ids.unique()
    assert result.state["curvature/ids"].tolist() == seen.tolist()
    assert result.state["curvature/first"].shape == (len(seen), 2)
    assert result.partials["curvature/sum"].is_sparse


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("capo", (0.5 / (0.5**0.5 + 1e-4), -0.5 / (0.5**0.5 + 1e-4), 0.0)),
        ("dr-capo", (0.5, -0.5, 0.0)),
        ("rein-capo", (1.0, 0.0, 1.0)),
    ],
)
def test_advantages_of_the_named_forms(name: str, expected: tuple[float, ...]) -> None:
    """Eq. 8 and 9 on a group with rewards 1 and 0 and on a group of one."""
    rows = [("a0", "a", 0, 1.0), ("a1", "a", 1, 0.0), ("b0", "b", 0, 1.0)]
    columns = ("rollout_id", "group_id", "sample", "reward")
    scored = pa.Table.from_pylist([dict(zip(columns, row, strict=True)) for row in rows])
    assert curate(scored, load_recipe(name).curate)["advantage"].to_pylist() == pytest.approx(expected, abs=1e-12)


def test_named_forms() -> None:
    """Thresholds, advantages and aggregations of the paper's three variants."""
    found = {}
    for name in ("capo", "dr-capo", "rein-capo"):
        recipe = load_recipe(name)
        objective, advantage = recipe.train.objective, recipe.curate.advantage
        select = objective.select
        found[name] = (select.tau_f, select.tau_h, select.k, advantage.sql, advantage.params, objective.aggregate.kind)
        assert (objective.ratio.kind, objective.gate.low, objective.gate.high) == ("token", 0.2, 0.2)
        assert objective.kl.kind == "none"
    assert found == {
        "capo": (1e-4, 0.01, 50, "grpo", {"eps": 1e-4}, "seq_mean_token_mean"),
        "dr-capo": (1e-3, 5e-4, 50, "dr_grpo", {}, "seq_sum_const"),
        "rein-capo": (1e-5, 0.1, 50, "reinforce", {"baseline": "none"}, "seq_mean_token_mean"),
    }


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
