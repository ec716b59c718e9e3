"""Causal language models: build, load, save. Weights are safetensors, everything else is JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollway.config.policies import HuggingFacePolicy, LoraConfig, PolicyConfig, ScratchPolicy
from rollway.errors import RollwayError
from rollway.policies import tokenizers
from rollway.policies.manifest import NamedPolicy, folder_files, named, verify
from rollway.policies.tensor_files import system_errors
from rollway.store.atomic import atomic_folder, write_json

if TYPE_CHECKING:
    import peft
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

FAMILY = "causal_lm"
ADAPTER = "adapter_model.safetensors"


@dataclass
class CausalPolicy:
    """A causal language model in memory."""

    model: PreTrainedModel
    """With a LoRA: the base model, its linear layers wrapped in place; only the adapter requires gradients."""
    tokenizer: PreTrainedTokenizerBase
    spec: NamedPolicy
    """How it is loaded; `folder` and `files` are those of the place it came from."""
    adapter: peft.PeftModel | None = None
    """Handle on the LoRA, for example `with policy.adapter.disable_adapter():`."""


def build(config: PolicyConfig, texts: Sequence[str], seed: int, device: str | None = None) -> CausalPolicy:
    """A new policy. `texts` train a bpe tokenizer; `seed` is added to that of the config for random weights.

    Raises RollwayError when a model or tokenizer cannot be found or read.
    """
    match config:
        case ScratchPolicy():
            return _scratch(config, texts, config.seed + seed, device)
        case HuggingFacePolicy():
            return _huggingface(config, seed, device)


def load(policy_json: Path, name: str = "main", *, train: bool = False, device: str | None = None) -> CausalPolicy:
    """Loads a named policy after checking the digests of its files. `train`: in training mode, with gradients.

    Raises RollwayError naming the file and the stage to rerun when something is missing, damaged or of a wrong shape.
    """
    spec = named(policy_json, verify(policy_json, name), name)
    if spec.kind == "critic":
        raise RollwayError(f"{policy_json}: policy {name!r} is a critic, not a language model")
    folder = policy_json.parent / (spec.folder or "")
    source = folder if spec.base is None else spec.base
    policy = CausalPolicy(load_model(source, spec), load_tokenizer(source, spec), spec)
    if spec.kind == "lora":
        policy = _load_adapter(folder, policy)
    _prepare(policy, train, device)
    return policy


@dataclass(frozen=True)
class Reader:
    """What a policy makes of text and can take in: all of it but the weights."""

    tokenizer: PreTrainedTokenizerBase
    vocabulary: int
    """Token ids lie below this."""
    context: int | None
    """Longest prompt plus completion in tokens; None: no limit stated."""
    stop_ids: tuple[int, ...] = ()
    """Ids that end a completion, as `stop_ids` of the loaded policy."""


def load_reader(policy_json: Path, name: str = "main") -> Reader:
    """Tokenizer and limits of a named policy, its files checked as in `load`; its weights stay on disk."""
    from transformers import AutoConfig

    spec = named(policy_json, verify(policy_json, name), name)
    source = policy_json.parent / (spec.folder or "") if spec.base is None else spec.base
    with _readable(source):
        config = AutoConfig.from_pretrained(
            source, revision=spec.revision, trust_remote_code=spec.trust_remote_code
        ).get_text_config()
        generation = _declared_ends(source, spec)
    tokenizer = load_tokenizer(source, spec)
    ends = _end_ids(tokenizer, generation, config.eos_token_id)
    return Reader(tokenizer, config.vocab_size, _context(config), tuple(ends))


def reader_of(policy: CausalPolicy) -> Reader:
    """What `load_reader` says of a policy that is in memory."""
    config = policy.model.config.get_text_config()
    return Reader(policy.tokenizer, config.vocab_size, _context(config), tuple(stop_ids(policy)))


def save(folder: Path, policy: CausalPolicy, name: str = "main", *, trained: bool = True) -> NamedPolicy:
    """Writes `folder`/weights/`name` and returns its entry for policy.json in `folder`.

    A LoRA writes its adapter only. `trained=False` says that the weights are those the policy was built with: a Hugging
    Face model is then named, not copied. The same weights give the same bytes.
    """
    if not trained and policy.spec.kind == "base":
        return policy.spec
    target = folder / "weights" / name
    with whole_folder(target) as temporary:
        if policy.adapter is not None:
            save_adapter(temporary, policy)
        else:
            save_model(temporary, policy.model)
            save_tokenizer(temporary, policy.tokenizer)
    files = folder_files(target)
    if policy.adapter is not None:
        return replace(policy.spec, kind="lora", folder=f"weights/{name}", files=files)
    return replace(policy.spec, kind="full", folder=f"weights/{name}", base=None, revision=None, files=files)


def save_model(folder: Path, model: PreTrainedModel) -> None:
    """Weights (safetensors) and configuration in Hugging Face form."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model.save_pretrained(folder)


