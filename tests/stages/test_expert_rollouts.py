"""Expert solutions in the groups that the rollout stage writes (`rollout.experts`)."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from rollway.config.policies import CharTokenizer, ScratchPolicy, SftConfig
from rollway.config.rollouts import RolloutConfig
from rollway.config.tasks import TaskConfig
from rollway.errors import RollwayError
from rollway.policies import causal_lm, manifest
from rollway.runtime.specs import STAGE_VERSION, RolloutSpec
from rollway.stages import rollout as stage
from rollway.store import parquet
from rollway.tasks import prepare
from rollway.training.sft import Demonstration, sft

torch.set_num_threads(1)

ENTRIES = [{"q": f"{a}+{b}=", "answer": str(a + b), "steps": f"{a}{b}>{a + b}"} for a in (1, 2, 3) for b in (1, 2)]
GROUP = 3


@dataclass(frozen=True)
class Here:
    """A folder with the prompts of a task and an untrained policy."""

    folder: Path
    prompts: Path
    policy: Path

    def rows(self, name: str = "rollouts", *, shard: int = 0, **rollout: Any) -> list[dict[str, Any]]:
        given = {"prompts": 5, "group": GROUP, "sampling": {"max_tokens": 4}, "experts": 1} | rollout
        spec = RolloutSpec(
            version=STAGE_VERSION["rollout"],
            seed=0,
            round=2,
            pass_number=0,
            policy_round=1,
            shard=shard,
            rollout=RolloutConfig.model_validate(given),
        )
        out = self.folder / f"{name}.parquet"
        files = {"prompts": self.prompts, "policy": self.policy, "rollouts": out}
        stage.run(spec, **files, earlier_rollouts=[], earlier_scores=[], stored=[])
        return parquet.read(out).to_pylist()


def here(folder: Path, *, entries: list[dict[str, Any]] = ENTRIES, context: int = 32, **task: Any) -> Here:
    (folder / "task.jsonl").write_text("\n".join(json.dumps(entry) for entry in entries))
    given = {"source": {"kind": "jsonl", "path": "task.jsonl"}, "prompt": "{q}", "demonstration": "{steps}"} | task
    made = prepare("sums", TaskConfig.model_validate({**given, "splits": {"heldout": 1}}), folder)
    parquet.write(folder / "train.parquet", made.train, "prompts")
    config = ScratchPolicy(
        layers=1,
        hidden=16,
        heads=2,
        kv_heads=1,
        intermediate=32,
        context=context,
        tokenizer=CharTokenizer(alphabet="0123456789+=>"),
    )
    built = causal_lm.build(config, [], seed=0, device="cpu")
    main = causal_lm.save(folder / "policy", built)
    manifest.write_manifest(folder / "policy" / "policy.json", manifest.PolicyManifest("causal-lm", {"main": main}))
    return Here(folder, folder / "train.parquet", folder / "policy" / "policy.json")


def apart_from_logprobs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The engine's log-probs differ in their last bits between batches of other sizes."""
    return [row | {"logprobs": len(row["logprobs"])} for row in rows]


