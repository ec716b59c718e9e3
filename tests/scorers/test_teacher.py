"""Teachers: token-level log-probs against naive forwards in float32, contexts and their offsets, refusals."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError

from rollway.config.policies import CharTokenizer, ScratchPolicy
from rollway.config.scorers import ScoreConfig, TeacherScorer
from rollway.errors import RollwayError
from rollway.policies import causal_lm
from rollway.policies.head import LOGIT_ELEMENTS
from rollway.policies.manifest import PolicyManifest, write_manifest
from rollway.runtime.specs import ScoreSpec
from rollway.scorers.teacher import check_same, table
from rollway.stages import score as stage
from rollway.store import parquet
from rollway.store.tables import ROLLOUTS, TABLES, TEACHER_COLUMNS

ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789+=> .:"
SIZE: dict[str, Any] = {"layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "intermediate": 64, "context": 48}
COMPLETIONS = {"g0": ["ab", "cdef", "a"], "g1": ["xyz", "zz"]}
RIGHT = {"g0-0": 0.0, "g0-1": 1.0, "g0-2": 1.0, "g1-0": 0.0, "g1-1": 0.0}


def built(seed: int, alphabet: str = ALPHABET, **size: int) -> causal_lm.CausalPolicy:
    config = ScratchPolicy(tokenizer=CharTokenizer(alphabet=alphabet), **{**SIZE, **size})
    policy = causal_lm.build(config, [], seed, device="cpu")
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.mul_(2.0)
    return policy


def stored(folder: Path, updates: int = 0, **named: causal_lm.CausalPolicy) -> Path:
    entries = {name: causal_lm.save(folder, policy, name) for name, policy in named.items()}
    write_manifest(folder / "policy.json", PolicyManifest("causal_lm", entries, updates=updates))
    return folder / "policy.json"


class Bench:
    """Rollouts of a small policy, and a teacher that scores them through the stage."""

    def __init__(self, root: Path, chat: bool) -> None:
        self.root = root
        self.student, self.teacher = built(0), built(1)
        self.policy = stored(root / "student", main=self.student)
        self.taught_by = stored(root / "teacher", main=self.teacher)
        self.tokenizer = self.student.tokenizer
        self.format = "chat" if chat else "plain"
        prompt = {
            "prompt_id": "p",
            "task": "t",
            "split": "train",
            "messages": json.dumps([{"role": "user", "content": "1+1="}]),
            "answer": "2",
            "meta": json.dumps({"format": self.format, "demonstration": "so 2"}),
        }
        parquet.write(root / "prompts.parquet", pa.Table.from_pylist([prompt]), "prompts")
        self.rollouts = [self.rollout(g, n, t) for g, texts in COMPLETIONS.items() for n, t in enumerate(texts)]
        self.write()

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def asked(self, text: str) -> list[int]:
        """Ids of a user's message, worded by hand."""
        if self.format == "plain":
            return self.encode(text)
        user, assistant = self.tokenizer.convert_tokens_to_ids(["<user>", "<assistant>"])
        return [user, *self.encode(text), assistant]

    def rollout(self, group: str, sample: int, text: str) -> dict[str, Any]:
        tokens = [*self.encode(text), self.tokenizer.eos_token_id]
        count = len(tokens)
        return {
            **{"rollout_id": f"{group}-{sample}", "round": 0, "pass": 0, "policy": "d", "policy_round": 0},
            **{"group_id": group, "prompt_id": "p", "sample": sample, "source": "policy", "finish": "stop"},
            **{"length": count, "engine": "transformers", "sampling": "{}", "prompt_tokens": self.asked("1+1=")},
            **{"tokens": tokens, "logprobs": [-1.0] * count, "train_mask": [n != 1 for n in range(count)]},
            **{"segments": [], "text": text},
        }

    def write(self) -> None:
        table = pa.Table.from_pylist(self.rollouts, schema=ROLLOUTS.schema())
        parquet.write(self.root / "rollouts.parquet", table, "rollouts")
        scores = [
            {
                "rollout_id": r["rollout_id"],
                "scorer": "exact",
                "reward": RIGHT.get(r["rollout_id"], 0.0),
                "components": {},
            }
            for r in self.rollouts
        ]
        schema = TABLES["scores"].schema()
        parquet.write(self.root / "exact-000.parquet", pa.Table.from_pylist(scores, schema=schema), "scores")

    def score(self, teacher: Path | None = None, policy: Path | None = None, **given: Any) -> list[dict[str, Any]]:
        config = TeacherScorer.model_validate({"model": {"kind": "warmup", "name": "big"}, **given})
        spec = ScoreSpec(
            version=1,
            scorer="wise",
            config=config,
            policy=str(policy or self.policy),
            teacher=str(teacher or self.taught_by),
        )
        out = self.root / "wise-000.parquet"
        stage.run(
            spec,
            prompts=self.root / "prompts.parquet",
            rollouts=self.root / "rollouts.parquet",
            needs=[self.root / "exact-000.parquet"] if config.needs else [],
            scores=out,
            cache=self.root,
        )
        return parquet.read(out).to_pylist()

    def naive(self, ids: Sequence[int], tokens: Sequence[int], model: Any = None) -> torch.Tensor:
        """[T, V] log-probs by one whole forward of one row."""
        with torch.no_grad():
            logits = (model or self.teacher.model)(torch.tensor([[*ids, *tokens]])).logits[0]
        assert logits.dtype == torch.float32
        return logits[len(ids) - 1 : -1].log_softmax(-1)

    def check(self, row: dict[str, Any], ids: Sequence[int], tokens: Sequence[int], model: Any = None) -> None:
        """All that is said of a row against the naive forward."""
        logp = self.naive(ids, tokens, model)
        own = logp.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert row["teacher_logprob"] == pytest.approx(own.tolist(), abs=2e-5)
        assert row["teacher_entropy"] == pytest.approx((-(logp.exp() * logp).sum(1)).tolist(), abs=2e-5)
        best = logp.topk(3)
        assert row["teacher_topk_ids"] == best.indices.tolist()
        assert np.array(row["teacher_topk_logprobs"]) == pytest.approx(best.values.numpy(), abs=2e-5)


