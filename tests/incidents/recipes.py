"""Synthetic scored rollouts, and the batch that any recipe makes of them: curated by its SQL, filled for its objective.

Groups differ in size; among them are a group of one, one without a right answer, one without a wrong one, one of equal
rewards that are neither, and two of the same prompt. Recipes that replay also see two older groups; those with anchors
see expert rollouts.
"""

import json
import zlib
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from rollway.config import load_recipe
from rollway.config.distillation import TopK
from rollway.config.objectives import Objective
from rollway.config.recipes import Recipe
from rollway.config.training import GaeAdvantage, ReturnsAdvantage, TeacherAdvantage, TrainConfig, WhitenAdvantage
from rollway.curation import curate, given_values
from rollway.objectives import TokenBatch, requirements, route_codes
from rollway.training import advantages
from rollway.training.batch import TrainingBatch, training_batch

T, HIDDEN, VOCABULARY, TOP = 6, 3, 12, 4
PREFIX = 2
"""Tokens of a derived rollout's turn that were there before it."""
EOS = PAD = 0
"""One id for both: what pads must never be told from what ends by its id."""

# group: prompt, age, rewards, judge's scores, texts. A row whose reward is below 1 is wrong.
GROUPS: dict[str, tuple[str, int, tuple[float, ...], tuple[float, ...], str]] = {
    "a": ("p0", 0, (1.0, 0.0, 0.0, 1.0), (9.0, 2.0, 6.0, 5.0), "uvwu"),
    "b": ("p1", 0, (1.0,), (7.0,), "u"),
    "c": ("p2", 0, (0.0, 0.0, 0.0), (3.0, 1.0, 8.0), "uvw"),
    "d": ("p3", 0, (1.0, 1.0, 1.0), (9.0, 8.0, 4.0), "uuv"),
    "e": ("p0", 0, (1.0, 0.0, 0.6, 0.0, 1.0), (8.0, 1.0, 4.0, 7.0, 10.0), "xyzvw"),
    "f": ("p4", 0, (0.6, 0.6), (5.0, 5.0), "uv"),
    "g": ("p5", 1, (1.0, 0.0, 0.0), (8.0, 2.0, 3.0), "uvw"),
    "h": ("p6", 2, (0.0, 1.0, 1.0), (2.0, 9.0, 7.0), "uvw"),
    "i": ("p7", 3, (0.0, 1.0), (2.0, 9.0), "uv"),
}
DOMAIN = {"p0": "sums", "p1": "sums", "p2": "sums", "p3": "words", "p4": "words"}
EXPERTS = {"a": 10.0, "c": 11.5}
"""Groups with a right rollout of an expert, and the judge's score of it."""


@dataclass(frozen=True)
class Synthetic:
    """A recipe, its curated batch table, the trainer's rows of it, and the tensors that its objective sees."""

    recipe: Recipe
    table: pa.Table
    rows: TrainingBatch
    tokens: TokenBatch

    @property
    def objective(self) -> Objective:
        return self.recipe.train.objective

    @property
    def pairs(self) -> list[tuple[int, int]]:
        return list(zip(self.rows.chosen.tolist(), self.rows.rejected.tolist(), strict=True))


@cache
def recipe_of(name: str) -> Recipe:
    return load_recipe(name)


def scored_rows(recipe: Recipe) -> list[dict[str, Any]]:
    """Scored rollouts, with every column that some recipe's SQL names."""
    out = []
    for group, (prompt, age, rewards, judge, texts) in GROUPS.items():
        if age > recipe.curate.replay:
            continue
        rows = list(zip(rewards, judge, texts, strict=True))
        experts = (recipe.train.objective.anchors.kind != "none" or recipe.rollout.experts) and group in EXPERTS
        for sample, (reward, score, text) in enumerate([*rows, (1.0, EXPERTS[group], "s")] if experts else rows):
            row = {
                "rollout_id": f"{group}-{sample}",
                "group_id": group,
                "prompt_id": prompt,
                "sample": sample,
                "source": "policy" if sample < len(rewards) else "expert",
                "finish": "length" if (group, sample) in (("e", 0), ("e", 1)) else "stop",
                "length": 64 if (group, sample) in (("e", 0), ("e", 1)) else 48 + 4 * sample,
                "reward": reward,
                "correct": reward >= 1.0,
                "age": age,
                "text": text,
                "judge": score,
                "mean_logprob": -0.1 * (1 + sample),
                "teacher": -0.3 - 0.1 * score,
                "meta": json.dumps({"domain": DOMAIN.get(prompt, "words"), "topic": prompt}),
                "pass": 0,
                **({"prefix_length": None} if recipe.rollout.derive else {}),
            }
            out.append(row)
        if group in EXPERTS:
            out += _derived(recipe, out[-1])
    return out


