"""`rollway compare-gradients` on one small stored round: against plain autograd, closed forms, and the trainer."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from rollway.cli import main
from rollway.comparison import render
from rollway.comparison import stored as files
from rollway.comparison.gradients import GradientComparison, Measured, compare_gradients, cosines, rows, state_before
from rollway.config.base import as_given
from rollway.config.experiment import load_experiment
from rollway.config.policies import ScratchPolicy
from rollway.config.recipes import load_recipe
from rollway.errors import RollwayError
from rollway.objectives import initial_state
from rollway.policies import causal_lm
from rollway.policies.manifest import PolicyManifest, read_manifest, write_manifest
from rollway.store.atomic import write_json
from rollway.training.batch import training_batch
from rollway.training.gradients import Models, accumulate
from rollway.training.precompute import precompute
from rollway.training.state import TrainState, save_state
from rollway.training.update import update
from store.synthetic import write, write_run_info

POLICY = {
    "kind": "scratch",
    "tokenizer": {"kind": "char", "alphabet": "abc>"},
    "hidden": 16,
    "layers": 1,
    "heads": 2,
    "kv_heads": 1,
    "intermediate": 16,
    "context": 32,
}
GIVEN = {
    "rollout": {"group": 4, "sampling": {"max_tokens": 6}},
    "score": {"scorers": {"exact": {"kind": "exact"}}, "reward": {"exact": 1.0}, "correct": "exact"},
    "train": {"optimizer": {"lr": 0.01}},
}
GROUPS, GROUP = 3, 4
RUN = "grpo-s0"


def save(path: Path, policy: causal_lm.CausalPolicy) -> None:
    named = causal_lm.save(path.parent, policy)
    write_manifest(path, PolicyManifest("causal-lm", {"main": named}, state={}, updates=0))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three groups of four, the last without signal; the policy of round 1 is that of round 0, moved a little."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("gradients") / "results"
    config = as_given(load_recipe("grpo", GIVEN))
    write_run_info(root, RUN, name="grpo", recipe="grpo", config=config)
    policy = causal_lm.build(ScratchPolicy.model_validate(POLICY), [], 0)
    save(root / "warmups" / "tiny-s0" / "policy.json", policy)
    prompt = {"task": "add", "split": "train", "messages": "[]", "answer": "a", "meta": "{}"}
    prompts = [{**prompt, "prompt_id": f"p{g}"} for g in range(GROUPS)]
    write(root / "tasks" / "add" / "train.parquet", prompts, "prompts")
    made = sampled(policy, np.random.default_rng(0))
    folder = root / RUN / "r0000" / "p0"
    write(folder / "rollouts-000.parquet", made, "rollouts")
    rewards = [[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]
    scores = [
        {
            "rollout_id": row["rollout_id"],
            "scorer": "exact",
            "reward": rewards[int(row["group_id"][1:])][row["sample"]],
            "components": [],
        }
        for row in made
    ]
    write(folder / "scores" / "exact-000.parquet", scores, "scores")
    torch.manual_seed(1)
    with torch.no_grad():
        for p in policy.model.parameters():
            p += 0.1 * torch.randn_like(p)
    save(root / RUN / "r0001" / "policy.json", policy)
    return root


def sampled(policy: causal_lm.CausalPolicy, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Random tokens with the policy's own log-probs as the behaviour's."""
    out = []
    for g in range(GROUPS):
        prompt = rng.integers(2, 6, 3).tolist()
        for sample in range(GROUP):
            tokens = rng.integers(2, 6, int(rng.integers(2, 7))).tolist()
            with torch.no_grad():
                logp = naive_logp(policy.model, prompt, tokens).tolist()
            out.append(
                {
                    "rollout_id": f"r{g}-{sample}",
                    "round": 0,
                    "pass": 0,
                    "policy": "digest",
                    "policy_round": 0,
                    "group_id": f"g{g}",
                    "prompt_id": f"p{g}",
                    "sample": sample,
                    "source": "policy",
                    "finish": "stop",
                    "length": len(tokens),
                    "engine": "transformers",
                    "sampling": "{}",
                    "prompt_tokens": prompt,
                    "tokens": tokens,
                    "logprobs": logp,
                    "train_mask": [True] * len(tokens),
                    "segments": [{"start": 0, "end": len(tokens), "author": "policy", "turn": 0}],
                    "text": "a",
                }
            )
    return out


