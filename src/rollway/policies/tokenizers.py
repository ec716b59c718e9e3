"""Tokenizers of scratch policies, in Hugging Face form, and the encoding of prompts for any tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from rollway.config.policies import BpeTokenizer, CharTokenizer
from rollway.errors import RollwayError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
ROLES = ["<system>", "<user>", "<assistant>"]
SPECIAL = [PAD, EOS, UNK, *ROLES]
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def char_tokenizer(config: CharTokenizer) -> PreTrainedTokenizerFast:
    """One token per character of the alphabet, digits too. Raises RollwayError when a character repeats."""
    from tokenizers import Tokenizer, decoders, models

    repeated = sorted({c for c in config.alphabet if config.alphabet.count(c) > 1})
    if repeated:
        raise RollwayError(
            f"policy.tokenizer.alphabet: characters {repeated} stand in it more than once; keep one each"
        )
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *config.alphabet])}
    # A BPE without merges is a character tokenizer, and faster than splitting by a regular expression.
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNK))
    backend.decoder = decoders.Fuse()
    return _wrap(backend)


def bpe_tokenizer(config: BpeTokenizer, texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on `texts`; every digit is a token of its own. Raises RollwayError without texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + len(SPECIAL)
    if config.vocab_size < smallest:
        raise RollwayError(f"policy.tokenizer.vocab_size: {config.vocab_size} is below {smallest}, the bytes alone")
    if not texts:
        raise RollwayError("policy.tokenizer: bpe needs texts to train on; name a task in the warm-up (`task:`)")
    backend = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size, special_tokens=SPECIAL, initial_alphabet=sorted(alphabet), show_progress=False
    )
    backend.train_from_iterator(sorted(texts), trainer)
    return _wrap(backend)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], format: str) -> list[int]:
    """Token ids of a prompt, ready for a completion.

    format: "chat" words the messages by the tokenizer's chat template; "plain" takes the text of the single message.
    Exactly one BOS stands first where the tokenizer or its template puts one; none where neither does.
    Raises RollwayError when the tokenizer has no chat template, or the prompt has no token.
    """
    match format:
        case "plain":
            text = "".join(message["content"] for message in messages)
        case "chat":
            if tokenizer.chat_template is None:
                raise RollwayError("the policy's tokenizer has no chat template: set the task's `format: plain`")
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        case _:
            raise RollwayError(f"prompt format {format!r} is unknown; use plain or chat")
    ids = tokenizer.encode(text, add_special_tokens=False)
    bos = tokenizer.bos_token_id
    if bos is not None:
        start = next((i for i, token in enumerate(ids) if token != bos), len(ids))
        one = _adds_bos(tokenizer) or (format == "chat" and start > 0)
        ids = [bos] * one + ids[start:]
    if not ids:
        raise RollwayError("a prompt has no token: its text is empty, or the tokenizer knows none of it")
    return ids


def encode_completions(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of whole completions that nobody sampled, each with the end token.

    Raises RollwayError when the tokenizer has no end-of-sequence token.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise RollwayError("the policy's tokenizer has no end-of-sequence token; take one that has")
    return [[*ids, end] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


@lru_cache(maxsize=16)
def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.encode("a", add_special_tokens=True)[:1] == [tokenizer.bos_token_id]


def _wrap(backend: object) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        additional_special_tokens=ROLES,
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )
