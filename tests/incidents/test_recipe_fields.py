"""INCIDENT 34: every field of every recipe's objective, token-level advantage and curation acts, or is refused.

Each field, those left at their defaults included, is set to another value; the stage's spec in the plan must change,
and so must what the update is made of: the loss, the gradient of some rollout's tokens, or the state that it leaves. A
batch that only looks different is no effect. Refusals count where planning makes them, not where a stage would fail.
The other fields are in test_stage_fields.py.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path as File
from typing import Any

import pytest
import torch
from torch import Tensor

from incidents.recipes import curated as batch_table
from incidents.recipes import gradients, recipe_of, rollouts, scored_rows, token_batch
from rollway.config import deep_merge, load_recipe, recipe_names
from rollway.config.curation import CURATE_STEPS
from rollway.config.objectives import Objective
from rollway.config.recipes import Recipe, parse
from rollway.config.scorers import ScoreConfig
from rollway.curation import check_method, given_values
from rollway.curation.sql_file import GIVEN, read_step
from rollway.errors import RollwayError
from rollway.objectives import TokenBatch, dcpo_temperature, initial_state, loss, state_cadence
from rollway.objectives.preparation import prepare
from rollway.runtime.specs import STAGE_VERSION, CurateSpec, TrainSpec, dump
from rollway.training.batch import training_batch

Path = tuple[str, ...]

PAIRED = ("copg", "dpo", "ipo", "spin")
OF_EXPERTS = ("otr", "otr-exact", "dft", "spin")
"""Recipes that train on experts' rows, one of a group, in the groups a and c alone."""

