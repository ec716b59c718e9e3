"""Incidents that no other test catches: truncated samplers, token ids through the store, prompts under preferences."""

import ast
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

import rollway.training
from incidents.recipes import default_batch, recipe_of
from rollway.config import load_recipe, recipe_names
from rollway.config.base import ConfigError
from rollway.config.objectives import Objective
from rollway.config.policies import CharTokenizer
from rollway.objectives import initial_state, loss
from rollway.policies.tokenizers import char_tokenizer
from rollway.store import parquet
from rollway.store.tables import ROLLOUTS
from rollway.training.batch import TrainingBatch, training_batch
from rollway.training.gradients import Models, accumulate
from rollway.training.precompute import precompute
from rollway.training.signal import has_signal
from rollway.training.state import TrainState
from rollway.training.update import update
from training.tiny import random_batch, tiny


@pytest.mark.parametrize("truncation", [{"top_k": 50}, {"top_p": 0.9}], ids=["top_k", "top_p"])
@pytest.mark.parametrize("name", recipe_names())
def test_truncated_sampling_is_refused_where_nothing_corrects_it(name: str, truncation: dict[str, float]) -> None:
    """INCIDENT 9: the trainer's support is the full softmax, so its ratio to a truncated sampler is biased."""
    over = {"rollout": {"sampling": truncation}}
    objective, rollout = recipe_of(name).train.objective, recipe_of(name).rollout
    if rollout.mix is None and (objective.correction.kind != "none" or objective.takes_any_prefix()):
        assert load_recipe(name, over).rollout.sampling.model_dump().items() >= truncation.items()
        return
    words = "top_p/top_k truncate what is sampled.*correction"
    words = "no effect on stored completions" if rollout.engine.kind == "stored" else words
    words = "not defined of a mixture" if rollout.mix is not None else words
    with pytest.raises(ConfigError, match=words):
        load_recipe(name, over)


# Ids that no tokenizer would give for the text they decode to: unmerged, special tokens inside, end tokens twice.
ADVERSARIAL = ["1", "<eos>", "<eos><eos>1", "<pad>", "<user>1+1=<assistant>", " 1", "\u00e9", "1\n\n", ""]


def test_ids_survive_the_store(tmp_path: Path) -> None:
    """INCIDENT 22: what was sampled is what is trained on, though text and ids would not give each other back."""
    tokenizer = char_tokenizer(CharTokenizer(alphabet="1+= \n<>eospadurt"))
    special = [tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id]
    plain = [tokenizer.convert_tokens_to_ids(list(text)) for text in ADVERSARIAL]
    written = [[*ids, *special, *ids] for ids in plain]
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in written]
    again = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    assert all(a != b for a, b in zip(again, written, strict=True))
    rows = [
        {
            **dict.fromkeys(("policy", "group_id", "prompt_id", "source", "finish", "engine", "sampling"), "x"),
            **dict.fromkeys(("round", "pass", "policy_round"), 0),
            "rollout_id": f"r{n}",
            "sample": n,
            "length": len(ids),
            "prompt_tokens": ids[::-1],
            "tokens": ids,
            "logprobs": [-0.1] * len(ids),
            "train_mask": [True] * len(ids),
            "segments": [],
            "text": text,
        }
        for n, (ids, text) in enumerate(zip(written, texts, strict=True))
    ]
    parquet.write(tmp_path / "rollouts.parquet", pa.Table.from_pylist(rows, schema=ROLLOUTS.schema()), "rollouts")
    stored = parquet.read(tmp_path / "rollouts.parquet")
    batch = training_batch(pa.table({"rollout_id": [f"r{n}" for n in range(len(rows))]}), stored)
    assert [np.asarray(row.tokens).tolist() for row in batch.rows] == written
    assert [np.asarray(row.prompt_tokens).tolist() for row in batch.rows] == [ids[::-1] for ids in written]


