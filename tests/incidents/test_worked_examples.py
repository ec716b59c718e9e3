"""The worked batch of the baselines through each recipe as it is: its SQL, the trainer's own precomputation, its loss.

Six completions of two prompts; the expected numbers were computed by hand from the papers' formulas.
"""

import ast
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import Tensor

from objectives.rows import CORRECT, ENGINE, GROUP, NOW, OLD, REF, V_NOW, V_OLD, padded
from rollway.config import load_recipe, recipe_names
from rollway.config.recipes import Recipe
from rollway.curation import curate, given_values
from rollway.objectives import TokenBatch, loss, prepare
from rollway.policies.logprobs import TokenLogprobs
from rollway.training import precompute as module
from rollway.training.batch import TrainingRow, training_batch

PLAIN: dict[str, Any] = {}
WITHOUT_STD: dict[str, Any] = {"curate": {"advantage": {"sql": "dr_grpo"}}}
WORKED: list[tuple[str, dict[str, Any], float]] = [
    ("reinforce", {"curate": {"advantage": {"baseline": "none"}}}, 0.933333),
    ("reinforce", PLAIN, -0.091667),
    ("rloo", PLAIN, -0.083333),
    ("reinforce-plus-plus", PLAIN, -0.020010),
    ("reinforce-plus-plus-baseline", PLAIN, -0.017526),
    ("ppo", {"train": {"advantage": {"kl": 0.0}}}, 0.004445 + 0.061772),
    ("ppo", {"train": {"advantage": {"kl": 0.0}, "objective": {"value": {"clip": None}}}}, 0.004445 + 0.057801),
    ("grpo", PLAIN, -0.026756),
    ("grpo", {"train": {"objective": {"aggregate": "token_mean"}}}, -0.085597),
    ("grpo", {"train": {"objective": {"aggregate": "seq_mean_token_sum"}}}, -0.242524),
    ("grpo", {"train": {"objective": {"kl": {"kind": "k3", "beta": 0.04}}}}, -0.024685),
    ("dr-grpo", {"rollout": {"sampling": {"max_tokens": 4}}}, -0.035005),
    ("dapo", PLAIN, -0.092484),
    ("gspo", PLAIN, -0.000192),
    ("gspo", {"train": {"objective": {"gate": {"low": 0.1, "high": 0.1}}}}, -0.039504),
    ("gspo-token", PLAIN, -0.000192),
    ("gspo-token", {"train": {"objective": {"gate": {"low": 0.1, "high": 0.1}}}}, -0.039504),
    ("cispo", PLAIN, -0.008875),
    ("tis", PLAIN, -0.077549),
    ("tis", {"train": {"objective": {"aggregate": "seq_mean_token_mean"}}}, -0.008261),
    ("tis", {"train": {"objective": {"correction": {"level": "sequence"}}}}, -0.117467),
    ("mis", PLAIN, -0.145473),
    ("dpo", PLAIN, 0.663597),
    ("ipo", PLAIN, 19.36),
    ("sft", PLAIN, 0.723529),
    ("seqkd", PLAIN, 0.723529),
    ("rft", PLAIN, 0.622222),
    ("psr", PLAIN, -1.050666),
    ("nsr", PLAIN, 1.009554),
    ("w-reinforce", PLAIN, 0.419461),
]

ELSEWHERE = {
    "sd-zero": "objectives/test_sd_zero.py::test_phase_two_worked",
    "sd-zero-srt": "objectives/test_sd_zero.py::test_self_revision_training_worked",
    "sapo": "objectives/test_sapo.py::test_worked_batch",
    "fiberpo": "objectives/test_fiberpo.py::test_worked",
    "fiberpo-domain": "objectives/test_fiberpo.py::test_domain_form_by_hand",
    "capo": "objectives/test_capo.py::test_worked_loss",
    "rein-capo": "objectives/test_capo.py::test_worked_loss",
    "dr-capo": "objectives/test_capo.py::test_constant_denominator_form",
    "copg": "objectives/test_copg.py::test_worked_pair",
    "d3s": "objectives/test_d3s.py::test_worked_selection",
    "d3s-gspo": "objectives/test_d3s.py::test_sequence_ratio_reads_all_valid_tokens_and_averages_kept_ones",
    "dagrpo": "objectives/test_dagrpo.py::test_coefficients_with_a_constant_length",
    "dcpo": "objectives/test_dcpo.py::test_worked",
    "ngrpo": "objectives/test_ngrpo.py::test_token_losses",
    "opd": "objectives/test_distillation.py::test_opsd_worked",
    "sdpo": "objectives/test_self_distillation.py::test_sdpo_worked_through_sql_and_objective",
    "srpo": "objectives/test_self_distillation.py::test_srpo_worked_through_sql_and_objective",
    "opsd": "objectives/test_self_distillation.py::test_opsd_worked",
    "scope": "objectives/test_scope.py::test_the_worked_example_through_sql_and_objective",
    "opd-reward": "training/test_teacher.py::test_worked_rewards_of_a_teacher",
    "g-opd": "objectives/test_opd_survey.py::test_extrapolation_by_hand",
    "minillm": "objectives/test_opd_survey.py::test_minillm_by_hand",
    "minillm-mixed": "objectives/test_opd_survey.py::test_minillm_of_a_mixture_by_hand",
    "distillm": "objectives/test_divergences.py::test_worked_values_and_slopes",
    "distillm-2": "objectives/test_opd_survey.py::test_distillm_2_by_hand",
    "eopd": "objectives/test_opd_survey.py::test_entropy_aware_by_hand",
    "todi": "objectives/test_divergences.py::test_todi_has_the_value_of_jeffreys_and_another_slope",
    "akl": "objectives/test_divergences.py::test_akl_weighs_head_and_tail",
    "ovd": "scorers/test_ovd.py::test_a_score_of_0_to_9_is_the_reward_of_grpo",
    "gkd": "objectives/test_distillation.py::test_kepo_worked",
    "expo": "objectives/test_expo.py::test_worked",
    "expo-dpo": "objectives/test_expo.py::test_dpo_worked",
    "kepo": "objectives/test_kepo.py::test_worked_loss",
    **dict.fromkeys(("otr", "otr-exact", "dft"), "objectives/test_otr.py::test_worked"),
    "spin": "objectives/test_spin.py::test_ln_2_at_a_zero_margin",
    "gad": "training/test_discriminator.py::test_worked",
    "pf-ppo": "objectives/test_pf_ppo.py::test_weighted_token_mean",
    "r2vpo": "objectives/test_r2vpo.py::test_worked",
}
"""Recipes whose papers have worked examples of their own, and the tests that hold them."""