ALTERNATIVES: dict[str, Any] = {
    # objective: kinds
    "ratio.kind": {"none": "token", "token": "sequence", "sequence": "token", "sequence_token": "token"}
    | {"fibre": "total_variation", "fibre_domain": "fibre"},
    "gate.kind": {"none": "sft", "sft": "none", "clip": "soft", "dual_clip": "soft", "soft": "clip"}
    | {"cispo": "clip", "variance": "clip", "dft": "sft", "one_token": "sft"},
    "aggregate.kind": {"token_mean": "seq_mean_token_mean", "seq_mean_token_mean": "token_mean"}
    | {"seq_mean_token_sum": "token_mean", "seq_sum_const": "token_mean"}
    | {"group_mean_token_sum": "seq_mean_token_sum"},
    "kl.kind": {"none": {"kind": "k3", "beta": 0.1}},
    "correction.kind": {"none": "tis", "tis": "mis", "mis": "tis"},
    "select.kind": {"all": "entropy_top", "signal_top": "all", "curvature": "all"},
    "mixing.kind": {"none": "target_entropy", "target_entropy": "none"},
    "anchors.kind": {"none": "unit", "unit": "shaped"},
    "preference.kind": {"none": "dpo", "dpo": "ipo", "ipo": "dpo", "copg": "dpo", "spin": "dpo"},
    "direction.kind": {"sgd": "adam", "adam": "sgd"},
    "dual.kind": {"ascent": "fixed"},
    # objective: parts that a preference does without
    "ratio": {"kind": "token"},
    "gate": {"kind": "clip"},
    "aggregate": {"kind": "token_mean"},
    # objective: values
    "denominator": {"old": "behavior", "behavior": "old"},
    "weights": {"denominator": "numerator", "numerator": "denominator"},
    "empty": {"leave_out": "zero", "zero": "leave_out"},
    "level": {"token": "sequence"},
    "weighs": {"policy": "all"},
    "centre": {"one": "mean"},
    "every": {"update": "round"},
    "sided": {"two": "one"},
    "form": {"pair": "group"},
    "average": True,
    "versions": 3,
    "entropy_bonus": 0.1,
    "k": 3,
    "c": 1.05,
    "cap": 1.1,
    "lam_max": 0.01,
    "share": 0.9,
    "curate.select.share": 0.2,
    "final": 0.9,
    "domain.up": 0.5,
    "domain.down": 0.5,
    "gap": 0.01,
    "hot": 1.5,
    "cold": 0.5,
    "tau_h": 1e-4,
    "tau_f": 1e-7,
    "value": {"clip": 0.2},
    # objective: a teacher
    "objective.distill": {None: {"divergence": "reverse_kl"}},
    "divergence.kind": {"reverse_kl": "jsd", "jsd": "forward_kl", "forward_kl": "jsd", "skew_reverse": "jsd"}
    | {"todi": "jeffreys", "akl": "jeffreys"},
    "experts.kind": {"skew_forward": "jsd"},
    "estimate.kind": {"sampled": "topk", "topk": "sampled", "exact": {"kind": "topk", "k": 4}},
    "granularity": {"token": "sequence"},
    "estimate.k": {None: 2, 100: 2},
    "of": {"teacher": "student", "student": "teacher"},
    "outside": {"tail": "renormalise"},
    "rows": {"all": "routed", "routed": "all"},
    "distill.aggregate": {None: {"kind": "seq_mean_token_mean"}},
    "importance.kind": {"none": {"kind": "truncated", "cap": 0.9}, "ratio": "none", "truncated": "none"},
    "emphasis.kind": {"none": "entropy_weight", "entropy_above": "none", "entropy_weight": "none"},
    "distill.clip": {None: 0.01, 0.05: 0.5},
    "curate.teacher": {None: "teacher", "teacher": None},
    # objective: what is copied
    "objective.imitate": {None: {"beta": 0.1}},
    "imitate.tokens": {"sum": "mean"},
    # train.advantage
    "advantage": {"kind": "returns"},
    "advantage.kind": {"returns": "gae", "gae": "returns", "whiten": "returns", "teacher": "returns"},
    "advantage.mean": {True: False, False: True},
    "from_next": {True: False, False: True},
    "with_curated": {False: True},
    "mean_one": {False: True},
    "start": {0.0: 0.9},
    "step": {0.25: 1.0},
    "margin": {0.0: 0.5},
    "student_sign": {1: -1},
    "gamma": 0.5,
    "lam": 0.5,
    "gkd:lam": 0.1,
    "kl": 1.0,
    "whiten": False,
    # curate
    "curate.reward": {"sql": "threshold", "threshold": 2.0, "below": -1.0},
    "curate.filter": {"sql": "not_truncated"},
    "curate.advantage": {"sql": "rloo"},
    "curate.weight": {"sql": "pf_ppo", "keep": "bw"},
    "curate.route": {"sql": "source"},
    "curate.pair": {"sql": "best_worst"},
    "curate.select": {"sql": "not_truncated"},
    **{f"{name}:curate.pair": {"sql": "two_per_prompt"} for name in ("dpo", "ipo")},
    **{f"{name}:curate.select": {"sql": str(File(__file__).with_name("whole_pairs.sql"))} for name in PAIRED},
    **{f"{name}:curate.weight": {"sql": str(File(__file__).with_name("by_sample.sql"))} for name in OF_EXPERTS},
    **{f"{name}:curate.select": {"sql": str(File(__file__).with_name("group_a.sql"))} for name in OF_EXPERTS},
    **{f"{n}:curate.filter": {"sql": str(File(__file__).with_name("group_a.sql"))} for n in ("expo-dpo", "spin")},
    "expo-dpo:curate.select": {"sql": str(File(__file__).with_name("group_a.sql"))},
    "spin:curate.select": {"sql": str(File(__file__).with_name("group_a_slots.sql"))},
    "curate.replay": {0: 2, 4: 1},
    "per": {"tokens": "trajectories"},
    "curate.horizon": {None: 10, 50: 10},
    "eps": 0.5,
    "ddof": {1: 0, 0: 1},
    "delta": 0.5,
    "std": True,
    "baseline": {"batch": "none", "none": "batch"},
    "limit": 55,
    "cache_share": 0.5,
    "signed": False,
    "at_most": 0.9,
    "keep": "bw",
    "key": "topic",
    "per_prompt": 1,
    "per_group": {1: 2, 4: 1},
    "pool": "all",
    "max_age": 1,
    "n_init": 4,
    "n_final": 2,
    "keep_share": 0.5,
    "r_max": 2.0,
    "virtual": 3,
    "least": 1000,
    "failing": True,
    "source": {"explanation": "policy"},
    "attempt": {"hinted": "hint"},
    "positive": 0.7,
    "negative": -0.7,
}
"""By field (the longest name that fits): its other value, or the other value for each value that recipes have. A
recipe's name and a colon before it: for that recipe."""

