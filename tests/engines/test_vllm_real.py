"""vLLM itself, in the environment that `make vllm` makes: log-probs, updates in place, stops, adapters, whole runs.

One engine serves most of these tests; each further one costs its start, half a minute or more.
"""

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from rollway.config.policies import CharTokenizer, HuggingFacePolicy, LoraConfig, ScratchPolicy
from rollway.config.rollouts import Sampling, VllmEngine
from rollway.engines import Completion, Request, serving, vllm_launch
from rollway.errors import RollwayError
from rollway.policies import causal_lm, manifest
from rollway.policies.causal_lm import CausalPolicy
from rollway.policies.logprobs import Row, token_logprobs
from workflow.project import ROOT, Project


def _installed() -> bool:
    try:
        vllm_launch.find_python()
    except RollwayError:
        return False
    return True


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not _installed(), reason="vLLM's own environment is not there: run `make vllm`"),
]

ENGINE = VllmEngine(enforce_eager=True, kv_cache=0.25, max_num_seqs=128)
ALPHABET = "0123456789+-=abcdefghij\n"
SCRATCH = ScratchPolicy(
    layers=3, hidden=128, heads=4, kv_heads=2, intermediate=256, context=128, tokenizer=CharTokenizer(alphabet=ALPHABET)
)
REQUESTS = [Request(f"r{n}", [5 + n % 20, 6, 7, 8 + n // 20] + [9] * (n % 7)) for n in range(100)]


@pytest.fixture(scope="module", autouse=True)
def workflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One workflow, whose engine outlives each test."""
    folder = tmp_path_factory.mktemp("workflow") / ".worker"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROLLWAY_ENGINES", f"{os.getpid()}:{folder}")
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        yield folder
        vllm_launch.stop_all(folder)


def disturb(policy: CausalPolicy, seed: int, scale: float) -> None:
    """Random weights alone give flat distributions, in which mistakes would not show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.dim() == 2:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def write(folder: Path, policy: CausalPolicy) -> Path:
    entry = causal_lm.save(folder, policy)
    manifest.write_manifest(folder / "policy.json", manifest.PolicyManifest("causal-lm", {"main": entry}))
    return folder / "policy.json"


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three policies with tied embeddings, as most small models have them; `near` is one small update from `a`."""
    folder = tmp_path_factory.mktemp("policies")
    made = {}
    for name, steps in {"a": [(1, 0.15)], "b": [(2, 0.15)], "near": [(1, 0.15), (3, 1e-3)]}.items():
        policy = causal_lm.build(SCRATCH, [], seed=0, device="cpu")
        policy.model.config.tie_word_embeddings = True
        policy.model.tie_weights()
        for seed, scale in steps:
            disturb(policy, seed, scale)
        made[name] = write(folder / name, policy)
    return made


def logprobs(policy: Path, requests: list[Request], done: list[Completion], temperature: float) -> list[list[float]]:
    model = causal_lm.load(policy, device="cpu").model
    rows = [Row(request.prompt_tokens, c.tokens) for request, c in zip(requests, done, strict=True)]
    found = token_logprobs(model, rows, temperature=temperature, micro_tokens=4096).logp
    return [found[i, : len(c.tokens)].tolist() for i, c in enumerate(done)]


def gap(policy: Path, requests: list[Request], done: list[Completion], temperature: float = 1.0) -> float:
    """Largest |engine - trainer| in nats."""
    expected = logprobs(policy, requests, done, temperature)
    return max(float(np.abs(np.array(c.logprobs) - e).max()) for c, e in zip(done, expected, strict=True))


def pid(folder: Path) -> int:
    return int(json.loads((folder / "vllm-cpu.json").read_text())["pid"])


def test_log_probs_of_100_rollouts_are_the_trainers(
    policies: dict[str, Path], record_property: Callable[[str, object], None]
) -> None:
    with serving(ENGINE, policies["a"]) as served:
        done = served.draw(REQUESTS, Sampling(temperature=0.8, max_tokens=64), seed=1)
    worst = gap(policies["a"], REQUESTS, done, 0.8)
    record_property("max_difference_nats", worst)
    print(f"max |vLLM - trainer| over {sum(len(c.tokens) for c in done)} tokens of 100 rollouts: {worst:.2g} nats")
    assert {c.finish for c in done} == {"stop", "length"}
    assert worst < 5e-5


def test_an_update_in_place_is_really_seen(policies: dict[str, Path], workflow: Path) -> None:
    pids = []
    for name in ("a", "b", "a", "near", "b"):
        with serving(ENGINE, policies[name]) as served:
            done = served.draw(REQUESTS, Sampling(max_tokens=16), seed=2)
        pids.append(pid(workflow))
        gaps = {other: gap(policies[other], REQUESTS, done) for other in policies}
        print(name, gaps)
        assert gaps[name] < 5e-5
        assert all(gaps[other] > 10 * gaps[name] for other in policies if other != name)
    assert len(set(pids)) == 1, "one engine for all"


def test_tokens_depend_on_seed_and_rollout_alone(policies: dict[str, Path]) -> None:
    sampling = Sampling(max_tokens=24)
    with serving(ENGINE, policies["a"]) as served:
        whole = served.draw(REQUESTS, sampling, seed=5)
        turned = served.draw(REQUESTS[::-1], sampling, seed=5)[::-1]
        few = served.draw(REQUESTS[10:13], sampling, seed=5)
        other = served.draw(REQUESTS, sampling, seed=6)
    assert [c.tokens for c in whole] == [c.tokens for c in turned]
    assert [c.tokens for c in whole[10:13]] == [c.tokens for c in few]
    assert [c.tokens for c in whole] != [c.tokens for c in other]


def test_greedy_takes_the_likeliest_at_temperature_one(policies: dict[str, Path]) -> None:
    with serving(ENGINE, policies["a"]) as served:
        done = served.draw(REQUESTS[:20], Sampling(temperature=0.0, max_tokens=16), seed=0)
    assert gap(policies["a"], REQUESTS[:20], done) < 5e-5
    for request, c in zip(REQUESTS[:20], done, strict=True):
        scores = logits(policies["a"], request, c)
        assert scores.argmax(-1).tolist() == c.tokens


def logits(policy: Path, request: Request, done: Completion) -> Tensor:
    """[T, V] from which each token of the completion is drawn."""
    model = causal_lm.load(policy, device="cpu").model
    with torch.no_grad():
        whole = model(torch.tensor([[*request.prompt_tokens, *done.tokens]])).logits[0]
    return whole[len(request.prompt_tokens) - 1 : -1]


def test_log_probs_are_those_of_the_truncated_distribution(policies: dict[str, Path]) -> None:
    sampling = Sampling(temperature=0.7, top_k=5, top_p=0.8, max_tokens=12)
    with serving(ENGINE, policies["a"]) as served:
        done = served.draw(REQUESTS[:20], sampling, seed=0)
    for request, c in zip(REQUESTS[:20], done, strict=True):
        scores = logits(policies["a"], request, c) / 0.7
        order = scores.argsort(-1, descending=True)
        probability = scores.gather(-1, order)[:, :5].softmax(-1)
        # The likeliest tokens whose probabilities before them do not reach top_p.
        kept = probability.cumsum(-1) - probability < 0.8
        probability = torch.where(kept, probability, 0.0)
        expected = (probability / probability.sum(-1, keepdim=True)).log()
        for t, token in enumerate(c.tokens):
            place = order[t, :5].tolist().index(token)
            assert c.logprobs[t] == pytest.approx(expected[t, place].item(), abs=1e-4)


def test_stop_texts_and_stop_tokens_end_completions(policies: dict[str, Path]) -> None:
    plain = Sampling(max_tokens=48)
    with serving(ENGINE, policies["a"]) as served:
        tokenizer = served.reader.tokenizer
        whole = served.draw(REQUESTS, plain, seed=7)
        stops = ["12", "=", "<|user|>"] if "<|user|>" in tokenizer.all_special_tokens else ["12", "="]
        cut = served.draw(REQUESTS, plain.model_copy(update={"stop": stops}), seed=7)
    texts = [text for text in stops if text not in tokenizer.all_special_tokens]
    ids = {*served.reader.stop_ids, *(tokenizer.convert_tokens_to_ids(t) for t in stops if t not in texts)}
    ended = 0
    for c, w in zip(cut, whole, strict=True):
        # The same noise: what is cut is the beginning of what would have been.
        assert w.tokens[: len(c.tokens)] == c.tokens
        read = tokenizer.decode(c.tokens, skip_special_tokens=True)
        before = tokenizer.decode(c.tokens[:-1], skip_special_tokens=True)
        assert not any(text in before for text in texts) and not ids & set(c.tokens[:-1])
        stopped = any(text in read for text in texts) or c.tokens[-1] in ids
        assert (c.finish == "stop") == stopped
        ended += any(text in read for text in texts)
    assert ended > 5


def test_a_completion_ends_with_the_context(policies: dict[str, Path]) -> None:
    long = [Request("long", [5 + n % 20 for n in range(124)]), Request("short", [5, 6])]
    with serving(ENGINE, policies["a"]) as served:
        done = served.draw(long, Sampling(max_tokens=40), seed=0)
        assert len(done[0].tokens) <= 4 and gap(policies["a"], long, done) < 5e-5
        with pytest.raises(RollwayError, match="has 128 tokens, vLLM has room for 128"):
            served.draw([Request("full", [5] * 128)], Sampling(max_tokens=4), seed=0)


def test_the_check_refuses_what_it_is_not_told_to_bear(policies: dict[str, Path], workflow: Path) -> None:
    """A tolerance below rounding: updated in place, started anew, and then refused."""
    strict = ENGINE.model_copy(update={"logprob_tolerance": 1e-9})
    with (
        pytest.raises(RollwayError, match="logprob_tolerance allows 1e-09"),
        serving(strict, policies["b"]) as served,
    ):
        served.draw(REQUESTS, Sampling(max_tokens=8), seed=0)


def test_adapters_are_applied_and_changed(tmp_path: Path, workflow: Path) -> None:
    base = causal_lm.build(SCRATCH, [], seed=0, device="cpu")
    disturb(base, 1, 0.15)
    causal_lm.save(tmp_path / "base", base)
    config = HuggingFacePolicy(name=str(tmp_path / "base/weights/main"), lora=LoraConfig(rank=4, alpha=8.0))
    made = {}
    for seed, name in enumerate(("one", "two")):
        policy = causal_lm.build(config, [], seed=0, device="cpu")
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in policy.model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        made[name] = write(tmp_path / name, policy)
    pids = []
    for name in ("one", "two", "one"):
        with serving(ENGINE, made[name]) as served:
            done = served.draw(REQUESTS, Sampling(max_tokens=16), seed=3)
        pids.append(pid(workflow))
        gaps = {other: gap(made[other], REQUESTS, done) for other in made}
        print(name, gaps)
        assert gaps[name] < 5e-5 and gaps["two" if name == "one" else "one"] > 0.1
    assert len(set(pids)) == 1, "another adapter needs no other engine"


def test_an_engine_that_is_killed_is_one_clear_error(policies: dict[str, Path], workflow: Path) -> None:
    with serving(ENGINE, policies["a"]) as served:
        served.draw(REQUESTS[:4], Sampling(max_tokens=4), seed=0)
        for core in children(pid(workflow)):
            os.kill(core, signal.SIGKILL)
        with pytest.raises(RollwayError, match=r"died in the middle of `generate`.*finished parts are kept"):
            served.draw(REQUESTS, Sampling(max_tokens=64), seed=0)


def children(parent: int) -> list[int]:
    """Processes of an engine's group that compute."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != parent:
            try:
                same = os.getpgid(int(entry.name)) == parent
                text = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if same and b"tracker" not in text:
                found.append(int(entry.name))
    return found


def test_several_rounds_through_one_engine(tmp_path: Path) -> None:
    """The example of the docs, with Snakemake, the warm worker and truncated importance sampling."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "config/examples/vllm_tiny.yaml").read_text())
    config["results"] = "results"
    config["defaults"]["rounds"] = 2
    project = Project(tmp_path, config)
    output = project.snakemake("all_rollouts", "all_evals", timeout=1800).stdout
    assert "vLLM took on the policy in place" in output
    log = (tmp_path / "results/.worker/vllm-cpu.log").read_text()
    assert len(re.findall("ready after", log)) == 1, "one start for all rounds"
    for r in (1, 2):
        metrics = json.loads((tmp_path / f"results/tis-s0/r{r:04d}/metrics.json").read_text())["metrics"]
        values = {row["name"]: row["value"] for row in metrics}
        # The engine's rounding is not the trainer's, and truncated importance sampling weighs by their ratio.
        assert 0.0 < values["gap_max"] < 1e-3 and 0.999 < values["ess"] <= 1.0
        assert 0.0 < abs(values["correction/mean"] - 1.0) < 1e-3
    assert not list((tmp_path / "results/.worker").glob("*.socket"))
