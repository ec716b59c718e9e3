"""FiberPO: gates, regimes, the domain form and the total-variation form."""

import pytest
import torch

from objectives.rows import padded, parse
from rollway.config import load_recipe
from rollway.objectives import TokenBatch, loss, separable, whole_batch_metrics
from rollway.objectives.fibre import (
    Level,
    channel_aggregates,
    fibre_domain_ratio,
    fibre_ratio,
    rollback_gate,
    total_variation_ratio,
)

FIBER = parse(
    ratio={"kind": "fibre", "up": 0.12, "down": 0.08, "residual": 0.15}, gate="none", aggregate="seq_mean_token_mean"
)
LEVEL = Level(0.12, 0.08)


def near(expected: object) -> object:
    return pytest.approx(expected, abs=6e-7)


def batch(x: list[tuple[float, ...]], advantage: list[float], **fields: object) -> TokenBatch:
    shift = padded(x)
    old = torch.full_like(shift, -1.0)
    return TokenBatch(
        logp=(old + shift).requires_grad_(),
        logp_old=old,
        mask=~shift.isnan(),
        advantage=torch.tensor(advantage, dtype=torch.float64),
        **fields,
    )


@pytest.mark.parametrize(
    ("x", "advantage", "ratios", "expected"),
    [
        ((0.02, -0.01, 0.03, 0.0), 1.0, (1.020201, 0.990050, 1.030455, 1.0), -1.010176),
        ((0.30, -0.10, 0.20, 0.05), 1.0, (1.221403, 0.829029, 1.119072, 0.963194), -1.033175),
        ((0.50, 0.55, 0.45, -0.02), -1.0, (1.133148, 1.161834, 1.077884, 0.843665), 1.054133),
        ((-0.4, -0.4, -0.4, 0.1), 1.0, (0.904837, 0.904837, 0.904837, 1.284025), -0.999634),
    ],
)
def test_worked(x: tuple[float, ...], advantage: float, ratios: tuple[float, ...], expected: float) -> None:
    result = loss(batch([x], [advantage]), FIBER)
    assert (-advantage * result.token_loss[0]).tolist() == near(ratios)
    assert float(result.loss.detach()) == near(expected)


def test_the_recipe_is_what_is_tested_here() -> None:
    """The worked examples have a residual of .15; the recipe's is .05."""
    over = {"train": {"objective": {"ratio": {"residual": 0.15}}}}
    assert load_recipe("fiberpo", over).train.objective == FIBER
    assert load_recipe("fiberpo").train.objective.ratio.residual == 0.05
    levels = load_recipe("fiberpo-domain").train.objective.ratio
    budgets = [(level.up, level.down) for level in (levels.domain, levels.group, levels.trajectory)]
    assert budgets == [(0.05, 0.04), (0.08, 0.06), (0.12, 0.09)]


@pytest.mark.parametrize(
    ("x", "up", "down", "base", "u", "v", "log_f"),
    [
        ((0.02, -0.01, 0.03, 0.0), 0.0125, 0.0025, 0.01, None, None, None),
        (
            (0.30, -0.10, 0.20, 0.05),
            *(0.1375, 0.025, 0.025),
            (0.1625, 0.075, 0.0625, -0.0875),
            (-0.025, -0.1375, -0.025, -0.025),
            (0.175, -0.2125, 0.0875, -0.0625),
        ),
        ((0.50, 0.55, 0.45, -0.02), 0.375, 0.005, -0.005, None, None, None),
        ((-0.4, -0.4, -0.4, 0.1), 0.025, 0.3, 0.025, None, None, None),
    ],
)
def test_worked_parts(x: tuple, up: float, down: float, base: float, u: object, v: object, log_f: object) -> None:
    """s+, s-, log w, and of the second example u, v and log f, each on its own."""
    shift = torch.tensor([x], dtype=torch.float64)
    mask = torch.ones_like(shift, dtype=torch.bool)
    plus, minus = channel_aggregates(shift, mask)
    assert (float(plus), float(minus)) == near((up, down))
    size = torch.tensor(4.0, dtype=torch.float64)
    assert float(rollback_gate(plus, 0.12, size) - rollback_gate(minus, 0.08, size)) == near(base)
    if u is None:
        return
    sign = torch.where(shift >= 0, 1.0, -1.0)
    same, opposite = torch.where(sign > 0, plus, minus), torch.where(sign > 0, minus, plus)
    assert (sign * shift - same)[0].tolist() == near(u)
    assert (-opposite)[0].tolist() == near(v)
    found = fibre_ratio(shift, mask, LEVEL, 0.15).log() - base
    assert found[0].tolist() == near(log_f)


