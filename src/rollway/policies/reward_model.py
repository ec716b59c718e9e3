"""Reward models: Hugging Face sequence classifiers with one output, read at a row's last token.

A trained one is `reward_model.json`, which names the files of the plain Hugging Face folder `weights/` beside it.
Training and scoring word a row with the same function, and measure with the same one.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollway.errors import RollwayError
from rollway.policies import causal_lm
from rollway.policies.manifest import check_files, folder_files
from rollway.runtime.notice import tick
from rollway.store.atomic import read_json, write_json

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

VERSION = 1
MADE_BY = "the reward_model stage"
WEIGHTS = "weights"


@dataclass(frozen=True)
class RewardModelManifest:
    """What reward_model.json holds."""

    files: dict[str, str]
    """File name -> sha256, relative to `weights/`."""
    mean: float
    """Of the outputs over the distinct completions that it was trained on."""
    std: float
    """Their standard deviation (ddof 1)."""


@dataclass(frozen=True)
class RewardModel:
    """A classifier in memory, its padding token set."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def pad(self) -> int:
        return int(self.tokenizer.pad_token_id)

    @property
    def longest(self) -> int | None:
        """Most tokens of a row; None where the architecture states no limit."""
        return causal_lm.context_length(self.model)

    def unreadable(self, ids: Sequence[int]) -> str | None:
        """Why the model cannot read a row of token ids; None where it can."""
        if not ids:
            return "no token to read"
        if self.longest is not None and len(ids) > self.longest:
            return f"{len(ids)} tokens, but the reward model reads at most {self.longest}"
        return None


# ---- made, loaded, saved


def from_policy(who: str, policy: causal_lm.CausalPolicy, seed: int) -> RewardModel:
    """The policy's backbone (a LoRA folded in) and tokenizer under a new head, drawn from `seed`. Consumes `policy`.

    Raises RollwayError, whose sentence begins with `who`, for architectures without a sequence classifier.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    source = causal_lm.merged(policy)
    config = copy.deepcopy(source.model.config)
    config.num_labels = 1
    with torch.random.fork_rng(devices=[]), _usable(who, "the base policy"):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(
            config,
            dtype=source.model.dtype,
            attn_implementation=source.spec.attention,
            trust_remote_code=False,
        )
        model.base_model.load_state_dict(source.model.base_model.state_dict())
    return _padded(who, "the base policy", model.to(source.model.device), source.tokenizer)


def from_pretrained(who: str, name: str, revision: str | None, dtype: str, seed: int) -> RewardModel:
    """A Hugging Face model with one output; a head that its weights lack is drawn from `seed`.

    Raises RollwayError, whose sentence begins with `who`, when it cannot be loaded or has other weights.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, tokenizer, info = _read(who, name, revision, dtype, num_labels=1)
    prefix = f"{model.base_model_prefix}."
    lacking = sorted(key for key in info["missing_keys"] if key.startswith(prefix))
    if lacking:
        raise RollwayError(f"{who}: the weights of {name} lack {lacking[0]}; they are of another model")
    return _padded(who, name, model, tokenizer)


def load(who: str, place: str, shown: str, revision: str | None = None) -> RewardModel:
    """A whole reward model in float32; `shown` is its name in messages, which begin with `who`.

    Raises RollwayError when it cannot be loaded, or has no head, or more than one output.
    """
    model, tokenizer, info = _read(who, place, revision, "float32", shown=shown)
    if model.config.num_labels != 1:
        raise RollwayError(f"{who}: {shown} has {model.config.num_labels} outputs; a reward model has exactly one")
    if info["missing_keys"]:
        raise RollwayError(
            f"{who}: the weights of {shown} lack {sorted(info['missing_keys'])[0]}, which would be random; "
            "it is no reward model"
        )
    return _padded(who, shown, model, tokenizer)


def in_float32(reward_model: RewardModel) -> RewardModel:
    """The model as scorers compute with it: itself where it is in float32, else a copy."""
    import torch

    if {parameter.dtype for parameter in reward_model.model.parameters()} == {torch.float32}:
        return reward_model
    return RewardModel(copy.deepcopy(reward_model.model).float(), reward_model.tokenizer)


def save(folder: Path, reward_model: RewardModel) -> dict[str, str]:
    """Writes `folder`/weights and returns the digests of its files. The same weights give the same bytes."""
    target = folder / WEIGHTS
    with causal_lm.whole_folder(target) as temporary:
        causal_lm.save_model(temporary, reward_model.model)
        causal_lm.save_tokenizer(temporary, reward_model.tokenizer)
    return folder_files(target)


def write_manifest(path: Path, manifest: RewardModelManifest) -> None:
    """Written last, when all the files that it names are in place."""
    write_json(path, {"version": VERSION, **asdict(manifest)})