def test_each_group_gets_the_demonstration_of_its_prompt(tmp_path: Path) -> None:
    place = here(tmp_path)
    steps = {e["q"]: e["steps"] for e in ENTRIES}
    prompts = {p["prompt_id"]: p for p in parquet.read(place.prompts).to_pylist()}
    tokenizer = causal_lm.load(place.policy).tokenizer
    rows = place.rows()
    groups = [rows[i : i + GROUP + 1] for i in range(0, len(rows), GROUP + 1)]
    assert len(groups) == 5
    for group in groups:
        assert len({row["group_id"] for row in group}) == 1
        assert [row["source"] for row in group] == ["policy"] * GROUP + ["expert"]
        assert [row["sample"] for row in group] == list(range(GROUP + 1))
        expert = group[-1]
        text = steps[json.loads(prompts[expert["prompt_id"]]["messages"])[0]["content"]]
        assert expert["text"] == text
        assert expert["tokens"] == [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        count = len(expert["tokens"])
        assert expert["length"] == count == len(expert["logprobs"]) == len(expert["train_mask"])
        assert all(map(math.isnan, expert["logprobs"]))
        assert all(expert["train_mask"])
        assert expert["segments"] == [{"start": 0, "end": count, "author": "expert", "turn": 0}]
        assert expert["prompt_tokens"] == group[0]["prompt_tokens"]
        assert (expert["finish"], expert["policy"], expert["engine"]) == ("stop", "", "demonstration")
        assert (expert["round"], expert["policy_round"], expert["entropy"]) == (2, 1, None)
        assert expert["rollout_id"] == f"{expert['group_id']}-{GROUP:04d}"


def test_the_tokens_are_those_that_the_warm_up_teaches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rollway.training import sft as warmup

    place = here(tmp_path)
    expert = place.rows()[GROUP]
    seen: list[list[int]] = []
    monkeypatch.setattr(warmup, "_accumulate", lambda model, rows: seen.extend(list(r.tokens) for r in rows) or 0.5)
    policy = causal_lm.load(place.policy, train=True)
    demonstration = Demonstration(expert["prompt_id"], expert["prompt_tokens"], expert["text"])
    sft(policy.model, policy.tokenizer, [demonstration], SftConfig(steps=1, batch=1), seed=0)
    assert seen == [expert["tokens"]]


def test_the_policys_own_rollouts_are_the_same_without_experts(tmp_path: Path) -> None:
    place = here(tmp_path)
    own = [row for row in place.rows() if row["source"] == "policy"]
    assert own == place.rows(experts=0)


def test_shards_and_parts_change_nothing_and_a_killed_job_resumes(tmp_path: Path) -> None:
    place = here(tmp_path)
    whole = place.rows("whole")
    parts = place.rows("parts", part=1)
    shards = [row for shard in range(2) for row in place.rows(f"shard{shard}", shard=shard, shards=2)]
    assert apart_from_logprobs(whole) == apart_from_logprobs(parts) == apart_from_logprobs(shards)

    class Killed(Exception):
        pass

    calls = []
    write = parquet.write

    def dies(path: Path, *args: Any) -> None:
        calls.append(path)
        if len(calls) == 6:
            raise Killed
        write(path, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage.parquet, "write", dies)
        with pytest.raises(Killed):
            place.rows("killed", part=3)
    assert not (tmp_path / "killed.parquet").exists()
    assert apart_from_logprobs(place.rows("killed", part=3)) == apart_from_logprobs(whole)
    place.rows("once", part=3)
    assert (tmp_path / "killed.parquet").read_bytes() == (tmp_path / "once.parquet").read_bytes()


def test_without_a_demonstration_the_answer_is_the_solution(tmp_path: Path) -> None:
    place = here(tmp_path, demonstration=None)
    answers = {p["prompt_id"]: p["answer"] for p in parquet.read(place.prompts).to_pylist()}
    experts = [row for row in place.rows() if row["source"] == "expert"]
    assert [row["text"] for row in experts] == [answers[row["prompt_id"]] for row in experts]


@pytest.mark.parametrize(
    ("changes", "context", "words"),
    [
        ({"steps": None}, 32, ["prompt ", "has no demonstration", "`demonstration`", "leave experts out"]),
        ({"steps": ""}, 32, ["prompt ", "has no demonstration"]),
        ({"steps": "11>2!"}, 32, ["tokenizer does not know", "11>2!"]),
        ({"steps": "1" * 30}, 32, ["35 tokens", "context is 32", "shorten the demonstration"]),
    ],
)
def test_a_demonstration_that_cannot_be_used_is_named(
    tmp_path: Path, changes: dict[str, Any], context: int, words: list[str]
) -> None:
    place = here(tmp_path, entries=[entry | changes for entry in ENTRIES], context=context)
    with pytest.raises(RollwayError) as caught:
        place.rows()
    for word in [*words, "rollout.experts"]:
        assert word in str(caught.value)
    assert not (tmp_path / "rollouts.parquet").exists()
