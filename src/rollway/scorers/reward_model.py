"""A Hugging Face sequence-classification model with one output, in float32."""

from pathlib import Path
from typing import Any

from rollway.config.scorers import RewardModelScorer
from rollway.errors import RollwayError
from rollway.scorers.rows import Row, Verdict


def verdicts(name: str, config: RewardModelScorer, rows: list[Row], threads: int, root: Path) -> list[Verdict]:
    """The model's output for prompt and completion together, worded by its own tokenizer.

    Rows are batched by length; a row longer than the model can read is that row's error.
    Raises RollwayError when the model cannot be loaded, or has more than one output, or another tokenizer.
    """
    import torch

    torch.set_num_threads(threads)
    model, tokenizer = _load(name, config, root)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device).eval()
    encoded = {(r.prompt_id, r.completion): _encode(name, tokenizer, r) for r in rows}
    _check_ids(name, model.get_input_embeddings().num_embeddings, [*encoded.values(), [tokenizer.pad_token_id]])
    longest = model.config.get_text_config().max_position_embeddings
    found = {
        key: Verdict.failed(f"{len(ids)} tokens, but the reward model reads at most {longest}")
        for key, ids in encoded.items()
        if len(ids) > longest
    }
    keys = sorted((key for key in encoded if key not in found), key=lambda key: (len(encoded[key]), encoded[key]))
    for start in range(0, len(keys), config.batch):
        part = keys[start : start + config.batch]
        rewards = _forward(model, tokenizer.pad_token_id, [encoded[key] for key in part], device)
        found.update({key: Verdict(reward) for key, reward in zip(part, rewards, strict=True)})
    return [found[r.prompt_id, r.completion] for r in rows]


def _load(name: str, config: RewardModelScorer, root: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    local = root / config.name
    place = str(local) if local.is_dir() else config.name
    try:
        model = AutoModelForSequenceClassification.from_pretrained(place, revision=config.revision, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(place, revision=config.revision)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RollwayError(f"scorer {name}: reward model {config.name} cannot be loaded ({reason})") from error
    if model.config.num_labels != 1:
        raise RollwayError(
            f"scorer {name}: {config.name} has {model.config.num_labels} outputs; a reward model has exactly one"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise RollwayError(f"scorer {name}: the tokenizer of {config.name} has neither a padding nor an end token")
    # The model finds each row's last token by this id, the only place where a causal classifier reads its score.
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def _encode(name: str, tokenizer: Any, row: Row) -> list[int]:
    """Token ids of the whole conversation: by chat template for chat prompts, else the texts one after the other."""
    if row.meta["format"] == "plain":
        return tokenizer(row.messages[-1]["content"] + row.completion)["input_ids"]
    if tokenizer.chat_template is None:
        raise RollwayError(f"scorer {name}: the task's prompts are chats, but the reward model has no chat template")
    messages = [*row.messages, {"role": "assistant", "content": row.completion}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _check_ids(name: str, known: int, rows: list[list[int]]) -> None:
    largest = max((max(ids) for ids in rows if ids), default=0)
    if largest >= known:
        raise RollwayError(
            f"scorer {name}: the tokenizer gives id {largest}, but the reward model knows {known} ids; "
            "they do not belong together"
        )


def _forward(model: Any, pad: int, rows: list[list[int]], device: str) -> list[float]:
    """Outputs [N] of rows padded on the right."""
    import torch

    width = max(len(ids) for ids in rows)
    tokens = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for index, ids in enumerate(rows):
        tokens[index, : len(ids)] = torch.tensor(ids)
        mask[index, : len(ids)] = 1
    with torch.inference_mode():
        logits = model(input_ids=tokens.to(device), attention_mask=mask.to(device)).logits
    return logits[:, 0].double().tolist()
