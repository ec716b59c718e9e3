"""What a step logs of a teacher, and whose log-probs a teacher's reward is taken against."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from rollway.config import load_recipe
from rollway.config.training import TrainConfig
from rollway.policies import head as head_module
from rollway.training import gradients as module
from rollway.training import teacher_gap
from rollway.training.batch import Said, TrainingBatch
from rollway.training.precompute import precompute
from rollway.training.state import TrainState
from rollway.training.update import update
from training.test_teacher import K, logits_of, taught
from training.tiny import random_batch, tiny


def reward_form(**ratio: Any) -> TrainConfig:
    objective = {"ratio": {"kind": "token", **ratio}, "gate": "none", "aggregate": "token_mean"}
    return TrainConfig.model_validate({"objective": objective, "advantage": {"kind": "teacher", "kappa": 2.0}})


def test_the_reward_and_the_ratio_are_of_one_mu() -> None:
    """arXiv 2604.00626, eq. 6: A = -kappa (ln mu - ln P), rho = Q / mu; mu is the trainer's old policy, or with
    `denominator: behavior` whoever sampled."""
    policy, batch = tiny(), taught(random_batch(5), tiny(seed=5))
    old = precompute(policy, None, None, batch, reward_form(), {}, 1.0).tokens
    sampler = precompute(policy, None, None, batch, reward_form(denominator="behavior"), {}, 1.0)
    for n, row in enumerate(batch.rows):
        assert row.said.logprob is not None
        width = len(row.tokens)
        said = torch.tensor(row.said.logprob.tolist(), dtype=torch.float64)
        own = 2.0 * (said - old.logp_old[n, :width])
        torch.testing.assert_close(old.advantage[n, :width], own)
        by_mu = 2.0 * (said - torch.tensor(row.logprobs.tolist(), dtype=torch.float64))
        torch.testing.assert_close(sampler.tokens.advantage[n, :width], by_mu)
        assert float((own - by_mu).abs().max()) > 0.1, "the two policies differ here"


def stepped(train: TrainConfig, batch: TrainingBatch) -> dict[str, float]:
    """Metrics of a round of one step."""
    _, metrics = update(tiny(), None, None, batch, train, TrainState(seed=0))
    return {m.name: m.value for m in metrics}


def gkd(**distill: Any) -> TrainConfig:
    part = {"divergence": "jsd", "estimate": "topk", **distill}
    return TrainConfig.model_validate({"objective": {"aggregate": "token_mean", "distill": part}})


def by_hand(batch: TrainingBatch) -> dict[str, list[float]]:
    """Of every trained token, from whole logits, row by row: both KLs of K tokens and the rest, the overlap."""
    found: dict[str, list[float]] = {"kl_teacher": [], "kl_teacher_forward": [], "top_k_overlap": []}
    policy = tiny()
    for row in batch.rows:
        assert row.said.topk_ids is not None
        assert row.said.topk_logprobs is not None
        q = logits_of(policy, row).softmax(-1).detach().numpy()
        for t in np.flatnonzero(row.train_mask):
            ids = row.said.topk_ids[t].tolist()
            theirs, mine = np.exp(row.said.topk_logprobs[t].astype(np.float64)), q[t, ids]
            theirs, mine = (np.append(x, 1.0 - x.sum()) for x in (theirs, mine))
            found["kl_teacher"].append(float((mine * np.log(mine / theirs)).sum()))
            found["kl_teacher_forward"].append(float((theirs * np.log(theirs / mine)).sum()))
            found["top_k_overlap"].append(len({*ids} & {*q[t].argsort()[::-1][:K].tolist()}) / K)
    return found


def held_out(batch: TrainingBatch) -> TrainingBatch:
    """With tokens that are not trained on."""
    rows = [replace(r, train_mask=np.arange(len(r.tokens)) % 3 != 1) for r in batch.rows]
    return replace(batch, rows=rows)


@pytest.mark.parametrize("micro", [20, 1000])
def test_kls_and_overlap_of_a_stored_top_k_against_whole_logits(micro: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """arXiv 2604.00626, procedure 7, of a loss that reads the teacher's top k and not the sampled token."""
    monkeypatch.setitem(head_module.LOGIT_ELEMENTS, "cpu", 30)
    batch = held_out(taught(random_batch(7), tiny(seed=5)))
    found, expected = stepped(gkd().model_copy(update={"micro_tokens": micro}), batch), by_hand(batch)
    for name, values in expected.items():
        assert found[name] == pytest.approx(np.mean(values), abs=1e-6), name
    assert 0.1 < found["top_k_overlap"] < 0.9
    same = stepped(gkd(), taught(random_batch(7), tiny()))
    assert (same["kl_teacher"], same["top_k_overlap"]) == (pytest.approx(0.0, abs=1e-6), 1.0)


