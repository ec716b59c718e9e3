"""The pipeline on real input: a Hugging Face model folder (full and LoRA), and GSM8K."""

import json
from pathlib import Path
from typing import Any

import pytest

from rollway.config import deep_merge
from workflow.project import ROOT, TINY, Project

GSM8K = ROOT.parent / "shared/data/gsm8k"


def model_folder(folder: Path) -> Path:
    """A Hugging Face folder: BPE tokenizer, chat template, Qwen3 architecture, random weights."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    from transformers.models.qwen3 import Qwen3Config, Qwen3ForCausalLM

    texts = [path.read_text() for path in sorted((ROOT / "src/rollway").rglob("*.py"))[:40]]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("lora", [None, {"rank": 4, "alpha": 8.0}], ids=["full", "lora"])
def test_two_rounds_on_a_hugging_face_folder(tmp_path: Path, lora: dict[str, Any] | None) -> None:
    model = model_folder(tmp_path / "model")
    config = deep_merge(
        TINY,
        {
            "tasks": {"spell": {"format": "chat", "system": "Answer.", "prompt": "Spell {word} backwards."}},
            "warmups": {"hf": {"policy": {"kind": "huggingface", "name": "model", "lora": lora}}},
            "defaults": {
                "warmup": "hf",
                "rollout": {"sampling": {"max_tokens": 12}},
                "score": {
                    "scorers": {
                        "exact": {"kind": "exact"},
                        "letters": {"kind": "format", "pattern": "s", "full": False},
                    },
                    "reward": {"letters": 1.0},
                    "correct": "exact",
                },
                "evaluate": {"prompts": 4},
            },
        },
    )
    project = Project(tmp_path, config)
    project.snakemake()
    manifests = [json.loads((tmp_path / f"results/grpo-s0/r000{r}/policy.json").read_text()) for r in (1, 2)]
    assert [m["updates"] for m in manifests] == [1, 2]
    main = manifests[1]["policies"]["main"]
    assert main["kind"] == ("lora" if lora else "full")
    weights = project.bytes_of("grpo-s0/**/weights/main/*.safetensors")
    assert len(set(weights.values())) == 2, "each round changed the weights"
    if lora:
        assert sum(map(len, weights.values())) < (model / "model.safetensors").stat().st_size


@pytest.mark.skipif(not GSM8K.is_dir(), reason="GSM8K is not on this machine; it is not part of the repository")
def test_two_rounds_on_gsm8k(tmp_path: Path) -> None:
    """Rewards are zero at this size: every stage must cope with batches without any signal."""
    config = deep_merge(
        TINY,
        {
            "tasks": {
                "spell": {
                    "source": {"kind": "jsonl", "path": str(GSM8K / "train.jsonl")},
                    "heldout_source": {"kind": "jsonl", "path": str(GSM8K / "test.jsonl")},
                    "prompt": "{question}\n",
                    "answer": "{answer}",
                    "extract": "hash",
                    "demonstration": "{answer}",
                    "splits": {"heldout": None},
                }
            },
            "warmups": {
                "tiny": {
                    "policy": {"tokenizer": {"kind": "bpe", "vocab_size": 400}, "context": 1024},
                    "sft": {"steps": 3, "batch": 8},
                }
            },
            "defaults": {
                "rollout": {"sampling": {"max_tokens": 24}},
                "score": {
                    "scorers": {"math": {"kind": "math_verify", "extract": "hash"}},
                    "reward": {"math": 1.0},
                    "correct": "math",
                },
                "evaluate": {"prompts": 8},
            },
        },
    )
    project = Project(tmp_path, config)
    output = project.snakemake().stdout
    assert "no rollout carries a signal" in output
    counted = project.rollway(
        "sql", "SELECT split, count(*) FROM prompts GROUP BY split ORDER BY split", "--format", "csv"
    )
    assert counted.stdout.split() == ["split,count_star()", "heldout,1319", "train,7473"]
    for metrics in (tmp_path / "results/grpo-s0").glob("r*/metrics.json"):
        assert "NaN" not in metrics.read_text()
