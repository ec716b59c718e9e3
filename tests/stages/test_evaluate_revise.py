"""Held-out samples that are answered once more behind a context made of them (`evaluate.revise`)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from rollway.config.experiment import EvaluateConfig
from rollway.config.rollouts import TransformersEngine
from rollway.config.scorers import ExactScorer
from rollway.policies import causal_lm
from rollway.policies.logprobs import Row, token_logprobs
from rollway.runtime.specs import STAGE_VERSION, EvaluateSpec
from rollway.stages import evaluate as stage
from rollway.store import parquet
from rollway.store.tables import EVALS
from stages.test_expert_rollouts import Here, here

torch.set_num_threads(1)

REVISE = {"prefix": "{completion}>{verdict}>", "right": "1", "wrong": "00"}


def evaluated(place: Here, name: str, **given: Any) -> tuple[list[dict[str, Any]], dict[str, float]]:
    spec = EvaluateSpec(
        version=STAGE_VERSION["evaluate"],
        seed=0,
        round=1,
        evaluate=EvaluateConfig.model_validate({"samples": 3, "k": [1], "bootstrap": 20} | given),
        max_tokens=4,
        stop=[],
        engine=TransformersEngine(),
        scorer_name="exact",
        scorer=ExactScorer(extract=r"regex:(\d)"),
        threshold=1.0,
    )
    files = {"prompts": place.prompts, "policy": place.policy, "cache": place.folder}
    out = place.folder / f"{name}.parquet"
    stage.run(spec, **files, evals=out, metrics=place.folder / f"{name}.json")
    figures = json.loads((place.folder / f"{name}.json").read_text())["metrics"]
    return parquet.read(out).to_pylist(), {f["name"]: f["value"] for f in figures}


def test_revising_in_evaluation(tmp_path: Path) -> None:
    place = here(tmp_path)
    plain, before = evaluated(place, "plain")
    rows, figures = evaluated(place, "revised", revise=REVISE)
    assert parquet.names(tmp_path / "plain.parquet") == EVALS.names()
    assert [{n: row[n] for n in EVALS.names()} for row in rows] == plain
    assert {name: figures[name] for name in before} == before
    policy = causal_lm.load(place.policy)
    entries = parquet.read(place.prompts).to_pylist()
    prompts = {entry["prompt_id"]: json.loads(entry["messages"])[-1]["content"] for entry in entries}
    asked = []
    for row in rows:
        ids = [t for t in row["tokens"] if t != policy.tokenizer.eos_token_id]
        phrase = ">1>" if row["correct"] else ">00>"
        ends = [policy.tokenizer(t, add_special_tokens=False)["input_ids"] for t in (prompts[row["prompt_id"]], phrase)]
        assert row["revised_prompt_tokens"] == [*ends[0], *ids, *ends[1]]
        asked.append(Row(row["revised_prompt_tokens"], row["revised_tokens"]))
    logp = token_logprobs(policy.model, asked, temperature=1.0, micro_tokens=512).logp
    for n, row in enumerate(rows):
        np.testing.assert_allclose(row["revised_logprobs"], logp[n, : row["revised_length"]].tolist(), atol=1e-5)
    share = float(np.mean([row["revised_correct"] for row in rows]))
    assert figures["revised/pass@1"] == pytest.approx(share)
    assert "revised/prompts" not in figures


def test_contexts_of_other_rollouts_are_refused() -> None:
    with pytest.raises(ValidationError, match="held-out samples do not have"):
        EvaluateConfig.model_validate({"revise": {"prompt": "{sibling}"}})