def _derived(recipe: Recipe, last: dict[str, Any]) -> list[dict[str, Any]]:
    """What the recipe's further passes make of a group whose last row this is: right completions, pass after pass."""
    made = [(number, part) for number, part in enumerate(recipe.rollout.derive, 1) for _ in range(part.samples)]
    return [
        last
        | {"rollout_id": f"{last['group_id']}-{sample}", "sample": sample, "source": part.name, "pass": number}
        | {"reward": 1.0, "correct": True, "finish": "stop", "length": 40 + sample, "text": "t"}
        | {"prefix_length": PREFIX if any(c.prefix for c in part.context) else None}
        for sample, (number, part) in enumerate(made, last["sample"] + 1)
    ]


def curated(recipe: Recipe, rows: list[dict[str, Any]], round: int = 20) -> pa.Table:
    """The batch table that the recipe's SQL makes of the rows."""
    key = json.dumps([recipe.curate.model_dump(), rows, round])
    if key not in _CURATED:
        given = given_values(recipe.curate, round=round, seed=3)
        # The teacher's columns are tensors of `token_batch` here; tests/curation/test_teacher.py carries them.
        own = recipe.curate.model_copy(update={"teacher": None})
        right = [(row["group_id"], row["rollout_id"]) for row in rows if row["correct"]]
        told = [any(g == row["group_id"] and r != row["rollout_id"] for g, r in right) for row in rows]
        scored = pa.Table.from_pylist(rows).append_column("has_teacher", pa.array(told, pa.bool_()))
        _CURATED[key] = curate(scored, own, given=given)
    return _CURATED[key]


_CURATED: dict[str, pa.Table] = {}


def rollouts(rows: list[dict[str, Any]], seed: int) -> pa.Table:
    """Tokens of the rollouts: 1 to 6, the last one EOS; some rows have a hole that the policy did not write."""
    out = []
    for row in rows:
        rng = np.random.default_rng([seed, zlib.crc32(row["rollout_id"].encode())])
        length = int(rng.integers(1, T + 1 - (row.get("prefix_length") or 0)))
        mask = rng.random(length) > 0.1
        mask[-1] = True
        made = {
            "rollout_id": row["rollout_id"],
            "group_id": row["group_id"],
            "source": row["source"],
            "prompt_tokens": rng.integers(1, VOCABULARY, 3).tolist(),
            "tokens": [*rng.integers(1, VOCABULARY, length - 1).tolist(), EOS],
            "logprobs": (-rng.random(length) - 0.05).tolist(),
            "train_mask": mask.tolist(),
            "train_prompt_tokens": None,
            "prefix_length": row.get("prefix_length"),
        }
        out.append(made)
    types = {
        "prompt_tokens": pa.list_(pa.int32()),
        "tokens": pa.list_(pa.int32()),
        "logprobs": pa.list_(pa.float32()),
        "train_mask": pa.list_(pa.bool_()),
        "train_prompt_tokens": pa.list_(pa.int32()),
        "prefix_length": pa.int32(),
    }
    names = ("rollout_id", "group_id", "source", *types)
    return pa.Table.from_pylist(out, pa.schema([(name, types.get(name, pa.string())) for name in names]))


@cache
def default_batch(name: str, seed: int = 0) -> Synthetic:
    """`make_batch` of the recipe as it is, in float64, made once."""
    return make_batch(recipe_of(name), torch.float64, seed)


