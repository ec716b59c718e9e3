"""How decoding is organised does not show in what is drawn: threads, memory, shared beginnings, CUDA graphs."""

import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch

from engines.full_forwards import assert_same, requests, slow
from rollway.config.policies import CharTokenizer, ScratchPolicy
from rollway.config.rollouts import Sampling
from rollway.engines import Request, cuda_graphs, kv_cache, transformers_engine
from rollway.engines.transformers_engine import generate
from rollway.errors import RollwayError
from rollway.policies import causal_lm
from rollway.policies.logprobs import Row, decoder, token_logprobs
from rollway.sampling import draw


@pytest.fixture
def two_threads(monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(transformers_engine, "ROWS_PER_THREAD", 8)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("group", [1, 4, 40])
def test_threads_draw_the_same(policy, monkeypatch, two_threads, group):
    wanted, sampling = requests(40, group=group), Sampling(max_tokens=20)
    parts = []
    attempt = transformers_engine._attempt
    monkeypatch.setattr(
        transformers_engine,
        "_attempt",
        lambda w, d, order, batch: (parts.append(order), attempt(w, d, order, batch))[1],
    )
    together = generate(policy, wanted, sampling, batch=24, seed=0, entropy=True)
    assert [len(part) for part in parts] == [20, 20]
    assert generate(policy, wanted, sampling, batch=24, seed=0, entropy=True) == together, "whichever thread is faster"
    assert torch.get_num_threads() == 2
    monkeypatch.setattr(transformers_engine, "ROWS_PER_THREAD", 64)
    alone = generate(policy, wanted, sampling, batch=24, seed=0, entropy=True)
    assert len(parts) == 5
    assert_same(together, alone)


def test_shares_hold_every_request_once():
    prompts = [(7, 8)] * 3 + [(9,)] * 5 + [(7,)] * 4 + [(8,)] * 2
    for workers in (2, 3, 5):
        shares = transformers_engine._shares(prompts, workers)
        assert sorted(k for share in shares for k in share) == list(range(14))
        assert all(share == sorted(share) for share in shares)
    first, second = transformers_engine._shares(prompts, 2)
    assert {prompts[k] for k in first}.isdisjoint(prompts[k] for k in second)


def test_an_error_in_a_thread_is_the_calls_error(policy, monkeypatch, two_threads):
    real, failed, calls = draw.draw, threading.Event(), Counter()

    def drawing(*arguments):
        name = threading.current_thread().name
        calls[name] += 1
        if name.endswith("_0"):
            assert failed.wait(60)
            time.sleep(0.01)
        elif calls[name] == 3:
            failed.set()
            raise ValueError("from a thread")
        return real(*arguments)

    monkeypatch.setattr(draw, "draw", drawing)
    with pytest.raises(ValueError, match="from a thread"):
        generate(policy, requests(32), Sampling(max_tokens=70), batch=32, seed=0)
    assert torch.get_num_threads() == 2
    assert min(calls.values()) == 3
    assert max(calls.values()) < 60, "the other thread went on"


def hungry(monkeypatch, most, error=None):
    """Steps of more rows than `most` ask for more memory than there is."""
    real, sizes = draw.draw, []

    def drawing(logits, *rest):
        sizes.append(len(logits))
        if len(logits) > most:
            if error is not None:
                raise error
            torch.empty(10**15)
        return real(logits, *rest)

    monkeypatch.setattr(draw, "draw", drawing)
    return sizes


def while_recording():
    """How memory that runs out in the middle of recording a CUDA graph comes out of torch."""
    try:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried ...")
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    "error", [None, torch.OutOfMemoryError("CUDA out of memory. Tried ..."), MemoryError(), while_recording()]
)
def test_out_of_memory_halves_the_batch(policy, monkeypatch, capsys, error):
    wanted, sampling = requests(48), Sampling(max_tokens=12)
    expected = generate(policy, wanted, sampling, batch=48, seed=0)
    sizes = hungry(monkeypatch, 7, error)
    assert_same(generate(policy, wanted, sampling, batch=48, seed=0), expected)
    said = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
    assert "decoding 48 rollouts at once" in said[0]
    assert "24 at once; lower rollout.engine.batch" in said[0]
    assert 2 <= len(said) <= 3
    assert max(sizes[-20:]) <= 7


def test_rows_that_had_ended_are_kept(policy, monkeypatch):
    """One step in the middle runs out of memory: what had ended by then is not drawn again."""
    wanted, sampling = requests(48), Sampling(max_tokens=30)
    expected = generate(policy, wanted, sampling, batch=48, seed=0)
    starts = []
    real, attempt = kv_cache.SlotCache.step, transformers_engine._attempt

    def step(self, tokens, lengths):
        if len(starts) == 1 and len(tokens) < 30:
            raise MemoryError
        return real(self, tokens, lengths)

    def watched(work, drawn, order, batch):
        starts.append((len(order), batch))
        return attempt(work, drawn, order, batch)

    monkeypatch.setattr(kv_cache.SlotCache, "step", step)
    monkeypatch.setattr(transformers_engine, "_attempt", watched)
    assert_same(generate(policy, wanted, sampling, batch=48, seed=0), expected)
    (every, _), (left, smaller) = starts
    assert (every, smaller) == (48, 24)
    assert 0 < left < 30