@pytest.fixture(scope="module", params=["plain", "chat"])
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("teacher"), request.param == "chat")


@pytest.mark.parametrize("elements", [64, 2**21])
@pytest.mark.parametrize("micro_tokens", [8, 16384])
def test_the_policys_own_prompt(
    bench: Bench, elements: int, micro_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LOGIT_ELEMENTS, "cpu", elements)
    rows = bench.score(top_k=3, micro_tokens=micro_tokens)
    for row, rollout in zip(rows, bench.rollouts, strict=True):
        bench.check(row, rollout["prompt_tokens"], rollout["tokens"])
        trained = [v for v, kept in zip(row["teacher_logprob"], rollout["train_mask"], strict=True) if kept]
        assert row["reward"] == pytest.approx(np.mean(trained), abs=1e-6), "the mean over what the policy wrote"
        assert dict(row["components"])["given"] == 1.0
    assert [row["rollout_id"] for row in rows] == [r["rollout_id"] for r in bench.rollouts]


def test_only_what_is_asked_for_is_stored(bench: Bench) -> None:
    bench.score(entropy=False)
    assert pq.read_schema(bench.root / "wise-000.parquet").names == [*TABLES["scores"].names(), "teacher_logprob"]
    bench.score(top_k=2)
    assert pq.read_schema(bench.root / "wise-000.parquet").names[-4:] == list(TEACHER_COLUMNS[:4])


def test_temperature_divides_all_logits(bench: Bench) -> None:
    row = bench.score(temperature=2.0, top_k=3)[1]
    rollout = bench.rollouts[1]
    with torch.no_grad():
        logits = bench.teacher.model(torch.tensor([[*rollout["prompt_tokens"], *rollout["tokens"]]])).logits[0]
    logp = (logits[len(rollout["prompt_tokens"]) - 1 : -1] / 2.0).log_softmax(-1)
    assert row["teacher_entropy"] == pytest.approx((-(logp.exp() * logp).sum(1)).tolist(), abs=2e-5)
    assert np.array(row["teacher_topk_logprobs"]) == pytest.approx(logp.topk(3).values.numpy(), abs=2e-5)


def test_a_solution_in_the_prompt_moves_the_offset(bench: Bench) -> None:
    """OPSD's context: the teacher's prompt is longer than the policy's, and the tokens are the same."""
    rows = bench.score(top_k=3, context=[{"prompt": "{prompt} ref: {meta.demonstration}. {answer}"}])
    for row, rollout in zip(rows, bench.rollouts, strict=True):
        bench.check(row, bench.asked("1+1= ref: so 2. 2"), rollout["tokens"])
        assert row["teacher_prompt_tokens"] == bench.asked("1+1= ref: so 2. 2")
        assert len(row["teacher_logprob"]) == rollout["length"]