MORE_TOKENS = {"train": {"objective": {"select": {"share": 0.9, "final": 0.95}}}}
COMPANIONS: dict[str, dict[str, Any]] = {
    "sd-zero-srt:weights": {},
    "weights": {"curate": {"weight": {"sql": "pf_ppo", "keep": "bw"}}},
    "sided": {"train": {"objective": {"select": {"tau_h": 1e9, "tau_f": 1e9}}}},
    # The older groups are without an expert's solution: the coin must leave them their own.
    "gkd:curate.replay": {"curate": {"filter": {"lam": 1.0}}},
    **{f"{n}:curate.replay": {"curate": {"filter": {"sql": "not_truncated"}}} for n in ("otr", "otr-exact", "dft")},
    **{f"{n}:curate.replay": {"curate": {"pair": {"sql": "right_wrong"}}} for n in ("expo-dpo", "spin")},
    **{
        f"{name}:weights": {"curate": {"weight": {"sql": str(File(__file__).with_name("by_sample.sql"))}}}
        for name in OF_EXPERTS
    },
    "dagrpo:eps": {"curate": {"advantage": {"std": True}}},
    # One loss has risen: with a step of 1 the policy's rows are taken, of which there are more than two.
    **{
        f"distillm:{field}": {"curate": {"filter": {"step": 1.0}}}
        for field in ("margin", "max_age", "curate.horizon", "curate.weight", "curate.select")
    },
    "distillm:weights": {"curate": {"filter": {"step": 1.0}, "weight": {"sql": "pf_ppo", "keep": "bw"}}},
    "lam_max": {"train": {"objective": {"gate": {"dual": {"delta": 0.0}}}}},
    # The few tokens of strongest signal lie in rows that every choice of rows keeps.
    **{f"d3s-gspo:{field}": MORE_TOKENS for field in ("pool", "n_init", "n_final", "keep_share", "curate.horizon")},
}
"""What a field needs beside it before it can act: given to the recipe on both sides of the comparison."""

BESIDE: dict[str, dict[str, Any]] = {
    "form": {"curate": {"pair": None}},
    "objective.imitate": {"curate": {"route": {"sql": "imitate", "source": "policy"}}, "rollout": {"experts": 1}},
    "fiberpo-domain:ratio.kind": {"curate": {"route": None}},
    **{f"{name}:curate.select": {"curate": {"horizon": None}} for name in ("d3s", "d3s-gspo")},
    "distillm:curate.filter": {"curate": {"horizon": None}},
    "anchors.kind": {"curate": {"route": {"sql": "source"}}, "rollout": {"experts": 1}},
    "with_curated": {"curate": {"advantage": {"sql": "grpo"}}},
}
"""What would have no effect, or be refused, beside the field's other value: changed with it."""

WITHOUT_EFFECT = {
    **dict.fromkeys(
        ("gate.candidates", "gate.kappa"),
        "what is drawn by them is given here: objectives/test_otr.py::test_reruns_are_equal_and_seeds_differ",
    ),
    "sd-zero-srt:curate.filter.sql": "derived rows are all right here: curation/test_parents.py has wrong ones",
    "sd-zero-srt:curate.replay": "replayed groups have no derived rows here, and the weights drop all others",
    "minillm-mixed:correction.kind": "no weight exceeds 1 / (1 - share), and the cap is above it",
    "chunk": "tokens handled at once: by its own definition the result does not depend on it",
    "rein-capo:low": "advantages are rewards of at least 0: the clip acts above 1 alone",
    "psr:negative": "the filter leaves no wrong rollouts",
    "scope:negative": "wrong rollouts go to the teacher alone",
    "nsr:positive": "the filter leaves no right rollouts",
    "psr:low": "advantages are positive: the clip acts above 1 alone",
    "nsr:high": "advantages are negative: the clip acts below 1 alone",
    "nsr:anchors.kind": "the filter leaves no expert's rollout",
    "srpo:low": "wrong rows go to the teacher, or have the advantage 0: the clip acts above 1 alone",
    **dict.fromkeys(
        ("sdpo:of", "srpo:of", "sdpo:distill.temperature", "srpo:distill.temperature"),
        "the top k are given here: training/test_teacher.py makes them of live models",
    ),
    **dict.fromkeys(
        [
            f"{n}:{key}"
            for n in ("opsd", "sd-zero")
            for key in ("divergence.kind", "distill.clip", "distill.temperature")
        ],
        "the exact divergence is given here: training/test_teacher.py makes it of a live teacher",
    ),
}
"""Fields that change nothing, and why that is right."""