def make_batch(
    recipe: Recipe,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    *,
    rows: list[dict[str, Any]] | None = None,
    fill: float = float("nan"),
) -> Synthetic:
    """What the recipe trains on, given `rows` (by default `scored_rows`). Masked positions hold `fill`."""
    given = scored_rows(recipe) if rows is None else rows
    table = curated(recipe, given)
    batch = training_batch(table, rollouts(given, seed))
    return Synthetic(recipe, table, batch, token_batch(batch, recipe.train, dtype, seed, fill))


def token_batch(batch: TrainingBatch, train: TrainConfig, dtype: torch.dtype, seed: int, fill: float) -> TokenBatch:
    """Random log-probs, entropies, values and hidden states, each row's a function of its id and slot alone."""
    objective, n = train.objective, len(batch.rows)
    mask, ids = torch.zeros(n, T, dtype=torch.bool), torch.full((n, T), PAD)
    columns: dict[str, Tensor] = {name: torch.full((n, T), fill, dtype=dtype) for name in _TOKEN_FIELDS}
    wide = {"hidden": torch.full((n, T, HIDDEN), fill, dtype=dtype)}
    estimate = None if objective.distill is None else objective.distill.estimate
    top = min(estimate.k or TOP, TOP) if isinstance(estimate, TopK) else TOP
    wide |= {name: torch.full((n, T, top), fill, dtype=dtype) for name in _TOP_FIELDS}
    for i, row in enumerate(batch.rows):
        length = len(row.tokens)
        mask[i, :length] = torch.from_numpy(np.array(row.train_mask))
        ids[i, :length] = torch.from_numpy(np.array(row.tokens, dtype=np.int64))
        for name, x in _random_row(f"{seed}/{row.rollout_id}/{row.slot}").items():
            at = wide[name] if name in wide else columns[name]
            x = x[:, :top] if name in _TOP_FIELDS else x
            at[i] = torch.where(mask[i][:, None] if x.dim() == 2 else mask[i], x.to(dtype), at[i])
    for name in ("logp", *(["entropy"] if objective.entropy_bonus > 0 else []), *(["value"] if train.critic else [])):
        columns[name].requires_grad_()
    for name in ("topk_logp", "divergence", "missed"):
        if name in requirements(objective):
            (wide if name in wide else columns)[name].requires_grad_()
    routes = [row.route for row in batch.rows]
    generator = torch.Generator().manual_seed(seed)
    tokens = TokenBatch(
        mask=mask,
        token_ids=ids,
        lm_head=torch.randn(VOCABULARY, HIDDEN, dtype=torch.float64, generator=generator).to(dtype),
        lr=0.01,
        weight=torch.tensor([row.weight for row in batch.rows], dtype=dtype),
        group=torch.tensor([row.group for row in batch.rows], dtype=torch.int64),
        reward=torch.tensor([row.reward for row in batch.rows], dtype=dtype),
        correct=torch.tensor([bool(row.correct) for row in batch.rows], dtype=torch.bool),
        route=route_codes(routes) if "route" in requirements(objective) else None,
        domain=torch.tensor([sorted({*routes}, key=str).index(r) for r in routes], dtype=torch.int64),
        age=torch.tensor([row.age for row in batch.rows], dtype=torch.int64),
        pair_chosen=torch.from_numpy(batch.chosen) if len(batch.chosen) else None,
        pair_rejected=torch.from_numpy(batch.rejected) if len(batch.chosen) else None,
        extra={} if train.objective_horizon is None else {"progress": torch.tensor(0.4)},
        **columns,
        **wide,
    )
    if objective.preference.kind != "none" and tokens.pair_chosen is None:
        none = torch.zeros(0, dtype=torch.int64)
        tokens = replace(tokens, pair_chosen=none, pair_rejected=none)
    return _with_advantage(tokens, batch, train, dtype)


_TOKEN_FIELDS = (
    *("logp", "logp_old", "logp_ref", "logp_behavior", "logp_old_temp", "entropy", "value", "value_old", "returns"),
    *("teacher_logp", "teacher_entropy", "divergence", "hit", "missed"),
)
_TOP_FIELDS = ("topk_logp", "teacher_topk_logp")