@pytest.mark.parametrize(("x", "expected"), [(0.10, 0.10), (0.13, 0.08), (0.149, 0.004), (0.15, 0.0), (-0.13, -0.08)])
def test_gate(x: float, expected: float) -> None:
    size = torch.tensor(4.0, dtype=torch.float64)
    assert float(rollback_gate(torch.tensor(x, dtype=torch.float64), 0.12, size)) == pytest.approx(expected, abs=1e-12)


def test_gate_is_continuous_and_odd() -> None:
    for t in (1.0, 4.0, 37.0):
        size, x = torch.tensor(t, dtype=torch.float64), torch.linspace(-0.4, 0.4, 8001, dtype=torch.float64)
        g = rollback_gate(x, 0.12, size)
        assert float(g.diff().abs().max()) <= 1.01 * t * 1e-4
        torch.testing.assert_close(g, -rollback_gate(-x, 0.12, size))


@pytest.mark.parametrize("t", [1.0, 4.0, 37.0])
def test_gate_falls_with_slope_minus_t_until_it_is_zero(t: float) -> None:
    """Continuous at C and at (1 + 1/T) C; with one token the rollback is as wide as the budget."""
    size, end = torch.tensor(t, dtype=torch.float64), 0.12 * (1 + 1 / t)
    x = torch.tensor([0.12, 0.12 + 1e-12, end - 1e-12, end, 2 * end], dtype=torch.float64)
    assert rollback_gate(x, 0.12, size).tolist() == pytest.approx([0.12, 0.12, 0.0, 0.0, 0.0], abs=1e-9)
    inside = torch.tensor((0.12 + end) / 2, dtype=torch.float64, requires_grad=True)
    assert float(torch.autograd.grad(rollback_gate(inside, 0.12, size), inside)[0]) == -t
    if t == 1.0:
        assert end - 0.12 == pytest.approx(0.12)


def test_opposite_drifts_of_mean_zero_are_seen() -> None:
    x = torch.tensor([[0.5, -0.5, 0.5, -0.5]], dtype=torch.float64)
    mask = torch.ones_like(x, dtype=torch.bool)
    up, down = channel_aggregates(x, mask)
    assert float(x.mean()) == 0.0
    assert (float(up), float(down)) == (0.25, 0.25)
    found = whole_batch_metrics(batch([(0.5, -0.5, 0.5, -0.5)], [1.0]), FIBER)
    assert found["fibre/rows_both_zeroed"] == 1.0


def test_small_drift_is_the_plain_ratio_with_identity_jacobian() -> None:
    generator = torch.Generator().manual_seed(0)
    x = 0.02 * torch.randn(3, 5, dtype=torch.float64, generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [0, 1, 0, 0, 0]], dtype=torch.bool)
    ratio = fibre_ratio(x, mask, LEVEL, 0.15)
    torch.testing.assert_close(ratio[mask], x.exp()[mask], atol=1e-12, rtol=0)
    jacobian = torch.autograd.functional.jacobian(lambda y: fibre_ratio(y, mask[:1], LEVEL, 0.15).log(), x[:1])
    torch.testing.assert_close(jacobian[0, :, 0], torch.eye(5, dtype=torch.float64), atol=1e-12, rtol=0)


def test_on_policy_gradient_is_the_policy_gradient() -> None:
    b = batch([(0.0, 0.0, 0.0), (0.0,)], [1.5, -0.5])
    g = torch.autograd.grad(loss(b, FIBER).loss, b.logp)[0]
    assert g[0].tolist() == near([-0.25, -0.25, -0.25])
    assert g[1].tolist() == near([0.25, 0, 0])


def test_rollback_jacobian() -> None:
    """s+ in rollback, all tokens risen, no residual clipped: delta_ij - 1/T - 1."""
    x = torch.tensor([[0.14, 0.13, 0.12, 0.15]], dtype=torch.float64)
    mask = torch.ones_like(x, dtype=torch.bool)
    jacobian = torch.autograd.functional.jacobian(lambda y: fibre_ratio(y, mask, LEVEL, 0.15).log(), x)[0, :, 0]
    torch.testing.assert_close(jacobian, torch.eye(4, dtype=torch.float64) - 1.25, atol=1e-12, rtol=0)


def test_uniform_shift_has_no_residual() -> None:
    x = torch.full((1, 4), 0.1, dtype=torch.float64)
    ratio = fibre_ratio(x, torch.ones_like(x, dtype=torch.bool), LEVEL, 0.01)
    torch.testing.assert_close(ratio, x.exp(), atol=1e-12, rtol=0)


def test_trajectories_do_not_interact_and_padding_does_not_count() -> None:
    b = batch([(0.30, -0.10, 0.20, 0.05), (0.5, 0.55)], [1.0, 1.0])
    alone = loss(b.rows([0]), FIBER).token_loss
    torch.testing.assert_close(loss(b, FIBER).token_loss[:1], alone, atol=0, rtol=0)
    assert separable(FIBER)


