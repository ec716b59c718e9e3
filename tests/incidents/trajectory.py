"""Three rounds of a recipe in one process, at a scale of milliseconds: generate, score, curate, update.

`PYTHONPATH=src:tests python -m incidents.trajectory [RECIPE ...]` rewrites the golden files: do it when a change of
numbers is meant, and say why in the commit.
"""

import copy
import json
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from rollway.config import CurateConfig, load_recipe, recipe_names
from rollway.config.distillation import TopK
from rollway.config.policies import CharTokenizer, ScratchPolicy, SftConfig
from rollway.config.recipes import Recipe
from rollway.config.rollouts import RolloutConfig, Sampling, TransformersEngine
from rollway.config.scorers import ExactScorer
from rollway.config.training import TrainConfig
from rollway.curation import curate, given_values
from rollway.engines import Request, TeacherShare, make
from rollway.policies import causal_lm
from rollway.policies.critic import build_critic
from rollway.policies.logprobs import Row as TokenRow
from rollway.policies.top_k import row_top_k
from rollway.sampling.derived import ADDED
from rollway.sampling.prompts import epoch_block, groups, rollout_id
from rollway.scorers.rows import Row
from rollway.scorers.run import score
from rollway.store.tables import ROLLOUTS
from rollway.training.batch import Said, TrainingRow, training_batch
from rollway.training.sft import Demonstration, sft
from rollway.training.state import TrainState
from rollway.training.update import update

GOLDEN = Path(__file__).parent / "golden"
ROUNDS, PROMPTS, SAMPLES = 3, 4, 6
SUMS = {f"{a}+{b}=": str(a + b) for a in range(3) for b in range(2)}
TINY = ScratchPolicy(
    layers=1,
    hidden=32,
    heads=2,
    kv_heads=1,
    intermediate=48,
    context=16,
    tokenizer=CharTokenizer(alphabet="0123+="),
)
VOCABULARY = 8
"""Of its tokens, as many as recipes with a larger top k take here."""
FIRST_CHARACTER = ExactScorer(extract="regex:^(.)")


@cache
def teacher() -> causal_lm.CausalPolicy:
    """The same policy after four times as many steps."""
    return warmed_up(steps=160)


def _said(row: TrainingRow) -> Said:
    """What a scorer would store of the row's tokens."""
    found = row_top_k(teacher().model, [row], 4)[0]
    kept = (found.logp, found.entropy, found.ids.int(), found.logprobs)
    # A live teacher reads the question twice.
    twice = np.array([*row.prompt_tokens, *row.prompt_tokens], dtype=np.int32)
    return Said(*(x.detach().numpy() for x in kept), prompt_tokens=twice)


def _heard(row: dict[str, Any]) -> float:
    """The teacher's mean log-prob of a rollout's tokens: its score."""
    found = row_top_k(teacher().model, [TokenRow(row["prompt_tokens"], row["tokens"])], 1)[0]
    return float(found.logp.double().mean())


@cache
def warmed_up(steps: int = 40) -> causal_lm.CausalPolicy:
    """A policy that is right about one time in three, so that groups differ."""
    policy = causal_lm.build(TINY, [], seed=0, device="cpu")
    policy.model.requires_grad_(True)
    shown = [Demonstration(q, causal_lm.encode_prompt(policy, _asked(q), "plain"), a) for q, a in SUMS.items()]
    sft(policy.model, policy.tokenizer, shown, SftConfig(steps=steps, batch=6, lr=5e-3, lr_warmup_steps=0), seed=0)
    return policy