@cache
def _random_row(key: str) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(zlib.crc32(key.encode()))

    def normal(scale: float, *shape: int) -> Tensor:
        return scale * torch.randn(*(shape or (T,)), dtype=torch.float64, generator=g)

    old, value = -normal(1.0).abs() - 0.05, normal(1.0)
    return {
        "logp_old": old,
        "logp": old + normal(0.25),
        "logp_ref": old + normal(0.3),
        "logp_behavior": old + normal(0.5),
        "logp_old_temp": old + normal(0.2),
        "entropy": normal(1.0).abs() + 0.01,
        "value": value,
        "value_old": value + normal(0.3),
        "hidden": normal(1.0, T, HIDDEN),
        "teacher_logp": old + normal(0.4),
        "teacher_entropy": normal(1.0).abs(),
        "divergence": normal(1.0).abs(),
        "hit": torch.rand(T, dtype=torch.float64, generator=g),
        "missed": -normal(1.0).abs(),
        **{name: normal(1.0, T, VOCABULARY).log_softmax(-1)[:, :TOP] for name in _TOP_FIELDS},
    }


def _with_advantage(tokens: TokenBatch, batch: TrainingBatch, train: TrainConfig, dtype: torch.dtype) -> TokenBatch:
    """The advantages that the trainer would make: of the SQL, or token-level ones of rewards, log-probs and values."""
    mask, rows = tokens.mask, batch.rows
    sample = None
    if all(row.advantage is not None for row in rows):
        sample = torch.tensor([row.advantage for row in rows], dtype=dtype)
    assert tokens.reward is not None and tokens.logp_old is not None
    assert tokens.value_old is not None
    match train.advantage:
        case None:
            return replace(tokens, advantage=sample)
        case WhitenAdvantage():
            assert sample is not None
            return replace(tokens, advantage=advantages.whiten(advantages.broadcast(sample, mask), mask, tokens.weight))
        case TeacherAdvantage() as part:
            assert tokens.teacher_logp is not None
            given = part.model_dump(exclude={"kind", "with_curated"})
            made = advantages.of_teacher(tokens.teacher_logp, tokens.logp_old, tokens.logp_ref, mask, **given)
            if part.with_curated:
                assert sample is not None
                made = made + advantages.broadcast(sample, mask)
            return replace(tokens, advantage=made)
        case ReturnsAdvantage(gamma=gamma, kl=kl, whiten=white):
            made = advantages.returns(tokens.reward, tokens.logp_old, tokens.logp_ref, mask, gamma=gamma, kl=kl)
            return replace(tokens, advantage=advantages.whiten(made, mask, tokens.weight) if white else made)
        case GaeAdvantage(gamma=gamma, lam=lam, kl=kl, whiten=white):
            made, target = advantages.gae(
                tokens.reward,
                tokens.value_old,
                mask,
                gamma=gamma,
                lam=lam,
                kl=kl,
                logp_old=tokens.logp_old,
                logp_ref=tokens.logp_ref,
            )
            made = advantages.whiten(made, mask, tokens.weight) if white else made
            return replace(tokens, advantage=made, returns=target)


def leaves(batch: TokenBatch) -> dict[str, Tensor]:
    """Per-token tensors that the batch's loss is differentiated with respect to."""
    names = ("logp", "entropy", "value", "topk_logp", "divergence", "missed")
    named = {name: getattr(batch, name) for name in names}
    return {name: x for name, x in named.items() if x is not None and x.requires_grad}


def pull(slopes: dict[str, Tensor]) -> Tensor:
    """[N, T]: how hard the loss pulls at each token, through whatever leaf."""
    return torch.stack([g.abs().flatten(2).sum(-1) if g.dim() > 2 else g.abs() for g in slopes.values()]).sum(0)


def gradients(value: Tensor, batch: TokenBatch) -> dict[str, Tensor]:
    """d value / d leaf of the batch, zeros where it does not enter."""
    inputs = leaves(batch)
    if not value.requires_grad:
        return {name: torch.zeros_like(x) for name, x in inputs.items()}
    found = torch.autograd.grad(value, list(inputs.values()), allow_unused=True)
    return {n: torch.zeros_like(inputs[n]) if g is None else g for n, g in zip(inputs, found, strict=True)}
