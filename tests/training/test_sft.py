"""Supervised warm-up: closed-form loss, order and noise as functions of the seed, and that it learns."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from rollway.config.policies import CharTokenizer, DemonstrationNoise, SftConfig
from rollway.errors import RollwayError
from rollway.policies.tokenizers import char_tokenizer
from rollway.training.guards import UpdateRefused
from rollway.training.sft import Demonstration, corrupt, order, sft
from training.tiny import VOCABULARY, largest_difference, naive_logp, random_row, tiny


def tokenizer() -> PreTrainedTokenizerFast:
    made = char_tokenizer(CharTokenizer(alphabet="abcdef"))
    assert len(made) == VOCABULARY
    return made


def demonstrations() -> list[Demonstration]:
    words = tokenizer()
    texts = {"ab": "fed", "ba": "de", "aa": "f", "bb": "ffff", "cab": "abc"}
    return [Demonstration(p, words(p, add_special_tokens=False)["input_ids"], t) for p, t in texts.items()]


def test_the_first_loss_is_the_token_mean_over_completions_and_end_tokens() -> None:
    model, words = tiny(dtype=torch.float32), tokenizer()
    with torch.no_grad():
        logp = []
        for n, d in enumerate(demonstrations()):
            ids = [*words(d.text, add_special_tokens=False)["input_ids"], words.eos_token_id]
            row = random_row(np.random.default_rng(0), n, length=len(ids))
            logp.append(naive_logp(model, replace(row, prompt_tokens=np.array(d.prompt_tokens), tokens=np.array(ids))))
    metrics = sft(model, words, demonstrations(), SftConfig(steps=1, batch=5), seed=0)
    assert metrics[0].value == pytest.approx(float(-torch.cat(logp).mean()), abs=1e-5)
    assert [(m.step, m.name) for m in metrics] == [(1, "loss"), (1, "grad_norm"), (1, "lr")]


def test_it_learns_its_demonstrations_and_repeats_bitwise() -> None:
    config = SftConfig(steps=60, batch=4, lr=0.02, lr_warmup_steps=5)
    runs = []
    for seed in (0, 0, 1):
        model = tiny(dtype=torch.float32)
        metrics = sft(model, tokenizer(), demonstrations(), config, seed=seed)
        runs.append(([p.detach().clone() for p in model.parameters()], [m.value for m in metrics if m.name == "loss"]))
        assert not model.training
    assert runs[0][1][-1] < 0.2 < runs[0][1][0]
    assert largest_difference(runs[0][0], runs[1][0]) == 0.0
    assert largest_difference(runs[0][0], runs[2][0]) > 0.0


def test_progress_counts_every_step() -> None:
    seen: list[int] = []
    config = SftConfig(steps=23, batch=2)
    sft(
        tiny(dtype=torch.float32),
        tokenizer(),
        demonstrations(),
        config,
        seed=0,
        progress=lambda n, info: seen.append(n),
    )
    assert seen == [10, 10, 3]


def test_every_demonstration_once_per_epoch_with_like_lengths_together() -> None:
    lengths = [int(x) for x in np.random.default_rng(0).integers(1, 50, 64)]
    steps = list(order(lengths, SftConfig(steps=8, batch=8), seed=3))
    assert sorted(n for rows in steps for n in rows) == list(range(64))
    spread = [max(lengths[n] for n in rows) - min(lengths[n] for n in rows) for rows in steps]
    assert max(spread) < 20
    longer = list(order(lengths, SftConfig(steps=20, batch=8), seed=3))
    assert all((a == b).all() for a, b in zip(steps, longer, strict=False))
    assert set(Counter(int(n) for rows in longer for n in rows).values()) == {2, 3}


def test_noise_replaces_one_character_in_the_stated_share() -> None:
    rng = np.random.default_rng(0)
    noise = DemonstrationNoise(wrong_share=0.3)
    made = [corrupt("abcd", "abcdef", noise, rng) for _ in range(4000)]
    wrong = [m for m in made if m != "abcd"]
    assert len(wrong) / 4000 == pytest.approx(0.3, abs=0.03)
    assert all(sum(x != y for x, y in zip(m, "abcd", strict=True)) == 1 for m in wrong)
    places = Counter(next(k for k in range(4) if m[k] != "abcd"[k]) for m in wrong)
    assert min(places.values()) > 0.2 * len(wrong)
    assert {c for m in wrong for c in m} == set("abcdef")
    assert corrupt("aa", "a", DemonstrationNoise(wrong_share=1.0), rng) == "aa"


def test_noise_is_drawn_anew_at_each_use() -> None:
    config = SftConfig(steps=12, batch=5, noise=DemonstrationNoise(wrong_share=1.0))
    noisy = sft(tiny(dtype=torch.float32), tokenizer(), demonstrations(), config, seed=0)
    again = sft(tiny(dtype=torch.float32), tokenizer(), demonstrations(), config, seed=0)
    clean = sft(tiny(dtype=torch.float32), tokenizer(), demonstrations(), SftConfig(steps=12, batch=5), seed=0)
    assert noisy == again
    assert noisy != clean


@pytest.mark.parametrize(
    ("given", "context", "words"),
    [
        ([], None, "no demonstrations"),
        ([Demonstration("p7", [3], "")], None, "prompt p7 is empty"),
        ([Demonstration("p7", [3], "abcdef")], 7, "prompt p7 .* 8 tokens, the policy's context is 7"),
    ],
)
def test_demonstrations_that_cannot_be_learnt_are_named(given: list, context: int | None, words: str) -> None:
    with pytest.raises(RollwayError, match=words):
        sft(tiny(dtype=torch.float32), tokenizer(), given, SftConfig(steps=1), seed=0, context=context)


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    model = tiny(dtype=torch.float32)
    with torch.no_grad():
        model.get_output_embeddings().weight[0] = float("nan")
    with pytest.raises(RollwayError, match="warm-up step 0: loss nan"):
        sft(model, tokenizer(), demonstrations(), SftConfig(steps=1), seed=0)


def test_the_rows_of_a_step_that_is_not_finite_are_told_the_worst_first() -> None:
    """One token's embedding is not a number: only the row that reads it suffers."""
    model = tiny(dtype=torch.float32)
    given = [Demonstration("clean", [3, 4], "ab"), Demonstration("bad", [5, 4], "ab"), Demonstration("fair", [3], "b")]

    def poisoned(module: torch.nn.Module, seen: tuple[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
        return torch.where((seen[0] == 5).unsqueeze(-1), float("nan"), out)

    model.get_input_embeddings().register_forward_hook(poisoned)
    with pytest.raises(UpdateRefused, match="warm-up step 0: loss nan") as caught:
        sft(model, tokenizer(), given, SftConfig(steps=1, batch=3), seed=0)
    worst, *others = caught.value.rows
    assert (worst["prompt_id"], worst["tokens"]) == ("bad", 3)
    assert np.isnan(worst["loss"]) and {row["prompt_id"] for row in others} == {"clean", "fair"}
    assert all(np.isfinite([row["loss"], row["gradient_norm"]]).all() for row in others)
    assert all(p.grad is None for p in model.parameters())
    assert caught.value.figures["update"] == 0