def test_out_of_memory_for_one_row_is_one_sentence(policy, monkeypatch):
    hungry(monkeypatch, 0)
    with pytest.raises(
        RollwayError, match=r"out of memory decoding one rollout at a time.*rollout\.sampling\.max_tokens"
    ):
        generate(policy, requests(8), Sampling(max_tokens=4), batch=8, seed=0)


def test_other_errors_pass(policy, monkeypatch):
    hungry(monkeypatch, 0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"):
        generate(policy, requests(8), Sampling(max_tokens=4), batch=8, seed=0)


def test_a_common_beginning_is_encoded_once(policy, monkeypatch):
    rng = np.random.default_rng(3)
    begin = rng.integers(6, 29, 30).tolist()
    wanted = [Request(f"r{i}", begin + rng.integers(6, 29, 1 + i % 3).tolist()) for i in range(12)]
    sampling = Sampling(max_tokens=12)
    encoded = []
    hook = policy.model.get_input_embeddings().register_forward_hook(lambda m, i, o: encoded.append(o.shape[:2]))
    got = generate(policy, wanted, sampling, batch=12, seed=0)
    hook.remove()
    assert (1, 30) in encoded
    assert max(rows * tokens for rows, tokens in encoded) <= 33
    for request, completion in zip(wanted, got, strict=True):
        tokens, logprobs = slow(policy, request, sampling, 0)
        assert completion.tokens == tokens
        assert np.allclose(completion.logprobs, logprobs, atol=1e-5)


def test_prompts_of_which_one_begins_the_other():
    assert kv_cache._common(torch.tensor([[1, 2, 3], [1, 2, 3]])) == 2, "the last token is always encoded"
    assert kv_cache._common(torch.tensor([[1, 2, 3], [1, 9, 3]])) == 1
    assert kv_cache._common(torch.tensor([[1, 2, 3]])) == 0


def test_rows_at_the_end_of_the_context_wait_for_the_others(policy):
    """One row of many fills its context and stays in the batch for a while: nothing is computed beyond it."""
    context = policy.model.config.max_position_embeddings
    wanted = [Request("long", [7] * (context - 3)), *requests(60)]
    sampling = Sampling(max_tokens=60)
    completions = generate(policy, wanted, sampling, batch=61, seed=0)
    assert len(completions[0].tokens) <= 3
    assert_same(completions[1:], generate(policy, wanted[1:], sampling, batch=61, seed=0))


def test_a_large_vocabulary_is_drawn_from_in_slices(monkeypatch):
    logits = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    uniforms = torch.rand(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for sampling in (Sampling(), Sampling(temperature=0.0), Sampling(top_k=5, top_p=0.9, temperature=0.7)):
        whole = draw.draw(logits, uniforms, sampling)
        for elements in (1, 40 * 7, 40 * 50):
            with monkeypatch.context() as patch:
                patch.setitem(draw.ELEMENTS, "cpu", elements)
                tokens, logp = draw.draw(logits, uniforms, sampling)
                spread = draw.entropy(logits)
            assert torch.equal(tokens, whole[0])
            assert torch.equal(logp, whole[1])
            assert torch.equal(spread, draw.entropy(logits))


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Elements of the largest tensor that any operation makes of `logits`, views of it aside."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if not any(name in str(function) for name in ("split", "slice")):
            parts = made if isinstance(made, tuple | list) else [made]
            self.elements = max([self.elements, *(x.numel() for x in parts if isinstance(x, torch.Tensor))])
        return made


def test_slices_bound_what_a_draw_and_an_entropy_take(monkeypatch):
    monkeypatch.setitem(draw.ELEMENTS, "cpu", 40 * 7)
    logits, uniforms = torch.randn(50, 40), torch.rand(50, dtype=torch.float64)
    for sampling in (Sampling(), Sampling(temperature=0.0), Sampling(top_k=5, top_p=0.9)):
        with Largest() as seen:
            draw.draw(logits, uniforms, sampling)
            draw.entropy(logits)
        assert seen.elements == 40 * 7


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=0.0), Sampling(top_k=5), Sampling(top_p=0.9)], ids=str
)
def test_weights_that_are_not_finite_are_named_with_the_rollout(peaked, config, sampling, broken):
    policy = peaked(config)
    with torch.no_grad():
        policy.model.model.norm.weight.fill_(broken)
    wanted = requests(4)
    with pytest.raises(RollwayError, match=r"rollout r\d: the log-prob of its token 1 is not finite"):
        generate(policy, wanted, sampling.model_copy(update={"max_tokens": 3}), batch=4, seed=0)


