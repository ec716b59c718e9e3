"""Training of reward models: the loss in closed form, a planted reward recovered, the split, and the stage's files."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

from rollway import scorers
from rollway.config.policies import CharTokenizer, LoraConfig, ScratchPolicy
from rollway.config.reward_models import FilePairs, HuggingFaceBase, RewardModelConfig
from rollway.config.scorers import RewardModelScorer
from rollway.config.tasks import JsonlSource
from rollway.errors import RollwayError
from rollway.policies import causal_lm
from rollway.policies import reward_model as models
from rollway.policies.reward_model import RewardModel, encode, measure, outputs
from rollway.runtime.specs import STAGE_VERSION, RewardModelSpec
from rollway.stages.reward_model import run as stage
from rollway.tasks.entries import Entry
from rollway.training.pairs import Pair, deal, from_entries, swapped
from rollway.training.reward_model import EncodedPair, accumulate, bradley_terry, encoded, margins, moments, train

PAIRS = FilePairs(source=JsonlSource(path="pairs.jsonl"))
BASE = HuggingFaceBase(name="base")


def settings(**given: Any) -> RewardModelConfig:
    return RewardModelConfig(**{"base": BASE, "pairs": PAIRS, "batch": 16, "lr": 3e-3, **given})


def policy(seed: int = 0, context: int = 32) -> causal_lm.CausalPolicy:
    config = ScratchPolicy(
        tokenizer=CharTokenizer(alphabet="abcd>"),
        layers=1,
        hidden=16,
        heads=2,
        kv_heads=1,
        intermediate=32,
        context=context,
    )
    return causal_lm.build(config, [], seed, device="cpu")


def classifier(seed: int = 0, context: int = 32) -> RewardModel:
    return models.from_policy("reward_models.m", policy(seed, context), seed)


def words(rng: np.random.Generator, count: int, length: int = 6) -> list[str]:
    return ["".join(rng.choice(list("abcd"), length)) for _ in range(count)]


def texts_as_pairs(model: RewardModel, two: list[tuple[str, str]]) -> list[EncodedPair]:
    pairs = [Pair(str(n), [{"role": "user", "content": ">"}], "plain", c, r) for n, (c, r) in enumerate(two)]
    return encoded("reward_models.m", model, pairs)[0]


# ---- the loss


def test_the_loss_and_its_gradient_in_closed_form() -> None:
    chosen = torch.tensor([0.0, 1.5, -2.0, 400.0, -400.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([0.0, 0.5, 1.0, -400.0, 400.0], dtype=torch.float64, requires_grad=True)
    for centre in (0.0, 0.3):
        loss = bradley_terry(chosen, rejected, centre)
        slopes = torch.autograd.grad(loss.sum(), [chosen, rejected])
        c, r = chosen.detach().numpy(), rejected.detach().numpy()
        wrong = 1.0 / (1.0 + np.exp(np.clip(c - r, -700, 700)))
        assert loss.detach().numpy() == pytest.approx(np.logaddexp(0, r - c) + centre * (c + r) ** 2)
        assert slopes[0].numpy() == pytest.approx(-wrong + 2 * centre * (c + r), abs=1e-12)
        assert slopes[1].numpy() == pytest.approx(wrong + 2 * centre * (c + r), abs=1e-12)
    assert bradley_terry(torch.zeros(1), torch.zeros(1)).item() == pytest.approx(np.log(2))


def test_the_loss_compares_and_the_centring_fixes_the_level() -> None:
    chosen, rejected = torch.tensor([1.0, 0.2]), torch.tensor([0.4, -0.3])
    assert torch.allclose(bradley_terry(chosen + 5, rejected + 5), bradley_terry(chosen, rejected))
    assert (bradley_terry(chosen + 5, rejected + 5, 0.1) > bradley_terry(chosen, rejected, 0.1)).all()


def test_the_result_does_not_depend_on_micro_batches() -> None:
    rng = np.random.default_rng(0)
    two = [(words(rng, 1, int(rng.integers(1, 9)))[0], words(rng, 1, int(rng.integers(10, 20)))[0]) for _ in range(9)]
    found = []
    for micro_tokens in (1, 90, 100_000):
        model = classifier()
        model.model.double().requires_grad_(True)
        loss = accumulate(model, texts_as_pairs(model, two), settings(centre=0.1, micro_tokens=micro_tokens))
        found.append((loss, [p.grad for p in model.model.parameters() if p.grad is not None]))
    for loss, grads in found[1:]:
        assert loss == pytest.approx(found[0][0], abs=1e-12)
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(grads, found[0][1], strict=True))


class Counts(nn.Module):
    """r = sum of one weight per token: a reward that is linear in how often each token occurs."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(tokens, 1))
        self.device = torch.device("cpu")

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=(self.weight[input_ids] * attention_mask[..., None]).sum(1))


