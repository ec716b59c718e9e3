"""R2VPO: the variance penalty and its dual variable."""

import math

import pytest
import torch

from objectives.rows import at_ratio, padded, parse
from rollway.errors import RollwayError
from rollway.objectives import (
    TokenBatch,
    initial_state,
    loss,
    next_state,
    remembered,
    state_cadence,
    state_metrics,
    totals,
)

OLD = [(-1.0, -0.5, -2.0), (-0.7, -1.2)]
NOW = [(-0.8, -0.6, -1.0), (-0.9, -1.2)]


def near(expected: object) -> object:
    return pytest.approx(expected, abs=1e-6)


def r2vpo(lam: float = 1.5, dual: object = None, aggregate: object = "token_mean", **gate: object) -> object:
    dual = {"kind": "ascent", "delta": 0.04, "eta": 1.0} if dual is None else dual
    return parse(ratio="token", gate={"kind": "variance", "lam": lam, "dual": dual, **gate}, aggregate=aggregate)


def worked(**fields: object) -> TokenBatch:
    return TokenBatch(
        **(
            {
                "logp": padded(NOW).requires_grad_(),
                "logp_old": padded(OLD),
                "mask": ~padded(OLD).isnan(),
                "advantage": torch.tensor([1.0, -1.0], dtype=torch.float64),
            }
            | fields
        )
    )


def test_worked() -> None:
    batch, objective = worked(), r2vpo()
    result = loss(batch, objective)
    assert result.token_loss[0].tolist() == near([-1.147874, -0.891254, 1.710457])
    assert result.token_loss[1, :2].tolist() == near([0.868019, 1.0])
    assert float(result.loss.detach()) == near(0.307870)
    assert float(result.metrics["ratio/variance"]) == near(0.608685)
    gradient = -5 * torch.autograd.grad(result.loss, batch.logp)[0]
    assert gradient[0].tolist() == near([0.410137, 1.163157, -11.294041])
    assert gradient[1, :2].tolist() == near([-0.373499, -1.0])
    assert result.state["variance/lam"].tolist() == near([2.068685])
    assert state_cadence(objective) == "update"


def test_on_policy_the_dual_variable_falls_by_eta_delta() -> None:
    result = loss(at_ratio([(1.0, 1.0)], [1.0]), r2vpo())
    assert float(result.loss.detach()) == near(-1.0)
    assert result.state["variance/lam"].tolist() == near([1.46])


def test_dual_variable_rises_linearly_then_caps_and_decays_to_zero() -> None:
    state = None
    seen = []
    for _ in range(4):
        result = loss(worked(), r2vpo(dual={"kind": "ascent", "delta": 0.04, "eta": 1.0, "lam_max": 3.0}), state=state)
        state = result.state
        seen.append(float(state["variance/lam"]))
    assert seen == near([2.068685, 2.637370, 3.0, 3.0])
    calm, seen = at_ratio([(1.0, 1.0)], [1.0]), []
    state = None
    for _ in range(5):
        state = loss(calm, r2vpo(lam=0.1), state=state).state
        seen.append(float(state["variance/lam"]))
    assert seen == near([0.06, 0.02, 0.0, 0.0, 0.0])


def test_restoring_force_turns_at_the_fixed_point() -> None:
    lam, advantage = 2.5, 1.0
    batch = at_ratio([(1 + advantage / (2 * lam), 1.5)], [advantage])
    gradient = torch.autograd.grad(loss(batch, r2vpo(lam=lam)).loss, batch.logp)[0][0]
    assert float(gradient[0]) == pytest.approx(0.0, abs=1e-15)
    assert float(gradient[1]) == near(-1.5 * (1 - lam) / 2)


def test_without_advantage_only_the_pull_remains() -> None:
    batch = at_ratio([(1.4,)], [0.0])
    gradient = torch.autograd.grad(loss(batch, r2vpo(lam=2.0)).loss, batch.logp)[0]
    assert float(gradient[0, 0]) == near(2 * 2.0 * 1.4 * 0.4)