def test_the_overlap_is_of_a_bounded_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = taught(random_batch(7, length=5), tiny(seed=5))
    monkeypatch.setattr(teacher_gap, "TOKENS", 12)
    each = by_hand(batch)["top_k_overlap"]
    found = stepped(gkd().model_copy(update={"micro_tokens": 1000}), batch)
    # One pass reads the rows from the longest on, so which tokens are looked at is its order: a third of the 35.
    assert found["top_k_overlap"] * 12 * K == pytest.approx(round(found["top_k_overlap"] * 12 * K))
    assert min(each) <= found["top_k_overlap"] <= max(each)


def test_looking_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights after a step with and without what is measured beside, to the last bit."""
    batch, moved, seen = taught(random_batch(7), tiny(seed=5)), [], []
    for looks in (True, False):
        if not looks:
            monkeypatch.setattr(module, "overlap_observer", lambda *_: None)
            monkeypatch.setattr(module, "kl_over_top_k", lambda *_: {})
        policy = tiny()
        _, metrics = update(policy, None, None, batch, gkd(), TrainState(seed=0))
        moved.append([p.detach().clone() for p in policy.parameters()])
        seen.append("top_k_overlap" in {m.name for m in metrics})
    assert seen == [True, False]
    assert all(torch.equal(a, b) for a, b in zip(*moved, strict=True))


def test_renormalised_columns_have_no_kl() -> None:
    """Log-probs over T are those at T but for a constant, so what the rest has is unknown; the overlap is not."""
    estimate = {"kind": "topk", "outside": "renormalise"}
    found = stepped(gkd(estimate=estimate, temperature=1.5), taught(random_batch(5), tiny(seed=5)))
    assert "top_k_overlap" in found
    assert "kl_teacher" not in found


@pytest.mark.parametrize("name", ["gkd", "distillm", "distillm-2", "todi", "akl"])
def test_recipes_that_read_a_top_k_log_all_three(name: str) -> None:
    train = load_recipe(name, {}).train
    found = stepped(train, taught(random_batch(4, route="policy"), tiny(seed=5)))
    assert {"kl_teacher", "kl_teacher_forward", "top_k_overlap"} <= found.keys()
    assert found["kl_teacher"] > 0.0


def test_an_empty_rollout_is_0_and_stays_in_the_mean_over_rows() -> None:
    """OPSD, arXiv 2601.18734, its reductions: three rows and an empty one move by 3/4 of what three do."""
    batch = taught(random_batch(3), tiny(seed=5))
    nothing = Said(*(np.zeros(0, np.float32),) * 2, np.zeros((0, K), np.int32), np.zeros((0, K), np.float32))
    lists = {"tokens": np.zeros(0, np.int32), "logprobs": np.zeros(0, np.float32), "train_mask": np.zeros(0, np.bool_)}
    empty = replace(batch.rows[0], rollout_id="empty", said=nothing, **lists)
    objective = {"aggregate": {"kind": "seq_mean_token_mean", "empty": "zero"}, "distill": gkd().objective.distill}
    train = TrainConfig.model_validate({"objective": objective})
    losses = [stepped(train, replace(batch, rows=[*batch.rows, *more]))["loss"] for more in ([], [empty])]
    assert losses[1] == pytest.approx(0.75 * losses[0], rel=1e-12)
    assert losses[0] > 0.0
