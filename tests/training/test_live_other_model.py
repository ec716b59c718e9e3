"""A live teacher that is another model: a warm-up's policy or one of Hugging Face, beside the policy in the trainer."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from rollway.config.recipes import load_recipe
from rollway.config.training import LiveTeacher, TrainConfig
from rollway.errors import RollwayError
from rollway.objectives.divergences import divergence, with_tail
from rollway.runtime import spec_files
from rollway.runtime.plan_teachers import Teachers
from rollway.runtime.specs import STAGE_VERSION, TrainSpec
from rollway.training.batch import TrainingBatch, TrainingRow
from rollway.training.state import TrainState
from rollway.training.update import update
from training.test_teacher import config, logits_of, naive, taught
from training.tiny import VOCABULARY, gradients, largest_difference, random_batch, tiny

WARMUP = {"kind": "warmup", "name": "teacher"}
OTHER = {"kind": "live", "model": WARMUP}


def wider(vocabulary: int = VOCABULARY) -> Qwen3ForCausalLM:
    """A larger model of the same tokens: another width, depth and, with padding, output layer."""
    torch.manual_seed(7)
    size = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3}
    shape = {"num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "tie_word_embeddings": False}
    made = Qwen3ForCausalLM(Qwen3Config(vocab_size=vocabulary, initializer_range=0.3, **size, **shape))
    return made.to(torch.float64).eval()


def gradient(batch: TrainingBatch, train: TrainConfig, teacher: Qwen3ForCausalLM | None) -> list[Tensor]:
    """Of one step, as the optimiser gets it."""
    policy, seen = tiny(), list[Tensor]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rollway.training.update.step", lambda *_: seen.extend(gradients(policy)))
        update(policy, None, None, batch, train, TrainState(seed=0), teacher=teacher)
    return seen


def by_hand(
    batch: TrainingBatch, teacher: Qwen3ForCausalLM, train: TrainConfig, count: int = VOCABULARY
) -> list[Tensor]:
    """Through whole logits of both models, the teacher's over the first `count` ids."""
    part = train.objective.distill
    assert part is not None

    def of_row(row: TrainingRow, logits: Tensor) -> Tensor:
        with torch.no_grad():
            lp = (logits_of(teacher, row)[:, :count] / part.temperature).log_softmax(-1)
        return divergence(lp, (logits / part.temperature).log_softmax(-1), part.divergence)

    return naive(tiny(), batch, of_row)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd", "todi"])
def test_exact_beside_another_model_is_the_enumeration(kind: str) -> None:
    batch, teacher = random_batch(7), wider()
    train = config({"divergence": kind, "estimate": "exact", "temperature": 1.3}, teacher=OTHER)
    wanted = by_hand(batch, teacher, train)
    assert largest_difference(gradient(batch, train, teacher), wanted) < 1e-12
    assert max(float(g.abs().max()) for g in wanted) > 1e-3


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_stored_over_the_whole_vocabulary_agrees_with_live(kind: str) -> None:
    """Top k = V, stored in float32 by a scorer of the same teacher; live exact, and live top k of either model."""
    batch, teacher = random_batch(7), wider()
    exact = config({"divergence": kind, "estimate": "exact"}, teacher=OTHER)
    found = gradient(batch, exact, teacher)
    topk = {"kind": "topk", "k": VOCABULARY, "outside": "renormalise"}
    stored = config({"divergence": kind, "estimate": topk})
    from_file = gradient(taught(batch, teacher, VOCABULARY), stored, None)
    assert largest_difference(found, from_file) < 1e-6
    for of in ("teacher", "student"):
        live = config({"divergence": kind, "estimate": {**topk, "of": of}}, teacher=OTHER)
        assert largest_difference(found, gradient(batch, live, teacher)) < 1e-12


def test_rows_of_padding_in_the_teachers_output_layer_have_no_mass() -> None:
    batch, teacher = random_batch(7), wider(VOCABULARY + 4)
    train = config({"divergence": "forward_kl", "estimate": "exact"}, teacher=OTHER)
    assert largest_difference(gradient(batch, train, teacher), by_hand(batch, teacher, train)) < 1e-12
    sampled = config({"divergence": "reverse_kl"}, teacher=OTHER)
    stored = taught(batch, cut(wider(VOCABULARY + 4), VOCABULARY))
    assert largest_difference(gradient(batch, sampled, teacher), gradient(stored, config({}), None)) < 1e-6


SMALLER = VOCABULARY - 3


def within(batch: TrainingBatch, count: int) -> TrainingBatch:
    """Tokens of the ids below `count` alone."""
    rows = [
        replace(r, tokens=np.asarray(r.tokens) % count, prompt_tokens=[t % count for t in r.prompt_tokens])
        for r in batch.rows
    ]
    return replace(batch, rows=rows)


@pytest.mark.parametrize("estimate", ["exact", "student"])
def test_rows_of_padding_in_the_policys_output_layer_are_left_out(estimate: str) -> None:
    """Exact: both over the ids that both have. The policy's own top k: of these ids, the rest with its tail."""
    batch, teacher = within(random_batch(7), SMALLER), smaller()
    topk = {"kind": "topk", "k": 3, "of": "student"}
    train = config({"divergence": "jsd", "estimate": "exact" if estimate == "exact" else topk}, teacher=OTHER)
    assert train.objective.distill is not None
    kind = train.objective.distill.divergence

    def of_row(row: TrainingRow, logits: Tensor) -> Tensor:
        with torch.no_grad():
            lp = logits_of(teacher, row).log_softmax(-1)
        assert lp.shape[1] == SMALLER
        if estimate == "exact":
            return divergence(lp, logits[:, :SMALLER].log_softmax(-1), kind)
        best = logits[:, :SMALLER].topk(3, dim=-1).indices
        own, said = (x.log_softmax(-1).gather(1, best) for x in (logits, lp))
        return divergence(with_tail(said), with_tail(own), kind)

    assert largest_difference(gradient(batch, train, teacher), naive(tiny(), batch, of_row)) < 1e-12