def trajectory(name: str) -> dict[str, Any]:
    """What is kept of the recipe's rounds: right rollouts, rows of the batch, losses, gradient and parameter norms, and
    the sums of what the objective remembers."""
    recipe = load_recipe(name, {"train": {"optimizer": {"lr": 1e-3}}})
    train = with_fewer_entries(recipe.train, VOCABULARY)
    if train.critic is not None:
        train = train.model_copy(update={"critic": train.critic.model_copy(update={"lr": 1e-3})})
    policy = copy.deepcopy(warmed_up())
    synced = train.teacher is not None and train.teacher.weights == "synced"
    reference = copy.deepcopy(policy.model) if train.needs_reference() or synced else None
    critic = build_critic(policy, 0) if train.critic is not None else None
    average = copy.deepcopy(policy.model) if train.ema is not None else None
    state = TrainState(seed=0)
    rollouts: list[dict[str, Any]] = []
    rounds = []
    for number in range(ROUNDS):
        new = _rollouts(policy, number, recipe.rollout)
        if train.reads_teacher():
            new = [row | {"mean_logprob": float(np.mean(row["logprobs"])), "teacher": _heard(row)} for row in new]
            right = [(row["group_id"], row["rollout_id"]) for row in new if row["correct"]]
            for row in new:
                row["has_teacher"] = any(g == row["group_id"] and r != row["rollout_id"] for g, r in right)
        if recipe.rollout.derive:
            new = [row | {"parent_id": None, "prefix_length": None, "train_prompt_tokens": None} for row in new]
            new += _derived(recipe, policy, new, number)
        rollouts += new
        seen = [r for r in rollouts if number - r["round"] <= recipe.curate.replay]
        scored = pa.Table.from_pylist([{**_narrow(r), "age": number - r["round"]} for r in seen])
        own = recipe.curate.model_copy(update={"teacher": None})
        table = curate(scored, own, given=given_values(recipe.curate, round=number, seed=0))
        schema = ROLLOUTS.schema(ADDED if recipe.rollout.derive else ())
        tokens = pa.Table.from_pylist([{k: r.get(k) for k in schema.names} for r in seen], schema=schema)
        batch = training_batch(table, tokens)
        if train.reads_teacher():
            batch = replace(batch, rows=[replace(row, said=_said(row)) for row in batch.rows])
        state, metrics = update(policy.model, critic, reference, batch, train, state, average=average)
        norm = torch.stack([p.detach().double().square().sum() for p in policy.model.parameters()]).sum().sqrt()
        kept = {
            "right": sum(r["correct"] for r in new if r["source"] == "policy"),
            "rows": table.num_rows,
            "loss": [_short(m.value) for m in metrics if m.name == "loss"],
            "grad_norm": [_short(m.value) for m in metrics if m.name == "grad_norm"],
            "parameter_norm": _short(float(norm)),
            "objective_state": {name: _short(float(x.to_dense().sum())) for name, x in state.objective.items()},
        }
        rounds.append(kept)
    return {"recipe": name, "rounds": rounds}


def with_fewer_entries(train: TrainConfig, most: int) -> TrainConfig:
    """The same training with a top k that a vocabulary of `most` tokens has."""
    part = train.objective.distill
    if part is None or not isinstance(part.estimate, TopK) or (part.estimate.k or 0) <= most:
        return train
    fewer = part.model_copy(update={"estimate": part.estimate.model_copy(update={"k": most})})
    return train.model_copy(update={"objective": train.objective.model_copy(update={"distill": fewer})})


def _rollouts(policy: causal_lm.CausalPolicy, number: int, asks: RolloutConfig) -> list[dict[str, Any]]:
    """A round's rollouts with their scores: token payload and the columns that SQL sees, in one mapping each."""
    drawn = groups(f"r{number}", epoch_block(list(SUMS), seed=0, round=number, prompts=PROMPTS))
    asked = [(group, sample) for group in drawn for sample in range(SAMPLES)]
    prompts = {q: causal_lm.encode_prompt(policy, _asked(q), "plain") for q in SUMS}
    requests = [Request(rollout_id(g.group_id, s), prompts[g.prompt_id]) for g, s in asked]
    engine = make(TransformersEngine(batch=64))
    share = None if asks.mix is None else TeacherShare(teacher(), asks.mix.share)
    done = engine(policy, requests, Sampling(max_tokens=3), seed=0, entropy=asks.entropy, teacher=share)
    made = [
        (g, s, "policy", c.finish, list(c.tokens), list(c.logprobs), c.entropy)
        for (g, s), c in zip(asked, done, strict=True)
    ]
    for group in drawn if asks.experts else []:
        ids = policy.tokenizer.encode(SUMS[group.prompt_id], add_special_tokens=False)
        ids.append(policy.tokenizer.eos_token_id)
        made.append((group, SAMPLES, "expert", "stop", ids, [np.nan] * len(ids), None))
    rows = [
        {
            "rollout_id": rollout_id(group.group_id, sample),
            "round": number,
            "pass": 0,
            "policy": "tiny",
            "policy_round": number,
            "group_id": group.group_id,
            "prompt_id": group.prompt_id,
            "sample": sample,
            "source": source,
            "finish": finish,
            "length": len(tokens),
            "engine": "transformers",
            "sampling": "{}",
            "prompt_tokens": prompts[group.prompt_id],
            "tokens": tokens,
            "logprobs": logprobs,
            "train_mask": [True] * len(tokens),
            "segments": [],
            "text": causal_lm.decode(policy, tokens),
            "entropy": spread,
        }
        for group, sample, source, finish, tokens, logprobs, spread in made
    ]
    return _scored(rows)