def test_the_trainer_knows_no_tokenizer() -> None:
    """INCIDENT 22: what trains a policy on rollouts cannot tokenise; demonstrations and preference pairs are texts."""
    folder = Path(next(iter(rollway.training.__path__)))
    files = [path for path in folder.glob("*.py") if path.stem not in ("sft", "reward_model")]
    assert len(files) > 5
    for path in files:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not [name for name in names if "tokenize" in name.lower()], path.name


@pytest.mark.parametrize("kind", ["dpo", "ipo", "copg"])
def test_preferences_leave_the_prompt_alone(kind: str) -> None:
    """INCIDENT 27: hidden states before the one that predicts the first completion token get no gradient at all."""
    objective = Objective.model_validate({"preference": kind})
    batch = random_batch(6, pairs=3, seed=2)
    policy, reference = tiny(), tiny(seed=1)
    train = recipe_of("dpo").train.model_copy(update={"objective": objective})
    tokens = precompute(policy, None, reference, batch, train, {}, 1.0).tokens
    caught: list[Tensor] = []

    def watch(module: torch.nn.Module, inputs: tuple, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(caught.append)

    handle = policy.get_decoder().norm.register_forward_hook(watch)
    accumulate(Models(policy, None, 1.0, 1000), batch.rows, tokens, objective, {})
    handle.remove()
    order = sorted(range(6), key=lambda n: (-batch.rows[n].length, n))
    assert len(caught) == 1
    for place, n in enumerate(order):
        first = len(batch.rows[n].prompt_tokens) - 1
        last = first + len(batch.rows[n].tokens)
        slopes = caught[0][place].abs().sum(-1)
        assert bool((slopes[first:last] > 0).all())
        assert not bool(slopes[:first].any())
        assert not bool(slopes[last:].any())


def test_a_weak_preference_is_a_coin_toss() -> None:
    """INCIDENT 27: as beta goes to 0, DPO's loss goes to log 2 whatever the log-probs."""
    objective = Objective.model_validate({"preference": {"kind": "dpo", "beta": 1e-12}})
    assert float(loss(default_batch("dpo").tokens, objective).loss.detach()) == pytest.approx(np.log(2), rel=1e-10)


def test_a_pull_without_advantages_is_a_signal() -> None:
    """Replayed rows of equal rewards: against the behaviour's log-probs r is not 1, and R2VPO's penalty has a slope."""
    train = recipe_of("r2vpo").train
    state = initial_state(train.objective)
    tokens = precompute(tiny(), None, None, random_batch(8, advantage=0.0), train, state, 1.0).tokens
    moving = replace(tokens, logp=tokens.logp.clone().requires_grad_())
    slope = torch.autograd.grad(loss(moving, train.objective, state=state).loss, moving.logp)[0]
    assert bool(slope.any())
    assert has_signal(train.objective, tokens)


def test_the_four_level_recipe_trains_on_the_domains_of_its_own_sql() -> None:
    made = default_batch("fiberpo-domain")
    rows: TrainingBatch = made.rows
    assert {row.route for row in rows.rows} == {"sums", "words"}
    state, _ = update(tiny(dtype=torch.float32), None, None, rows, made.recipe.train, TrainState(seed=0))
    assert state.updates == 4


def test_what_is_remembered_once_a_round_is_of_all_its_steps() -> None:
    """INCIDENTS 1, 26: DCPO's next target is set by the entropy of every minibatch, not of the last one."""
    train = recipe_of("dcpo").train
    still = train.model_copy(update={"optimizer": train.optimizer.model_copy(update={"lr": 1e-12})})
    policy, batch = tiny(), random_batch(10)
    tokens = precompute(policy, None, None, batch, train, initial_state(train.objective), 1.0).tokens
    state, _ = update(policy, None, None, batch, still, TrainState(seed=0))
    assert state.updates == train.minibatches == 4
    expected = -float(tokens.logp[tokens.mask].mean())
    assert float(state.objective["mixing/entropy"]) == pytest.approx(expected, rel=1e-5)
