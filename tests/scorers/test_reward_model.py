import json
import shutil

import pytest
from pydantic import ValidationError

from rollway.config.base import as_given
from rollway.config.scorers import RewardModelScorer
from rollway.errors import RollwayError
from rollway.policies import reward_model as models
from rollway.policies.manifest import folder_files
from rollway.runtime.notice import progress
from rollway.scorers import score

TEMPLATE = "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random causal classifier of two layers with a character tokenizer, and one with two outputs."""
    import torch
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    characters = {c: i for i, c in enumerate(["<end>", *(chr(n) for n in range(32, 127))])}
    raw = Tokenizer(models.WordLevel(characters, unk_token="<end>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", chat_template=TEMPLATE)
    for name, outputs in (("one", 1), ("two", 2)):
        config = LlamaConfig(
            vocab_size=len(characters),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32,
            num_labels=outputs,
        )
        LlamaForSequenceClassification(config).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


def reference(folder, text):
    """One row alone, without padding: the head applied to the last token's hidden state."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder / "one").eval()
    ids = AutoTokenizer.from_pretrained(folder / "one")(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model.score(model.model(ids).last_hidden_state[:, -1]).item()


def test_batches_equal_rows_alone(folder, make_row, run):
    texts = ["a", "abcdefgh", "", "xyz", "a", "hello you"]
    rows = [make_row(text, number=n) for n, text in enumerate(texts)]
    expected = [reference(folder, f"2+2={text}") for text in texts]
    for batch in (1, 4, 64):
        found = run(RewardModelScorer(name=str(folder / "one"), batch=batch), rows)
        assert [row["reward"] for row in found] == pytest.approx(expected, abs=1e-5)
    assert len(set(expected)) == 5
    with progress("score s", len(rows)) as bar:
        run(RewardModelScorer(name=str(folder / "one"), batch=2), rows)
    assert bar.done == 6, "equal rows are read once and count each"
    assert f"  reward {sum(expected) / 6:.3f}" in bar.said()


def test_chats_are_worded_by_the_template(folder, make_row, run):
    rows = [make_row("4", meta={"format": "chat"})]
    found = run(RewardModelScorer(name=str(folder / "one")), rows)
    assert found[0]["reward"] == pytest.approx(reference(folder, "<u>2+2=<a>4"), abs=1e-5)


def test_rows_longer_than_the_model_are_errors(folder, make_row, run):
    rows = [make_row("x" * 60, number=0), make_row("x", number=1)]
    found = run(RewardModelScorer(name=str(folder / "one"), max_error_share=0.5), rows)
    assert "64 tokens, but the reward model reads at most 32" in found[0]["error"]
    assert found[1]["error"] is None


def test_unusable_models(folder, make_row, run, tmp_path):
    with pytest.raises(RollwayError, match="has 2 outputs"):
        run(RewardModelScorer(name=str(folder / "two")), [make_row("4")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(RollwayError, match="scorer s: reward model empty cannot be loaded"):
        run(RewardModelScorer(name="empty"), [make_row("4")])


def test_models_that_would_run_code_are_refused(folder, make_row, run, tmp_path):
    import torch
    from safetensors.torch import load_file

    shutil.copytree(folder / "one", tmp_path / "pickled")
    weights = tmp_path / "pickled/model.safetensors"
    torch.save(load_file(weights), tmp_path / "pickled/pytorch_model.bin")
    weights.unlink()
    with pytest.raises(RollwayError, match=r"pickled cannot be loaded \(it has no weights in safetensors form.*\)$"):
        run(RewardModelScorer(name="pickled"), [make_row("a")])
    shutil.copytree(folder / "one", tmp_path / "coded")
    config = json.loads((tmp_path / "coded/config.json").read_text())
    classes = {"AutoConfig": "own.Config", "AutoModelForSequenceClassification": "own.Model"}
    (tmp_path / "coded/config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": classes}))
    (tmp_path / "coded/own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(RollwayError, match=r"coded cannot be loaded \(it brings code of its own, which is never run"):
        run(RewardModelScorer(name="coded"), [make_row("a")])
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def trained(folder, tmp_path):
    """The same model as if it had been trained here: `weights/` and reward_model.json."""
    shutil.copytree(folder / "one", tmp_path / "m/weights")
    manifest = models.RewardModelManifest(folder_files(tmp_path / "m/weights"), mean=0.5, std=2.0)
    models.write_manifest(tmp_path / "m/reward_model.json", manifest)
    return tmp_path / "m/reward_model.json"


def rewards(rows, trained, **given):
    config = RewardModelScorer(trained="m", **given)
    table = score("s", config, rows, needs={}, threads=1, root=trained.parent, trained=trained)
    return table.column("reward").to_pylist()


def test_a_trained_model_is_standardised_unless_told_otherwise(folder, trained, make_row, run):
    rows = [make_row(text, number=n) for n, text in enumerate(["a", "bcd", "a"])]
    named = [row["reward"] for row in run(RewardModelScorer(name=str(folder / "one")), rows)]
    assert rewards(rows, trained, normalise=False) == named
    assert rewards(rows, trained) == pytest.approx([(value - 0.5) / 2.0 for value in named])


def test_the_reward_model_is_named_once_and_options_without_effect_are_refused():
    for given, words in (
        ({}, "exactly one of `name` and `trained`"),
        ({"name": "a", "trained": "b"}, "exactly one of `name` and `trained`"),
        ({"name": "a", "normalise": False}, "`normalise` needs `trained`"),
        ({"trained": "b", "revision": "main"}, "`revision` has no effect"),
    ):
        with pytest.raises(ValidationError, match=words):
            RewardModelScorer(**given)
    old = {"kind": "reward_model", "name": "a"}
    assert as_given(RewardModelScorer(name="a")) == old, "finished scores are not planned anew"


def test_weights_that_changed_since_training_are_refused(trained, make_row):
    weights = trained.parent / "weights/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(RollwayError, match=r"model.safetensors: .*truncated or changed.*the reward_model stage"):
        rewards([make_row("a")], trained)
    weights.unlink()
    with pytest.raises(RollwayError, match=r"model.safetensors: named in .*snakemake --force .*reward_model.json"):
        rewards([make_row("a")], trained)
    trained.write_text("{}")
    with pytest.raises(RollwayError, match=r"not a reward_model.json"):
        rewards([make_row("a")], trained)


def test_a_model_that_always_says_the_same_cannot_be_standardised(trained, make_row):
    manifest = models.read_manifest(trained)
    models.write_manifest(trained, models.RewardModelManifest(manifest.files, 0.0, 0.0))
    with pytest.raises(RollwayError, match=r"standard deviation of 0.*reward_models.m.*normalise: false"):
        rewards([make_row("a")], trained)
    assert len(rewards([make_row("a")], trained, normalise=False)) == 1


def test_weights_without_a_head_are_no_reward_model(folder, make_row, run, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    shutil.copytree(folder / "one", tmp_path / "headless")
    config = LlamaConfig.from_pretrained(folder / "one")
    LlamaForCausalLM(config).save_pretrained(tmp_path / "headless")
    with pytest.raises(RollwayError, match=r"headless lack score.weight, which would be random"):
        run(RewardModelScorer(name="headless"), [make_row("a")])
