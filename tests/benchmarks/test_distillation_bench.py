"""Costs, accuracy at equal cost, and blocks of pages: what the distillation bench says is what its files hold."""

import json
from pathlib import Path

import distillation_bench
import distillation_figures
import method_pages
import numpy as np
import pytest

from rollway.comparison.runs import Contender
from rollway.config import load_experiment, recipe_names
from rollway.config.recipes import read_yaml
from rollway.report.data import Run

CONFIG = Path(__file__).parents[2] / "config/examples/distillation_bench.yaml"


def contender(name: str, right: dict[int, list[list[int]]]) -> Contender:
    """right[round][seed][prompt]: right ones of 4 samples."""
    seeds = len(next(iter(right.values())))
    evaluations = {
        r: {seed: {f"p{i}": (4, c) for i, c in enumerate(row)} for seed, row in enumerate(of_seed)}
        for r, of_seed in right.items()
    }
    return Contender(name, name, [Run(f"{name}-s{seed}", name, seed, {}) for seed in range(seeds)], evaluations, "")


def test_all_arms_train_alike() -> None:
    """What the page says is the same for all: optimiser and schedule, updates per round, and completions of the student
    per round (those of an explanation, a hint or a revision are counted as tokens)."""
    experiment = load_experiment(read_yaml(CONFIG))
    settings = [experiment.settings(name, 0) for name in experiment.resolved if name != "teacher-text"]
    trained = {(s.train.optimizer.model_dump_json(), s.train.epochs * s.train.minibatches) for s in settings}
    assert len(trained) == 1
    assert {s.rollout.prompts * s.rollout.group for s in settings} == {256}
    (optimizer, updates), *_ = trained
    assert (json.loads(optimizer)["lr"], json.loads(optimizer)["schedule"]["warmup"], updates) == (3.0e-4, 0, 4)


def test_between_two_evaluations_accuracy_is_on_their_line() -> None:
    arm = contender("a", {0: [[0, 4]], 2: [[2, 4]], 4: [[4, 4]]})
    costs = {0: 0.0, 1: 5.0, 2: 10.0, 3: 20.0, 4: 40.0}
    for budget, first in ((0.0, 0.0), (5.0, 0.25), (10.0, 0.5), (25.0, 0.75), (40.0, 1.0), (99.0, 1.0)):
        np.testing.assert_allclose(distillation_figures.figures_at(arm, costs, budget), [[first, 1.0]])


def test_equal_cost_is_not_equal_rounds() -> None:
    """The dear arm ends higher, and is no better when both have spent the same."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 2, (5, 40))
    cheap = {0: (noise * 0).tolist(), 4: (noise + 1).tolist()}
    dear = {0: (noise * 0).tolist(), 4: (2 * noise + 2).tolist()}
    arms = [contender("grpo", cheap), contender("dear", dear)]
    per_round = {"grpo": 1.0, "dear": 2.0}
    costs = {name: {r: r * x for r in range(5)} for name, x in per_round.items()}
    found = distillation_figures.at_equal_cost(arms, "grpo", costs, 4.0)
    assert found["dear"].value == pytest.approx(found["grpo"].value)
    assert found["dear"].difference == pytest.approx(0.0) and found["dear"].verdict == "no difference shown"
    found = distillation_figures.at_equal_cost(arms, "grpo", costs, 8.0)
    assert found["dear"].difference == pytest.approx((noise + 1).mean() / 4) and found["dear"].verdict == "better"
    assert found["grpo"].verdict == "baseline"


def test_students_interval() -> None:
    """Three seeds, mean 2, standard deviation 1: 4.303 / sqrt(3) to either side."""
    mean = distillation_figures.mean_over_seeds([1.0, 2.0, 3.0])
    assert (mean.value, mean.high - 2.0) == (2.0, pytest.approx(4.303 / 3**0.5))
    assert distillation_figures.mean_over_seeds([1.5]) == distillation_figures.Mean(1.5, 1.5, 1.5)


def test_seconds_are_those_of_training_and_a_fork_has_its_parents(tmp_path: Path) -> None:
    def job(run: str, round: int, name: str, seconds: float) -> None:
        file = tmp_path / "logs" / run / f"r{round:04d}" / f"{name}.usage.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"seconds": 100.0, "cpu_seconds": seconds}))

    for run, info in (("a-s0", {}), ("b-s0", {"parent": "a-s0", "fork_round": 0, "fork_stage": "train"})):
        (tmp_path / run).mkdir()
        (tmp_path / run / "run.json").write_text(json.dumps({"rounds": 2, **info}))
        for round in range(2):
            job(run, round, "rollout-p0-000", 1.0 if run == "a-s0" else 7.0)
            job(run, round, "evaluate", 50.0)
            job(run, round + 1, "train", 2.0)
    job("a-s0", 0, "check-teacher-wise", 4.0)
    arms = [contender(name, {0: [[0]], 2: [[4]]}) for name in ("a", "b")]
    found = distillation_figures.processor_seconds(tmp_path, arms)
    assert found == {"a": {0: 0.0, 1: 7.0, 2: 10.0}, "b": {0: 0.0, 1: 7.0, 2: 16.0}}


def test_a_block_is_put_at_the_end_of_its_section_and_replaced(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A\n\n## Measured\n\nBy hand.\n\n### Below\n\nMore.\n\n## Limits\n\nFew.\n")
    method_pages.replace_block(page, "bench", ["one", "two"], after="Measured")
    once = page.read_text()
    assert "More.\n\n<!-- bench: begin -->\n\none\n\ntwo\n\n<!-- bench: end -->\n\n## Limits\n\nFew.\n" in once
    method_pages.replace_block(page, "bench", ["three"], after="Measured")
    assert page.read_text() == once.replace("one\n\ntwo", "three")
    empty = tmp_path / "empty.md"
    empty.write_text("# A\n\n## Measured\n\n## Limits\n")
    method_pages.replace_block(empty, "bench", ["x"], after="Measured")
    assert empty.read_text().startswith("# A\n\n## Measured\n\n<!-- bench: begin -->\n\nx\n")
    with pytest.raises(SystemExit, match="has no section Nowhere"):
        method_pages.replace_block(empty, "other", ["x"], after="Nowhere")


def test_every_arm_belongs_to_a_picture_and_a_page() -> None:
    experiment = load_experiment(read_yaml(CONFIG))
    arms = {name: run for name, run in experiment.resolved.items() if name not in distillation_bench.NO_ARMS}
    for name, run in arms.items():
        assert run.recipe in recipe_names()
        assert run.recipe in arms, "the block on a method's page is found by the run's name"
        assert name.startswith(run.recipe)
        assert distillation_bench.family_of(run.recipe) in distillation_bench.FAMILIES
        assert len(run.seeds) == 5
    rounds = {run.rounds for run in arms.values()}
    assert len(rounds) == 1
