"""SPIN (arXiv 2401.01335): the loss, its pairs, and the old policy that a round starts from."""

import math
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest
import torch

from objectives.rows import parse
from rollway.config import load_recipe
from rollway.curation import curate
from rollway.errors import RollwayError
from rollway.objectives import TokenBatch, loss, requirements, unit
from rollway.training.batch import TrainingBatch
from rollway.training.state import TrainState
from rollway.training.update import update
from training.tiny import gradients, largest_difference, naive_logp, random_batch, tiny

LAM = 0.1


def pair(moved: tuple[float, float], lam: float = LAM) -> torch.Tensor:
    """The loss where the expert's row has gained moved[0] nats since the round began, the policy's own moved[1]."""
    old = torch.tensor([[-1.0, -2.0, 9.0], [-0.5, -0.7, -3.0]], dtype=torch.float64)
    gained = torch.tensor(moved, dtype=torch.float64)[:, None] * torch.tensor([[0.25, 0.75, 9.0], [0.5, 0.25, 0.25]])
    batch = TokenBatch(
        logp=(old + gained).requires_grad_(),
        logp_old=old,
        mask=torch.tensor([[True, True, False], [True, True, True]]),
        pair_chosen=torch.tensor([0]),
        pair_rejected=torch.tensor([1]),
    )
    return loss(batch, parse(preference={"kind": "spin", "lam": lam})).loss.detach()


@pytest.mark.parametrize("both", [0.0, 0.7, -2.0])
def test_ln_2_at_a_zero_margin(both: float) -> None:
    assert float(pair((both, both))) == pytest.approx(math.log(2), abs=1e-12)


@pytest.mark.parametrize(("real", "own"), [(2.0, -1.0), (-1.0, 3.0), (0.3, 0.1)])
def test_softplus_of_the_margin(real: float, own: float) -> None:
    for lam in (0.1, 1.0):
        assert float(pair((real, own), lam)) == pytest.approx(math.log1p(math.exp(-lam * (real - own))), abs=1e-12)


def test_it_reads_the_old_policy_and_no_reference() -> None:
    train = load_recipe("spin").train
    assert requirements(train.objective) == {"logp_old", "pair_chosen", "pair_rejected"}
    assert not train.needs_reference()
    assert unit(train.objective) == "pair"
    with pytest.raises(ValueError, match="is a loss over whole completions, so kl would do nothing"):
        parse(preference="spin", kl={"kind": "k3", "beta": 0.1})


def paired(**given: Any) -> TrainingBatch:
    """Four pairs; every first row an expert's."""
    made = random_batch(8, seed=3, pairs=4, **given)
    rows = [replace(row, source="policy" if n % 2 else "expert") for n, row in enumerate(made.rows)]
    return TrainingBatch(rows, made.chosen, made.rejected)


def test_a_round_starts_at_ln_2_and_its_first_step_is_half_of_lam_apart() -> None:
    """p_old is the policy at the round's start: margin 0, gradient -(lam / 2) (grad real - grad self)."""
    batch, train = paired(), load_recipe("spin", {"train": {"epochs": 1, "minibatches": 1}}).train
    policy = tiny()
    for row_real, row_self in zip(batch.rows[::2], batch.rows[1::2], strict=True):
        (-(LAM / 2) / 4 * (naive_logp(policy, row_real).sum() - naive_logp(policy, row_self).sum())).backward()
    expected = torch.cat([g.flatten() for g in gradients(policy)]).norm()
    policy.zero_grad(set_to_none=True)
    state = TrainState(seed=0)
    for number in range(2):
        state, metrics = update(policy, None, None, batch, train, state)
        found = {m.name: m.value for m in metrics}
        assert found["loss"] == pytest.approx(math.log(2), abs=1e-12)
        assert found["preference/margin"] == pytest.approx(0.0, abs=1e-12)
        if number == 0:
            assert found["grad_norm"] == pytest.approx(float(expected), rel=1e-9)


def test_later_steps_of_a_round_are_measured_from_its_start() -> None:
    train = load_recipe("spin", {"train": {"epochs": 6, "minibatches": 1, "optimizer": {"lr": 1e-2}}}).train
    policy, start = tiny(), tiny()
    _, metrics = update(policy, None, None, paired(), train, TrainState(seed=0))
    margins = [m.value for m in metrics if m.name == "preference/margin"]
    assert margins[0] == pytest.approx(0.0, abs=1e-12)
    assert margins[-1] > margins[1] > 0.0
    losses = [m.value for m in metrics if m.name == "loss"]
    assert losses[-1] < losses[0]
    assert largest_difference(list(policy.parameters()), list(start.parameters())) > 0.0


def scored() -> pa.Table:
    """Group a: an expert and three samples; b: one sample and no expert; c: an expert alone; d: one and one."""
    rows = [("a", n, "policy") for n in range(3)] + [("a", 3, "expert"), ("b", 0, "policy"), ("c", 1, "expert")]
    rows += [("d", 0, "policy"), ("d", 1, "expert")]
    keys = ("group_id", "sample", "source")
    return pa.Table.from_pylist(
        [
            {"rollout_id": f"{g}{n}", **dict(zip(keys, (g, n, s), strict=True)), "reward": 0.0, "age": 0}
            for g, n, s in rows
        ]
    )


@pytest.mark.parametrize(
    ("most", "pairs"), [(1, "a3>a0 d1>d0"), (2, "a3>a0 a3>a1 d1>d0"), (9, "a3>a0 a3>a1 a3>a2 d1>d0")]
)
def test_pairs(most: int, pairs: str) -> None:
    config = load_recipe("spin", {"curate": {"pair": {"per_group": most}}}).curate
    found: dict[str, dict[str, str]] = {}
    for row in curate(scored(), config).to_pylist():
        found.setdefault(row["pair_id"], {})[row["role"]] = row["rollout_id"]
    assert sorted(f"{two['chosen']}>{two['rejected']}" for two in found.values()) == pairs.split()


def test_rows_of_other_policies_are_not_its_own(tmp_path: Any) -> None:
    """Replayed rollouts were written by older policies than the one that margins are measured from."""
    from rollway.config import deep_merge, load_experiment
    from rollway.runtime.plan import Plan
    from rollway.runtime.plan_checks import check
    from workflow.project import TINY

    run = {"recipe": "spin", "rounds": 3, "curate": {"replay": 1}}
    with pytest.raises(RollwayError, match="round 1 would train on rollouts of earlier rounds"):
        check(Plan(load_experiment(deep_merge(TINY, {"runs": {"grpo": run}}))))


def test_supervised_rows_are_all_but_the_policys_own() -> None:
    """Hints and revisions that derived passes add to the group are none either."""
    rows = [{"rollout_id": s, "source": s} for s in ("policy", "expert", "hint", "offline", "teacher")]
    table = pa.Table.from_pylist([{**r, "group_id": "g", "sample": n, "reward": 0.0} for n, r in enumerate(rows)])
    for name in ("otr", "otr-exact", "dft"):
        kept = curate(table, load_recipe(name).curate)
        assert kept["rollout_id"].to_pylist() == ["expert", "offline", "teacher"]
