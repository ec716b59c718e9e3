"""INCIDENT 34, the fields of rollout, score and the rest of train: each changes what is planned, or is refused.

Those that a cheap run of the stage can show also change what it writes: rollouts of an untrained policy, weights after
the updates of a tiny one. Objective, advantages and curation are in test_recipe_fields.py.
"""

import re
from pathlib import Path as File
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from incidents.test_recipe_fields import changed, fields
from rollway.config import deep_merge, load_experiment, load_recipe, recipe_names
from rollway.config.recipes import Recipe
from rollway.config.rollouts import RolloutConfig, Sampling
from rollway.config.training import TrainConfig
from rollway.errors import RollwayError
from rollway.policies.critic import Critic
from rollway.policies.manifest import NamedPolicy
from rollway.runtime.plan import Plan
from rollway.training.state import TrainState
from rollway.training.update import update
from stages.test_expert_rollouts import here
from stages.test_stored_rollouts import replay
from training.tiny import random_batch, tiny
from workflow.project import TINY

JUDGE = {"judge": {"kind": "python", "function": "m:f"}}
PASSES = {"rollout": {"passes": 2, "refill": {}}, "curate": {"filter": {"sql": "not_truncated"}}}
COSINE = {"train": {"optimizer": {"schedule": {"kind": "cosine", "horizon": 40}}}}

ALTERNATIVES: dict[str, Any] = {
    "rollout.sampling.temperature": 0.5,
    "rollout.sampling.top_p": 0.6,
    "rollout.sampling.top_k": 2,
    "rollout.sampling.stop": ["1", "="],
    "rollout.engine.kind": {"kind": "stored", "files": ["results/other/rollouts.parquet"]},
    "rollout.engine.files": ["results/other/rollouts.parquet"],
    "rollout.passes": 4,
    "rollout.refill": {"oversample": 2.0},
    "rollout.entropy": True,
    "rollout.experts": {0: 1, 1: 0},
    "score.scorers.exact.kind": {"kind": "format", "pattern": "a+"},
    "score.scorers.exact.needs": ["judge"],
    "score.scorers.exact.max_error_share": 0.5,
    "score.scorers.exact.strip": False,
    "score.scorers.exact.ignore_case": True,
    "score.scorers.exact.extract": "last_number",
    "score.correct": "judge",
    "score.threshold": {1.0: 0.5, 0.5: 1.0},
    "train.optimizer.betas": [0.5, 0.9],
    "train.optimizer.weight_decay": 0.3,
    "train.optimizer.schedule.kind": {"kind": "linear", "horizon": 40},
    "train.optimizer.schedule.warmup": 3,
    "train.optimizer.schedule.horizon": {None: 40},
    "train.optimizer.schedule.floor": 0.5,
    "train.critic": {"lr": 1.0e-3},
    "train.critic.warmup_updates": 3,
    "train.objective_horizon": {None: 10, 50: 2, 200: 2},
    "train.skip_without_signal": False,
    "train.kernels": "liger",
    "train.teacher": {None: {"kind": "live"}},
    "train.ema": {None: 0.1},
    "score.scorers.teacher.kind": {"kind": "exact"},
    "score.scorers.teacher.needs": ["exact"],
    "score.scorers.teacher.model.kind": {"kind": "policy", "age": "initial"},
    "score.scorers.teacher.model.name": "tiny",
    "score.scorers.teacher.model.seed": 1,
    "score.scorers.teacher.context": [{"prompt": "{answer} {prompt}"}],
    "score.scorers.teacher.references": ["results/other/rollouts.parquet"],
    "score.scorers.teacher.entropy": False,
    "score.scorers.teacher.max_error_share": 0.5,
    "score.scorers.teacher.overlong": "cut",
    "score.scorers.discriminator.kind": {"kind": "exact"},
    "score.scorers.discriminator.needs": ["exact"],
    "score.scorers.discriminator.references": ["results/other/rollouts.parquet"],
    "score.scorers.discriminator.max_error_share": 0.5,
    **{f"score.scorers.discriminator.training.{name}": 3 for name in ("lr_warmup_steps", "seed", "centre")},
    "score.scorers.discriminator.training.weight_decay": 0.1,
    "score.scorers.teacher.top_k": {0: 4, 20: 30},
    "score.scorers.teacher.context_tokens": {None: 20},
    "score.scorers.format.kind": {"kind": "exact"},
    "score.scorers.format.needs": ["exact"],
    "score.scorers.format.pattern": "x+",
    "score.scorers.format.full": False,
    "score.scorers.format.max_error_share": 0.5,
    "rollout.mix.model.kind": {"kind": "huggingface", "name": "tiny"},
    "rollout.mix.model.name": "tiny",
    "rollout.mix.model.seed": 1,
    "train.reference": "round",
    "train.teacher.kind": None,
    "train.teacher.weights": "trust_region",
    "train.teacher.context": "policy",
}
"""The other value of a field, or the other value for each value that recipes have; other numbers are doubled."""

