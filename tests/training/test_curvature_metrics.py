"""What the metrics files say of CAPO's masks: of the whole step, whatever its micro-batches."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rollway.config.objectives import Objective
from rollway.config.training import TrainConfig
from rollway.objectives import initial_state, loss
from rollway.policies.logprobs import token_logprobs
from rollway.training.batch import TrainingBatch
from rollway.training.gradients import Models, accumulate
from rollway.training.metrics import curvature_metrics
from rollway.training.precompute import precompute
from rollway.training.state import TrainState
from rollway.training.update import update
from training.tiny import random_batch, tiny


def objective(level: str = "token", tau_f: float = 0.5) -> Objective:
    return Objective.model_validate(
        {
            "ratio": "token",
            "gate": "clip",
            "aggregate": {"kind": "seq_mean_token_mean", "empty": "zero"},
            "select": {"kind": "curvature", "level": level, "tau_f": tau_f, "tau_h": 4.0, "k": 6},
        }
    )


def batch() -> TrainingBatch:
    made = random_batch(8, seed=3)
    made.rows[5] = replace(made.rows[5], weight=0.0)
    return made


@pytest.mark.parametrize("micro", [1, 30, 1000])
@pytest.mark.parametrize("level", ["token", "sequence", "batch"])
def test_against_numpy_on_the_whole_batch(level: str, micro: int) -> None:
    part, rows, policy = objective(level, 1e-6 if level == "batch" else 0.5), batch(), tiny()
    tokens = precompute(policy, None, None, rows, TrainConfig(objective=part), {}, 1.0).tokens
    tokens = replace(tokens, lr=0.5)
    got = accumulate(Models(policy, None, 1.0, micro), rows.rows, tokens, part, initial_state(part))
    found = curvature_metrics(tokens, got.per_token)
    seen = token_logprobs(policy, rows.rows, temperature=1.0, micro_tokens=10**6, hidden=True)
    head = policy.get_output_embeddings().weight.detach()
    whole = loss(replace(tokens, logp=seen.logp, hidden=seen.hidden, lm_head=head), part)
    where = tokens.mask & (tokens.weight != 0)[:, None]
    m_h, m_f = (whole.per_token[f"curvature/{n}"][where].numpy() for n in ("m_h", "m_f"))
    rejected = ~whole.kept[where].numpy()
    advantage = tokens.advantage[:, None].expand_as(where)[where].numpy()
    for q, name in ((50, "p50"), (90, "p90"), (99, "p99")):
        assert found[f"curvature/m_h/{name}"] == pytest.approx(np.percentile(m_h, q), rel=1e-9)
        assert found[f"curvature/m_h_abs/{name}"] == pytest.approx(np.percentile(np.abs(m_h), q), rel=1e-9)
        assert found[f"curvature/m_f/{name}"] == pytest.approx(np.percentile(m_f, q), rel=1e-9)
    assert found["curvature/rejected_share/positive"] == pytest.approx(rejected[advantage > 0].mean())
    assert found["curvature/rejected_share/negative"] == pytest.approx(rejected[advantage < 0].mean())
    assert rejected.any()
    ids = tokens.token_ids[where].numpy()[rejected].tolist()
    named = {int(n.rsplit("/", 1)[1]): v for n, v in found.items() if n.startswith("curvature/rejected_token/")}
    assert len(named) == min(5, len(set(ids)))
    assert named == {token: ids.count(token) for token in named}
    assert min(named.values()) >= max((ids.count(t) for t in set(ids) - named.keys()), default=0)


def test_the_metrics_file_holds_them_and_only_where_there_are_masks() -> None:
    rows = random_batch(8, seed=3)
    _, metrics = update(tiny(dtype=torch.float32), None, None, rows, TrainConfig(objective=objective()), TrainState(0))
    names = {m.name for m in metrics}
    assert {"curvature/m_f/p99", "curvature/m_h/p50", "curvature/rejected_share/positive", "kept_share"} <= names
    plain = objective().model_copy(update={"select": Objective.model_fields["select"].get_default()})
    _, metrics = update(tiny(dtype=torch.float32), None, None, rows, TrainConfig(objective=plain), TrainState(0))
    assert not [m.name for m in metrics if m.name.startswith("curvature")]


def test_nothing_rejected_and_no_token_of_a_sign() -> None:
    part, rows, policy = objective(tau_f=1e9), random_batch(4, advantage=1.0), tiny()
    part = part.model_copy(update={"select": part.select.model_copy(update={"tau_h": 1e9})})
    tokens = replace(precompute(policy, None, None, rows, TrainConfig(objective=part), {}, 1.0).tokens, lr=0.01)
    got = accumulate(Models(policy, None, 1.0, 1000), rows.rows, tokens, part, {})
    found = curvature_metrics(tokens, got.per_token)
    assert found["curvature/rejected_share/positive"] == 0.0
    assert np.isnan(found["curvature/rejected_share/negative"])
    assert not [name for name in found if "rejected_token" in name]
