"""Building, saving and loading of causal language models."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from rollway.config.policies import HuggingFacePolicy, LoraConfig, ScratchPolicy
from rollway.errors import RollwayError
from rollway.policies import causal_lm
from rollway.policies.logprobs import Row, token_logprobs
from rollway.policies.manifest import folder_files, read_manifest, write_manifest

ROWS = [Row([6, 7, 8], [9, 10, 11, 1]), Row([6, 7], [12, 13]), Row([9], [9, 9, 9, 9, 9])]


def logp(policy):
    return token_logprobs(policy.model, ROWS, temperature=1.0, micro_tokens=64).logp


@pytest.fixture
def local_model(tmp_path, policy):
    """A Hugging Face folder, as a user would have it."""
    policy.model.save_pretrained(tmp_path / "base")
    policy.tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_seeds(policy):
    again = causal_lm.build(ScratchPolicy(**policy_settings(), seed=1), [], seed=-1, device="cpu")
    other = causal_lm.build(ScratchPolicy(**policy_settings()), [], seed=1, device="cpu")
    assert torch.equal(logp(policy), logp(again))
    assert not torch.equal(logp(policy), logp(other))


def policy_settings():
    return {"layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "intermediate": 64, "context": 64}


def test_building_leaves_the_global_seed_alone(policy):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    causal_lm.build(ScratchPolicy(**policy_settings()), [], seed=3, device="cpu")
    assert torch.rand(1) == expected


def test_save_and_load_bitwise(tmp_path, policy, store_policy):
    first = store_policy(tmp_path / "a", policy)
    loaded = causal_lm.load(first, device="cpu")
    second = store_policy(tmp_path / "b", loaded)
    assert first.read_bytes() == second.read_bytes()
    assert torch.equal(logp(policy), logp(loaded))
    for file in (tmp_path / "a/weights/main").iterdir():
        assert file.read_bytes() == (tmp_path / "b/weights/main" / file.name).read_bytes()
        assert str(tmp_path).encode() not in file.read_bytes()
        assert file.suffix in {".safetensors", ".json", ".jinja"}


def test_train_mode(tmp_path, policy, store_policy):
    path = store_policy(tmp_path, policy)
    assert not any(p.requires_grad for p in causal_lm.load(path, device="cpu").model.parameters())
    trained = causal_lm.load(path, train=True, device="cpu").model
    assert trained.training
    assert all(p.requires_grad for p in trained.parameters())


def test_stop_ids_join_tokenizer_and_generation_config(policy):
    assert causal_lm.stop_ids(policy) == [policy.tokenizer.eos_token_id]
    policy.model.generation_config.eos_token_id = [1, 30]
    assert causal_lm.stop_ids(policy) == [1, 30]


def test_base_is_named_not_copied(tmp_path, local_model, store_policy):
    policy = causal_lm.build(HuggingFacePolicy(name=str(local_model)), [], seed=0, device="cpu")
    path = store_policy(tmp_path / "run", policy, trained=False)
    named = read_manifest(path).policies["main"]
    assert (named.kind, named.folder, named.base) == ("base", None, str(local_model))
    assert "model.safetensors" in named.files
    assert not (tmp_path / "run/weights").exists()
    assert torch.equal(logp(causal_lm.load(path, device="cpu")), logp(policy))
    trained = read_manifest(store_policy(tmp_path / "next", policy)).policies["main"]
    assert (trained.kind, trained.base) == ("full", None)


def test_changed_base_is_an_error(tmp_path, local_model, store_policy):
    policy = causal_lm.build(HuggingFacePolicy(name=str(local_model)), [], seed=0, device="cpu")
    path = store_policy(tmp_path / "run", policy, trained=False)
    (local_model / "config.json").write_text("{}")
    with pytest.raises(RollwayError, match=r"config\.json"):
        causal_lm.load(path)


def lora_policy(local_model, seed=0, **kwargs):
    config = HuggingFacePolicy(name=str(local_model), lora=LoraConfig(rank=2, **kwargs))
    return causal_lm.build(config, [], seed=seed, device="cpu")


@pytest.mark.parametrize(("target", "said"), [("lm_head", "output layer"), ("embed_tokens", "embedding")])
def test_adapters_that_nothing_reads_are_refused(tmp_path, local_model, store_policy, target, said):
    """Asked for, or found in a folder that another program wrote."""
    with pytest.raises(RollwayError, match=rf"policy\.lora\.target_modules: the {said} cannot have an adapter"):
        lora_policy(local_model, target_modules=["q_proj", target])
    path = store_policy(tmp_path / "run", lora_policy(local_model))
    folder = tmp_path / "run/weights/main"
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": [target]}))
    manifest = read_manifest(path)
    manifest.policies["main"] = replace(manifest.policies["main"], files=folder_files(folder))
    write_manifest(path, manifest)
    with pytest.raises(RollwayError, match=rf"weights/main: the {said} cannot have an adapter"):
        causal_lm.load(path, device="cpu")


def disturb(policy):
    """Gives the adapter's B matrices, which start at 0, some weight."""
    with torch.no_grad():
        for index, (name, parameter) in enumerate(policy.model.named_parameters()):
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)) * 0.1)