def test_what_moves_one_trajectory_leaves_the_others() -> None:
    rows = [(0.30, -0.10, 0.20, 0.05), (0.5, 0.55), (-0.2, 0.1, 0.05)]
    before = loss(batch(rows, [1.0] * 3), FIBER).token_loss
    after = loss(batch([rows[0], (9.0, -9.0), rows[2]], [1.0] * 3), FIBER).token_loss
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.equal(before[1], after[1])


def test_holes_in_the_mask_are_as_if_the_row_were_shorter() -> None:
    short = torch.tensor([[0.30, -0.10, 0.20, 0.05]], dtype=torch.float64)
    mask = torch.tensor([[True, False, True, True, False, True]])
    holed = torch.full((1, 6), 7.0, dtype=torch.float64).masked_scatter(mask, short)
    whole = torch.ones(1, 4, dtype=torch.bool)
    assert torch.equal(fibre_ratio(holed, mask, LEVEL, 0.15)[mask], fibre_ratio(short, whole, LEVEL, 0.15)[0])
    tv = total_variation_ratio(holed, mask, 0.1)[mask]
    torch.testing.assert_close(tv, total_variation_ratio(short, whole, 0.1)[0], atol=1e-15, rtol=0)
    wide = (LEVEL, LEVEL, LEVEL)
    one = torch.zeros(1).long()
    of_domain = fibre_domain_ratio(holed, mask, one, one, wide, 0.15)[mask]
    assert torch.equal(of_domain, fibre_domain_ratio(short, whole, one, one, wide, 0.15)[0])


def test_what_is_logged() -> None:
    """s+, s-, the ratio before its gates, regimes of the rows (eq. 7) and of their residuals."""
    rows = [
        (0.02, -0.01, 0.03, 0.0),  # both pass
        (0.30, -0.10, 0.20, 0.05),  # up rolled back
        (0.50, 0.55, 0.45, -0.02),  # up zeroed
        (0.26, -0.18, 0.26, -0.18),  # s+ .13 and s- .09: both rolled back
        (0.50, -0.50, 0.50, -0.50),  # both zeroed
        (0.26, -0.50, 0.26, -0.50),  # up rolled back, down zeroed
        (0.90,),  # of one token, zeroed
    ]
    found = whole_batch_metrics(batch(rows, [1.0] * 7), FIBER)
    x = padded(rows)
    mask = ~x.isnan()
    up = [sum(max(v, 0.0) for v in row) / len(row) for row in rows]
    down = [sum(max(-v, 0.0) for v in row) / len(row) for row in rows]
    clipped = [[abs(v - s if v >= 0 else v + t) > 0.15 for v in row] for row, s, t in zip(rows, up, down, strict=True)]
    expected = {
        "fibre/up": sum(up) / 7,
        "fibre/down": sum(down) / 7,
        "fibre/ratio_before": float(x[mask].exp().mean()),
        "fibre/clipped_share": sum(map(sum, clipped)) / 25,
        "fibre/rows_none_clipped": sum(not any(c) for c in clipped),
        "fibre/rows_some_clipped": sum(any(c) and not all(c) for c in clipped),
        "fibre/rows_all_clipped": sum(all(c) for c in clipped),
        "fibre/rows_passed": 1,
        "fibre/rows_one_rolled_back": 1,
        "fibre/rows_one_zeroed": 2,
        "fibre/rows_both_rolled_back": 1,
        "fibre/rows_both_zeroed": 1,
        "fibre/rows_rolled_back_and_zeroed": 1,
    }
    assert found == pytest.approx(expected, abs=1e-12)
    assert expected["fibre/rows_all_clipped"] > 0


def test_what_is_logged_of_the_four_levels() -> None:
    """Gates of both channels: 1 domain, 2 prompts, 3 trajectories. Only the domain's up channel is rolled back."""
    made = TokenBatch(
        logp=torch.tensor([[0.06, 0.06], [0.04, 0.06], [0.05, 0.05]], dtype=torch.float64) - 1,
        logp_old=torch.full((3, 2), -1.0, dtype=torch.float64),
        mask=torch.ones(3, 2, dtype=torch.bool),
        advantage=torch.ones(3, dtype=torch.float64),
        domain=torch.zeros(3).long(),
        group=torch.tensor([0, 0, 1]),
    )
    found = whole_batch_metrics(made, DOMAIN)
    counted = {name: value for name, value in found.items() if "_gates_" in name}
    assert counted == {
        "fibre/domain_gates_passed": 1,
        "fibre/domain_gates_rolled_back": 1,
        "fibre/domain_gates_zeroed": 0,
        "fibre/group_gates_passed": 4,
        "fibre/group_gates_rolled_back": 0,
        "fibre/group_gates_zeroed": 0,
        "fibre/trajectory_gates_passed": 6,
        "fibre/trajectory_gates_rolled_back": 0,
        "fibre/trajectory_gates_zeroed": 0,
    }


