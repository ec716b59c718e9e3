"""Sampling from a mixture of policy and teacher: by enumeration, by full forwards, in every way of decoding."""

import itertools
import math

import numpy as np
import pytest
import torch

from engines.full_forwards import assert_same, requests
from rollway.config.rollouts import Sampling
from rollway.engines import TeacherShare, kv_cache, transformers_engine
from rollway.engines.transformers_engine import generate
from rollway.errors import RollwayError
from rollway.sampling.draw import draw, entropy, mixture
from rollway.sampling.noise import keys, uniform

OWN = torch.tensor([[2.0, 1.0, 0.5, -1.0, -30.0]])
OTHER = torch.tensor([[-1.0, 0.0, 3.0, -1.0, 1.0, 7.0, 9.0]])
"""With two rows of padding."""


@pytest.mark.parametrize(("share", "temperature"), itertools.product([0.2, 0.9], [0.5, 1.0, 2.0]))
def test_a_mixture_by_enumeration(share, temperature):
    p = [math.exp(x / temperature) for x in OTHER[0, :5].tolist()]
    q = [math.exp(x / temperature) for x in OWN[0].tolist()]
    expected = [share * a / sum(p) + (1 - share) * b / sum(q) for a, b in zip(p, q, strict=True)]
    made = (mixture(OWN, OTHER, share, temperature) / temperature).softmax(-1)[0]
    assert made.tolist() == pytest.approx(expected, abs=1e-15)
    grid = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    everywhere = (OTHER.expand(len(grid), -1), share)
    tokens, logp = draw(OWN.expand(len(grid), -1), grid, Sampling(temperature=temperature), everywhere)
    for token, probability in enumerate(expected):
        chosen = tokens == token
        assert abs(chosen.double().mean().item() - probability) < 2e-5
        assert torch.allclose(logp[chosen].exp(), torch.tensor(probability, dtype=torch.float64), atol=1e-12)


def test_a_smaller_teacher_lends_nothing_to_tokens_that_it_does_not_have():
    made = mixture(OTHER, OWN, 0.25, 1.0).softmax(-1)[0]
    assert made[5:].tolist() == pytest.approx((0.75 * OTHER.double().softmax(-1))[0, 5:].tolist(), abs=1e-15)


@pytest.fixture
def teacher(config, peaked):
    made = peaked(config.model_copy(update={"layers": 1, "hidden": 48, "heads": 6}))
    with torch.no_grad():
        made.model.get_output_embeddings().weight.neg_()
    return made


def by_full_forwards(policy, teacher, request, sampling, seed, share):
    tokens, logprobs, entropies = [], [], []
    for position in range(sampling.max_tokens):
        ids = torch.tensor([[*request.prompt_tokens, *tokens]])
        with torch.no_grad():
            own, other = (model(input_ids=ids).logits[:, -1] for model in (policy.model, teacher.model))
        t = sampling.temperature
        blend = share * (other.double() / t).softmax(-1) + (1 - share) * (own.double() / t).softmax(-1)
        u = uniform(keys(seed, [request.rollout_id]), np.array([position]))
        tokens.append(int(torch.searchsorted(blend.cumsum(-1), torch.from_numpy(u)[:, None])[0, 0]))
        logprobs.append(blend[0, tokens[-1]].log().item())
        entropies.append(entropy(own).item())
        if tokens[-1] == policy.tokenizer.eos_token_id:
            break
    return tokens, logprobs, entropies


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_completions_of_a_mixture_are_those_of_full_forwards(policy, teacher, temperature):
    sampling, wanted = Sampling(max_tokens=24, temperature=temperature), requests(24)
    found = generate(policy, wanted, sampling, batch=8, seed=3, entropy=True, teacher=TeacherShare(teacher, 0.4))
    alone = generate(policy, wanted, sampling, batch=8, seed=3)
    assert sum(a.tokens != b.tokens for a, b in zip(found, alone, strict=True)) > 12
    for request, done in zip(wanted, found, strict=True):
        tokens, logprobs, entropies = by_full_forwards(policy, teacher, request, sampling, 3, 0.4)
        assert done.tokens == tokens
        assert np.allclose(done.logprobs, logprobs, atol=1e-4)
        assert np.allclose(done.entropy, entropies, atol=1e-4)


def test_neither_batch_nor_threads_nor_caches_show(policy, teacher, monkeypatch):
    sampling, wanted, share = Sampling(max_tokens=20), requests(40), TeacherShare(teacher, 0.3)
    one = generate(policy, wanted, sampling, batch=40, seed=0, teacher=share)
    assert_same(one, generate(policy, wanted, sampling, batch=7, seed=0, teacher=share))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(transformers_engine, "ROWS_PER_THREAD", 8)
    try:
        assert_same(one, generate(policy, wanted, sampling, batch=24, seed=0, teacher=share))
    finally:
        torch.set_num_threads(before)
    make = kv_cache.make

    def equal(model, *sizes, slots):
        return make(model, *sizes, slots=slots and model is not teacher.model)

    monkeypatch.setattr(kv_cache, "make", equal)
    assert_same(one, generate(policy, wanted, sampling, batch=24, seed=0, teacher=share))


def test_a_share_of_oneself_changes_nothing(policy):
    sampling, wanted = Sampling(max_tokens=20), requests(16)
    mixed = generate(policy, wanted, sampling, batch=16, seed=0, teacher=TeacherShare(policy, 0.5))
    assert_same(mixed, generate(policy, wanted, sampling, batch=16, seed=0))


def test_the_smaller_window_ends_a_row_and_both_models_are_left_as_they_were(policy, config, peaked):
    teacher = TeacherShare(peaked(config.model_copy(update={"context": 24})), 0.2)
    models = (policy.model, teacher.policy.model)
    for model in models:
        model.train()
    try:
        found = generate(policy, requests(4), Sampling(max_tokens=60), batch=4, seed=0, teacher=teacher)
        assert all(len(r.prompt_tokens) + len(c.tokens) <= 24 for r, c in zip(requests(4), found, strict=True))
        assert all(model.training for model in models)
    finally:
        policy.model.eval()


def test_messages_say_whose_fault_it_is(policy, config, peaked, teacher):
    short = TeacherShare(peaked(config.model_copy(update={"context": 4})), 0.2)
    with pytest.raises(RollwayError, match=r"the teacher of rollout\.mix's context holds 4"):
        generate(policy, requests(8), Sampling(max_tokens=4), batch=4, seed=0, teacher=short)
    with torch.no_grad():
        teacher.model.get_output_embeddings().weight.fill_(math.nan)
    with pytest.raises(RollwayError, match=r"the teacher's weights hold NaN.*rollout\.mix\.model is damaged"):
        generate(policy, requests(4), Sampling(max_tokens=4), batch=4, seed=0, teacher=TeacherShare(teacher, 0.2))