REFUSED: dict[str, str] = {
    # SQL that makes what nothing reads.
    "curate.reward": "curate.reward: has no effect",
    "curate.route": "curate.route: has no effect|fibre_domain needs to know|anchors: act on rows routed|"
    "of rows routed to `expert`|lacks the column slot",
    "curate.horizon": "curate.horizon: has no effect",
    # Advantages: none where the objective needs one, and none of both kinds.
    "curate.advantage": "curate.advantage: has no effect|makes its own from the rewards|nothing makes one",
    "advantage": "makes its own from the rewards|makes one advantage per token|objective reads no advantage|"
    "over all rows|penalty in the reward 0|synced is one model",
    "advantage.kind": "makes its own from the rewards|gae go together|curate.teacher: has no effect",
    # Rollouts that are drawn from, and pairs that are compared.
    "curate.replay": "draws from 4",
    "curate.pair": "compares pairs, and curation makes none|the objective compares no pairs|lacks the column slot",
    "curate.select": "lacks the column slot",
    # Parts of a token loss beside a preference, and the other way round.
    **dict.fromkeys(("ratio", "gate", "aggregate"), "is a loss over whole completions|(gate|ratio): not given"),
    "kl.kind": "is a loss over whole completions|synced is one model|leave `kl` out",
    "entropy_bonus": "is a loss over whole completions|synced is one model",
    "preference.kind": "is a loss over whole completions",
    "value": "is a loss over whole completions|train.critic and train.objective.value go together|stands alone",
    # A teacher that nothing stores, or that nobody asks.
    "objective.distill": "set curate.teacher|plain makes rows|is a loss over whole completions|act on rows that nobody "
    "sampled|nobody sampled an expert's solution",
    "curate.teacher": "is not a scorer of kind teacher|set curate.teacher",
    "estimate.kind": "likeliest tokens, and 0 are stored|nobody sampled an expert's solution|sampled sees neither|"
    "knows one divergence|replaces logp in estimate sampled|plain makes rows|spares a divergence",
    "cap": "would cut weights",
    "level": "a row's weight is a product",
    "granularity": "weighs single tokens",
    "estimate.at": "stored ones are at the rollouts'|divides by log-probs at the rollouts'",
    "importance.kind": "nobody sampled an expert's solution|truncate what is sampled|plain makes rows|"
    "spares a divergence",
    "temperature": "sampled sees single log-probs|another temperature is unknown|tail at another is unknown",
    "of": "stored columns do not hold",
    "rows": "goes by the rows' routes|curate.route: has no effect|no expert's row is distilled",
    "distill.aggregate": "distill stands alone",
    "distill.clip": "sampled sees none|akl weighs two",
    "objective.imitate": "is a loss over whole completions|imitates all rows alike|stands alone|for domains|over all "
    "rows",
    **dict.fromkeys(("advantage.mean", "from_next"), "speak of later tokens"),
    # Parts that do not go together.
    "ratio.kind": "acts on a ratio, and ratio is none|gated already|uses no ratio|per token|on single tokens|no room|"
    "mixing target_entropy makes token-level",
    "gate.kind": "gated already|uses no ratio|uses no advantage|curate.advantage: has no effect|reads no advantage|"
    "nothing makes one",
    "denominator": "correction weighs old against behavior|plain replaces the prompt",
    "correction.kind": "is a loss over whole completions|uses no advantage|on single tokens|behavior log-probs|"
    "plain replaces the prompt|nobody sampled an expert's solution",
    "mixing.kind": "is a loss over whole completions|uses no advantage|makes token-level|stands alone",
    "anchors.kind": "is a loss over whole completions|uses no advantage|no room|stands alone",
    "select.kind": "is a loss over whole completions|objective_horizon|on single tokens",
}
"""Fields whose other value may be refused, and why: what the message says."""