def domain_batch(x: list[tuple[float, ...]]) -> TokenBatch:
    return batch(x, [1.0] * len(x), domain=torch.tensor([0, 0, 0, 1]), group=torch.tensor([0, 0, 1, 2]))


DOMAIN = parse(ratio="fibre_domain", gate="none", aggregate="seq_mean_token_mean")
WIDE = {"up": 9.0, "down": 9.0}
OPEN = parse(
    ratio={"kind": "fibre_domain", "domain": WIDE, "group": WIDE, "trajectory": WIDE, "residual": 9.0},
    gate="none",
    aggregate="seq_mean_token_mean",
)


def test_domain_form_telescopes_to_the_ratio() -> None:
    x = [(0.3, -0.1), (0.2, 0.4, -0.2), (-0.5, 0.1, 0.0), (0.1,)]
    result = loss(domain_batch(x), OPEN)
    expected = -padded(x).exp()
    torch.testing.assert_close(result.token_loss[result.kept], expected[result.kept], atol=1e-12, rtol=0)


def test_domain_form_by_hand() -> None:
    """One domain, two prompts; only the domain's up channel leaves its budget, and is rolled back."""
    x = torch.tensor([[0.06, 0.06], [0.04, 0.06], [0.05, 0.05]], dtype=torch.float64)
    mask = torch.ones(3, 2, dtype=torch.bool)
    levels = (Level(0.05, 0.04), Level(0.08, 0.06), Level(0.12, 0.09))
    ratio = fibre_domain_ratio(x, mask, torch.zeros(3).long(), torch.tensor([0, 0, 1]), levels, 0.05)
    s = torch.tensor([0.06, 0.05, 0.05], dtype=torch.float64)
    s_group = torch.tensor([0.055, 0.05], dtype=torch.float64)
    s_domain = float(s_group.mean())
    rolled = 7 * 0.05 - 6 * s_domain
    base = rolled + (s_group[torch.tensor([0, 0, 1])] - s_domain) + (s - s_group[torch.tensor([0, 0, 1])])
    expected = (base[:, None] + x - s[:, None]).exp()
    torch.testing.assert_close(ratio, expected, atol=1e-12, rtol=0)


def test_trajectories_of_a_domain_interact() -> None:
    assert not separable(DOMAIN)
    x = [(0.3, 0.1), (0.2, 0.1, 0.2), (0.1, 0.1, 0.0), (0.1, 0.1)]
    moved = [*x[:2], (0.4, 0.4, 0.4), x[3]]
    a, b = loss(domain_batch(x), DOMAIN).token_loss, loss(domain_batch(moved), DOMAIN).token_loss
    assert not torch.equal(a[0], b[0])
    assert torch.equal(a[3], b[3])


def test_a_prompt_belongs_to_one_domain() -> None:
    x = torch.zeros(2, 1)
    with pytest.raises(ValueError, match="several domains"):
        fibre_domain_ratio(x, x == 0, torch.tensor([0, 1]), torch.tensor([0, 0]), (LEVEL, LEVEL, LEVEL), 0.1)


def test_rows_without_tokens_enter_no_mean() -> None:
    x = [(0.3, 0.1), (0.2, 0.1, 0.2), (0.1, 0.1, 0.0), (0.1, 0.1)]
    full = domain_batch(x)
    padded_batch = full.rows([0, 1, 2, 3, 1])
    padded_batch.mask[4] = False
    a, b = loss(full, DOMAIN), loss(padded_batch, DOMAIN)
    torch.testing.assert_close(a.loss, b.loss, atol=1e-15, rtol=0)


def test_total_variation_form() -> None:
    x = torch.tensor([[1.1, 0.8, 1.5]], dtype=torch.float64).log()
    mask = torch.ones_like(x, dtype=torch.bool)
    assert total_variation_ratio(x, mask, 1.0)[0].tolist() == near([1.1, 0.8, 1.5])
    # A budget of .3 leaves no room: the others of each token spend .7, .6 and .3.
    assert total_variation_ratio(x, mask, 0.1)[0].tolist() == near([1.0, 1.0, 1.0])
    # A budget of .57 leaves the last token .27, which shrinks as the first rises or the second falls.
    assert total_variation_ratio(x, mask, 0.19)[0].tolist() == near([1.0, 1.0, 1.27])
    objective = parse(ratio={"kind": "total_variation", "delta": 0.19}, gate="none", aggregate="seq_mean_token_mean")
    b = batch([tuple(x[0].tolist())], [1.0])
    result = loss(b, objective)
    assert float(result.loss.detach()) == near(-1.09)
    assert torch.autograd.grad(result.loss, b.logp)[0][0].tolist() == near([1.1 / 3, -0.8 / 3, 0.0])