def merged(policy: CausalPolicy) -> CausalPolicy:
    """The policy with its LoRA folded into the weights, as a full policy. Consumes `policy`."""
    if policy.adapter is None:
        return policy
    spec = replace(policy.spec, kind="full", base=None, revision=None, folder=None, files={})
    return CausalPolicy(policy.adapter.merge_and_unload(), policy.tokenizer, spec)


def encode_prompt(policy: CausalPolicy | Reader, messages: list[dict[str, str]], format: str) -> list[int]:
    """See `tokenizers.encode_prompt`."""
    return tokenizers.encode_prompt(policy.tokenizer, messages, format)


def decode(policy: CausalPolicy | Reader, tokens: Sequence[int]) -> str:
    """The text of a completion, without special tokens. For reading and scoring only: never encode it again."""
    return policy.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def stop_ids(policy: CausalPolicy) -> list[int]:
    """Ids that end a completion: the tokenizer's EOS and those of the model's generation config, sorted."""
    model = policy.model
    return _end_ids(policy.tokenizer, model.generation_config.eos_token_id, model.config.eos_token_id)


def _end_ids(tokenizer: PreTrainedTokenizerBase, *declared: int | list[int] | None) -> list[int]:
    ids = {tokenizer.eos_token_id}
    for some in declared:
        ids |= set(some) if isinstance(some, list) else {some}
    return sorted(ids - {None})


def _declared_ends(source: Path | str, spec: NamedPolicy) -> int | list[int] | None:
    """The end tokens that generation_config.json names; a model may come without that file."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(source, revision=spec.revision).eos_token_id
    except OSError:
        return None


def context_length(model: PreTrainedModel) -> int | None:
    """Longest prompt plus completion in tokens; None where the architecture states no limit."""
    return _context(model.config.get_text_config())


def _context(config: PretrainedConfig) -> int | None:
    settings = config.to_dict()
    # GPT-2 and others write the field under another name, which their attribute map tells.
    most = settings.get(config.attribute_map.get("max_position_embeddings", "max_position_embeddings"))
    rope = settings.get("rope_parameters") or {}
    for kind in [rope, *(part for part in rope.values() if isinstance(part, dict))]:
        if kind.get("rope_type") in _BY_LONGEST:
            original = kind.get("original_max_position_embeddings", settings.get("original_max_position_embeddings"))
            most = min(most, original) if most and original else most
    return most


_BY_LONGEST = ("dynamic", "longrope")
"""Rotary embeddings that change for all rows of a batch where one is longer than the original context. Up to there a
row's log-probs are its own."""


def default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _scratch(config: ScratchPolicy, texts: Sequence[str], seed: int, device: str | None) -> CausalPolicy:
    import torch
    from transformers import GenerationConfig
    from transformers.models.qwen3 import Qwen3Config, Qwen3ForCausalLM

    if config.hidden % config.heads or config.heads % config.kv_heads:
        raise RollwayError(
            f"policy: hidden {config.hidden} must be a multiple of heads {config.heads}, "
            f"and heads of kv_heads {config.kv_heads}"
        )
    match config.tokenizer.kind:
        case "char":
            tokenizer = tokenizers.char_tokenizer(config.tokenizer)
        case "bpe":
            tokenizer = tokenizers.bpe_tokenizer(config.tokenizer, texts)
    architecture = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden,
        intermediate_size=config.intermediate,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.hidden // config.heads,
        max_position_embeddings=config.context,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        attn_implementation=config.attention,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(architecture)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None
    )
    policy = CausalPolicy(model, tokenizer, NamedPolicy(kind="full", attention=config.attention))
    _prepare(policy, False, device)
    return policy


def _huggingface(config: HuggingFacePolicy, seed: int, device: str | None) -> CausalPolicy:
    local = Path(config.name).is_dir()
    spec = NamedPolicy(
        kind="base",
        base=config.name,
        revision=config.revision,
        dtype=config.dtype,
        attention=config.attention,
        gradient_checkpointing=config.gradient_checkpointing,
        trust_remote_code=config.trust_remote_code,
        files=folder_files(Path(config.name)) if local else {},
    )
    model = load_model(config.name, spec)
    if not local:
        # The commit that the hub resolved: what the name means today is what the next stage loads.
        spec = replace(spec, revision=model.config.to_dict().get("_commit_hash") or config.revision)
    policy = CausalPolicy(model, load_tokenizer(config.name, spec), spec)
    if config.lora is not None:
        policy = _add_lora(policy, config.lora, seed)
    _prepare(policy, False, device)
    return policy


