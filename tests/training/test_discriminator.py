"""GAD's discriminator (arXiv 2511.10643): its loss, its pairs, and the stage that teaches it round by round."""

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from rollway.config.policies import CharTokenizer, ScratchPolicy
from rollway.config.scorers import DiscriminatorScorer
from rollway.errors import RollwayError
from rollway.policies import causal_lm
from rollway.runtime.specs import STAGE_VERSION, DiscriminatorSpec
from rollway.scorers.rows import Row
from rollway.scorers.run import score
from rollway.stages.discriminator import run as stage
from rollway.store import parquet
from rollway.store.tables import ROLLOUTS
from rollway.training.pairs import against_teacher
from rollway.training.reward_model import bradley_terry
from store import synthetic

PROMPTS = 12
FAST = {"epochs": 6, "batch": 8, "lr": 1e-2}


def test_worked() -> None:
    """Scores 1.2 of the teacher's text and 0.4 of the student's; ln 2 where they are equal."""
    found = bradley_terry(torch.tensor([1.2, 0.4, -3.0]).double(), torch.tensor([0.4, 0.4, -3.0]).double())
    assert found.tolist() == pytest.approx([0.371101, math.log(2), math.log(2)], abs=6e-7)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A policy, and prompts whose demonstrations are all a's."""
    monkeypatch.chdir(tmp_path)
    config = ScratchPolicy(
        tokenizer=CharTokenizer(alphabet="ab>"), layers=1, hidden=8, heads=1, kv_heads=1, intermediate=16, context=16
    )
    policy = causal_lm.build(config, [], 0, device="cpu")
    named = {"main": causal_lm.save(tmp_path / "policy", policy)}
    from rollway.policies import manifest

    manifest.write_manifest(tmp_path / "policy/policy.json", manifest.PolicyManifest("causal-lm", named))
    prompts = [
        {
            "prompt_id": f"q{n}",
            "task": "t",
            "split": "train",
            "messages": json.dumps([{"role": "user", "content": f"{n:04b}>".replace("0", "a").replace("1", "b")}]),
            "meta": json.dumps({"format": "plain", "demonstration": "aaaa"}),
        }
        for n in range(PROMPTS)
    ]
    synthetic.write(Path("prompts.parquet"), prompts, "prompts")
    return tmp_path


