"""Derived passes of the rollout stage: prompts made of scored rollouts of the passes before."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from rollway.config.rollouts import RolloutConfig
from rollway.config.scorers import ScoreConfig
from rollway.errors import RollwayError
from rollway.policies import causal_lm, manifest
from rollway.policies.logprobs import Row, token_logprobs
from rollway.runtime.specs import STAGE_VERSION, RolloutSpec
from rollway.sampling import derived
from rollway.stages import rollout as stage
from rollway.store import parquet
from rollway.store.tables import DERIVED
from stages.test_expert_rollouts import ENTRIES, GROUP, Here, here

torch.set_num_threads(1)

REVISION: dict[str, Any] = {
    "name": "revision",
    "parents": {"sql": "each"},
    "context": [{"prefix": "{completion}>{verdict}>", "right": "1", "wrong": "00"}],
}
HINTED: dict[str, Any] = {
    "name": "hinted",
    "parents": {"sql": "each"},
    "context": [{"prompt": "{answer}={prompt}"}],
    "trained": "plain",
}


@dataclass
class Round:
    """A round of a tiny policy: pass 0, its verdicts, and the passes that are derived of it."""

    place: Here
    rows: list[dict[str, Any]]
    files: list[Path] = field(default_factory=list)
    scores: list[Path] = field(default_factory=list)

    def judge(self, rows: Sequence[dict[str, Any]], number: int, right: Sequence[float]) -> None:
        path = self.place.folder / f"scores{number}/exact-000.parquet"
        verdicts = {
            "rollout_id": [row["rollout_id"] for row in rows],
            "scorer": ["exact"] * len(rows),
            "reward": pa.array([float(x) for x in right], pa.float64()),
            "components": pa.array([[]] * len(rows), pa.map_(pa.string(), pa.float64())),
        }
        parquet.write(path, pa.table(verdicts), "scores")
        self.scores.append(path)

    def derive(self, file: str = "p1", number: int = 1, *, shard: int = 0, **given: Any) -> list[dict[str, Any]]:
        """Rows of a derived pass over the files so far."""
        out = self.place.folder / f"{file}.parquet"
        stage.run(self.spec(number, shard=shard, **given), **self.inputs(), rollouts=out)
        return parquet.read(out).to_pylist()

    def inputs(self) -> dict[str, Any]:
        files = {"prompts": self.place.prompts, "policy": self.place.policy}
        return {**files, "earlier_rollouts": self.files, "earlier_scores": self.scores, "stored": []}

    def spec(self, number: int = 1, *, shard: int = 0, author: str | None = None, **given: Any) -> RolloutSpec:
        sizes = {name: given.pop(name) for name in ("shards", "part", "sampling") if name in given}
        rollout = {"prompts": 5, "group": GROUP, "sampling": {"max_tokens": 4}, "derive": [REVISION | given]} | sizes
        return RolloutSpec(
            version=STAGE_VERSION["rollout"],
            seed=0,
            round=2,
            pass_number=number,
            policy_round=1,
            shard=shard,
            rollout=RolloutConfig.model_validate(rollout),
            score=ScoreConfig(),
            author=author,
        )


@pytest.fixture
def made(tmp_path: Path) -> Round:
    place = here(tmp_path)
    rows = place.rows("p0", experts=0)
    found = Round(place, rows, [tmp_path / "p0.parquet"])
    found.judge(rows, 0, [n % 2 for n in range(len(rows))])
    return found


def test_a_revision_continues_its_parent(made: Round) -> None:
    tokenizer = causal_lm.load_reader(made.place.policy).tokenizer
    parents = {row["rollout_id"]: (n, row) for n, row in enumerate(made.rows)}
    rows = made.derive()
    assert len(rows) == len(made.rows)
    assert len({row["rollout_id"] for row in [*rows, *made.rows]}) == 2 * len(rows)
    for row in rows:
        n, parent = parents[row["parent_id"]]
        ids = [t for t in parent["tokens"] if t != tokenizer.eos_token_id]
        phrase = tokenizer(">1>" if n % 2 else ">00>", add_special_tokens=False)["input_ids"]
        assert row["prompt_tokens"] == [*parent["prompt_tokens"], *ids, *phrase]
        assert row["prefix_length"] == len(ids) + len(phrase)
        assert row["train_prompt_tokens"] is None
        assert (row["source"], row["pass"], row["round"], row["policy_round"]) == ("revision", 1, 2, 1)
        assert (row["group_id"], row["prompt_id"]) == (parent["group_id"], parent["prompt_id"])
        assert row["sample"] == parent["sample"] + GROUP
        assert row["policy"] == manifest.digest(made.place.policy)
        assert row["segments"] == [{"start": 0, "end": row["length"], "author": "policy", "turn": 0}]
        assert all(row["train_mask"])
    assert parquet.metadata(made.place.folder / "p1.parquet")[DERIVED] == "revision"
    assert DERIVED not in parquet.metadata(made.files[0])


def test_log_probs_are_those_behind_what_was_read(made: Round) -> None:
    model = causal_lm.load(made.place.policy).model
    rows = made.derive(**HINTED)
    plain = {row["prompt_id"]: row["prompt_tokens"] for row in made.rows}
    read = token_logprobs(
        model, [Row(r["prompt_tokens"], r["tokens"]) for r in rows], temperature=1.0, micro_tokens=512
    )
    trained = [Row(r["train_prompt_tokens"], r["tokens"]) for r in rows]
    other = token_logprobs(model, trained, temperature=1.0, micro_tokens=512)
    apart = 0.0
    for n, row in enumerate(rows):
        assert row["train_prompt_tokens"] == plain[row["prompt_id"]]
        count = row["length"]
        np.testing.assert_allclose(row["logprobs"], read.logp[n, :count].tolist(), atol=1e-5)
        apart = max(apart, float(np.abs(np.array(row["logprobs"]) - other.logp[n, :count].tolist()).max()))
    assert apart > 1e-3


def test_the_hint_stands_in_what_is_read_alone(made: Round) -> None:
    tokenizer = causal_lm.load_reader(made.place.policy).tokenizer
    answers = {e["q"]: e["answer"] for e in ENTRIES}
    for row in made.derive(**HINTED):
        asked = tokenizer.decode(row["train_prompt_tokens"], skip_special_tokens=True)
        assert tokenizer.decode(row["prompt_tokens"], skip_special_tokens=True) == f"{answers[asked]}={asked}"
        assert row["prefix_length"] is None


def test_a_verdict_changes_what_is_read_and_the_ids(made: Round, tmp_path: Path) -> None:
    before = made.derive()
    made.scores.clear()
    made.judge(made.rows, 0, [1.0] * len(made.rows))
    after = made.derive("again")
    assert {r["rollout_id"] for r in before}.isdisjoint(r["rollout_id"] for r in after)
    for old, new, wrong in zip(before, after, [n % 2 == 0 for n in range(len(before))], strict=True):
        assert (old["prompt_tokens"] != new["prompt_tokens"]) is wrong


def test_half_a_reward_is_wrong(made: Round) -> None:
    """SD-Zero: r that is neither 0 nor 1 counts as wrong, and so below any threshold."""
    made.scores.clear()
    made.judge(made.rows, 0, [0.5] * len(made.rows))
    tokenizer = causal_lm.load_reader(made.place.policy).tokenizer
    wrong = tokenizer(">00>", add_special_tokens=False)["input_ids"]
    assert all(row["prompt_tokens"][-4:] == wrong for row in made.derive())


def test_shards_and_parts_change_nothing(made: Round) -> None:
    def bare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [row | {"logprobs": len(row["logprobs"])} for row in rows]

    whole = bare(made.derive(samples=2))
    parts = [bare(made.derive(f"shard{n}", samples=2, shard=n, shards=3, part=4)) for n in range(3)]
    assert [row for part in parts for row in part] == whole
    assert [row["sample"] for row in whole if row["group_id"] == whole[0]["group_id"]] == list(range(3, 9))


def test_a_killed_job_goes_on_where_it_was(made: Round, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = made.derive("whole", part=4)
    generate, calls = derived.Writer.generate, []

    def failing(self: derived.Writer, part: list[Any]) -> pa.Table:
        calls.append(len(part))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(self, part)

    monkeypatch.setattr(derived.Writer, "generate", failing)
    with pytest.raises(KeyboardInterrupt):
        made.derive("killed", part=4)
    again = made.derive("killed", part=4)
    assert again == whole
    assert calls == [4, 4, 4, 4, 3]
    assert (made.place.folder / "killed.parquet").read_bytes() == (made.place.folder / "whole.parquet").read_bytes()


def test_several_passes_on_top_of_each_other(made: Round, tmp_path: Path) -> None:
    """A hint for each group that is never trained on, and answers that read it, whose parent it is."""
    first = {"parents": {"sql": str(tmp_path / "first.sql")}}
    (tmp_path / "first.sql").write_text(
        "-- One per group.\nSELECT rollout_id FROM scored WHERE source = 'policy' AND sample = 0\n"
    )
    hints = made.derive("p1", **HINTED | first | {"name": "hint", "trained": "never"})
    assert len(hints) == 5
    assert all(row["train_prompt_tokens"] == [] and not any(row["train_mask"]) for row in hints)
    made.files.append(tmp_path / "p1.parquet")
    made.judge(hints, 1, [0.0] * 5)
    (tmp_path / "hinted.sql").write_text("-- The hints.\nSELECT rollout_id FROM scored WHERE source = 'hint'\n")
    second = {"parents": {"sql": str(tmp_path / "hinted.sql")}, "context": [{"prompt": "{completion}>{prompt}"}]}
    answers = made.derive("p2", 2, **HINTED | second | {"samples": 2})
    assert [row["parent_id"] for row in answers] == [row["rollout_id"] for row in hints for _ in range(2)]
    assert [row["sample"] for row in answers] == [4, 5] * 5
    tokenizer = causal_lm.load_reader(made.place.policy).tokenizer
    for row, hint in zip(answers[::2], hints, strict=True):
        asked = tokenizer.decode(row["train_prompt_tokens"], skip_special_tokens=True)
        assert tokenizer.decode(row["prompt_tokens"], skip_special_tokens=True) == f"{hint['text']}>{asked}"


def test_a_pass_without_parents_writes_an_empty_file(made: Round, tmp_path: Path) -> None:
    (tmp_path / "none.sql").write_text("-- Nobody.\nSELECT rollout_id FROM scored WHERE reward > 5\n")
    assert made.derive(parents={"sql": str(tmp_path / "none.sql")}) == []
    assert set(derived.ADDED) <= set(parquet.names(tmp_path / "p1.parquet"))


def test_attempts_differ(made: Round, tmp_path: Path) -> None:
    first = made.derive("p1", **HINTED)
    second = made.derive("p2", 2, **HINTED)
    assert {r["rollout_id"] for r in first}.isdisjoint(r["rollout_id"] for r in second)
    assert [r["tokens"] for r in first] != [r["tokens"] for r in second]


def test_another_policy_writes(made: Round, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    policy = causal_lm.load(made.place.policy)
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.mul_(3.0)
    entry = causal_lm.save(folder, policy)
    manifest.write_manifest(folder / "policy.json", manifest.PolicyManifest("causal-lm", {"main": entry}))
    author = {"kind": "warmup", "name": "wise"}
    rows = made.derive("p1", author=str(folder / "policy.json"), **HINTED)
    named = stage_rows(made, tmp_path, folder / "policy.json", HINTED | {"author": author})
    assert (
        {row["policy"] for row in rows} == {row["policy"] for row in named} == {manifest.digest(folder / "policy.json")}
    )
    assert {row["segments"][0]["author"] for row in named} == {"wise"}
    logp = token_logprobs(
        policy.model, [Row(r["prompt_tokens"], r["tokens"]) for r in rows], temperature=1.0, micro_tokens=512
    ).logp
    for n, row in enumerate(rows):
        np.testing.assert_allclose(row["logprobs"], logp[n, : row["length"]].tolist(), atol=1e-5)


def stage_rows(made: Round, folder: Path, author: Path, derive: dict[str, Any]) -> list[dict[str, Any]]:
    rollout = {"prompts": 5, "group": GROUP, "sampling": {"max_tokens": 4}, "derive": [derive]}
    spec = made.spec().model_copy(update={"author": str(author), "rollout": RolloutConfig.model_validate(rollout)})
    stage.run(spec, **made.inputs(), rollouts=folder / "named.parquet")
    return parquet.read(folder / "named.parquet").to_pylist()


def test_an_author_of_another_tokenizer_is_refused(made: Round, tmp_path: Path) -> None:
    from rollway.config.policies import CharTokenizer, ScratchPolicy

    size = {"layers": 1, "hidden": 16, "heads": 2, "kv_heads": 1, "intermediate": 32, "context": 32}
    config = ScratchPolicy(**size, tokenizer=CharTokenizer(alphabet="9876543210+=>"))
    folder = tmp_path / "other"
    entry = causal_lm.save(folder, causal_lm.build(config, [], seed=0, device="cpu"))
    manifest.write_manifest(folder / "policy.json", manifest.PolicyManifest("causal-lm", {"main": entry}))
    with pytest.raises(RollwayError, match=r"rollout\.derive\.hinted\.author: .*tokenizer is not the policy's"):
        made.derive(author=str(folder / "policy.json"), **HINTED)


def test_contexts_that_fill_the_window(tmp_path: Path) -> None:
    place = here(tmp_path, context=10)
    rows = place.rows("p0", experts=0)
    made = Round(place, rows, [tmp_path / "p0.parquet"])
    made.judge(rows, 0, [0.0] * len(rows))
    long = {"context": [{"prefix": "{completion}>1+1"}]}
    with pytest.raises(RollwayError, match=r"its author's context holds 10.*overlong: skip"):
        made.derive(**long)
    kept = made.derive(**long, overlong="skip")
    assert 0 < len(kept) < len(rows)
    assert all(len(row["prompt_tokens"]) < 10 for row in kept)


def other_window(folder: Path, context: int) -> str:
    """A policy of the same tokenizer with another window."""
    place = here(folder, context=context)
    return str(place.policy)


def test_the_window_is_its_authors(made: Round, tmp_path: Path) -> None:
    """One with a smaller window than the policy's leaves long prompts out."""
    (tmp_path / "small").mkdir()
    small = other_window(tmp_path / "small", 8)
    long = {"context": [{"prompt": "{prompt}{prompt}{prompt}"}], "trained": "never"}
    with pytest.raises(RollwayError, match=r"has 12 tokens, its author's context holds 8.*overlong: skip"):
        made.derive("p1", author=small, **long)
    assert made.derive("p1", author=small, **long, overlong="skip") == []
    kept = made.derive("p2", author=small, context=[{"prompt": "{prompt}1"}], overlong="skip")
    assert len(kept) == len(made.rows)
    assert all(len(row["prompt_tokens"]) + row["length"] <= 8 for row in kept)