def test_a_planted_linear_reward_is_recovered() -> None:
    """Pairs drawn from Bradley-Terry under a linear reward: training ends at the logistic regression's optimum, which
    scipy finds by itself, and near the planted weights."""
    planted = np.array([1.2, -0.8, 0.3, -0.7])
    rng = np.random.default_rng(0)
    two = rng.integers(0, 4, (800, 2, 6))
    reward = planted[two].sum(-1)
    first = rng.random(len(two)) < 1 / (1 + np.exp(reward[:, 1] - reward[:, 0]))
    two[~first] = two[~first][:, ::-1]
    pairs = [EncodedPair(c.tolist(), r.tolist()) for c, r in two]
    model: Any = SimpleNamespace(model=Counts(4), pad=0)
    train("m", model, pairs, settings(epochs=25, batch=200, lr=0.05))
    train("m", model, pairs, settings(epochs=40, batch=800, lr=0.005))

    counts = np.stack([(two == token).sum(-1) for token in range(4)], axis=-1).astype(float)
    differences = counts[:, 0] - counts[:, 1]
    # Every text has six tokens, so a constant on all weights changes nothing: the ridge only picks one of the optima.
    best = minimize(lambda w: np.logaddexp(0, -differences @ w).mean() + 1e-9 * w @ w, np.zeros(4), tol=1e-12).x
    learnt = model.model.weight.detach().numpy()[:, 0]
    assert learnt - learnt.mean() == pytest.approx(best - best.mean(), abs=5e-3)
    assert learnt - learnt.mean() == pytest.approx(planted - planted.mean(), abs=0.2)