def test_lora_saves_the_adapter_only_and_comes_back(tmp_path, local_model, store_policy):
    policy = lora_policy(local_model)
    disturb(policy)
    path = store_policy(tmp_path / "a", policy)
    files = {f.name for f in (tmp_path / "a/weights/main").iterdir()}
    assert files == {"adapter_model.safetensors", "adapter_config.json"}
    loaded = causal_lm.load(path, train=True, device="cpu")
    assert torch.equal(logp(policy), logp(loaded))
    trainable = {n for n, p in loaded.model.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in n for n in trainable)
    assert store_policy(tmp_path / "b", loaded).read_bytes() == path.read_bytes()


def test_lora_merged_equals_base_plus_adapter(local_model):
    """INCIDENTS 24."""
    policy = lora_policy(local_model)
    start = logp(policy)
    disturb(policy)
    unmerged = logp(policy)
    assert (unmerged - start).abs().max() > 1e-3
    with policy.adapter.disable_adapter():
        assert torch.allclose(logp(policy), start, atol=1e-6)
    assert torch.allclose(logp(causal_lm.merged(policy)), unmerged, atol=1e-5)


def test_lora_with_unknown_modules(local_model):
    with pytest.raises(RollwayError, match="target_modules"):
        lora_policy(local_model, target_modules=["no_such_layer"])


def test_dtype(local_model):
    policy = causal_lm.build(HuggingFacePolicy(name=str(local_model), dtype="bfloat16"), [], seed=0, device="cpu")
    assert policy.model.dtype == torch.bfloat16


def test_shape_that_does_not_fit(local_model):
    config = json.loads((local_model / "config.json").read_text())
    (local_model / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    with pytest.raises(RollwayError, match=r"mlp.*\[.*64.*96"):
        causal_lm.build(HuggingFacePolicy(name=str(local_model)), [], seed=0, device="cpu")


def test_missing_weight(local_model):
    tensors = load_file(local_model / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, local_model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RollwayError, match=r"lack model\.norm\.weight"):
        causal_lm.build(HuggingFacePolicy(name=str(local_model)), [], seed=0, device="cpu")


def test_truncated_weights(local_model):
    content = (local_model / "model.safetensors").read_bytes()
    (local_model / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(RollwayError, match="cannot be loaded"):
        causal_lm.build(HuggingFacePolicy(name=str(local_model)), [], seed=0, device="cpu")


def test_no_such_model(tmp_path):
    with pytest.raises(RollwayError, match="cannot be loaded"):
        causal_lm.build(HuggingFacePolicy(name=str(tmp_path / "nowhere")), [], seed=0, device="cpu")


def test_heads_must_divide():
    with pytest.raises(RollwayError, match="multiple of heads"):
        causal_lm.build(ScratchPolicy(hidden=30), [], seed=0, device="cpu")


def test_another_architecture(tmp_path, policy):
    torch.manual_seed(0)
    size = len(policy.tokenizer)
    GPT2LMHeadModel(GPT2Config(vocab_size=size, n_positions=64, n_embd=32, n_layer=2, n_head=2)).save_pretrained(
        tmp_path
    )
    policy.tokenizer.save_pretrained(tmp_path)
    other = causal_lm.build(HuggingFacePolicy(name=str(tmp_path)), [], seed=0, device="cpu")
    assert causal_lm.context_length(other.model) == 64
    assert torch.isfinite(logp(other)).all()
