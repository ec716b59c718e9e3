"""Rollouts of a mixture of policy and teacher: in the plan, and through the real Snakemake."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from rollway.config import deep_merge, load_experiment, load_recipe
from rollway.config.base import ConfigError
from rollway.errors import RollwayError
from rollway.policies import causal_lm
from rollway.policies.manifest import PolicyManifest, write_manifest
from rollway.runtime.plan import Plan
from rollway.runtime.plan_checks import check
from rollway.runtime.specs import RolloutSpec
from rollway.stages import rollout
from workflow.project import TINY, Project

WISE = deep_merge(TINY["warmups"]["tiny"], {"policy": {"hidden": 48}, "sft": {"steps": 120}})
MIX = {"model": {"kind": "warmup", "name": "teacher"}, "share": 0.4}


FULL = {"sampling": {"temperature": 1.0, "top_p": 1.0, "top_k": 0}}
AS_WRITTEN = {"estimate": {"kind": "sampled", "at": "distill"}, "clip": None}


def plan(*changes: dict[str, Any]) -> Plan:
    config = {"warmups": {"teacher": WISE}, "defaults": {"rounds": 2}}
    for change in changes:
        config = deep_merge(config, change)
    made = Plan(load_experiment(deep_merge(TINY, config)))
    check(made)
    return made


def at(run: str, number: int = 0, round: int = 0) -> Any:
    return SimpleNamespace(run=run, round=f"{round:04d}", p=str(number), shard="000", next=f"{round + 1:04d}")


def mixed(recipe: str = "minillm-mixed", **run: Any) -> dict[str, Any]:
    return {"runs": {"mine": {"recipe": recipe, **run}}}


def test_the_rollout_job_reads_the_teacher() -> None:
    made = plan(mixed())
    assert made.teachers.mixed(at("mine-s0")) == ["results/warmups/teacher-s0/policy.json"]
    assert json.loads(made.rollout_spec(at("mine-s0")))["teacher"] == "results/warmups/teacher-s0/policy.json"
    # Nothing of it in other runs' jobs, so that their results stay.
    assert made.teachers.mixed(at("grpo-s0")) == []
    assert not {"teacher", "mix"} & {*(spec := json.loads(made.rollout_spec(at("grpo-s0")))), *spec["rollout"]}


def test_derived_passes_and_evaluation_are_without() -> None:
    step = {"name": "again", "parents": {"sql": "each"}, "context": [{"prefix": "{completion}>"}], "trained": "never"}
    made = plan(mixed(rollout={"derive": [step]}, curate={"filter": {"sql": "sampled"}}))
    assert made.teachers.mixed(at("mine-s0", 1)) == []
    spec = json.loads(made.rollout_spec(at("mine-s0", 1)))
    assert "teacher" not in spec and spec["rollout"].get("mix") is None
    assert "mix" not in made.evaluate_spec(at("mine-s0"))


@pytest.mark.parametrize(
    ("recipe", "change", "says"),
    [
        ("minillm", {"rollout": {"mix": MIX}}, "rollout.mix: what is sampled is not the policy's own.*correction"),
        ("opsd", {"rollout": {"mix": MIX, **FULL}, "train": {"objective": {"distill": AS_WRITTEN}}}, "policy's own"),
        ("gad", {"rollout": {"mix": MIX}, "train": {"objective": {"correction": "tis"}}}, "some of it is a teacher's"),
        ("minillm-mixed", {"rollout": {"mix": {"share": 0.9}}}, r"cap: 2 would cut weights.* 10 at most.*`cap: 10`"),
        ("minillm-mixed", {"train": {"objective": {"distill": {"estimate": "sampled"}}}}, "spares a divergence"),
        ("minillm-mixed", {"train": {"objective": {"kl": {"kind": "k2", "beta": 0.5}}}}, "leave `kl` out"),
        ("gkd", {"rollout": {"mix": MIX}, "train": {"objective": {"kl": {"kind": "k2", "beta": 0.5}}}}, "`kl` out"),
        ("minillm-mixed", {"train": {"objective": {"correction": {"level": "sequence"}}}}, "level: token"),
        ("dpo", {"rollout": {"mix": MIX}}, "rollout.mix: what is sampled is not the policy's own"),
        ("minillm-mixed", {"rollout": {"engine": {"kind": "vllm"}}}, "vllm cannot draw from two models.*transformers"),
        ("minillm-mixed", {"rollout": {"sampling": {"top_p": 0.9}}}, "top_p and top_k are not defined of a mixture"),
        ("minillm-mixed", {"rollout": {"mix": {"share": 0.0}}}, "share"),
        ("minillm-mixed", {"rollout": {"mix": {"share": 1.0}}}, "share"),
        (
            "grpo",
            {"train": {"objective": {"correction": {"kind": "tis", "weighs": "policy"}}}},
            "weighs: policy has no",
        ),
        ("gkd", {"train": {"objective": {"correction": {"kind": "tis", "weighs": "policy"}}}}, "weighs: policy"),
    ],
)
def test_what_makes_no_sense_is_refused(recipe: str, change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_recipe(recipe, change)


@pytest.mark.parametrize("recipe", ["gkd", "distillm", "akl"])
def test_divergences_over_the_vocabulary_need_no_correction(recipe: str) -> None:
    assert load_recipe(recipe, {"rollout": {"mix": MIX}}).rollout.mix is not None


def test_refusals_of_the_plan() -> None:
    other = {"model": {"kind": "warmup", "name": "wiser"}}
    with pytest.raises(ConfigError, match=r"runs\.mine\.rollout\.mix\.model\.name: 'wiser' is not in warmups"):
        plan(mixed(rollout={"mix": other}))
    fork = {"recipe": "grpo", "rounds": 2, "fork": {"run": "mine", "round": 0}}
    with pytest.raises(RollwayError, match=r"runs\.fork: round 0 trains on rollouts of a mixture with a teacher"):
        plan(mixed(), {"runs": {"fork": fork}})
    # The parent's teacher has a larger share than the fork's.
    large = mixed(rollout={"mix": {**MIX, "share": 0.9}}, train={"objective": {"correction": {"cap": 10.0}}})
    fork = {"recipe": "minillm-mixed", "rounds": 2, "fork": {"run": "mine", "round": 0}}
    with pytest.raises(RollwayError, match=r"runs\.fork: round 0 .*cap: 2 would cut weights, which are 10 at most"):
        plan(large, {"runs": {"fork": fork}})
    plan(mixed(), {"runs": {"fork": fork}})
    judge = {"scorers": {"discriminator": {"kind": "discriminator", "references": ["x.parquet"]}}}
    fork = {
        **{"recipe": "gad", "rounds": 2, "fork": {"run": "mine", "round": 0, "stage": "rollout"}, "score": judge},
        "train": {"objective": {"correction": "tis"}},
    }
    with pytest.raises(RollwayError, match=r"runs\.fork\.score\.scorers\.discriminator: learns to know the policy's"):
        plan(mixed(), {"runs": {"fork": fork}})


def test_two_rounds_of_a_mixture(tmp_path: Path) -> None:
    """What is stored is the mixture's log-prob; the correction's weights are Q / p~, below 1 / (1 - share)."""
    few = {"rollout": {"prompts": 8, "mix": MIX}, "train": {"optimizer": {"lr": 1e-3}}}
    config = deep_merge(TINY, {"warmups": {"teacher": WISE, "tiny": {"sft": {"steps": 40}}}})
    project = Project(tmp_path, config | {"runs": {"mine": {"recipe": "minillm-mixed", **few}}})
    project.snakemake("results/mine-s0/r0002/policy.json", "results/mine-s0/run.json")
    results = tmp_path / "results"
    rows = pq.read_table(results / "mine-s0/r0000/p0/rollouts-000.parquet").to_pylist()
    assert json.loads(rows[0]["sampling"])["mix"]["share"] == 0.4
    policies = [causal_lm.load(results / f"warmups/{name}-s0/policy.json", "main") for name in ("tiny", "teacher")]
    weights = []
    for row in rows:
        ids = torch.tensor([[*row["prompt_tokens"], *row["tokens"]]])
        own, other = (_log_probs(policy, ids, row["tokens"]) for policy in policies)
        mixture = np.log(0.6 * np.exp(own) + 0.4 * np.exp(other))
        assert row["logprobs"] == pytest.approx(mixture, abs=1e-4)
        weights += np.exp(own - mixture).tolist()
    assert 0 < min(weights) < 0.9 and 1.01 < max(weights) < 1 / 0.6 + 1e-6
    metrics = json.loads((results / "mine-s0/r0001/metrics.json").read_text())["metrics"]
    figures = {row["name"]: row["value"] for row in metrics}
    assert figures["correction/mean"] == pytest.approx(np.mean(weights), abs=1e-4)
    assert project.planned("results/mine-s0/r0002/policy.json") == {}
    said = project.rollway("verify", "--results", "results", check=False).stdout
    assert "a mixture with a teacher (rollout.mix): their log-probs are not the policy's own" in said
    assert "made from" not in said and "another teacher" not in said, said
    with (results / "warmups/teacher-s0/policy.json").open("a") as file:
        file.write(" ")
    said = project.rollway("verify", "--results", "results", check=False).stdout
    assert "results/warmups/teacher-s0/policy.json: not the content that every file made from it has read" in said, said


def _log_probs(policy: causal_lm.CausalPolicy, ids: torch.Tensor, tokens: list[int]) -> np.ndarray:
    with torch.no_grad():
        logits = policy.model(input_ids=ids).logits[0, -len(tokens) - 1 : -1].double()
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0].numpy()


def test_a_teacher_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    odd = deep_merge(WISE, {"policy": {"tokenizer": {"alphabet": "zyxwvutsrqponmlkjihgfedcba>"}}})
    run = {"recipe": "minillm-mixed", "rounds": 1, "rollout": {"prompts": 4, "mix": MIX}}
    project = Project(tmp_path, deep_merge(TINY, {"warmups": {"teacher": odd}}) | {"runs": {"mine": run}})
    done = project.snakemake("results/mine-s0/r0000/p0/rollouts-000.parquet", check=False)
    assert done.returncode != 0
    assert "rollout.mix.model: the teacher's tokenizer is not the policy's" in done.stdout
    assert not (tmp_path / "results/mine-s0/r0000/p0/rollouts-000.parquet").exists()


def test_a_teacher_with_a_smaller_output_layer_is_refused(tmp_path: Path) -> None:
    """The policy may draw an id of its padding, which such a teacher cannot read."""
    project = Project(tmp_path, deep_merge(TINY, {"warmups": {"teacher": WISE}}))
    project.snakemake("results/warmups/tiny-s0/policy.json", "results/warmups/teacher-s0/policy.json")
    results = tmp_path / "results"
    policy = causal_lm.load(results / "warmups/tiny-s0/policy.json", "main")
    policy.model.resize_token_embeddings(policy.model.config.vocab_size + 8)
    named = causal_lm.save(tmp_path / "padded", policy)
    write_manifest(tmp_path / "padded/policy.json", PolicyManifest("causal-lm", {"main": named}, state={}, updates=0))
    config = load_recipe("minillm-mixed", {"rollout": {"mix": MIX}}).rollout
    at_first = {"version": 1, "seed": 0, "round": 0, "pass_number": 0, "policy_round": 0, "shard": 0}
    spec = RolloutSpec(**at_first, rollout=config, teacher=str(results / "warmups/teacher-s0/policy.json"))
    with pytest.raises(RollwayError, match="the policy's output layer has 41 rows and the teacher's 33"):
        rollout._teacher(spec, tmp_path / "padded/policy.json")