def read_manifest(path: Path) -> RewardModelManifest:
    """Checks the digests of the files that reward_model.json names.

    Raises RollwayError naming the first file that is missing, damaged or of another version, and the mend.
    """
    raw = read_json(path, MADE_BY)
    try:
        if raw["version"] != VERSION:
            raise RollwayError(
                f"{path}: version {raw['version']}, this rollway reads {VERSION}; "
                f"rerun {MADE_BY}: `snakemake --force {path}`"
            )
        manifest = RewardModelManifest(dict(raw["files"]), float(raw["mean"]), float(raw["std"]))
    except (KeyError, TypeError, ValueError) as error:
        raise RollwayError(f"{path}: not a reward_model.json ({error!r}); delete it and rerun {MADE_BY}") from error
    check_files(path.parent / WEIGHTS, manifest.files, path, MADE_BY)
    return manifest


# ---- rows


def encode(
    who: str, tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], format: str, completion: str
) -> list[int]:
    """Token ids of the whole conversation: by chat template for chat prompts, else the texts one after the other.

    Raises RollwayError, whose sentence begins with `who`, where chats meet a tokenizer without a chat template.
    """
    if format == "plain":
        return tokenizer(messages[-1]["content"] + completion)["input_ids"]
    if tokenizer.chat_template is None:
        raise RollwayError(
            f"{who}: the prompts are chats, but the reward model has no chat template; set `format: plain`, or take "
            "another model"
        )
    whole = [*messages, {"role": "assistant", "content": completion}]
    return tokenizer(tokenizer.apply_chat_template(whole, tokenize=False), add_special_tokens=False)["input_ids"]


def check_ids(who: str, reward_model: RewardModel, rows: Sequence[Sequence[int]]) -> None:
    """Raises RollwayError where a token id, the padding token's included, is beyond the model's embeddings."""
    known = reward_model.model.get_input_embeddings().num_embeddings
    largest = max([reward_model.pad, *(max(ids) for ids in rows if ids)])
    if largest >= known:
        raise RollwayError(
            f"{who}: the tokenizer gives id {largest}, but the reward model knows {known} ids; "
            "they do not belong together"
        )


def outputs(reward_model: RewardModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """The model's outputs [N] of rows of token ids, padded on the right; differentiable, in the model's dtype."""
    import torch

    width = max(len(ids) for ids in rows)
    tokens = torch.full((len(rows), width), reward_model.pad, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for index, ids in enumerate(rows):
        tokens[index, : len(ids)] = torch.tensor(ids)
        mask[index, : len(ids)] = 1
    device = reward_model.model.device
    logits = reward_model.model(input_ids=tokens.to(device), attention_mask=mask.to(device), use_cache=False).logits
    return logits[:, 0]


def measure(
    reward_model: RewardModel,
    rows: Sequence[Sequence[int]],
    batch: int,
    reward: Callable[[float], float] | None = None,
) -> list[float]:
    """Outputs without gradients, in the rows' order; `batch` rows of like length per forward pass, equal rows once.

    reward: what a scorer makes of an output, for the stage's bar.
    """
    import torch

    times = Counter(tuple(ids) for ids in rows)
    keys = sorted(times, key=lambda ids: (len(ids), ids))
    found: dict[tuple[int, ...], float] = {}
    with torch.inference_mode():
        for start in range(0, len(keys), batch):
            part = keys[start : start + batch]
            values = outputs(reward_model, part).double().tolist()
            found.update(zip(part, values, strict=True))
            tokens = sum(map(len, part))
            steps = sum(times[ids] for ids in part)
            total = sum(times[ids] * reward(value) for ids, value in zip(part, values, strict=True)) if reward else 0.0
            tick(steps, tokens=tokens, reward=total / steps if reward else None)
    return [found[tuple(ids)] for ids in rows]


# ---- loading in detail


def _read(
    who: str, place: str, revision: str | None, dtype: str, *, shown: str | None = None, num_labels: int | None = None
) -> tuple[Any, Any, dict[str, Any]]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    labels = {} if num_labels is None else {"num_labels": num_labels}
    with _usable(who, shown or place):
        model, info = AutoModelForSequenceClassification.from_pretrained(
            place,
            revision=revision,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **labels,
        )
        tokenizer = AutoTokenizer.from_pretrained(
            place, revision=revision, trust_remote_code=False, padding_side="right"
        )
    return model, tokenizer, info


def _padded(who: str, shown: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> RewardModel:
    """The model finds each row's last token by the padding id: the only place where a causal classifier is read."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise RollwayError(f"{who}: the tokenizer of {shown} has neither a padding nor an end token; take one that has")
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    return RewardModel(model, tokenizer)


@contextmanager
def _usable(who: str, shown: str) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        said = str(error).strip() or type(error).__name__
        if "trust_remote_code" in said:
            reason = "it brings code of its own, which is never run; take a model that transformers has the code of"
        elif "named model.safetensors" in said:
            reason = (
                "it has no weights in safetensors form, and pickled ones are not read, since they may run code; load "
                "it with transformers where you trust it, and write it anew with save_pretrained"
            )
        else:
            reason = said.splitlines()[0]
        raise RollwayError(f"{who}: reward model {shown} cannot be loaded ({reason})") from error