def naive_logp(model: torch.nn.Module, prompt: list[int], tokens: list[int]) -> Tensor:
    """Log-probs [T] from the model's own logits, one row at a time."""
    logits = model(input_ids=torch.tensor([[*prompt, *tokens]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]


def compare(results: Path, *recipes: str, at: str = "same", **more: Any) -> GradientComparison:
    return compare_gradients(results, RUN, 0, recipes, at=at, **more)


def stored_rows(results: Path) -> list[dict[str, Any]]:
    folder = results / RUN / "r0000" / "p0"
    rewards = {r["rollout_id"]: r["reward"] for r in pq.read_table(folder / "scores/exact-000.parquet").to_pylist()}
    made = pq.read_table(folder / "rollouts-000.parquet").to_pylist()
    return [{**row, "reward": rewards[row["rollout_id"]]} for row in made]


def advantages(made: list[dict[str, Any]], standardised: bool) -> list[float]:
    out = []
    for row in made:
        group = np.array([r["reward"] for r in made if r["group_id"] == row["group_id"]])
        gap = row["reward"] - group.mean()
        out.append(float(gap / (group.std(ddof=1) + 1e-6)) if standardised and group.std() > 0 else float(gap))
    return out


def loaded(results: Path, round: int) -> torch.nn.Module:
    path = files.open_round(results, RUN, 0).policy(round)
    return causal_lm.load(path, "main", train=True, device="cpu").model.eval()


def autograd(results: Path, *, dr: bool) -> list[Tensor]:
    """GRPO and Dr.GRPO at ratio 1 in a few lines: the gradient of A r is that of A log-prob."""
    made = stored_rows(results)
    model = loaded(results, 0)
    total = torch.zeros(())
    for row, a in zip(made, advantages(made, not dr), strict=True):
        logp = naive_logp(model, row["prompt_tokens"], row["tokens"])
        total = total - a * (logp.sum() / 6 if dr else logp.mean())
    (total / len(made)).backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


@pytest.mark.parametrize(("name", "dr"), [("grpo", False), ("dr-grpo", True)])
def test_gradients_equal_plain_autograd(results: Path, name: str, dr: bool) -> None:
    mine, expected = compare(results, name).measured[name].gradient, autograd(results, dr=dr)
    assert max(float(g.abs().max()) for g in expected) > 1e-4
    for a, b in zip(mine, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_cosine_of_two_methods_equals_plain_autograd(results: Path) -> None:
    found = compare(results, "grpo", "dr-grpo", "grpo")
    assert list(found.measured) == ["grpo", "dr-grpo"]
    a, b = (torch.cat([g.flatten() for g in autograd(results, dr=dr)]).double() for dr in (False, True))
    expected = float(a @ b / (a.norm() * b.norm()))
    assert found.cosine["grpo", "dr-grpo"] == found.cosine["dr-grpo", "grpo"] == pytest.approx(expected, abs=1e-6)
    assert expected < 0.9999
    assert found.cosine["grpo", "grpo"] == pytest.approx(1.0, abs=1e-12)
    assert found.measured["grpo"].norm == pytest.approx(float(a.norm()), rel=1e-5)


def test_the_gradient_is_that_of_training(results: Path) -> None:
    """The trainer's own `accumulate`, and the norm that a real first update reports."""
    stored = files.open_round(results, RUN, 0)
    recipe = files.recipe_for(stored, "grpo", None)
    made, rollouts = files.curated(stored, recipe)
    batch = training_batch(made.batch, rollouts)
    mine = compare(results, "grpo").measured["grpo"]
    model = loaded(results, 0)
    objective = recipe.train.objective
    fixed = precompute(model, None, None, batch, recipe.train, {}, 1.0)
    accumulate(Models(model, None, 1.0, 16384), fixed.rows, fixed.tokens, objective, initial_state(objective))
    for p, g in zip(model.parameters(), mine.gradient, strict=True):
        assert torch.equal(torch.zeros_like(p) if p.grad is None else p.grad, g)
    model = loaded(results, 0)
    _, metrics = update(model, None, None, batch, recipe.train, TrainState(seed=0))
    reported = {m.name: m.value for m in metrics}
    assert mine.norm == pytest.approx(reported["grad_norm"], rel=1e-5)
    assert mine.loss == pytest.approx(reported["loss"], abs=1e-6)


def test_counts_and_effective_tokens_have_closed_forms(results: Path) -> None:
    made = stored_rows(results)
    a = np.repeat(np.abs(advantages(made, False)), [r["length"] for r in made])
    m = compare(results, "dr-grpo").measured["dr-grpo"]
    assert (m.rows, m.tokens) == (GROUPS * GROUP, len(a))
    assert (m.rows_used, m.tokens_used) == (2 * GROUP, int((a > 0).sum()))
    assert m.gated == 0.0
    assert m.effective_tokens == pytest.approx(a.sum() ** 2 / (a**2).sum(), rel=1e-5)
    assert m.ess == pytest.approx(1.0, abs=1e-5)


def test_the_next_policy_gates_what_the_clip_says(results: Path) -> None:
    made = stored_rows(results)
    before, after = loaded(results, 0), loaded(results, 1)
    gated = pushed = 0
    weights = []
    with torch.no_grad():
        for row, a in zip(made, advantages(made, True), strict=True):
            new, old = (naive_logp(m, row["prompt_tokens"], row["tokens"]) for m in (after, before))
            ratio = (new - old).exp()
            weights.append(ratio)
            gated += int(((a > 0) & (ratio > 1.2) | (a < 0) & (ratio < 0.8)).sum()) if a else 0
            pushed += len(ratio) if a else 0
    w = torch.cat(weights)
    found = compare(results, "grpo", "psr", "sft", at="next").measured
    assert 0 < gated < pushed
    assert found["grpo"].gated == pytest.approx(gated / pushed)
    assert found["grpo"].tokens_used == pushed - gated
    assert found["grpo"].ess == pytest.approx(float(w.sum() ** 2 / (len(w) * (w**2).sum())), rel=1e-4)
    assert found["sft"].gated is None


def test_opposite_and_absent_gradients(results: Path) -> None:
    one = compare(results, "grpo").measured["grpo"]
    still = replace(one, gradient=[torch.zeros_like(g) for g in one.gradient])
    measured: dict[str, Measured] = {"a": one, "b": replace(one, gradient=[-2 * g for g in one.gradient]), "c": still}
    found = cosines(measured)
    assert found["a", "b"] == pytest.approx(-1.0)
    assert found["a", "c"] is None
    assert found["c", "c"] is None


def test_references_pairs_and_selections_work_on_the_same_rollouts(results: Path) -> None:
    found = compare(results, "dpo", "capo", "dcpo", "gspo", "reinforce-plus-plus", "copg")
    assert not found.reasons
    norms = {name: m.norm for name, m in found.measured.items()}
    assert all(math.isfinite(norm) and norm > 0 for name, norm in norms.items() if name != "capo")
    assert found.measured["dpo"].gated is None
    # At this learning rate every step is larger than the mask allows.
    assert (found.measured["capo"].gated, norms["capo"]) == (1.0, 0.0)
    assert found.cosine["capo", "capo"] is None


def test_what_a_recipe_lacks_is_reported(results: Path) -> None:
    found = compare(results, "grpo", "ppo", "dagrpo", "fiberpo-domain")
    assert list(found.measured) == ["grpo"]
    assert "needs a critic" in found.reasons["ppo"]
    assert "judge" in found.reasons["dagrpo"]
    assert "domain" in found.reasons["fiberpo-domain"]
    text = render.gradients_table(found)
    assert all(f"left out: {name}:" in text for name in found.reasons)
    table = rows(found).to_pylist()
    assert [row["recipe"] for row in table if row["reason"]] == sorted(found.reasons)


def test_settings_of_a_config_file(results: Path) -> None:
    task = {"source": {"kind": "jsonl", "path": "x.jsonl"}, "prompt": "{a}", "answer": "{b}"}
    experiment = load_experiment(
        {
            "tasks": {"add": task},
            "warmups": {"tiny": {"policy": POLICY}},
            "defaults": {"task": "add", "warmup": "tiny", **GIVEN},
            "runs": {"wide": {"recipe": "grpo", "train": {"objective": {"gate": {"low": 0.99, "high": 99.0}}}}},
        }
    )
    found = compare(results, "wide", "grpo", at="next", experiment=experiment).measured
    assert found["wide"].gated == 0.0
    assert found["grpo"].gated is not None and found["grpo"].gated > 0.0


def test_a_missing_scorer_is_named(results: Path) -> None:
    stored = files.open_round(results, RUN, 0)
    score = {"scorers": {"long": {"kind": "exact"}}, "reward": {"long": 1.0}, "correct": "long"}
    recipe = load_recipe("grpo", {**GIVEN, "score": score})
    with pytest.raises(RollwayError, match="needs scores of `long`, which grpo-s0 does not have in round 0"):
        files.curated(stored, recipe)


def test_a_fork_reads_its_parents_files(results: Path, tmp_path: Path) -> None:
    info = json.loads((results / RUN / "run.json").read_text())
    write_json(tmp_path / RUN / "run.json", info)
    fork = {**info, "name": "b", "parent": RUN, "fork_round": 1, "fork_stage": "score"}
    write_json(tmp_path / "b-s0" / "run.json", fork)
    for round in (0, 1):
        path = tmp_path / RUN / f"r{round:04d}" / "p0" / "rollouts-000.parquet"
        path.parent.mkdir(parents=True)
        path.touch()
    stored = files.open_round(tmp_path, "b-s0", 1)
    assert stored.rollouts(1) == [tmp_path / RUN / "r0001" / "p0" / "rollouts-000.parquet"]
    assert stored.policy(1) == tmp_path / RUN / "r0001" / "policy.json"
    assert stored.policy(2) == tmp_path / "b-s0" / "r0002" / "policy.json"
    assert stored.policy(0) == tmp_path / "warmups" / "tiny-s0" / "policy.json"


def test_a_fork_is_read_as_its_rollouts_were_sampled(results: Path, tmp_path: Path) -> None:
    """Another temperature and length of the fork are for the rounds it samples itself."""
    root = tmp_path / "results"
    shutil.copytree(results, root)
    info = json.loads((root / RUN / "run.json").read_text())
    config = as_given(load_recipe("grpo", {**GIVEN, "rollout": {"group": 4, "sampling": {"temperature": 0.5}}}))
    fork = {**info, "name": "fork", "parent": RUN, "fork_round": 0, "fork_stage": "score", "config": config}
    write_json(root / "fork-s0" / "run.json", fork)
    (mine, theirs) = (
        compare_gradients(root, run, 0, ["grpo", "dr-grpo"], at="same").measured for run in ("fork-s0", RUN)
    )
    assert {name: m.norm for name, m in mine.items()} == {name: m.norm for name, m in theirs.items()}
    assert mine["grpo"].ess == pytest.approx(1.0, abs=1e-5)


def test_a_fork_with_a_fresh_optimiser_leaves_its_parents_counters_behind(results: Path, tmp_path: Path) -> None:
    """Its first round is the first of the learning rate's schedule, as it is for the trainer."""
    root = tmp_path / "results"
    shutil.copytree(results, root)
    info = json.loads((root / RUN / "run.json").read_text())
    path = root / RUN / "r0001" / "policy.json"
    held = save_state(path.parent / "state", TrainState(seed=0, updates=3))
    write_manifest(path, replace(read_manifest(path), state=held))
    for name, optimizer, updates in (("carried", {}, 3), ("fresh", {"optimizer": "fresh"}, 0)):
        config = {**info["config"], "fork": {"run": "grpo", "round": 1, **optimizer}}
        fork = {**info, "name": name, "parent": RUN, "fork_round": 1, "fork_stage": "score", "config": config}
        write_json(root / f"{name}-s0" / "run.json", fork)
        assert state_before(replace(files.open_round(root, f"{name}-s0", 0), round=1)).updates == updates


def test_unknown_names_and_nothing_to_show_are_errors(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, says in (("drgrpo", "did you mean dr-grpo"), ("xyzzy", "rollway recipes"), ("none.yaml", "no such file")):
        with pytest.raises(RollwayError, match=f"{name}: .*{says}"):
            compare(results, "grpo", name)
    given = ["compare-gradients", "--results", str(results), "--run", RUN, "--round", "0", "--recipes", "ppo"]
    assert main([*given, "--svg", str(tmp_path / "map.svg")]) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and "no recipe can be computed on round 0" in shown.err and "needs a critic" in shown.err
    assert not (tmp_path / "map.svg").exists()


def test_experts_are_not_there_for_recipes_that_cannot_use_them(results: Path, tmp_path: Path) -> None:
    """Their gradient is that of the rollouts without the experts; the reward of an expert moves no baseline."""
    root = tmp_path / "results"
    shutil.copytree(results, root)
    folder = root / RUN / "r0000" / "p0"
    made = pq.read_table(folder / "rollouts-000.parquet").to_pylist()
    experts = [
        {**made[0], "rollout_id": "expert", "sample": GROUP, "source": "expert", "logprobs": [math.nan] * 9}
        | {"tokens": [2] * 9, "train_mask": [True] * 9, "length": 9}
    ]
    write(folder / "rollouts-001.parquet", experts, "rollouts")
    verdict = {"rollout_id": "expert", "scorer": "exact", "reward": 1.0, "components": []}
    write(folder / "scores" / "exact-001.parquet", [verdict], "scores")
    mine, before = (compare(root, "grpo", "gspo", "sft"), compare(results, "grpo", "gspo", "sft"))
    assert not mine.reasons
    for name in ("grpo", "gspo"):
        assert (mine.measured[name].rows, mine.measured[name].norm) == (GROUPS * GROUP, before.measured[name].norm)
    assert mine.measured["sft"].norm != before.measured["sft"].norm


def test_schedules_apply_from_their_round(results: Path) -> None:
    stored = files.open_round(results, RUN, 0)
    steps = [{"from": 1, "train": {"optimizer": {"lr": 0.5}}}]
    info = {**stored.info, "config": {**stored.info["config"], "schedule": steps}}
    rates = [replace(stored, info=info, round=r).settings()["train"]["optimizer"]["lr"] for r in (0, 1)]
    assert rates == [0.01, 0.5]


def test_the_command_writes_text_rows_and_a_picture(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["compare-gradients", "--results", str(results), "--run", RUN, "--round", "0", "--recipes", "grpo,rloo,ppo"]
    assert main([*given, "--svg", str(tmp_path / "map.svg")]) == 0
    text = capsys.readouterr().out
    assert "gradients on the rollouts of grpo-s0, round 0, at its policy" in text
    assert "left out: ppo: needs a critic" in text
    root = ElementTree.parse(tmp_path / "map.svg").getroot()
    assert len([e for e in root.iter() if e.tag.endswith("rect")]) == 1 + 4
    out = tmp_path / "rows.parquet"
    assert main([*given, "--format", "parquet", "--out", str(out)]) == 0
    asked = duckdb.sql(f"SELECT recipe, other, cosine > 0.5 FROM '{out}' WHERE reason IS NULL ORDER BY ALL").fetchall()
    assert asked == [(a, b, True) for a in ("grpo", "rloo") for b in ("grpo", "rloo")]
    assert main([*given, "--format", "csv"]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 1 + 4 + 1
    assert main([*given, "--format", "parquet"]) == 1
    assert main([*given[:-4], "--round", "7", "--recipes", "grpo"]) == 1
    assert "it has rounds 0 to 0" in capsys.readouterr().err
    with pytest.raises(RollwayError, match=r"has no run\.json of it; it has grpo-s0"):
        compare_gradients(results, "grpo", 0, ["grpo"], at="same")


def test_colours_run_from_red_over_white_to_blue() -> None:
    assert [render.colour(c) for c in (-1.0, 0.0, 1.0, None)] == ["#b3302c", "#ffffff", "#0b6fb8", "#d5d9dd"]