def _derived(
    recipe: Recipe, policy: causal_lm.CausalPolicy, rows: list[dict[str, Any]], number: int
) -> list[dict[str, Any]]:
    """Rows of the recipe's further passes, each once: of the parents that its SQL picks, the question with its answer
    or with the parent's own one is read again, by the policy, whoever the recipe's author is. It was never taught to
    use an answer, so two of three times what one would say who was is put in its place."""
    found: list[dict[str, Any]] = []
    engine = make(TransformersEngine(batch=64))
    for pass_number, part in enumerate(recipe.rollout.derive, 1):
        file = GOLDEN.parents[2] / "workflow/sql/parents" / f"{part.parents.sql}.sql"
        picks = CurateConfig(filter=part.parents.model_copy(update={"sql": str(file)}))
        scored = pa.Table.from_pylist([{**_narrow(row), "age": 0} for row in [*rows, *found]])
        table = curate(scored, picks, given=given_values(picks, round=number, seed=0))
        chosen = set(table.column("rollout_id").to_pylist())
        last = {row["group_id"]: row["sample"] for row in [*rows, *found]}
        turn = any(context.prefix for context in part.context)
        made = []
        for parent in [row for row in [*rows, *found] if row["rollout_id"] in chosen]:
            more = parent["text"] if turn else SUMS[parent["prompt_id"]]
            more_ids = policy.tokenizer.encode(f"{more}=", add_special_tokens=False)
            for _ in range(part.samples):
                last[parent["group_id"]] += 1
                new = {"sample": last[parent["group_id"]], "source": part.name, "pass": pass_number}
                new |= {"rollout_id": rollout_id(parent["group_id"], new["sample"]), "parent_id": parent["rollout_id"]}
                plain = rows[[row["group_id"] for row in rows].index(parent["group_id"])]["prompt_tokens"]
                new |= {"prompt_tokens": [*plain, *more_ids], "prefix_length": len(more_ids) if turn else None}
                new["train_prompt_tokens"] = {"as_read": None, "plain": plain, "never": []}[part.trained]
                made.append(parent | new)
        requests = [Request(row["rollout_id"], row["prompt_tokens"]) for row in made]
        done = engine(policy, requests, Sampling(max_tokens=3), seed=0, entropy=False)
        for n, (row, completion) in enumerate(zip(made, done, strict=True)):
            tokens, finish = list(completion.tokens), completion.finish
            if n % 3:
                tokens = policy.tokenizer.encode(f"{SUMS[row['prompt_id']]}+0", add_special_tokens=False)
                tokens, finish = [*tokens, policy.tokenizer.eos_token_id], "stop"
            row |= {"finish": finish, "length": len(tokens), "tokens": tokens, "train_mask": [True] * len(tokens)}
            row |= {"logprobs": list(completion.logprobs) if n % 3 == 0 else [np.nan] * len(tokens)}
            row |= {"text": causal_lm.decode(policy, tokens), "entropy": None}
        found += _scored(made)
    return found


def _scored(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if not rows:
        return []
    verdicts = score("exact", FIRST_CHARACTER, [_scorer_row(r) for r in rows], needs={}, threads=1, root=GOLDEN)
    for row, reward in zip(rows, verdicts["reward"].to_pylist(), strict=True):
        row |= {"reward": reward, "correct": reward >= 1.0, "judge": _judge(row, reward)}
        row["meta"] = json.dumps({"domain": "small" if row["prompt_id"] < "1" else "large"})
    return rows


def _judge(row: dict[str, Any], reward: float) -> float:
    """A verdict on the scale 1 to 10 that prefers right and short: what a judge might say, as a program."""
    return 10.0 - row["length"] if reward >= 1.0 else 6.0 - 2.0 * (row["sample"] % 3)


def _narrow(row: dict[str, Any]) -> dict[str, Any]:
    lists = ("prompt_tokens", "tokens", "logprobs", "train_mask", "segments", "entropy", "train_prompt_tokens")
    return {name: value for name, value in row.items() if name not in lists}


def _scorer_row(row: dict[str, Any]) -> Row:
    names = ("rollout_id", "prompt_id", "group_id", "sample", "length", "finish", "tokens")
    question = row["prompt_id"]
    return Row(
        **{name: row[name] for name in names},
        completion=row["text"],
        task="sums",
        messages=_asked(question),
        answer=SUMS[question],
        meta={},
    )


def _asked(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def _short(value: float) -> float:
    return float(f"{value:.8g}")


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    GOLDEN.mkdir(exist_ok=True)
    for name in names or recipe_names():
        text = json.dumps(trajectory(name), indent=1)
        (GOLDEN / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        print(f"{name}: written")


if __name__ == "__main__":
    main(sys.argv[1:])