def test_lam_zero_is_the_unclipped_policy_gradient() -> None:
    plain = parse(ratio="token", gate="none", aggregate="token_mean")
    assert torch.equal(loss(worked(), r2vpo(lam=0.0, dual="fixed")).loss, loss(worked(), plain).loss)


def test_fixed_weight_never_moves() -> None:
    objective = r2vpo(lam=0.04, dual="fixed")
    result = loss(worked(), objective, state=remembered(objective, {"variance/lam": torch.tensor([5.0])}))
    assert torch.equal(result.loss, loss(worked(), objective).loss)
    assert result.state == {}
    assert state_metrics(objective, result.state) == {"variance/lam": 0.04}
    assert state_cadence(objective) == "none"


def test_variance_of_the_ratio_is_twice_the_kl_to_second_order() -> None:
    p, q = (torch.tensor(x, dtype=torch.float64) for x in ([0.2, 0.3, 0.5], [0.25, 0.3, 0.45]))
    r = q / p
    assert float((p * (r - 1).square()).sum()) == near(0.0175)
    assert float(2 * (q * r.log()).sum()) == near(0.016747)
    assert float(-2 * (p * r.log()).sum()) == near(0.016103)


def test_replay_reads_the_behaviour_policy() -> None:
    replay = parse(
        ratio={"kind": "token", "denominator": "behavior"},
        gate={"kind": "variance", "lam": 1.5},
        aggregate="token_mean",
    )
    same = worked(logp_old=None, logp_behavior=padded(OLD))
    assert torch.equal(loss(same, replay).loss, loss(worked(), r2vpo()).loss)
    stale = worked(logp_behavior=padded(OLD) - 0.3)
    assert not torch.equal(loss(stale, replay).loss, loss(worked(), r2vpo()).loss)


def test_centred_variance() -> None:
    batch = worked()
    result = loss(batch, r2vpo(centre="mean"))
    r = (batch.logp.detach() - batch.logp_old)[batch.mask].exp()
    advantage = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0])
    assert float(result.loss.detach()) == near(float((-r * advantage + 1.5 * (r - r.mean()).square()).mean()))
    assert float(result.state["variance/lam"]) == near(1.5 + float(r.var(correction=0)) - 0.04)


def test_dual_variables_by_age() -> None:
    objective = r2vpo(dual={"kind": "ascent", "delta": 0.04, "versions": 2})
    batch = worked(age=torch.tensor([0, 3]))
    assert initial_state(objective)["variance/lam"].tolist() == [1.5, 1.5]
    x = [(math.exp(n - o) - 1) ** 2 for n, o in zip(NOW[0], OLD[0], strict=True)]
    y = [(math.exp(n - o) - 1) ** 2 for n, o in zip(NOW[1], OLD[1], strict=True)]
    state = loss(batch, objective).state
    assert state["variance/lam"].tolist() == near([1.5 + sum(x) / 3 - 0.04, 1.5 + sum(y) / 2 - 0.04])
    young = loss(batch.rows([0]), objective).state
    assert young["variance/lam"].tolist() == near([float(state["variance/lam"][0]), 1.5])


def test_dual_step_from_added_partials() -> None:
    objective, batch = r2vpo(), worked()
    whole = totals(batch, objective)
    parts = [loss(batch.rows([n]), objective, totals=whole).partials for n in range(2)]
    summed = {k: parts[0][k] + parts[1][k] for k in parts[0]}
    assert next_state(objective, initial_state(objective), summed)["variance/lam"].tolist() == near([2.068685])


def test_the_ratio_is_of_new_to_old_and_varies_under_the_old() -> None:
    """0.0175 is the variance of q / p under p; p / q under q has another."""
    p, q = (torch.tensor(x, dtype=torch.float64) for x in ([0.2, 0.3, 0.5], [0.25, 0.3, 0.45]))
    assert float((q * (p / q - 1).square()).sum()) == near(0.015556)
    assert float((p * (q / p - 1).square()).sum()) == near(0.0175)


