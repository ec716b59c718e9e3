"""A warm-up that reads some demonstrations as a teacher would: in the words of its context, without mistakes."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pydantic import ValidationError

from rollway.config.policies import CharTokenizer, PrivilegedSft, ScratchPolicy, SftConfig, WarmupConfig
from rollway.config.scorers import TeacherScorer
from rollway.errors import RollwayError
from rollway.policies import causal_lm
from rollway.runtime.specs import WarmupSpec, dump
from rollway.scorers.contexts import Private, worded
from rollway.scorers.rows import Row
from rollway.stages import warmup
from rollway.store import parquet
from rollway.training import sft as module

TINY = ScratchPolicy(
    layers=1, hidden=16, heads=2, kv_heads=1, intermediate=16, context=32, tokenizer=CharTokenizer(alphabet="0123+=?>")
)
SUMS = {"1+1=": "2", "1+2=": "3", "2+1=": "3", "0+1=": "1"}
TOLD = {"prompt": "{prompt}{sibling}?"}


def asked(**meta: Any) -> list[tuple[dict[str, Any], list[dict[str, str]], dict[str, Any]]]:
    return [
        (
            {"prompt_id": question, "task": "sums", "answer": answer},
            [{"role": "user", "content": question}],
            {"format": "plain", "demonstration": answer, **meta},
        )
        for question, answer in SUMS.items()
    ]


@pytest.fixture(scope="module")
def policy() -> causal_lm.CausalPolicy:
    built = causal_lm.build(TINY, [], 0, device="cpu")
    built.model.requires_grad_(True)
    return built


def read(policy: causal_lm.CausalPolicy, ids: Any) -> str:
    return "".join(policy.tokenizer.convert_ids_to_tokens(list(ids)))


@pytest.mark.parametrize(("share", "count"), [(0.5, 4), (0.2, 1), (0.75, 12)])
def test_the_share_of_all_that_is_shown(policy: causal_lm.CausalPolicy, share: float, count: int) -> None:
    """Prompts take turns, and go round again where the share is above one half."""
    found = warmup.told(PrivilegedSft.model_validate({"context": [TOLD], "share": share}), asked(), policy, 0)
    assert len(found) == count
    questions = list(SUMS)
    for number, demonstration in enumerate(found):
        question = questions[number % 4]
        assert read(policy, demonstration.prompt_tokens) == f"{question}{SUMS[question]}?"
        assert (demonstration.text, demonstration.noisy) == (SUMS[question], False)


def test_they_are_the_ids_that_a_scorer_would_make(policy: causal_lm.CausalPolicy) -> None:
    contexts = [TOLD, {"prompt": "{meta.hint}{prompt}", "prefix": ">"}]
    privileged = PrivilegedSft.model_validate({"context": contexts, "share": 0.5})
    scorer = TeacherScorer.model_validate({"model": {"kind": "live"}, "context": contexts, "needs": ["exact"]})
    rows = asked(hint="0")
    found = warmup.told(privileged, rows, policy, 0)
    reader = causal_lm.reader_of(policy)
    for number, (prompt, messages, meta) in enumerate(rows):
        row = Row("r", prompt["prompt_id"], "g", 0, "x", 1, "stop", [1], "sums", messages, prompt["answer"], meta)
        private = Private(SUMS[prompt["prompt_id"]], None, False, {"exact": 0.0})
        ids = worded([scorer.context[number % 2]], row, private, reader, [])
        assert ids is not None
        assert list(found[number].prompt_tokens) == ids[1]


def test_their_demonstrations_have_no_mistakes(policy: causal_lm.CausalPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[bool, set[str]] = {True: set(), False: set()}

    def spy(model: Any, rows: Any) -> float:
        for row in rows:
            prompt = read(policy, row.prompt_tokens)
            seen[prompt.endswith("?")].add(f"{prompt[:4]}{read(policy, row.tokens[:-1])}")
        return 1.0

    monkeypatch.setattr(module, "_accumulate", spy)
    monkeypatch.setattr(module, "gradient_norm", lambda optimizer: 1.0)
    monkeypatch.setattr(module, "step", lambda *given: None)
    privileged = PrivilegedSft.model_validate({"context": [TOLD], "share": 0.5})
    plain = [
        module.Demonstration(
            row["prompt_id"], causal_lm.encode_prompt(policy, messages, "plain"), meta["demonstration"]
        )
        for row, messages, meta in asked()
    ]
    config = SftConfig.model_validate({"steps": 8, "batch": 8, "noise": {"wrong_share": 1.0}})
    module.sft(policy.model, policy.tokenizer, [*plain, *warmup.told(privileged, asked(), policy, 0)], config, seed=0)
    right = {question + answer for question, answer in SUMS.items()}
    assert seen[True] == right
    assert seen[False].isdisjoint(right)


def test_a_field_that_no_prompt_has_is_named(policy: causal_lm.CausalPolicy) -> None:
    privileged = PrivilegedSft.model_validate({"context": [{"prompt": "{meta.hint}"}]})
    with pytest.raises(RollwayError, match=r"warm-up: sft.privileged.context, prompt 1\+1=: .*no field 'meta.hint'"):
        warmup.told(privileged, asked(), policy, 0)
    for name in ("scores.exact", "feedback"):
        with pytest.raises(ValidationError, match="a warm-up has no rollouts"):
            PrivilegedSft.model_validate({"context": [{"prompt": f"{{{name}}}"}]})


def test_an_answer_and_what_is_said_of_it(policy: causal_lm.CausalPolicy) -> None:
    """SD-Zero's reviser: of the answers that it reads the stated share is wrong and called so; what it learns to
    write behind them is right, and the same seed draws the same mistakes."""
    context = {"prefix": "{completion}{verdict}", "right": "+", "wrong": "?"}
    chosen = {"context": [context], "share": 0.98, "noise": {"wrong_share": 0.5}}
    privileged = PrivilegedSft.model_validate(chosen)
    found = warmup.told(privileged, asked(), policy, 0)
    wrong = 0
    for number, demonstration in enumerate(found):
        question = list(SUMS)[number % 4]
        seen = read(policy, demonstration.prompt_tokens)
        assert seen[:4] == question
        assert seen[5:] == ("+" if seen[4] == SUMS[question] else "?")
        assert (demonstration.text, demonstration.noisy) == (SUMS[question], False)
        wrong += seen[4] != SUMS[question]
    assert 0.4 < wrong / len(found) < 0.6
    texts = [read(policy, d.prompt_tokens) for d in found]
    assert texts == [read(policy, d.prompt_tokens) for d in warmup.told(privileged, asked(), policy, 0)]
    assert texts != [read(policy, d.prompt_tokens) for d in warmup.told(privileged, asked(), policy, 1)]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"context": [TOLD], "noise": {"wrong_share": 0.5}}, "privileged.noise has no effect"),
        (
            {"context": [{"prompt": "{sibling}{verdict}", "right": "a", "wrong": "b"}]},
            "{verdict} is about {completion}",
        ),
    ],
)
def test_options_of_what_is_told_that_do_not_go_together(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        PrivilegedSft.model_validate(given)


def test_through_the_stage(tmp_path: Path) -> None:
    """Both kinds are trained on; without `privileged` the spec is what it was."""
    rows = [
        {**row, "split": "train", "messages": json.dumps(messages), "meta": json.dumps(meta)}
        for row, messages, meta in asked()
    ]
    parquet.write(tmp_path / "train.parquet", pa.Table.from_pylist(rows), "prompts")
    sft: dict[str, Any] = {"steps": 60, "batch": 8, "lr": 1e-2, "lr_warmup_steps": 0}
    told = {**sft, "privileged": {"context": [TOLD], "share": 0.5}}
    config = WarmupConfig.model_validate({"policy": TINY.model_dump(), "task": "sums", "sft": told})
    spec = WarmupSpec(version=1, warmup=config, seed=0)
    warmup.run(spec, prompts=[tmp_path / "train.parquet"], policy=tmp_path / "w/policy.json")
    trained = causal_lm.load(tmp_path / "w/policy.json", "main")
    from rollway.policies.logprobs import Row as Fed
    from rollway.policies.logprobs import token_logprobs

    ids = [
        Fed(
            causal_lm.encode_prompt(trained, [{"role": "user", "content": f"{q}{a}?"}], "plain"),
            trained.tokenizer.convert_tokens_to_ids(list(a)),
        )
        for q, a in SUMS.items()
    ]
    found = token_logprobs(trained.model, ids, temperature=1.0, micro_tokens=4096).logp
    assert float(found.exp().min()) > 0.5
    plain = WarmupConfig.model_validate({"policy": TINY.model_dump(), "task": "sums", "sft": sft})
    assert "privileged" not in dump(WarmupSpec(version=1, warmup=plain, seed=0))