def test_the_first_right_sibling(bench: Bench) -> None:
    """SRPO's context: of group 0 the samples 1 and 2 are right; group 1 has none, and so no teacher."""
    rows = bench.score(top_k=3, needs=["exact"], context=[{"prompt": "{prompt} {sibling}"}])
    for number, sibling in ((0, "cdef"), (1, "a"), (2, "cdef")):
        bench.check(rows[number], bench.asked(f"1+1= {sibling}"), bench.rollouts[number]["tokens"])
    for row in rows[3:]:
        assert (row["reward"], row["components"], row["error"]) == (0.0, [("given", 0.0)], None)
        assert [row[column] for column in TEACHER_COLUMNS] == [None] * 5


def test_a_context_for_groups_without_a_right_one(bench: Bench) -> None:
    contexts = [{"prompt": "{prompt} {sibling}"}, {"prompt": "{prompt} not {completion}"}]
    rows = bench.score(top_k=3, needs=["exact"], context=contexts)
    bench.check(rows[0], bench.asked("1+1= cdef"), bench.rollouts[0]["tokens"])
    bench.check(rows[3], bench.asked("1+1= not xyz"), bench.rollouts[3]["tokens"])
    assert [dict(row["components"])["context"] for row in rows] == [0.0, 0.0, 0.0, 1.0, 1.0]


def test_its_own_answer_before_the_answer(bench: Bench) -> None:
    """SD-Zero's layout: prompt, y, phrase by the reward, then y again; scored is the second copy."""
    context = {"prefix": "{completion} {verdict}: ", "right": "good", "wrong": "no"}
    rows = bench.score(top_k=3, needs=["exact"], context=[context])
    for row, rollout in zip(rows, bench.rollouts, strict=True):
        phrase = bench.encode(" good: " if RIGHT[rollout["rollout_id"]] else " no: ")
        first = [*rollout["prompt_tokens"], *rollout["tokens"][:-1], *phrase]
        bench.check(row, first, rollout["tokens"])
        other = bench.naive([*rollout["prompt_tokens"], *bench.encode("q"), *phrase], rollout["tokens"])
        own = other.gather(1, torch.tensor(rollout["tokens"])[:, None])[:, 0]
        assert row["teacher_logprob"] != pytest.approx(own.tolist(), abs=1e-3), "another first copy changes it"