@pytest.mark.parametrize("lam", [0.0, 0.04, 1.5, 100.0])
def test_on_policy_it_is_the_policy_gradient_for_every_weight(lam: float) -> None:
    batch = at_ratio([(1.0, 1.0), (1.0,)], [2.0, -0.5])
    result = loss(batch, r2vpo(lam=lam))
    assert float(result.loss.detach()) == near(-(2.0 + 2.0 - 0.5) / 3)
    gradient = torch.autograd.grad(result.loss, batch.logp)[0]
    assert gradient[batch.mask].tolist() == near([-2 / 3, -2 / 3, 0.5 / 3])


@pytest.mark.parametrize("lam", [0.04, 1.0, 2.5])
def test_what_a_clip_drops_still_counts(lam: float) -> None:
    clip = parse(ratio="token", gate={"kind": "clip", "low": 0.2, "high": 0.2}, aggregate="token_mean")
    found = []
    for objective in (clip, r2vpo(lam=lam, dual="fixed")):
        batch = at_ratio([(1.5,)], [1.0])
        found.append(float(torch.autograd.grad(loss(batch, objective).loss, batch.logp)[0][0, 0]))
    assert found == near([0.0, -1.5 * (1 - lam)])


def test_negative_advantages_turn_below_one() -> None:
    lam = 2.5
    batch = at_ratio([(1 - 1 / (2 * lam), 0.5)], [-1.0])
    gradient = torch.autograd.grad(loss(batch, r2vpo(lam=lam)).loss, batch.logp)[0][0]
    assert float(gradient[0]) == pytest.approx(0.0, abs=1e-15)
    assert float(gradient[1]) == near(-0.5 * (-1 + 2 * lam * 0.5) / 2)


def test_a_large_weight_only_pulls_back() -> None:
    batch = at_ratio([(1.2, 0.8)], [1.0])
    pull = torch.autograd.grad(loss(batch, r2vpo(lam=1e6, dual="fixed")).loss, batch.logp)[0][0] / 1e6
    assert pull.tolist() == pytest.approx([1.2 * 0.2, -0.8 * 0.2], abs=1e-5)


def test_what_is_logged() -> None:
    result = loss(worked(), r2vpo())
    assert float(result.metrics["variance/reversed_share"]) == near(1 / 5)
    assert float(result.metrics["variance/would_clip_share"]) == near(2 / 5)
    assert float(result.metrics["ratio/variance"]) == near(0.608685)
    single, several = r2vpo(), r2vpo(dual={"kind": "ascent", "versions": 2})
    assert state_metrics(single, initial_state(single)) == {"variance/lam": 1.5}
    assert state_metrics(several, initial_state(several)) == {"variance/lam_0": 1.5, "variance/lam_1": 1.5}


def test_row_means_change_the_loss_and_not_the_variance() -> None:
    result = loss(worked(), r2vpo(aggregate="seq_mean_token_mean"))
    rows = [(-1.147874 - 0.891254 + 1.710457) / 3, (0.868019 + 1.0) / 2]
    assert float(result.loss.detach()) == near(sum(rows) / 2)
    assert result.state["variance/lam"].tolist() == near([2.068685])


def test_masked_tokens_and_absent_rows_stay_out_of_the_variance() -> None:
    mask = torch.tensor([[True, True, False], [True, True, False]])
    expected = 1.5 + sum((math.exp(x) - 1) ** 2 for x in (0.2, -0.1, -0.2, 0.0)) / 4 - 0.04
    assert loss(worked(mask=mask), r2vpo()).state["variance/lam"].tolist() == near([expected])
    alone = loss(worked(weight=torch.tensor([0.0, 1.0])), r2vpo()).state["variance/lam"].tolist()
    assert alone == near([1.5 + (math.exp(-0.2) - 1) ** 2 / 2 - 0.04])


def test_another_number_of_dual_variables_is_refused() -> None:
    stored = initial_state(r2vpo(dual={"kind": "ascent", "versions": 2}))
    with pytest.raises(RollwayError, match="asks for 1 dual variables, and the checkpoint holds 2"):
        remembered(r2vpo(), stored)