def rollouts(path: str, texts: list[str], source: str = "policy") -> Path:
    """Two rollouts of each prompt, their texts in turn."""
    drawn = synthetic.rollout_rows("mu-s0", 0)[0]
    rows = [
        {**drawn, "rollout_id": f"{path}-{n}", "prompt_id": f"q{n % PROMPTS}", "source": source}
        | {"text": texts[n % len(texts)], "group_id": f"g{n % PROMPTS}", "sample": n // PROMPTS}
        for n in range(2 * PROMPTS)
    ]
    synthetic.write(Path(path), rows, "rollouts")
    return Path(path)


def teach(round: int, files: list[Path], previous: str | None = None, seed: int = 0, **config: Any) -> dict[str, float]:
    """The stage's figures; the model lies in d{round}-s{seed}."""
    references = config.pop("told", [])
    settings = DiscriminatorScorer.model_validate({"training": FAST, "heldout_share": 0.25, **config})
    spec = DiscriminatorSpec(
        version=STAGE_VERSION["discriminator"], seed=seed, round=round, scorer="told", config=settings
    )
    out = Path(f"d{round}-s{seed}")
    stage(
        spec,
        prompts=Path("prompts.parquet"),
        rollouts=files,
        references=references,
        previous=[Path(previous)] if previous else [],
        policy=[] if previous else [Path("policy/policy.json")],
        reward_model=out / "reward_model.json",
        metrics=out / "metrics.json",
    )
    found = json.loads((out / "metrics.json").read_text())
    assert found["round"] == round
    assert found["stage"] == "discriminator"
    return {row["name"].removeprefix("told/"): row["value"] for row in found["metrics"]}


def judged(model: str, texts: list[str]) -> list[float]:
    rows = [
        Row(
            rollout_id=f"r{n}",
            prompt_id="q0",
            group_id="g",
            sample=n,
            completion=text,
            length=len(text),
            finish="stop",
            tokens=[],
            task="t",
            messages=[{"role": "user", "content": "aaaa>"}],
            answer=None,
            meta={"format": "plain"},
        )
        for n, text in enumerate(texts)
    ]
    settings = DiscriminatorScorer()
    table = score("told", settings, rows, needs={}, threads=1, root=Path(), trained=Path(model))
    return table["reward"].to_pylist()


def test_it_learns_to_tell_the_texts_apart_and_rewards_what_looks_like_the_teachers(folder: Path) -> None:
    found = teach(0, [rollouts("mine.parquet", ["bbab", "babb"])])
    assert (found["pairs_train"], found["pairs_heldout"], found["pairs_skipped"]) == (18, 6, 0)
    assert found["before_log_loss"] == pytest.approx(math.log(2), abs=0.3)
    assert found["heldout_accuracy"] == 1.0
    assert found["heldout_log_loss"] < 0.3
    rewards = judged("d0-s0/reward_model.json", ["aaaa", "bbab"])
    assert rewards[0] > rewards[1] + 1.0


def test_a_round_goes_on_from_the_one_before(folder: Path) -> None:
    """The student now writes something else: the old model is asked first, then taught."""
    teach(0, [rollouts("mine.parquet", ["bbab", "babb"])])
    found = teach(1, [rollouts("next.parquet", ["bbbb", "babb"])], "d0-s0/reward_model.json")
    assert found["before_accuracy"] == 1.0, "what it knows from round 0 holds for much of round 1"
    anew = teach(2, [rollouts("next.parquet", ["bbbb", "babb"])])
    assert found["loss"] < anew["loss"]
    first = judged("d0-s0/reward_model.json", ["aaaa", "bbab"])
    assert judged("d1-s0/reward_model.json", ["aaaa", "bbab"]) != first


def test_the_same_bytes_twice_and_others_for_another_seed(folder: Path) -> None:
    files = [rollouts("mine.parquet", ["bbab", "babb"])]
    teach(0, files)
    weights = Path("d0-s0/weights/model.safetensors").read_bytes()
    teach(0, files)
    assert Path("d0-s0/weights/model.safetensors").read_bytes() == weights
    teach(0, files, seed=1)
    assert Path("d0-s1/weights/model.safetensors").read_bytes() != weights
    teach(0, files, training={**FAST, "seed": 4})
    assert Path("d0-s0/weights/model.safetensors").read_bytes() != weights


def test_a_student_that_writes_what_the_teacher_does_ends_the_game(folder: Path) -> None:
    """Nothing can be learnt; the model is passed on as it is."""
    teach(0, [rollouts("mine.parquet", ["bbab"])])
    found = teach(1, [rollouts("same.parquet", ["aaaa"])], "d0-s0/reward_model.json")
    assert (found["pairs_train"], found["pairs_skipped"]) == (0, 2 * PROMPTS)
    assert "loss" not in found
    texts = ["aaaa", "bbab", "abab"]
    assert judged("d1-s0/reward_model.json", texts) == judged("d0-s0/reward_model.json", texts)


def test_references_stand_in_for_demonstrations(folder: Path) -> None:
    told = rollouts("teacher.parquet", ["bbbb"], source="teacher")
    teach(0, [rollouts("mine.parquet", ["aaaa", "abaa"])], told=[told])
    rewards = judged("d0-s0/reward_model.json", ["bbbb", "aaaa"])
    assert rewards[0] > rewards[1]


def test_what_is_paired(folder: Path) -> None:
    asked = parquet.read(Path("prompts.parquet"), ["prompt_id", "messages", "meta"])
    drawn = synthetic.rollout_rows("mu-s0", 0)[0]
    given = [("r0", "q0", "policy"), ("r1", "q1", "policy"), ("r2", "q0", "expert")]
    rows = [{**drawn, "rollout_id": r, "prompt_id": q, "source": s, "text": f"text {r}"} for r, q, s in given]
    table = pa.Table.from_pylist(rows, schema=ROLLOUTS.schema())
    pairs, skipped = against_teacher(table, asked, {"q0": "told"})
    assert [(p.pair_id, p.chosen, p.rejected) for p in pairs] == [("r0", "told", "text r0")]
    assert skipped == {"not the policy's own": 1, "no text of the teacher for its prompt": 1}
    lost = pa.Table.from_pylist([{**rows[0], "prompt_id": "q99"}], schema=ROLLOUTS.schema())
    with pytest.raises(RollwayError, match="its prompt q99 is not among the task's prompts"):
        against_teacher(lost, asked, {"q0": "told"})


def test_a_teacher_without_text_is_refused(folder: Path) -> None:
    told = rollouts("teacher.parquet", ["bbbb"], source="teacher")
    rows = parquet.read(told).to_pylist()
    elsewhere = [{**row, "prompt_id": "other"} for row in rows]
    synthetic.write(told, elsewhere, "rollouts")
    with pytest.raises(RollwayError, match="no rollout of round 0 answers a prompt that the teacher answered too"):
        teach(0, [rollouts("mine.parquet", ["bbab"])], told=[told])


def test_a_damaged_predecessor_is_named(folder: Path) -> None:
    files = [rollouts("mine.parquet", ["bbab", "babb"])]
    teach(0, files)
    weights = Path("d0-s0/weights/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(RollwayError, match=r"model\.safetensors: its content is not what"):
        teach(1, files, "d0-s0/reward_model.json")