def test_a_classifier_learns_an_order_and_repeats_bitwise() -> None:
    """More a than b is better: pairs that it has not seen are ranked, and the same seed gives the same weights."""
    rng = np.random.default_rng(0)

    def better(two: list[str]) -> tuple[str, str]:
        value = [text.count("a") - text.count("b") for text in two]
        return (two[0], two[1]) if value[0] > value[1] else (two[1], two[0])

    def draw(count: int) -> list[tuple[str, str]]:
        drawn = [words(rng, 2) for _ in range(4 * count)]
        clear = [t for t in drawn if abs((t[0].count("a") - t[0].count("b")) - (t[1].count("a") - t[1].count("b"))) > 1]
        return [better(two) for two in clear[:count]]

    learnt, unseen = draw(300), draw(100)
    weights = []
    for seed in (0, 0, 1):
        model = classifier()
        before = np.mean(np.array(margins("m", model, texts_as_pairs(model, unseen))) > 0)
        metrics = train(
            "m", model, texts_as_pairs(model, learnt), settings(epochs=6, seed=seed, lr=1e-2, lr_warmup_steps=3)
        )
        weights.append([p.detach().clone() for p in model.model.parameters()])
        after = np.mean(np.array(margins("m", model, texts_as_pairs(model, unseen))) > 0)
        assert before < 0.8 < 0.93 < after
        losses = [m.value for m in metrics if m.name == "loss"]
        assert len(losses) == 6 * 19
        assert losses[0] == pytest.approx(np.log(2), abs=0.1)
        assert [m.value for m in metrics if m.name == "lr"][:4] == pytest.approx([2.5e-3, 5e-3, 7.5e-3, 1e-2])
    assert all(torch.equal(a, b) for a, b in zip(weights[0], weights[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights[0], weights[2], strict=True))


def test_a_loss_that_is_not_finite_stops() -> None:
    model = classifier()
    with torch.no_grad():
        next(model.model.parameters()).fill_(float("nan"))
    with pytest.raises(RollwayError, match="m: step 1: loss nan"):
        train("m", model, texts_as_pairs(model, [("a", "b")]), settings())


def test_dropout_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """With BERT's usual dropout, training is what it is without: micro-batches would otherwise draw other noise."""
    from transformers import BertConfig, BertForSequenceClassification

    def trained(dropout: float, micro_tokens: int) -> list[Tensor]:
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=8,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            num_labels=1,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
        model: Any = SimpleNamespace(model=BertForSequenceClassification(config).double(), pad=0)
        train("m", model, pairs, settings(batch=6, epochs=2, micro_tokens=micro_tokens))
        return [p.detach() for p in model.model.parameters()]

    rng = np.random.default_rng(0)
    pairs = [EncodedPair(c.tolist(), r.tolist()) for c, r in rng.integers(1, 8, (6, 2, 5))]
    plain = trained(0.0, 100_000)
    for micro_tokens in (1, 100_000):
        # Adam turns the rounding of a gradient of nought (a key's bias) into a step: what is compared is the rest.
        for one, other in zip(trained(0.5, micro_tokens), plain, strict=True):
            assert torch.allclose(one, other, atol=1e-6) or one.abs().max() < 0.02


# ---- the model


def test_the_backbone_is_the_policys_and_the_head_is_drawn_from_the_seed() -> None:
    given = policy()
    made = [models.from_policy("m", policy(), seed) for seed in (0, 0, 1)]
    ids = torch.tensor([[6, 7, 8]])
    with torch.no_grad():
        states = given.model.model(ids).last_hidden_state
        assert torch.equal(made[0].model.base_model(ids).last_hidden_state, states)
        assert outputs(made[0], [[6, 7, 8]]).item() == pytest.approx(
            made[0].model.score(states)[0, -1].item(), abs=1e-6
        )
    assert torch.equal(made[0].model.score.weight, made[1].model.score.weight)
    assert not torch.equal(made[0].model.score.weight, made[2].model.score.weight)


def test_a_lora_is_folded_into_the_backbone(tmp_path: Path) -> None:
    from rollway.config.policies import HuggingFacePolicy

    causal_lm.save(tmp_path, policy())
    config = HuggingFacePolicy(name=str(tmp_path / "weights/main"), lora=LoraConfig(rank=2))
    given = causal_lm.build(config, [], 0, device="cpu")
    with torch.no_grad():
        for name, parameter in given.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        ids = torch.tensor([[6, 7, 8]])
        states = given.model.base_model(ids).last_hidden_state
        plain = policy().model.model(ids).last_hidden_state
        made = models.from_policy("m", given, 0).model.base_model(ids).last_hidden_state
    assert torch.allclose(made, states, atol=1e-5)
    assert not torch.allclose(made, plain, atol=1e-2)


def test_stored_token_ids_and_texts_word_a_row_alike() -> None:
    """What the policy sampled (prompt and completion ids without the end) is what the reward model reads."""
    made, asked = policy(), "ab>"
    prompt = causal_lm.encode_prompt(made, [{"role": "user", "content": asked}], "plain")
    for completion in ([6, 7, 9], [8], [6] * 10):
        text = causal_lm.decode(made, [*completion, made.tokenizer.eos_token_id])
        row = encode("m", made.tokenizer, [{"role": "user", "content": asked}], "plain", text)
        assert row == [*prompt, *completion]


def test_rows_that_cannot_be_used_are_counted_by_reason() -> None:
    model = classifier(context=8)
    question = [{"role": "user", "content": ">"}]
    pairs = [
        Pair("ok", question, "plain", "ab", "ba"),
        Pair("same", question, "plain", "ab", "ab"),
        Pair("long", question, "plain", "a" * 8, "b"),
        Pair("none", [{"role": "user", "content": ""}], "plain", "", "b"),
    ]
    used, skipped = encoded("m", model, pairs)
    assert len(used) == 1
    assert skipped == {
        "chosen and rejected are the same tokens": 1,
        "longer than the 8 tokens that the model reads": 1,
        "a completion and its prompt have no token": 1,
    }


# ---- the pairs


def pair(n: int, prompt: str) -> Pair:
    return Pair(f"p{n}", [{"role": "user", "content": prompt}], "plain", "a", "b")


def test_no_prompt_is_on_both_sides_and_the_order_does_not_matter() -> None:
    pairs = [pair(n, f"q{n % 10}{' ' * (n % 2)}") for n in range(60)]
    learnt, unseen = deal(pairs, 0.2)
    assert len(unseen) == 12
    prompts = [{p.messages[0]["content"].strip() for p in side} for side in (learnt, unseen)]
    assert not prompts[0] & prompts[1]
    assert deal(pairs[::-1], 0.2) == (learnt, unseen)
    for share, held in ((0.01, 1), (0.99, 9)):
        assert len({p.messages[0]["content"].strip() for p in deal(pairs, share)[1]}) == held


def test_pairs_of_one_prompt_cannot_be_held_out() -> None:
    with pytest.raises(RollwayError, match="7 preference pairs, all of one prompt"):
        deal([pair(n, "q" + " " * n) for n in range(7)], 0.2)


def test_swaps_are_drawn_by_pair_and_only_grow_with_the_share() -> None:
    pairs = [pair(n, "q") for n in range(4000)]
    assert swapped(pairs, 0.0) == (pairs, 0)
    changed, count = swapped(pairs, 0.2)
    assert abs(count - 800) < 4 * np.sqrt(4000 * 0.2 * 0.8)
    assert sum(p.chosen == "b" and p.rejected == "a" for p in changed) == count
    more, _ = swapped(pairs, 0.5)
    assert all(m.chosen == "b" for c, m in zip(changed, more, strict=True) if c.chosen == "b")
    assert swapped(pairs, 1.0)[1] == 4000


def test_entries_are_worded_by_templates_and_a_null_is_refused() -> None:
    config = FilePairs(
        source=JsonlSource(path="x"), prompt="{q}?", chosen="{both.0}", rejected="{both.1}", format="chat"
    )
    entry = Entry("x line 1", {"q": "why", "both": ["good", "bad"]})
    made = from_entries([entry], config)[0]
    assert (made.messages, made.chosen, made.rejected) == ([{"role": "user", "content": "why?"}], "good", "bad")
    assert made.format == "chat"
    with pytest.raises(RollwayError, match="x line 2: its rejected is null"):
        from_entries([Entry("x line 2", {"q": "why", "both": ["good", None]})], config)


# ---- the stage


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base model and pairs in which more a is better; prompts repeat."""
    monkeypatch.chdir(tmp_path)
    causal_lm.save(tmp_path / "made", policy())
    shutil.copytree(tmp_path / "made/weights/main", tmp_path / "base")
    rng = np.random.default_rng(0)
    rows = []
    for n in range(120):
        texts = sorted(words(rng, 2), key=lambda text: (text.count("a"), text))
        rows.append({"prompt": f"{'abcd'[n % 4]}{'abcd'[n // 4 % 4]}>", "chosen": texts[1], "rejected": texts[0]})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def run_stage(config: RewardModelConfig, out: Path) -> dict[str, Any]:
    spec = RewardModelSpec(version=STAGE_VERSION["reward_model"], config=config)
    made, metrics = out / "reward_model.json", out / "metrics.json"
    stage(spec, prompts=[], rollouts=[], scores=[], policy=[], reward_model=made, metrics=metrics)
    found: dict[str, Any] = json.loads(metrics.read_text())
    return found


def last(metrics: dict[str, Any]) -> dict[str, float]:
    return {row["name"]: row["value"] for row in metrics["metrics"]}


def test_the_stage_writes_the_same_bytes_twice(folder: Path) -> None:
    config = settings(epochs=2)
    for name in ("m/one", "m/two"):
        run_stage(config, folder / name)
    files = [
        {p.relative_to(folder / name): p.read_bytes() for p in (folder / name).rglob("*") if p.is_file()}
        for name in ("m/one", "m/two")
    ]
    assert files[0] == files[1]
    names = {str(path) for path in files[0]}
    assert {"reward_model.json", "metrics.json", "weights/model.safetensors", "weights/tokenizer.json"} <= names
    assert not any(str(folder).encode() in content for content in files[0].values())


def row_of(number: int, given: Pair, completion: str) -> scorers.Row:
    return scorers.Row(
        rollout_id=f"r{number}",
        prompt_id="p",
        group_id="g",
        sample=number,
        completion=completion,
        length=len(completion),
        finish="stop",
        tokens=[],
        task="t",
        messages=given.messages,
        answer=None,
        meta={"format": given.format},
    )


def test_what_is_measured_is_what_the_scorer_says(folder: Path) -> None:
    found = run_stage(settings(epochs=6, lr=1e-2), folder / "m/one")
    values = last(found)
    assert values["pairs_train"] + values["pairs_heldout"] + values["pairs_skipped"] == 120
    assert values["heldout_accuracy"] > 0.75
    losses = [row for row in found["metrics"] if row["name"] == "loss"]
    assert [row["step"] for row in losses] == list(range(1, len(losses) + 1))
    assert sum(b["count"] for b in found["reliability"]["heldout"]) == values["pairs_heldout"]

    entries = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    learnt, unseen = deal(from_entries([Entry("", entry) for entry in entries], PAIRS), 0.2)

    def scored(texts: list[tuple[Pair, str]], **given: Any) -> np.ndarray:
        rows = [row_of(n, p, text) for n, (p, text) in enumerate(texts)]
        table = scorers.score(
            "s",
            RewardModelScorer(trained="one", **given),
            rows,
            needs={},
            threads=1,
            root=folder,
            trained=folder / "m/one/reward_model.json",
        )
        return table.column("reward").to_numpy()

    distinct = {(p.messages[0]["content"], text): (p, text) for p in learnt for text in (p.chosen, p.rejected)}
    normalised = scored(list(distinct.values()))
    assert normalised.mean() == pytest.approx(0.0, abs=1e-5)
    assert normalised.std(ddof=1) == pytest.approx(1.0, abs=1e-5)
    different = [p for p in unseen if p.chosen != p.rejected]
    margin = scored([(p, p.chosen) for p in different], normalise=False)
    margin = margin - scored([(p, p.rejected) for p in different], normalise=False)
    assert np.mean(np.where(margin == 0, 0.5, margin > 0)) == pytest.approx(values["heldout_accuracy"])
    assert np.logaddexp(0, -margin).mean() == pytest.approx(values["heldout_log_loss"], abs=1e-5)


def test_swapped_labels_harm_training_but_are_not_held_out(folder: Path) -> None:
    clean, noisy = (run_stage(settings(epochs=6, lr=1e-2, flip=flip), folder / f"m/{flip}") for flip in (0.0, 1.0))
    assert last(noisy)["pairs_flipped"] == last(noisy)["pairs_train"]
    assert last(clean)["pairs_flipped"] == 0
    assert last(noisy)["train_accuracy"] > 0.75, "what it was taught, it learnt"
    assert last(noisy)["heldout_accuracy"] < 0.4 < 0.75 < last(clean)["heldout_accuracy"]


def test_centring_moves_outputs_towards_zero(folder: Path) -> None:
    means = []
    for centre in (0.0, 1.0):
        run_stage(settings(epochs=6, lr=1e-2, centre=centre), folder / f"m/{centre}")
        means.append(abs(json.loads((folder / f"m/{centre}/reward_model.json").read_text())["mean"]))
    assert means[1] < 0.2 < means[0] or means[1] < 0.5 * means[0]


def test_a_trained_model_can_be_trained_on_and_bfloat16_is_kept(folder: Path) -> None:
    run_stage(settings(), folder / "m/one")
    again = settings(base=HuggingFaceBase(name="m/one/weights", dtype="bfloat16"))
    run_stage(again, folder / "m/two")
    assert json.loads((folder / "m/two/weights/config.json").read_text())["dtype"] == "bfloat16"
    loaded = models.load("m", "m/two/weights", "two")
    manifest = models.read_manifest(folder / "m/two/reward_model.json")
    entries = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    learnt, _ = deal(from_entries([Entry("", entry) for entry in entries], PAIRS), 0.2)
    assert moments("m", loaded, encoded("m", loaded, learnt)[0]) == pytest.approx(
        (manifest.mean, manifest.std), abs=1e-6
    )
    assert measure(loaded, [[6, 7]], 1)[0] == pytest.approx(outputs(loaded, [[6, 7]]).item())


def test_weights_that_overflow_in_the_last_update_are_not_saved(folder: Path) -> None:
    config = settings(batch=200, lr=1e38)
    with pytest.raises(RollwayError, match=r"reward_models.x: after training its outputs are not finite; lower `lr`"):
        run_stage(config, folder / "m/x")
    assert not (folder / "m/x").exists()
    with pytest.raises(RollwayError, match=r"reward_models.x: step 2: loss nan"):
        run_stage(settings(batch=60, lr=1e38), folder / "m/x")
    told = json.loads((folder / "m/x/failed/reward_model.json").read_text())
    assert (told["stage"], told["what"], told["loss"], told["update"]) == ("reward_model", "loss", "nan", 1)
    entries = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    ids = {pair.pair_id for pair in from_entries([Entry("", entry) for entry in entries], PAIRS)}
    assert 0 < len(told["rows"]) <= 60 and {row["pair_id"] for row in told["rows"]} <= ids
    assert told["rows"][0]["loss"] == "nan"
    run_stage(settings(), folder / "m/x")
    assert not (folder / "m/x/failed").exists()


def test_bad_input_is_one_sentence(folder: Path) -> None:
    one_prompt = [{"prompt": ">", "chosen": "a", "rejected": "b"}] * 3
    (folder / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in one_prompt))
    with pytest.raises(RollwayError, match="all of one prompt"):
        run_stage(settings(pairs=FilePairs(source=JsonlSource(path="one.jsonl"))), folder / "m/x")
    long = [{"prompt": f"{c}>", "chosen": "a" * 60, "rejected": "b"} for c in "abcd"]
    (folder / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long))
    with pytest.raises(RollwayError, match=r"reward_models.x: of 4 pairs, 0 are left .*4 longer than the 32 tokens"):
        run_stage(settings(pairs=FilePairs(source=JsonlSource(path="long.jsonl"))), folder / "m/x")
    with pytest.raises(RollwayError, match=r"reward_models.x: reward model nowhere cannot be loaded"):
        run_stage(settings(base=HuggingFaceBase(name="nowhere")), folder / "m/x")
    without = json.loads((folder / "base/tokenizer_config.json").read_text())
    kept = {key: value for key, value in without.items() if key not in ("pad_token", "eos_token")}
    (folder / "base/tokenizer_config.json").write_text(json.dumps(kept))
    with pytest.raises(RollwayError, match="neither a padding nor an end token"):
        run_stage(settings(), folder / "m/x")
    assert not (folder / "m/x").exists()