def fields(value: Any, at: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Leaves of nested mappings."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from fields(item, (*at, name))
    else:
        yield at, value


def leaves_of(recipe: Recipe) -> list[tuple[Path, Any]]:
    dumped = recipe.model_dump()
    train = {name: dumped["train"][name] for name in ("objective", "advantage")}
    curate = dumped["curate"]
    for step in CURATE_STEPS:
        part = getattr(recipe.curate, step)
        if part is not None:
            declared = read_step(step, part).params
            defaults = {n: p.default for n, p in declared.items() if n not in GIVEN and n not in part.params}
            curate[step] = defaults | curate[step]
    return list(fields({"train": train, "curate": curate}))


def alternative(recipe: str, path: Path, value: Any) -> tuple[str, Any]:
    """The table's name for a field, and its other value; numbers without an entry are halved or doubled."""
    names = [".".join(path[i:]) for i in range(len(path))]
    sql = path[0] == "curate" and path[-1] == "sql"
    key = f"curate.{path[1]}" if sql else next((n for n in names if n in ALTERNATIVES), "")
    if not key:
        assert isinstance(value, float | int) and not isinstance(value, bool), f"no other value of {path} is known"
        return path[-1], value * 2 if isinstance(value, int) else value * 0.1
    other = ALTERNATIVES.get(f"{recipe}:{key}", ALTERNATIVES[key])
    if sql:
        return key, None if value == other["sql"] else other
    by_value = isinstance(other, dict) and "sql" not in other and (value is None or not isinstance(value, dict))
    if by_value and value in other:
        other = other[value]
    return key, {"kind": other} if path[-1] == "kind" and isinstance(other, str) else other


def changed(dumped: dict[str, Any], path: Path, other: Any) -> dict[str, Any]:
    """The mapping with another value at the path; a kind or an SQL file replaces the mapping that holds it."""
    place = path[:-1] if path[-1] in ("kind", "sql") else path
    if not place:
        return other
    head, rest = place[0], place[1:]
    inner = dumped[head] if isinstance(dumped, dict) and head in dumped else {}
    return {**dumped, head: changed(inner, rest, other) if rest else other}


def specs(recipe: Recipe) -> tuple[str, str]:
    """What the plan hands to the stages curate and train."""
    return (
        dump(CurateSpec(version=STAGE_VERSION["curate"], seed=0, round=3, score=recipe.score, curate=recipe.curate)),
        dump(TrainSpec(version=STAGE_VERSION["train"], seed=0, round=3, temperature=1.0, train=recipe.train)),
    )


def planned(dumped: dict[str, Any], name: str) -> Recipe:
    """The recipe, if planning takes it: its SQL too, with a judge among the scorers. Raises RollwayError."""
    recipe = parse(Recipe, dumped, name)
    ratio = recipe.train.objective.ratio
    key = f"{recipe.curate.model_dump_json()} {sorted(recipe.train.reads())} {ratio and ratio.kind}"
    if key not in _VERDICTS:
        try:
            judged = recipe.model_copy(update={"score": SCORED_BY_A_JUDGE})
            check_method(judged, given_values(recipe.curate, round=3, seed=0))
            _VERDICTS[key] = None
        except RollwayError as error:
            _VERDICTS[key] = error
    verdict = _VERDICTS[key]
    if verdict is not None:
        raise verdict
    return recipe


_VERDICTS: dict[str, RollwayError | None] = {}
PROGRAM = {"kind": "python", "function": "m:f"}
SCORED_BY_A_JUDGE = parse(
    ScoreConfig, {"scorers": {"exact": {"kind": "exact"}, "judge": PROGRAM, "teacher": PROGRAM}}, "score"
)


def outputs(recipe: Recipe, rows: list[dict[str, Any]]) -> Iterator[Any]:
    """Loss, gradients by rollout and states, under several states and learning rates."""
    batch = training_batch(batch_table(recipe, rows), rollouts(rows, 0))
    names = [f"{row.rollout_id}/{row.slot}" for row in batch.rows]
    tokens = token_batch(batch, recipe.train, torch.float64, 0, 0.0)
    objective = recipe.train.objective
    start = initial_state(objective)
    yield from (state_cadence(objective), sorted(start))
    entropies = (0.0, 0.2, 1.0) if "mixing/entropy" in start else (0.0,)
    rates = (1e-4, 0.01, 30.0) if objective.select.kind == "curvature" else (0.01,)
    hollow = tokens.mask.clone()
    hollow[:1] = False
    for entropy in entropies:
        state = start if len(entropies) == 1 else {**start, "mixing/entropy": torch.tensor(entropy).double()}
        yield dcpo_temperature(objective, state)
        for mask in (tokens.mask, hollow):
            for lr in rates:
                given = replace(tokens, mask=mask, lr=lr)
                yield from numbers(given, objective, state, names)
                if "curvature/steps" in start:
                    # Adam's direction is the gradient until a step has left moments.
                    yield from numbers(given, objective, loss(given, objective, state=state).state, names)


def numbers(tokens: TokenBatch, objective: Objective, state: dict[str, Tensor], names: list[str]) -> list[Any]:
    """Rows without a gradient are left out: whether they are in the batch shows in the others' alone."""
    progress = float(tokens.extra["progress"]) if "progress" in tokens.extra else 0.0
    result = loss(prepare(tokens, objective, state=state, progress=progress), objective, state=state)
    slopes = gradients(result.loss, tokens)
    moved = {
        f"{leaf} of {name}": row.tolist()
        for leaf, slope in slopes.items()
        for name, row in zip(names, slope, strict=True)
        if bool(row.any())
    }
    return [float(result.loss.detach()), moved, {k: x.to_dense().tolist() for k, x in result.state.items()}]


def alike(a: Any, b: Any) -> bool:
    """Equal but for rounding: rows that do not matter may change the order of a sum."""
    match a, b:
        case (float() | int(), float() | int()):
            return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-13)
        case dict(), dict():
            return a.keys() == b.keys() and all(alike(a[k], b[k]) for k in a)
        case list(), list():
            return len(a) == len(b) and all(map(alike, a, b))
    return bool(a == b)