def names(n: int) -> dict[str, Any]:
    return {"rollout_id": f"r{n}", "group_id": f"g{GROUP[n]}", "source": "policy"}


def scored() -> pa.Table:
    rows = [
        names(n)
        | {"prompt_id": f"p{GROUP[n]}", "sample": n % 3, "finish": "stop", "length": len(OLD[n]), "age": 0}
        | {"reward": CORRECT[n], "correct": CORRECT[n] == 1.0, "text": f"text {n}"}
        for n in range(len(OLD))
    ]
    return pa.Table.from_pylist(rows)


def rollouts() -> pa.Table:
    types = {"prompt_tokens": pa.list_(pa.int32()), "tokens": pa.list_(pa.int32())}
    types |= {"logprobs": pa.list_(pa.float32()), "train_mask": pa.list_(pa.bool_())}
    rows = [
        names(n)
        | {"prompt_tokens": [1], "tokens": [2] * len(OLD[n]), "logprobs": ENGINE[n], "train_mask": [True] * len(OLD[n])}
        for n in range(len(OLD))
    ]
    text = ("rollout_id", "group_id", "source")
    return pa.Table.from_pylist(rows, pa.schema([*((t, pa.string()) for t in text), *types.items()]))


def of(rows: list[TrainingRow], table: list[tuple[float, ...]]) -> Tensor:
    """The table's values for these rows, padded to their longest."""
    return padded([table[int(row.rollout_id[1:])] for row in rows], fill=0.0)


def worked_batch(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> TokenBatch:
    """What the trainer makes of the recipe's batch, where models would give the worked log-probs and values."""
    given = given_values(recipe.curate, round=0, seed=0)
    batch = training_batch(curate(scored(), recipe.curate, given=given), rollouts())
    known = {"policy": OLD, "reference": REF}

    def logprobs(model: Any, rows: list[TrainingRow], **_: Any) -> TokenLogprobs:
        x = of(rows, known[model])
        return TokenLogprobs(x, torch.zeros_like(x))

    monkeypatch.setattr(module, "token_logprobs", logprobs)
    monkeypatch.setattr(module, "values", lambda critic, rows, **_: of(rows, V_OLD))
    policy, critic, reference = ("policy", "critic" if recipe.train.critic else None, "reference")
    fixed = module.precompute(policy, critic, reference, batch, recipe.train, {}, 1.0)  # type: ignore[arg-type]
    fields = {"logp": of(fixed.rows, NOW), "value": of(fixed.rows, V_NOW) if critic else None}
    return prepare(TokenBatch(**(vars(fixed.tokens) | fields)), recipe.train.objective)


@pytest.mark.parametrize(("name", "over", "expected"), WORKED, ids=[f"{n}-{i}" for i, (n, _, _) in enumerate(WORKED)])
def test_worked_batch(name: str, over: dict[str, Any], expected: float, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(name, over)
    value = loss(worked_batch(recipe, monkeypatch), recipe.train.objective).loss
    assert float(value) == pytest.approx(expected, abs=1.1e-6 if name == "ppo" else 6e-7)


def test_leave_one_out_with_the_penalty_in_the_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    """RLOO's KL, against its sentence in the paper: the return less the mean return of the others."""
    over = {"curate": {"advantage": None}, "train": {"advantage": {"kind": "leave_one_out", "kl": 0.01}}}
    recipe = load_recipe("rloo", over)
    made = worked_batch(recipe, monkeypatch).advantage
    assert made is not None
    returns = [
        r - 0.01 * sum(o - f for o, f in zip(old, ref, strict=True))
        for r, old, ref in zip(CORRECT, OLD, REF, strict=True)
    ]
    expected = [
        own - sum(x for m, x in enumerate(returns) if GROUP[m] == GROUP[n] and m != n) / 2
        for n, own in enumerate(returns)
    ]
    assert made.tolist() == pytest.approx(expected, abs=1e-12)
    batch = worked_batch(recipe, monkeypatch)
    plain = -sum(a * sum(now) for a, now in zip(expected, NOW, strict=True)) / 6
    assert float(loss(batch, recipe.train.objective).loss) == pytest.approx(plain, abs=1e-12)


def test_grpo_without_the_standard_deviation(monkeypatch: pytest.MonkeyPatch) -> None:
    made = worked_batch(load_recipe("grpo", WITHOUT_STD), monkeypatch).advantage
    assert made is not None
    assert made.tolist() == pytest.approx([2 / 3, -1 / 3, -1 / 3, 1 / 3, 1 / 3, -2 / 3], abs=1e-12)


def test_every_recipe_has_its_worked_example() -> None:
    assert {name for name, _, _ in WORKED} | ELSEWHERE.keys() == set(recipe_names())
    for place in ELSEWHERE.values():
        file, function = place.split("::")
        tree = ast.parse((Path(__file__).parents[1] / file).read_text(encoding="utf-8"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, place