def test_completions_in_a_prefix_keep_their_own_ids(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids that no tokenizer would give for the text, as sampling may: they stand before the completion as they are."""
    rollout = bench.rollout("g0", 0, "ab")
    rollout["tokens"][1] = bench.tokenizer.unk_token_id
    monkeypatch.setattr(bench, "rollouts", [rollout])
    bench.write()
    row = bench.score(top_k=3, context=[{"prefix": "{completion}="}])[0]
    first = [*rollout["prompt_tokens"], *rollout["tokens"][:-1], *bench.encode("=")]
    bench.check(row, first, rollout["tokens"])
    monkeypatch.undo()
    bench.write()


@pytest.mark.parametrize(("percent", "kept"), [(99, 2), (67, 2), (66, 1), (34, 1), (33, 0)])
def test_the_beginning_of_its_own_answer(bench: Bench, percent: int, kept: int) -> None:
    """`{completion|first N%}`: so many of the ids without the end token, rounded down."""
    row = bench.score(top_k=3, context=[{"prefix": f"{{completion | first {percent}%}}="}])[3]
    tokens = bench.rollouts[3]["tokens"]
    assert len(tokens) == 4
    first = [*bench.rollouts[3]["prompt_tokens"], *tokens[:kept], *bench.encode("=")]
    bench.check(row, first, tokens)


@pytest.mark.parametrize(
    "context",
    [
        {"prompt": "{completion|first 50%}"},
        {"prefix": "{completion|first 0%}"},
        {"prefix": "{completion|first 100%}"},
        {"prefix": "{completion|half}"},
        {"prefix": "{answer|first 50%}"},
        {"prefix": "{completion"},
    ],
)
def test_templates_that_cannot_be_filled_are_refused_with_the_config(context: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="template"):
        TeacherScorer.model_validate({"model": {"kind": "policy"}, "context": [context]})


def test_a_context_that_does_not_fit(bench: Bench) -> None:
    long = [{"prompt": "x" * 60 + "{prompt}"}]
    with pytest.raises(
        RollwayError, match=r"wise: failed on 5 of 5 .* context and completion have \d+ \+ 3 tokens, the"
    ):
        bench.score(context=long)
    rows = bench.score(context=long, max_error_share=1.0)
    assert all(row["error"] and row["teacher_logprob"] is None and row["reward"] == 0.0 for row in rows)
    rows = bench.score(top_k=3, context=long, overlong="cut")
    for row, rollout in zip(rows, bench.rollouts, strict=True):
        whole = bench.asked("x" * 60 + "1+1=")
        kept = whole[len(whole) - (SIZE["context"] - rollout["length"]) :]
        bench.check(row, kept, rollout["tokens"])
        assert dict(row["components"])["cut"] == len(whole) - len(kept)


def test_a_field_that_is_not_there_names_those_that_are(bench: Bench) -> None:
    with pytest.raises(ValidationError, match=r"a row has no field 'anwser'; there are prompt, answer"):
        bench.score(context=[{"prompt": "{anwser}"}])
    with pytest.raises(RollwayError, match=r"has no field 'meta\.hint'"):
        bench.score(context=[{"prefix": "{meta.hint}"}])


def test_other_tokens_are_refused(bench: Bench, tmp_path: Path) -> None:
    swapped = stored(tmp_path / "swapped", main=built(2, "ba" + ALPHABET[2:]))
    with pytest.raises(
        RollwayError, match=r"wise: the teacher's tokenizer is not the policy's: token 'a' has the id \d+"
    ):
        bench.score(teacher=swapped)
    fewer = stored(tmp_path / "fewer", main=built(2, ALPHABET[:-1]))
    with pytest.raises(RollwayError, match="token ':' has the id none in the teacher's"):
        bench.score(teacher=fewer)
    whole = len(bench.tokenizer)
    lacking = built(2)
    lacking.model.resize_token_embeddings(whole - 1)
    less = stored(tmp_path / "less", main=lacking)
    sizes = rf"output layer has {whole - 1} rows and the policy's {whole}; .* but their tokenizer has {whole} tokens"
    with pytest.raises(RollwayError, match=sizes):
        bench.score(teacher=less)


def resized(model: Any, rows: int) -> Any:
    """Its output layer with rows of padding, which random weights make far from unlikely."""
    before = model.config.vocab_size
    model.resize_token_embeddings(rows)
    with torch.no_grad():
        model.get_output_embeddings().weight[before:].normal_(0.0, 0.5)
    return model


@pytest.mark.parametrize(("teacher", "policy"), [(64, None), (None, 64), (64, 72), (72, 64)])
def test_output_layers_padded_to_other_sizes(
    bench: Bench, tmp_path: Path, teacher: int | None, policy: int | None
) -> None:
    """The teacher's distribution is over the ids that both have, a softmax of those alone."""
    wise, own = built(1), built(0)
    resized(wise.model, teacher or len(bench.tokenizer))
    resized(own.model, policy or len(bench.tokenizer))
    by, student = stored(tmp_path / "by", main=wise), stored(tmp_path / "student", main=own)
    both = min(wise.model.config.vocab_size, own.model.config.vocab_size)
    rollout = bench.rollouts[1]
    row = bench.score(teacher=by, policy=student, top_k=both)[1]
    ids, tokens = rollout["prompt_tokens"], rollout["tokens"]
    with torch.no_grad():
        logits = wise.model(torch.tensor([[*ids, *tokens]])).logits[0, len(ids) - 1 : -1, :both]
    logp = logits.log_softmax(-1)
    own_logp = logp.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    assert row["teacher_logprob"] == pytest.approx(own_logp.tolist(), abs=2e-5)
    assert row["teacher_entropy"] == pytest.approx((-(logp.exp() * logp).sum(1)).tolist(), abs=2e-5)
    assert row["teacher_topk_ids"] == logp.sort(descending=True, stable=True).indices.tolist()
    assert np.exp(row["teacher_topk_logprobs"]).sum(1) == pytest.approx(np.ones(len(tokens)), abs=1e-5)


def test_an_id_of_the_policys_padding_fails_its_row_alone(bench: Bench, tmp_path: Path) -> None:
    own = built(0)
    resized(own.model, 64)
    student, rollout = stored(tmp_path / "student", main=own), bench.rollouts[0]
    whole, tokens = len(bench.tokenizer), rollout["tokens"]
    try:
        rollout["tokens"] = [60, *tokens[1:]]
        bench.write()
        rows = bench.score(policy=student, max_error_share=0.5)
    finally:
        rollout["tokens"] = tokens
        bench.write()
    assert rows[0]["error"] == f"the completion has the id 60, and the teacher knows {whole}"
    assert [row["error"] for row in rows[1:]] == [None] * (len(rows) - 1)


def test_an_author_with_more_ids_than_the_policy_reads(bench: Bench) -> None:
    own = causal_lm.reader_of(bench.student)
    more = replace(own, vocabulary=own.vocabulary + 3)
    assert check_same("author", own, more, writes=True) == own.vocabulary
    assert check_same("scorer", more, own) == own.vocabulary
    with pytest.raises(RollwayError, match="may hold an id of its padding, which the policy cannot read"):
        check_same("author", more, own, writes=True)


@pytest.mark.parametrize("given", [{"context": [{"prompt": "{prompt} {meta.demonstration}"}]}, {}])
def test_an_empty_completion_has_empty_columns(bench: Bench, given: dict[str, Any]) -> None:
    """It is no error: it stays in the batch, where means over rows count it as 0."""
    empty = {**bench.rollout("g2", 0, ""), "tokens": [], "logprobs": [], "train_mask": [], "length": 0}
    bench.rollouts.insert(1, empty)
    try:
        bench.write()
        rows = bench.score(top_k=3, **given)
        live = bench.score(model={"kind": "live"}, context=given["context"]) if "context" in given else []
    finally:
        bench.rollouts.remove(empty)
        bench.write()
    assert [row["error"] for row in rows] == [None] * len(rows)
    assert rows[1]["reward"] == 0.0
    assert dict(rows[1]["components"]) == {"given": 1.0, "entropy": 0.0}
    assert [rows[1][name] for name in TEACHER_COLUMNS[:4]] == [[], [], [], []]
    for n in (0, 2):
        ids = bench.asked("1+1= so 2") if "context" in given else bench.rollouts[0]["prompt_tokens"]
        bench.check(rows[n], ids, bench.rollouts[n // 2]["tokens"])
    if live:
        assert (live[1]["reward"], live[1]["teacher_prompt_tokens"]) == (1.0, rows[1]["teacher_prompt_tokens"])
        assert rows[1]["teacher_prompt_tokens"] == bench.asked("1+1= so 2")


def test_more_tokens_than_there_are(bench: Bench) -> None:
    whole = len(bench.tokenizer)
    with pytest.raises(RollwayError, match=f"wise.top_k: {whole + 1} is larger than the vocabulary of {whole} tokens"):
        bench.score(top_k=whole + 1)
    row = bench.score(top_k=whole)[0]
    assert np.exp(row["teacher_topk_logprobs"]).sum(1) == pytest.approx(np.ones(3), abs=1e-5)


def test_a_moving_average_beside_the_policy(bench: Bench, tmp_path: Path) -> None:
    model = {"kind": "policy", "policy": "ema"}
    both = stored(tmp_path / "both", updates=3, main=built(3), ema=bench.teacher)
    rollout = bench.rollouts[0]
    bench.check(bench.score(teacher=both, model=model, top_k=3)[0], rollout["prompt_tokens"], rollout["tokens"])
    start = stored(tmp_path / "start", main=bench.teacher)
    bench.check(bench.score(teacher=start, model=model, top_k=3)[0], rollout["prompt_tokens"], rollout["tokens"])
    trained = stored(tmp_path / "trained", updates=3, main=bench.teacher)
    with pytest.raises(RollwayError, match=r"policy.json: has no policy named 'ema'; it holds \['main'\]"):
        bench.score(teacher=trained, model=model)


def test_a_hugging_face_folder(bench: Bench) -> None:
    folder = str(bench.root / "teacher/weights/main")
    rows = bench.score(model={"kind": "huggingface", "name": folder}, top_k=3)
    bench.check(rows[1], bench.rollouts[1]["prompt_tokens"], bench.rollouts[1]["tokens"])
    rows = bench.score(model={"kind": "huggingface", "name": folder, "dtype": "bfloat16"})
    assert rows[1]["teacher_logprob"] != bench.score()[1]["teacher_logprob"]
    with pytest.raises(RollwayError, match="nowhere: cannot be loaded"):
        bench.score(model={"kind": "huggingface", "name": "nowhere"})


def test_a_teacher_that_is_known_by_its_text(bench: Bench, tmp_path: Path) -> None:
    """Its stored completion stands in the prompt; the first by rollout_id; without one the next context."""
    own = {"group_id": "x", "source": "teacher"}
    rows = [{**bench.rollout("x", n, text), **own} for n, text in ((1, "late"), (0, "first"))]
    rows.append({**bench.rollout("x", 2, "other"), **own, "prompt_id": "q"})
    parquet.write(tmp_path / "said.parquet", pa.Table.from_pylist(rows, schema=ROLLOUTS.schema()), "rollouts")
    contexts = [{"prompt": "{prompt} {reference}"}, {"prefix": "alone "}]
    given = {"references": [str(tmp_path / "said.parquet")], "context": contexts, "top_k": 3}
    row = bench.score(**given)[0]
    bench.check(row, bench.asked("1+1= first"), bench.rollouts[0]["tokens"])
    parquet.write(tmp_path / "said.parquet", pa.Table.from_pylist(rows[2:], schema=ROLLOUTS.schema()), "rollouts")
    row = bench.score(**given)[0]
    bench.check(row, [*bench.rollouts[0]["prompt_tokens"], *bench.encode("alone ")], bench.rollouts[0]["tokens"])
    with pytest.raises(RollwayError, match=r"wise.references: .*exact-000.parquet holds no rollouts"):
        bench.score(**{**given, "references": [str(bench.root / "exact-000.parquet")]})


def test_a_live_teacher_gets_its_context_alone(bench: Bench) -> None:
    """No model is loaded; SQL sees by the reward which rollouts have a teacher."""
    context = [{"prompt": "{prompt} {sibling}"}]
    rows = bench.score(model={"kind": "live"}, needs=["exact"], context=context)
    assert pq.read_schema(bench.root / "wise-000.parquet").names[5:] == ["teacher_prompt_tokens"]
    assert [row["reward"] for row in rows] == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert rows[1]["teacher_prompt_tokens"] == bench.asked("1+1= a")
    assert rows[4]["teacher_prompt_tokens"] is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"context": [{}]}, "a context gives `prompt`, `prefix` or both"),
        ({"context": [{"prompt": "{sibling}"}]}, "set `needs`, the first of which"),
        ({"context": [{"prompt": "{scores.exact}"}]}, "set `needs`"),
        ({"needs": ["exact"]}, "`needs` has no effect"),
        ({"needs": ["exact"], "context": [{"prefix": "{verdict}", "right": "a"}]}, "give `right` and `wrong`"),
        ({"context": [{"prefix": "a", "right": "a", "wrong": "b"}]}, "have no effect without `{verdict}`"),
        ({"context": [{"prefix": "{{verdict}}", "right": "a", "wrong": "b"}]}, "have no effect without `{verdict}`"),
        ({"threshold": 0.5}, "`threshold` has no effect"),
        ({"context": [{"prefix": "a"}, {"prefix": "b"}]}, "always used, so it stands last"),
        ({"model": {"kind": "live"}}, "give `context`"),
        ({"model": {"kind": "live"}, "context": [{"prefix": "a"}], "top_k": 3}, "top_k have no effect"),
        ({"references": ["a"]}, "go together"),
        ({"context": [{"prompt": "{reference}"}]}, "go together"),
        ({"overlong": "cut"}, "`overlong: cut` has no effect"),
    ],
)
def test_options_that_do_not_go_together(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        TeacherScorer.model_validate({"model": {"kind": "policy"}, **given})


def test_a_pass_without_rollouts_has_empty_columns() -> None:
    """A later pass may have nothing to do; its scores are a file all the same."""
    config = TeacherScorer.model_validate({"kind": "teacher", "model": {"kind": "policy"}, "top_k": 4})
    made = table("wise", config, pa.chunked_array([pa.array([], pa.string())]), [])
    assert made.num_rows == 0
    assert made.schema.field("teacher_topk_logprobs").type == pa.list_(pa.list_(pa.field("element", pa.float32())))


def test_a_teacher_says_of_nothing_that_it_is_right() -> None:
    wise = TeacherScorer.model_validate({"model": {"kind": "policy"}})
    with pytest.raises(ValidationError, match="'wise' is a teacher"):
        ScoreConfig(scorers={"wise": wise}, reward={"wise": 1.0}, correct="wise")