@pytest.mark.parametrize("name", recipe_names())
def test_every_field_changes_the_plan_and_an_output(name: str) -> None:
    recipe = recipe_of(name)
    whole = planned(recipe.model_dump(), name)
    known: dict[tuple[str, int], Any] = {}
    idle, unplanned, wrongly_refused = [], [], []
    for path, value in leaves_of(recipe):
        ends = [".".join(path[i:]) for i in range(len(path))]
        if any(end in WITHOUT_EFFECT or f"{name}:{end}" in WITHOUT_EFFECT for end in ends):
            continue
        key, other = alternative(name, path, value)
        companion = COMPANIONS.get(f"{name}:{key}", COMPANIONS.get(key, {}))
        dumped = deep_merge(recipe.model_dump(), companion)
        beside = BESIDE.get(f"{name}:{key}", BESIDE.get(key, {}))
        where = f"{'.'.join(path)}: {value!r} -> {other!r}"
        base = planned(dumped, name) if companion else whole
        try:
            moved = planned(deep_merge(changed(dumped, path, other), beside), name)
        except RollwayError as error:
            if not re.search(REFUSED.get(key, "(?!)"), str(error)):
                wrongly_refused.append(f"{key}: {where} is refused: {error}")
            continue
        if specs(base) == specs(moved):
            unplanned.append(where)
        rows = scored_rows(moved)
        own = scored_rows(base) if path[0] == "curate" else rows
        before = (str(companion), len(own))
        if before not in known:
            known[before] = list(outputs(base, own))
        # The first difference will do; the rest is not computed.
        if all(alike(a, b) for a, b in zip_longest(known[before], outputs(moved, rows))):
            idle.append(where)
    assert not wrongly_refused, "\n".join(wrongly_refused)
    assert not unplanned, f"the plan does not see {unplanned}"
    assert not idle, f"nothing comes of {idle}"


WOULD_DO_NOTHING = {
    "imitation reads no advantage, of the trainer's neither": ("sft", {"train": {"advantage": {"kind": "returns"}}}),
    "a preference reads no advantage": ("dpo", {"train": {"advantage": {"kind": "returns"}}}),
    "advantages of critic and rewards replace the curated ones": ("ppo", {"curate": {"advantage": {"sql": "rloo"}}}),
    "returns replace the curated ones": ("reinforce-plus-plus", {"curate": {"advantage": {"sql": "rloo"}}}),
    "anchors act on rows routed to expert, and no SQL routes": ("grpo", {"train": {"objective": {"anchors": "unit"}}}),
}


@pytest.mark.parametrize(("name", "over"), WOULD_DO_NOTHING.values(), ids=WOULD_DO_NOTHING.keys())
def test_what_would_have_no_effect_is_refused(name: str, over: dict[str, Any]) -> None:
    with pytest.raises(RollwayError):
        load_recipe(name, over)