def test_a_larger_window_reads_what_the_policy_could_not(tmp_path: Path) -> None:
    """As far as what is trained fits the policy."""
    place = here(tmp_path, context=10)
    rows = place.rows("p0", experts=0)
    made = Round(place, rows, [tmp_path / "p0.parquet"])
    made.judge(rows, 0, [0.0] * len(rows))
    (tmp_path / "large").mkdir()
    large = other_window(tmp_path / "large", 32)
    long = {"context": [{"prompt": "{prompt}{prompt}{prompt}"}]}
    for number, trained in enumerate(("plain", "never")):
        found = made.derive(f"p{number + 1}", author=large, **long, trained=trained)
        assert len(found) == len(rows)
        assert all(len(row["prompt_tokens"]) == 12 for row in found)
    with pytest.raises(RollwayError, match=r"a prompt of 12 tokens and a completion of up to 4 are trained.*holds 10"):
        made.derive("p3", author=large, **long)
    assert made.derive("p3", author=large, **long, overlong="skip") == []


def test_siblings_and_extraction(made: Round, tmp_path: Path) -> None:
    """Groups alternate right and wrong, so every rollout has a right sibling unless it is the only right one."""
    rows = made.derive(context=[{"prompt": "{sibling}={prompt}"}])
    right = {r["rollout_id"] for n, r in enumerate(made.rows) if n % 2}
    alone = {
        row["rollout_id"]
        for row in made.rows
        if not any(
            r["group_id"] == row["group_id"] and r["rollout_id"] in right - {row["rollout_id"]} for r in made.rows
        )
    }
    assert alone
    assert {row["parent_id"] for row in rows} == {row["rollout_id"] for row in made.rows} - alone
    digits = made.derive("digits", extract=r"regex:(\d)", context=[{"prompt": "{completion}={prompt}"}])
    with_digit = {row["rollout_id"] for row in made.rows if any(c.isdigit() for c in row["text"])}
    assert {row["parent_id"] for row in digits} == with_digit
    assert with_digit < {row["rollout_id"] for row in made.rows}


def test_entropies_are_stored_where_asked(made: Round) -> None:
    rollout = made.spec().rollout.model_copy(update={"entropy": True})
    out = made.place.folder / "entropy.parquet"
    stage.run(made.spec().model_copy(update={"rollout": rollout}), **made.inputs(), rollouts=out)
    for row in parquet.read(out).to_pylist():
        assert len(row["entropy"]) == row["length"]
        assert all(math.isfinite(x) for x in row["entropy"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "policy"}, "is the source of other rollouts"),
        ({"context": []}, "at least 1 item"),
        ({"context": [{"prompt": "{reference}"}]}, "only a teacher's context has"),
        ({"context": [{"prefix": "x"}, {"prefix": "{sibling}"}]}, "stands last"),
        ({"extract": "boxed"}, "no `prompt` names"),
        ({"sampling": {"temperature": 0.5}}, "is not the 1 of rollout.sampling"),
        ({"attempts": 10}, "11 passes in a round"),
    ],
)
def test_settings_that_make_no_sense(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RolloutConfig.model_validate({"derive": [REVISION | given]})
    if "sampling" in given:
        RolloutConfig.model_validate({"derive": [REVISION | given | {"trained": "never"}]})