OPPOSITES: dict[str, Any] = {
    "score.scorers.teacher.needs": [],
    "score.scorers.teacher.overlong": "error",
    "train.reference": "initial",
}
"""For recipes that have that other value."""

BESIDE: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("rollout.passes", "rollout.refill", "rollout.refill.oversample"), PASSES),
    "train.optimizer.schedule.floor": COSINE,
    "score.correct": {"score": {"scorers": JUDGE}},
    "seqkd:rollout.passes": {},
    "seqkd:rollout.refill": {},
    **{
        f"distillm:rollout.{field}": deep_merge(PASSES, {"curate": {"horizon": None}})
        for field in ("passes", "refill", "refill.oversample")
    },
}
"""What a field needs beside it before it can act: on both sides of the comparison."""

REFUSED = {
    "rollout.sampling.top_p": "truncate what is sampled|no effect on stored completions|not defined of a mixture",
    "rollout.sampling.top_k": "truncate what is sampled|no effect on stored completions|not defined of a mixture",
    "rollout.engine.kind": "no effect on stored completions|stored completions are none of it|draw from two models",
    "rollout.entropy": "no effect on stored completions",
    "rollout.passes": "rollout.refill go together",
    "rollout.refill": "no effect on stored completions|rollout.refill go together",
    "rollout.experts": "nobody sampled an expert's solution|act on experts' rollouts",
    "score.threshold": "is not score.threshold",
    "score.correct": "everything else goes by score.correct",
    "score.scorers.exact.needs": "needs other scorers|`needs` has no effect on kind exact",
    "score.reward.exact": "2 cancels",
    "score.reward.discriminator": "2 cancels",
    "score.scorers.discriminator.needs": "no effect on kind discriminator",
    "train.optimizer.schedule.horizon": "constant ignores `horizon`",
    "train.critic": "train.critic and train.objective.value go together",
    "train.objective_horizon": "go together",
    "train.teacher": "nothing asks it|needs to know how many|curate.teacher: has no effect",
    "train.teacher.kind": "what stored columns do not hold",
    "train.teacher.weights": "nothing reads the average|sync has no effect",
    "train.teacher.context": "curate.teacher: has no effect",
    "train.teacher.mix": "no effect without `weights: trust_region`",
    "train.ema": "nothing reads the average",
    "train.reference": "nothing refers|no gradient|penalty in the reward 0",
    "score.scorers.format.needs": "no effect on kind format",
    "score.scorers.teacher.kind": "is not a scorer of kind teacher",
    "score.scorers.teacher.needs": "no context names|set `needs`",
    "score.scorers.teacher.context": "`needs` has no effect",
    "score.scorers.teacher.context_tokens": "give a context",
    **dict.fromkeys(
        ("score.scorers.teacher.entropy", "score.scorers.teacher.top_k"),
        "a live teacher speaks in the trainer|entropy: training reads it",
    ),
    "score.scorers.teacher.references": "go together",
    "score.scorers.teacher.threshold": "no context names|is not score.threshold",
    "score.scorers.teacher.temperature": "differs from rollout.sampling.temperature|stored at 1|a live teacher speaks",
    "score.scorers.teacher.overlong": "give a context",
    "rollout.sampling.temperature": "differs from rollout.sampling.temperature",
}
"""Fields whose other value planning may refuse, and what it says then."""

