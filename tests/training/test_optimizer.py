"""The optimiser against torch's own AdamW, the schedule, clipping, and copies of low-precision weights."""

import pytest
import torch
from torch import nn

from rollway.config.training import LrSchedule, OptimizerConfig
from rollway.errors import RollwayError
from rollway.training.optimizer import adam, gradient_norm, learning_rate, schedule_factor, step, tensors


def layer(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(3, 2).to(dtype)


def fill(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def test_steps_equal_torch_with_decay_on_matrices_and_clipping() -> None:
    mine, theirs = layer(), layer()
    optimizer = adam(mine, OptimizerConfig(weight_decay=0.1), {})
    groups = [{"params": [theirs.weight], "weight_decay": 0.1}, {"params": [theirs.bias], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=0.01)
    for n in range(4):
        fill(mine, n)
        fill(theirs, n)
        norm = gradient_norm(optimizer)
        assert norm == pytest.approx(float(nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)))
        step(optimizer, 0.01, norm, 0.5)
        reference.step()
        assert mine.weight.grad is None
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-7)


def test_bfloat16_weights_learn_from_steps_below_their_precision() -> None:
    module = layer(dtype=torch.bfloat16)
    start = module.weight.detach().clone()
    moments: dict[str, torch.Tensor] = {}
    for _ in range(300):
        optimizer = adam(module, OptimizerConfig(), moments)
        for p in module.parameters():
            p.grad = torch.ones_like(p)
        step(optimizer, 1e-5, 1.0, None)
        moments = tensors(optimizer)
    assert moments["weight/weight"].dtype == torch.float32
    assert torch.equal(module.weight, moments["weight/weight"].bfloat16())
    assert (start - module.weight).abs().max() > 1e-3


def test_bfloat16_weights_keep_updates_of_the_default_learning_rate() -> None:
    """lr 1e-6 is a thousandth of bfloat16's spacing near 0.5: the float32 copies hold what the weights cannot show yet,
    across checkpoints, and moments are float32 too."""
    module = layer(dtype=torch.bfloat16)
    with torch.no_grad():
        module.weight.fill_(0.5)
    start, moments = module.weight.detach().clone(), {}
    for number in range(1200):
        optimizer = adam(module, OptimizerConfig(), moments)
        for p in module.parameters():
            p.grad = torch.full_like(p, 0.01)
        step(optimizer, 1e-6, 1.0, None)
        moments = tensors(optimizer)
        if number == 99:
            assert torch.equal(module.weight, start)
            assert torch.allclose(moments["weight/weight"], start.float() - 100e-6, atol=1e-6)
    assert {x.dtype for x in moments.values()} == {torch.float32}
    assert (module.weight < start).all()


def test_a_gradient_that_is_not_finite_shows_in_the_norm() -> None:
    module = layer()
    fill(module, 0)
    module.bias.grad[1] = float("nan")
    assert gradient_norm(adam(module, OptimizerConfig(), {})) != pytest.approx(0.0, nan_ok=False)
    assert torch.tensor(gradient_norm(adam(module, OptimizerConfig(), {}))).isnan()


def test_moments_of_another_module_are_refused() -> None:
    module = layer()
    fill(module, 0)
    optimizer = adam(module, OptimizerConfig(), {})
    step(optimizer, 0.01, 1.0, None)
    with pytest.raises(RollwayError, match="does not fit"):
        adam(nn.Linear(4, 2), OptimizerConfig(), tensors(optimizer))
    with pytest.raises(RollwayError, match="trainable"):
        adam(layer().requires_grad_(False), OptimizerConfig(), {})


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({}, [1.0] * 7),
        ({"warmup": 2}, [1 / 3, 2 / 3, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ({"kind": "linear", "horizon": 4}, [1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0]),
        ({"kind": "linear", "warmup": 2, "horizon": 4, "floor": 0.5}, [1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.5, 0.5]),
        ({"kind": "cosine", "horizon": 4, "floor": 0.1}, [1.0, 0.868198, 0.55, 0.231802, 0.1, 0.1, 0.1]),
    ],
)
def test_schedules(schedule: dict, expected: list[float]) -> None:
    made = LrSchedule.model_validate(schedule)
    assert [schedule_factor(made, u) for u in range(7)] == pytest.approx(expected, abs=1e-6)
    assert learning_rate(OptimizerConfig(lr=2.0, schedule=made), 0) == pytest.approx(2 * expected[0], abs=1e-6)


def test_a_horizon_inside_the_warmup_is_refused() -> None:
    with pytest.raises(ValueError, match="must exceed"):
        LrSchedule(kind="linear", warmup=5, horizon=5)