@pytest.mark.parametrize("estimate", ["exact", "sampled", {"kind": "topk", "k": 3}])
def test_a_row_with_an_id_beyond_the_teachers_is_named(estimate: Any) -> None:
    batch = within(random_batch(3), SMALLER)
    odd = np.array([*batch.rows[1].tokens[:-1], SMALLER])
    rows = [batch.rows[0], replace(batch.rows[1], tokens=odd), batch.rows[2]]
    train = config({"estimate": estimate}, teacher=OTHER)
    with pytest.raises(
        RollwayError, match=rf"row \({rows[1].rollout_id}, slot 0\) has the id {SMALLER}, .* knows {SMALLER}"
    ):
        gradient(replace(batch, rows=rows), train, smaller())


def smaller() -> Qwen3ForCausalLM:
    """Another model whose embedding and output layer end before the policy's padding."""
    return wider(SMALLER)


def cut(model: Qwen3ForCausalLM, rows: int) -> Qwen3ForCausalLM:
    """The same with the first rows of its output layer alone."""
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight[:rows].detach())
    return model


RECIPES: dict[str, dict[str, Any]] = {
    "gkd": {"estimate": "exact"},
    "todi": {"estimate": {"kind": "exact"}},
    "distillm": {"estimate": {"kind": "topk", "k": 4, "of": "student"}},
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_ask_the_warm_up_live(name: str) -> None:
    """Nothing of the teacher is stored for them: no `curate.teacher`."""
    over = {"train": {"teacher": OTHER, "objective": {"distill": RECIPES[name]}}}
    recipe = load_recipe(name, {**over, "curate": {"teacher": None}})
    assert recipe.train.reads_teacher() == frozenset()
    assert not recipe.train.needs_reference()
    before, after = (
        gradient(random_batch(4), recipe.train, wider()),
        gradient(random_batch(4), recipe.train, tiny(seed=5)),
    )
    assert largest_difference(before, after) > 1e-4, "it is the model that teaches"


def test_minillm_reads_its_reward_from_columns_and_its_divergence_live() -> None:
    over = {"train": {"teacher": OTHER, "objective": {"distill": {"estimate": {"kind": "exact"}}}}}
    recipe = load_recipe("minillm", over)
    assert recipe.train.reads_teacher() == {"teacher_logprob"}
    batch, teacher = taught(random_batch(6), wider()), wider()
    found = gradient(batch, recipe.train, teacher)
    stored = {"estimate": {"kind": "topk", "k": VOCABULARY, "outside": "renormalise"}}
    columns = load_recipe(
        "minillm",
        {"score": {"scorers": {"teacher": {"top_k": VOCABULARY}}}, "train": {"objective": {"distill": stored}}},
    )
    from_file = gradient(taught(batch, teacher, VOCABULARY), columns.train, None)
    assert largest_difference(found, from_file) < 1e-6


def test_what_is_refused() -> None:
    with pytest.raises(ValidationError, match="is the policy's own, and `model` names another"):
        LiveTeacher.model_validate({**OTHER, "weights": "ema"})
    with pytest.raises(RollwayError, match=r"a teacher's own model goes with train.teacher.model"):
        gradient(random_batch(3), config({"estimate": "exact"}, teacher=OTHER), None)
    # Beside another model the reference may be another policy still.
    both = config({"estimate": "exact"}, teacher=OTHER, objective={"kl": {"kind": "k3", "beta": 0.1}})
    assert both.needs_reference()


@pytest.mark.parametrize(
    ("model", "files"), [(WARMUP, ["warmups/teacher-s0"]), ({**WARMUP, "seed": 3}, ["warmups/teacher-s3"])]
)
def test_the_train_job_waits_for_the_warm_up(model: dict[str, Any], files: list[str]) -> None:
    train = config({"estimate": "exact"}, teacher={"kind": "live", "model": model})
    plan = SimpleNamespace(
        recipe=lambda run, round: SimpleNamespace(train=train), warmup_file=lambda name, seed: f"warmups/{name}-s{seed}"
    )
    w = SimpleNamespace(run="a-s0", next="0001")
    assert Teachers(plan).other(w) == files  # type: ignore[arg-type]
    assert Teachers(plan).named(w) == {"teacher": files[0]}  # type: ignore[arg-type]


def test_what_training_wrote_names_the_teacher_that_it_read(tmp_path: Path) -> None:
    """The warm-up's policy.json is one of the files that the round's account of itself lists."""
    train = config({"estimate": "exact"}, teacher=OTHER)
    held = tmp_path / "policy.json"
    held.write_text("{}")
    given = {"version": STAGE_VERSION["train"], "seed": 0, "round": 0, "temperature": 1.0, "train": train}
    assert spec_files.of_spec("train", TrainSpec(**given, teacher=str(held))) == {"teacher": [held]}  # type: ignore[arg-type]
    assert spec_files.of_spec("train", TrainSpec(**given)) == {}  # type: ignore[arg-type]