def _add_lora(policy: CausalPolicy, config: LoraConfig, seed: int) -> CausalPolicy:
    import peft
    import torch

    lora = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=config.target_modules,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            adapter = peft.get_peft_model(policy.model, lora)
        except ValueError as error:
            raise RollwayError(f"policy.lora.target_modules: {error}") from error
    _check_adapted(policy.model, "policy.lora.target_modules")
    return CausalPolicy(policy.model, policy.tokenizer, replace(policy.spec, kind="lora"), adapter)


def _check_adapted(model: PreTrainedModel, where: str) -> None:
    """Raises RollwayError where an adapter sits on the output layer or the token embedding."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer, name in ((model.get_output_embeddings(), "output layer"), (model.get_input_embeddings(), "embedding")):
        if isinstance(layer, BaseTunerLayer):
            raise RollwayError(
                f"{where}: the {name} cannot have an adapter: log-probs and decoding read its weights themselves; "
                "name layers of the blocks only, or all-linear"
            )


def save_adapter(folder: Path, policy: CausalPolicy) -> None:
    """The LoRA of a policy in peft's form, without its base."""
    import peft
    from safetensors.torch import save_file

    adapter = policy.adapter
    assert adapter is not None
    tensors = {name: tensor.contiguous() for name, tensor in peft.get_peft_model_state_dict(adapter).items()}
    save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})
    # peft keeps the target modules as a set, whose order differs between processes.
    write_json(folder / "adapter_config.json", _sorted_sets(adapter.peft_config["default"].to_dict()))


def save_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """The tokenizer in Hugging Face form: the same bytes whether it was made or loaded."""
    tokenizer.save_pretrained(folder)
    # How it was loaded is not what it is: without this a loaded tokenizer would be saved in other bytes than a new one.
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    for key in ("is_local", "local_files_only", "name_or_path"):
        settings.pop(key, None)
    write_json(file, settings)


def _load_adapter(folder: Path, policy: CausalPolicy) -> CausalPolicy:
    import peft

    lora = peft.LoraConfig.from_pretrained(folder)
    adapter = peft.get_peft_model(policy.model, lora)
    _check_adapted(policy.model, str(folder))
    expected = {name: tuple(tensor.shape) for name, tensor in peft.get_peft_model_state_dict(adapter).items()}
    peft.set_peft_model_state_dict(adapter, read_tensors(folder / ADAPTER, expected))
    return CausalPolicy(policy.model, policy.tokenizer, policy.spec, adapter)


def load_model(source: Path | str, spec: NamedPolicy) -> PreTrainedModel:
    """A Hugging Face causal language model. Raises RollwayError when it is not there, damaged or of wrong shapes."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from rollway.policies.direct_load import load_qwen3
    from rollway.policies.head import check_head

    disable_progress_bar()
    with _readable(source):
        if (direct := load_qwen3(source, spec)) is not None:
            return direct
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            revision=spec.revision,
            dtype=spec.dtype,
            attn_implementation=spec.attention,
            trust_remote_code=spec.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    if info["mismatched_keys"]:
        key, found, expected = sorted(info["mismatched_keys"])[0]
        raise RollwayError(
            f"{source}: weight {key} has shape {list(found)}, its config.json asks for {list(expected)}; "
            "the weights and the configuration are of different models"
        )
    if info["missing_keys"]:
        raise RollwayError(f"{source}: the weights lack {sorted(info['missing_keys'])[0]}; they are of another model")
    check_head(model, str(source))
    return model


def load_tokenizer(source: Path | str, spec: NamedPolicy) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    with _readable(source):
        return AutoTokenizer.from_pretrained(
            source, revision=spec.revision, trust_remote_code=spec.trust_remote_code, padding_side="right"
        )


def _prepare(policy: CausalPolicy, train: bool, device: str | None) -> None:
    policy.model.to(device or default_device())
    if policy.adapter is None:
        policy.model.requires_grad_(train)
    policy.model.train(train)
    if train and policy.spec.gradient_checkpointing:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})


@contextmanager
def _readable(source: Path | str) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RollwayError(f"{source}: cannot be loaded as a Hugging Face causal language model: {first}") from error


def read_tensors(file: Path, expected: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises RollwayError unless names and shapes are those `expected`."""
    from safetensors.torch import load_file

    with _readable(file):
        tensors = load_file(file)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise RollwayError(
                f"{file}: weight {name} has shape {found.get(name)}, the policy's is {expected.get(name)}"
            )
    return tensors


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """`atomic_folder`, for the files of a model."""
    with atomic_folder(target) as temporary, system_errors():
        yield temporary


def _sorted_sets(value: Any) -> Any:
    match value:
        case dict():
            return {key: _sorted_sets(item) for key, item in value.items()}
        case set():
            return sorted(value)
        case _:
            return value