def test_one_row_that_is_not_finite_is_the_one_named(policy, monkeypatch):
    """The head's first product gives a NaN in the row of the second request only."""
    real, seen = draw.draw, []

    def drawing(logits, *rest):
        seen.append(len(logits))
        if len(seen) == 1:
            logits[1, 3] = float("nan")
        return real(logits, *rest)

    monkeypatch.setattr(draw, "draw", drawing)
    wanted = [Request("left", [7, 8]), Request("right", [7, 9])]
    with pytest.raises(RollwayError, match="rollout right: "):
        generate(policy, wanted, Sampling(max_tokens=3), batch=2, seed=0)


class Unrecorded:
    """Takes the shapes of CUDA graphs, and runs the step.

    A replay runs no Python: what the step sets in the cache's layers is put back, unless the shape is new.
    """

    shapes: set = set()

    def __init__(self):
        self.recorded = set()

    def __call__(self, step, tokens, lengths, view):
        key = (len(tokens), view)
        before = [vars(layer).copy() for layer in step.__self__.layers]
        states = step(tokens, lengths, view)
        if key in self.recorded:
            for layer, attributes in zip(step.__self__.layers, before, strict=True):
                vars(layer).update(attributes)
        self.recorded.add(key)
        self.shapes.add(key)
        return states

    def forget(self):
        self.recorded.clear()


@pytest.fixture
def unrecorded(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "recordable", lambda model: True)
    monkeypatch.setattr(cuda_graphs, "GraphedSteps", Unrecorded)
    monkeypatch.setattr(cuda_graphs, "TOKENS", 16)
    monkeypatch.setattr(Unrecorded, "shapes", set())


@pytest.mark.parametrize("own", [False, True])
def test_the_shapes_of_graphs_change_nothing(policy, monkeypatch, request, own):
    """What a GPU would record, run on the CPU: lengths rounded up, rows dropped by halves."""
    wanted, sampling = requests(48), Sampling(max_tokens=40)
    expected = generate(policy, wanted, sampling, batch=48, seed=0)
    request.getfixturevalue("unrecorded")
    monkeypatch.setattr(kv_cache, "FIRST_TOKENS", 8)
    if own:
        monkeypatch.setattr(transformers_engine, "fused", lambda model: None)
    assert_same(generate(policy, wanted, sampling, batch=48, seed=0), expected)
    assert {view % 16 for _, view in Unrecorded.shapes} == {0}
    assert len({rows for rows, _ in Unrecorded.shapes}) <= 6


def test_rows_moved_after_a_replay_take_all_their_keys_along(policy, unrecorded):
    """What was recorded last looked at fewer tokens than the step that is replayed before rows are dropped."""
    rows = torch.from_numpy(np.random.default_rng(0).integers(6, 28, (4, 46)))
    slots, kept = torch.arange(4), [3, 1]
    with torch.inference_mode():
        cache = kv_cache.make(policy.model, 50, 40, None, slots=True)
        for prompt in (40, 4, 40):
            cache.prefill(rows[:, :prompt], slots, slots, 4)
            for length in range(prompt, prompt + 5):
                cache.step(rows[:, length], np.full(4, length))
        assert Unrecorded.shapes == {(4, 48), (4, 16)}
        cache.keep(np.array(kept))
        states = cache.step(rows[kept, 45], np.full(2, 45))
        alone = decoder(policy.model)(input_ids=rows[kept]).last_hidden_state[:, -1]
    assert torch.allclose(states, alone, atol=1e-5)


def long_then_short(count: int, tokens: int, more: int, short: int) -> list[Request]:
    rng = np.random.default_rng(0)
    sizes = [tokens] * count + [short] * more
    return [Request(f"r{i}", rng.integers(6, 28, size).tolist()) for i, size in enumerate(sizes)]


@pytest.mark.gpu
def test_graphs_draw_what_the_eager_steps_draw(monkeypatch):
    config = ScratchPolicy(layers=3, context=600, tokenizer=CharTokenizer(alphabet="0123456789abcdefghijklmnop"))
    policy = causal_lm.build(config, [], seed=0, device="cuda")
    # Prompts beyond the tokens of one graph, then short ones: rows are dropped after replays of both kinds.
    wanted, sampling = long_then_short(60, 300, 140, 20), Sampling(max_tokens=290)
    assert cuda_graphs.recordable(policy.model)
    graphed = generate(policy, wanted, sampling, batch=64, seed=0)
    monkeypatch.setattr(cuda_graphs, "recordable", lambda model: False)
    eager = generate(policy, wanted, sampling, batch=64, seed=0)
    same = [a.tokens == b.tokens for a, b in zip(graphed, eager, strict=True)]
    assert np.mean(same) > 0.97, "a draw at the very edge of two tokens may fall on the other side"
    rows = [Row(r.prompt_tokens, c.tokens) for r, c in zip(wanted, graphed, strict=True)]
    full = token_logprobs(policy.model, rows, temperature=1.0, micro_tokens=8192).logp.cpu()
    for i, completion in enumerate(graphed):
        assert np.allclose(completion.logprobs, full[i, : len(completion.tokens)], atol=1e-4)
