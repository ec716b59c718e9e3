"""Tokenizers of scratch policies, and the encoding of prompts: BOS once or not at all (INCIDENTS 10)."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rollway.config.policies import BpeTokenizer, CharTokenizer
from rollway.errors import RollwayError
from rollway.policies.tokenizers import bpe_tokenizer, char_tokenizer, encode_prompt

TEXTS = ["The answer to 12 + 345 is 357.", "Spell backward: hello -> olleh", "na\u00efve caf\u00e9 12345"]


def user(text):
    return [{"role": "user", "content": text}]


def test_char_is_one_token_per_character():
    tokenizer = char_tokenizer(CharTokenizer())
    text = "12+34=46 ok\n"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.encode("\u00e9", add_special_tokens=False) == [tokenizer.unk_token_id]


def test_char_alphabet_without_repeats():
    with pytest.raises(RollwayError, match="more than once"):
        char_tokenizer(CharTokenizer(alphabet="aba"))


def test_bpe_keeps_digits_single_and_bytes_whole():
    tokenizer = bpe_tokenizer(BpeTokenizer(vocab_size=300), TEXTS)
    for text in [*TEXTS, "\U0001f600 \t unseen\n\n  spaces"]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert len(tokenizer.encode("987654", add_special_tokens=False)) == 6
    assert len(tokenizer) <= 300


def test_bpe_is_the_same_whatever_the_order(tmp_path):
    for name, texts in (("a", TEXTS), ("b", TEXTS[::-1])):
        bpe_tokenizer(BpeTokenizer(vocab_size=300), texts).save_pretrained(tmp_path / name)
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()


@pytest.mark.parametrize(("size", "texts", "message"), [(100, TEXTS, "below"), (300, [], "texts")])
def test_bpe_errors(size, texts, message):
    with pytest.raises(RollwayError, match=message):
        bpe_tokenizer(BpeTokenizer(vocab_size=size), texts)


def test_chat_with_scratch_survives_saving(tmp_path):
    tokenizer = char_tokenizer(CharTokenizer())
    ids = encode_prompt(tokenizer, [{"role": "system", "content": "be brief"}, *user("1+1=")], "chat")
    special = [tokenizer.convert_tokens_to_ids(t) for t in ("<system>", "<user>", "<assistant>")]
    assert [i for i in ids if i in special] == special
    assert ids[-1] == special[-1]
    tokenizer.save_pretrained(tmp_path)
    assert encode_prompt(AutoTokenizer.from_pretrained(tmp_path), user("1+1="), "chat") == encode_prompt(
        tokenizer, user("1+1="), "chat"
    )


def word_tokenizer(bos: bool, adds: bool, template: str | None) -> PreTrainedTokenizerFast:
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3, "b": 4, "hi": 5}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if adds:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    names = {"bos_token": "<s>"} if bos else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", chat_template=template, **names
    )


WITH_BOS = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
WITHOUT_BOS = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.mark.parametrize(
    ("bos", "adds", "template", "format", "text", "golden"),
    [
        (True, True, WITH_BOS, "chat", "hi a", [0, 5, 3]),  # Llama 3: template and tokenizer both put it
        (True, True, WITHOUT_BOS, "chat", "hi a", [0, 5, 3]),  # only the tokenizer puts it: it must not get lost
        (True, False, WITH_BOS, "chat", "hi a", [0, 5, 3]),  # only the template puts it
        (True, False, WITHOUT_BOS, "chat", "hi a", [5, 3]),  # has one and never uses it (GPT-2)
        (False, False, WITHOUT_BOS, "chat", "hi a", [5, 3]),  # has none (Qwen)
        (True, True, None, "plain", "hi a", [0, 5, 3]),
        (True, True, None, "plain", "<s> hi a", [0, 5, 3]),  # already in the text
        (True, False, None, "plain", "hi a", [5, 3]),
        (False, False, None, "plain", "hi a", [5, 3]),
    ],
)
def test_exactly_one_bos_or_none(bos, adds, template, format, text, golden):
    assert encode_prompt(word_tokenizer(bos, adds, template), user(text), format) == golden


def test_errors():
    with pytest.raises(RollwayError, match="no chat template"):
        encode_prompt(word_tokenizer(False, False, None), user("hi"), "chat")
    with pytest.raises(RollwayError, match="no token"):
        encode_prompt(word_tokenizer(False, False, None), user(""), "plain")
    with pytest.raises(RollwayError, match="plain or chat"):
        encode_prompt(word_tokenizer(False, False, None), user("hi"), "xml")
