"""The quick way to load a Qwen3 gives the model of `from_pretrained`, or leaves the folder to it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM, PreTrainedModel  # noqa: E402

from rollway.config.policies import CharTokenizer, ScratchPolicy  # noqa: E402
from rollway.errors import RollwayError  # noqa: E402
from rollway.policies import causal_lm  # noqa: E402
from rollway.policies.direct_load import WEIGHTS, load_qwen3  # noqa: E402
from rollway.policies.manifest import NamedPolicy  # noqa: E402

SPEC = NamedPolicy(kind="full")
CONFIG = ScratchPolicy(
    tokenizer=CharTokenizer(alphabet="abc"), layers=2, hidden=16, heads=4, kv_heads=2, intermediate=24, context=32
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    causal_lm.save_model(folder, causal_lm.build(CONFIG, [], seed=3, device="cpu").model)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "model"))


def slow(folder: Path, spec: NamedPolicy) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=spec.dtype, attn_implementation=spec.attention, use_safetensors=True
    )


def direct(folder: Path, spec: NamedPolicy = SPEC) -> PreTrainedModel:
    model = load_qwen3(folder, spec)
    assert model is not None
    return model


def rewrite(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_it_is_the_same_model(folder: Path, tmp_path: Path, attention: str) -> None:
    spec = replace(SPEC, attention=attention)
    ours, theirs = direct(folder, spec), slow(folder, spec)
    assert type(ours) is type(theirs) and ours.training == theirs.training
    assert ours.config.to_dict() == theirs.config.to_dict()
    assert ours.config._attn_implementation == theirs.config._attn_implementation == attention
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    own = dict([*ours.named_parameters(), *ours.named_buffers()])
    other = dict([*theirs.named_parameters(), *theirs.named_buffers()])
    assert own.keys() == other.keys()
    for name, tensor in own.items():
        assert torch.equal(tensor, other[name]), name
        assert (tensor.dtype, tensor.device, tensor.requires_grad) == (
            other[name].dtype,
            other[name].device,
            other[name].requires_grad,
        )
    ids = torch.arange(6)[None]
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
    for name, model in (("ours", ours), ("theirs", theirs)):
        causal_lm.save_model(tmp_path / name, model)
    saved = {file.name: file.read_bytes() for file in (tmp_path / "ours").iterdir()}
    assert saved == {file.name: file.read_bytes() for file in (tmp_path / "theirs").iterdir()}


def test_it_is_the_same_model_in_half_precision(folder: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    rewrite(folder, dtype="bfloat16")
    spec = replace(SPEC, dtype="bfloat16")
    ours, theirs = direct(folder, spec), slow(folder, spec)
    ids = torch.arange(6)[None]
    assert ours.dtype == torch.bfloat16 and torch.equal(ours(ids).logits, theirs(ids).logits)
    assert ours.model.rotary_emb.inv_freq.dtype == theirs.model.rotary_emb.inv_freq.dtype


def test_it_uses_no_random_numbers(folder: Path) -> None:
    before = torch.get_rng_state()
    direct(folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_load_model_goes_that_way(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    assert causal_lm.load_model(folder, SPEC).config.num_hidden_layers == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True},
        {"quantization_config": {"bits": 4}},
        {"auto_map": {"AutoModelForCausalLM": "evil.Model"}},
        {"architectures": ["OtherForCausalLM"]},
        {"model_type": "llama"},
    ],
)
def test_any_other_folder_is_left_alone(folder: Path, changes: dict[str, object]) -> None:
    rewrite(folder, **changes)
    assert load_qwen3(folder, SPEC) is None


def test_weights_of_another_type_are_left_to_be_converted(folder: Path) -> None:
    assert load_qwen3(folder, replace(SPEC, dtype="bfloat16")) is None
    assert causal_lm.load_model(folder, replace(SPEC, dtype="bfloat16")).dtype == torch.bfloat16


def test_what_is_wrong_with_a_folder_is_still_said(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    missing = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    save_file(missing, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(RollwayError, match=r"the weights lack lm_head\.weight"):
        causal_lm.load_model(folder, SPEC)
    save_file(tensors | {"lm_head.weight": torch.zeros(2, 2)}, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(RollwayError, match=r"weight lm_head\.weight has shape"):
        causal_lm.load_model(folder, SPEC)
    (folder / WEIGHTS).write_bytes(b"\x00" * 40)
    with pytest.raises(RollwayError, match="cannot be loaded"):
        causal_lm.load_model(folder, SPEC)
    (folder / "config.json").write_text("{")
    with pytest.raises(RollwayError, match="cannot be loaded"):
        causal_lm.load_model(folder, SPEC)