SAME_RESULT = {
    "rollout.shards": "tokens do not depend on the files that they lie in",
    "rollout.part": "the size of what is resumed",
    "rollout.engine.batch": "rows decoded at once: log-probs agree but for rounding",
    "train.micro_tokens": "rows of one forward: by its own definition the result does not depend on it",
    "train.kernels": "the same layers by other kernels (tests/policies/test_kernels.py), or a refusal without a GPU",
}
"""Fields that are planned and change no result, and why that is right."""


def other_value(path: tuple[str, ...], value: Any) -> Any:
    name = ".".join(path)
    if name == "rollout.derive":
        return [*value[:-1], {**value[-1], "samples": value[-1]["samples"] + 1}]
    if name in OPPOSITES and value == ALTERNATIVES[name]:
        return OPPOSITES[name]
    if name in ALTERNATIVES:
        other = ALTERNATIVES[name]
        by_value = isinstance(other, dict) and not all(isinstance(key, str) for key in other)
        return other[value] if by_value and value in other else value * 2 if by_value else other
    assert isinstance(value, float | int) and not isinstance(value, bool), f"no other value of {name} is known"
    return value * 2


def leaves_of(recipe: Recipe) -> list[tuple[tuple[str, ...], Any]]:
    dumped = recipe.model_dump(mode="json")
    train = {k: v for k, v in dumped["train"].items() if k not in ("objective", "advantage")}
    return list(fields({"rollout": dumped["rollout"], "score": dumped["score"], "train": train}))


