"""Tasks: where prompts come from, how they are worded, and how they are split."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PositiveInt, field_validator, model_validator

from rollway.config.base import Strict


def _check_extract(spec: str) -> str:
    if spec.startswith("regex:"):
        _check_pattern(spec.removeprefix("regex:"))
    elif spec not in ("none", "hash", "boxed", "last_number"):
        raise ValueError(f"{spec!r} is none of none, hash, boxed, last_number, regex:PATTERN")
    return spec


def _check_pattern(pattern: str) -> str:
    import regex

    try:
        regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression ({error})") from None
    return pattern


Extract = Annotated[str, AfterValidator(_check_extract)]
Pattern = Annotated[str, AfterValidator(_check_pattern)]


class ReasoningGymSource(Strict):
    """A dataset of `reasoning_gym`, by name, with its own verifier."""

    kind: Literal["reasoning_gym"] = "reasoning_gym"
    dataset: str
    """Name as in `reasoning_gym.create_dataset`."""
    size: PositiveInt = 1000
    """Entries drawn before duplicates are dropped."""
    seed: int = 0
    """Entry i is made from seed + i."""
    params: dict[str, Any] = {}
    """Further arguments of the dataset (difficulty and so on)."""

    @field_validator("params")
    @classmethod
    def _own_keys(cls, params: dict[str, Any]) -> dict[str, Any]:
        for key in ("seed", "size"):
            if key in params:
                raise ValueError(f"{key!r} is a key of the source itself: write source.{key}")
        return params


class HuggingFaceSource(Strict):
    """A dataset that `datasets.load_dataset` can load: a hub name, or a local folder or file type."""

    kind: Literal["huggingface"] = "huggingface"
    path: str
    """First argument of `load_dataset`: hub name, local folder, or builder such as `json`."""
    name: str | None = None
    """Configuration name of the dataset."""
    split: str = "train"
    """Split of the dataset that is read."""
    revision: str | None = None
    """Git revision on the hub; pin it for reproducible runs."""
    data_files: str | list[str] | dict[str, str] | None = None
    """Files that `load_dataset` reads (one, several, or per split); None: those of the dataset itself."""


class JsonlSource(Strict):
    """A file of JSON lines."""

    kind: Literal["jsonl"] = "jsonl"
    path: str
    """Path of the file."""


class ParquetSource(Strict):
    """A Parquet file."""

    kind: Literal["parquet"] = "parquet"
    path: str
    """Path of the file."""


class BuiltinSource(Strict):
    """A small task that ships with the project, in `data/`."""

    kind: Literal["builtin"] = "builtin"
    name: str
    """Name of a file in `data/`, without its suffix `.jsonl`."""


Source = Annotated[
    ReasoningGymSource | HuggingFaceSource | JsonlSource | ParquetSource | BuiltinSource, Field(discriminator="kind")
]


class SplitConfig(Strict):
    """How one source is divided. Prompts are dealt by a hash of their text, so a split never depends on order."""

    train: PositiveInt | None = None
    """Prompts for training; None takes all that are not held out."""
    heldout: PositiveInt | None = 100
    """Prompts never trained on; None takes all of `heldout_source`."""
    seed: int = 0
    """Seed of that hash."""


class TaskConfig(Strict):
    """A task: a source, the wording of its prompts, its answers, and its splits."""

    source: Source
    """Where the entries come from."""
    heldout_source: Source | None = None
    """A source of its own for the held-out split (a published test set). None: split `source`."""
    prompt: str = "{question}"
    """Template over the entry's fields; `{metadata.word}` reaches into mappings, `{word|lower}` (upper, strip)."""
    system: str | None = None
    """System message; only with `format: chat`."""
    format: Literal["plain", "chat"] = "plain"
    """plain: the prompt text as it is. chat: messages, worded by the tokenizer's chat template."""
    messages: str | None = None
    """Field that already holds chat messages (then `prompt` is not used)."""
    answer: str | None = "{answer}"
    """Template of the reference answer. None: the task has no answers."""
    extract: Extract = "none"
    """How the answer is taken from that text: none, hash (after ####), boxed, last_number, or regex:PATTERN."""
    demonstration: str | None = None
    """Template of a full solution for supervised warm-up; None: the answer itself."""
    id: str | None = None
    """Field that holds a unique id; None: a hash of the prompt."""
    meta: list[str] = []
    """Fields kept as JSON beside the prompt (reasoning_gym keeps what its verifier needs by itself)."""
    splits: SplitConfig = SplitConfig()
    """How prompts are dealt into train and held-out."""
    on_duplicate: Literal["drop", "refuse"] = "drop"
    """Prompts of the same text, or in both splits: drop (counted; a held-out prompt wins) or refuse."""

    @model_validator(mode="after")
    def _parts_have_effect(self) -> "TaskConfig":
        if self.format == "plain" and (self.system is not None or self.messages is not None):
            raise ValueError("`system` and `messages` only have an effect with `format: chat`")
        if self.messages is not None and (self.system is not None or "prompt" in self.model_fields_set):
            raise ValueError("`prompt` and `system` have no effect beside `messages`, the whole conversation")
        if self.answer is None and self.extract != "none":
            raise ValueError("`extract` has no effect without `answer`")
        if self.splits.heldout is None and self.heldout_source is None:
            raise ValueError("splits.heldout: null needs a `heldout_source`")
        return self