def planned(run: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Every job of a run of two rounds: what it writes, and its spec. Raises RollwayError."""
    common = {k: TINY["defaults"][k] for k in ("task", "warmup", "rounds", "evaluate")}
    warmups = {**TINY["warmups"], "teacher": TINY["warmups"]["tiny"]}
    plan = Plan(load_experiment({**TINY, "warmups": warmups, "defaults": common, "runs": {"mine": run}}))
    jobs: list[tuple[Any, ...]] = []
    for r in range(2):
        at = SimpleNamespace(run="mine-s0", round=str(r), next=str(r + 1))
        for p in plan.passes("mine-s0", r):
            for shard, path in enumerate(plan.rollout_paths("mine-s0", r, p)):
                part = SimpleNamespace(**vars(at), p=str(p), shard=str(shard))
                jobs.append((path, plan.rollout_spec(part)))
                scorers = plan.recipe("mine-s0", r).score.scorers
                jobs += [(path, plan.score_spec(SimpleNamespace(**vars(part), scorer=s))) for s in scorers]
        jobs += [(plan.curate_spec(at),), (plan.train_spec(at),), (plan.evaluate_spec(at),)]
    return jobs


@pytest.mark.parametrize("name", recipe_names())
def test_every_field_changes_the_plan(name: str) -> None:
    recipe = load_recipe(name)
    unplanned, wrongly_refused = [], []
    known: dict[str, Any] = {}
    for path, value in leaves_of(recipe):
        key, other = ".".join(path), other_value(path, value)
        parts = recipe.model_dump(mode="json", include={"rollout", "score", "curate", "train"})
        beside = BESIDE.get(f"{name}:{key}", BESIDE.get(key, {}))
        dumped = deep_merge(parts, beside)
        before = str(beside)
        if before not in known:
            known[before] = planned({"recipe": name, **dumped})
        try:
            after = planned({"recipe": name, **changed(dumped, path, other)})
        except RollwayError as error:
            if not re.search(REFUSED.get(key, "(?!)"), str(error)):
                wrongly_refused.append(f"{key}: {value!r} -> {other!r} is refused: {error}")
            continue
        if after == known[before]:
            unplanned.append(f"{key}: {value!r} -> {other!r}")
    assert not wrongly_refused, "\n".join(wrongly_refused)
    assert not unplanned, f"the plan does not see {unplanned}"


ROLLOUT_FIELDS = [path for path, _ in leaves_of(load_recipe("grpo")) if path[0] == "rollout"]


@pytest.mark.parametrize("path", [p for p in ROLLOUT_FIELDS if p[1] not in ("passes", "refill")], ids=".".join)
def test_rollouts_show_their_settings(path: tuple[str, ...], tmp_path: File) -> None:
    """`passes` and `refill` decide about later passes (tests/stages/test_refill.py)."""
    place = here(tmp_path)
    settings = RolloutConfig(prompts=3, group=2, part=3, sampling=Sampling(max_tokens=6)).model_dump(mode="json")
    value = dict(fields(settings))[path[1:]]
    if path[-1] == "kind":
        place.rows("stored", group=4, experts=0)
        moved = replay(place, [tmp_path / "stored.parquet"], prompts=3, group=2)
    else:
        after = changed(settings, path[1:], other_value(path, value))
        shards = [place.rows(f"other{n}", shard=n, **after) for n in range(after["shards"])]
        moved = [row for part in shards for row in part]
    rows = place.rows(**settings)
    same = len(rows) == len(moved) and all(alike_rows(a, b) for a, b in zip(rows, moved, strict=True))
    assert same == (".".join(path) in SAME_RESULT)


def alike_rows(a: dict[str, Any], b: dict[str, Any]) -> bool:
    floats = ("logprobs", "entropy")
    return {k: v for k, v in a.items() if k not in floats} == {k: v for k, v in b.items() if k not in floats} and all(
        (a[k] is None) == (b[k] is None) and (a[k] is None or a[k] == pytest.approx(b[k], abs=1e-4, nan_ok=True))
        for k in floats
    )


TRAINED = {
    "ppo": {"minibatches": 2, "optimizer": {"lr": 0.01}, "critic": {"lr": 0.01}},
    "grpo": {"minibatches": 2, "optimizer": {"lr": 0.01}},
    "d3s": {"minibatches": 2, "optimizer": {"lr": 0.01}},
}
"""One recipe with a critic, one whose batch can lack signal, one with a schedule in its objective."""


def trained_fields(name: str) -> list[tuple[str, ...]]:
    own = {"ppo": "train.critic.", "grpo": "train.", "d3s": "train.objective_horizon"}[name]
    paths = [path for path, _ in leaves_of(load_recipe(name)) if ".".join(path).startswith(own)]
    return [path for path in paths if ".".join(path) not in REFUSED or name == "d3s"]


@pytest.mark.parametrize(
    ("name", "path"),
    [(name, path) for name in TRAINED for path in trained_fields(name)],
    ids=lambda value: value if isinstance(value, str) else ".".join(value),
)
def test_weights_show_the_settings_of_training(name: str, path: tuple[str, ...]) -> None:
    key = ".".join(path)
    companion = BESIDE.get(key, {}).get("train", {})
    dumped = load_recipe(name, {"train": deep_merge(TRAINED[name], companion)}).train.model_dump(mode="json")
    value = dict(fields(dumped))[path[1:]]
    other = TrainConfig.model_validate(changed(dumped, path[1:], other_value(path, value)))
    # The second round of `skip_without_signal` has none: what then moves the weights is Adam's momentum.
    second = {"advantage": 0.0} if key == "train.skip_without_signal" else {}
    before, after = (after_two_rounds(train, **second) for train in (TrainConfig.model_validate(dumped), other))
    gap = max(float((a - b).abs().max()) for a, b in zip(before, after, strict=True))
    assert gap < 1e-9 if key in SAME_RESULT else gap > 1e-7, gap


def after_two_rounds(train: TrainConfig, **second: Any) -> list[Tensor]:
    policy, critic = tiny(), Critic(tiny(seed=2), NamedPolicy(kind="critic")) if train.critic else None
    state, reference = TrainState(seed=0), tiny(seed=1)
    for batch in (random_batch(8), random_batch(8, seed=1, **second)):
        state, _ = update(policy, critic, reference, batch, train, state)
    models: list[torch.nn.Module] = [policy, *([critic] if critic else [])]
    return [p.detach().clone() for model in models for p in model.parameters()]
