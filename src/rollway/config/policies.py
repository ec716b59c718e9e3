"""Policies and their warm-up."""

import re
from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from rollway.config.base import Strict
from rollway.config.contexts import TeacherContext

Dtype = Literal["float32", "bfloat16", "float16"]


class CharTokenizer(Strict):
    """One token per character; unknown characters become `<unk>`."""

    kind: Literal["char"] = "char"
    alphabet: str = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:;!?'\"+-*/=()<>[]{}#$%&@^_|~\\\n"
    """Characters that get a token, each named once."""


class BpeTokenizer(Strict):
    """A small byte-level BPE trained on the task's own prompts and demonstrations; digits stay single."""

    kind: Literal["bpe"] = "bpe"
    vocab_size: PositiveInt = 512
    """Number of tokens, bytes and special tokens included."""


Tokenizer = Annotated[CharTokenizer | BpeTokenizer, Field(discriminator="kind")]


class ScratchPolicy(Strict):
    """A small Qwen3-architecture model with random weights, saved in Hugging Face form."""

    kind: Literal["scratch"] = "scratch"
    tokenizer: Tokenizer = CharTokenizer()
    """How text becomes tokens."""
    layers: PositiveInt = 3
    """Transformer blocks."""
    hidden: PositiveInt = 128
    """Width of the hidden states."""
    heads: PositiveInt = 4
    """Attention heads of a layer."""
    kv_heads: PositiveInt = 2
    """Heads of keys and values, shared by the attention heads."""
    intermediate: PositiveInt = 384
    """Width inside the feed-forward blocks."""
    context: PositiveInt = 256
    """Longest prompt plus completion, in tokens."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """Implementation of attention in `transformers`."""
    seed: int = 0
    """Seed of the random weights; the seed of the run is added to it."""


class LoraConfig(Strict):
    """Low-rank adapters (through `peft`); only they are trained and saved."""

    rank: PositiveInt = 16
    """Rank of each adapter."""
    alpha: PositiveFloat = 32.0
    """An adapter's output is scaled by alpha / rank."""
    dropout: NonNegativeFloat = 0.0
    """Share of an adapter's inputs that is dropped in training."""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Names of the layers with adapters; all-linear: every linear layer except the output layer. That and the token
    embedding can have none."""


class HuggingFacePolicy(Strict):
    """Any Hugging Face causal language model, by hub name or local folder."""

    kind: Literal["huggingface"] = "huggingface"
    name: str
    """Hub name or folder."""
    revision: str | None = None
    """Git revision on the hub; pin it for reproducible runs."""
    dtype: Dtype = "float32"
    """Number format of the weights."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Implementation of attention in `transformers`."""
    lora: LoraConfig | None = None
    """Adapters to train in place of the weights; None: all weights are trained."""
    trust_remote_code: bool = False
    """Runs code from the model's repository: leave it off unless you have read that code. Needs a `revision` that is a
    commit, so that the code that runs is the code that was read, or a local folder (`./NAME`)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""

    @model_validator(mode="after")
    def _code_is_pinned(self) -> "HuggingFacePolicy":
        local = self.name.startswith((".", "/", "~"))
        if self.trust_remote_code and not local and not re.fullmatch(r"[0-9a-f]{40}", self.revision or ""):
            raise ValueError(
                "trust_remote_code runs whatever the repository holds at that moment: pin `revision` to the commit (40 "
                "hexadecimal digits) that you have read, or leave it off"
            )
        return self


PolicyConfig = Annotated[ScratchPolicy | HuggingFacePolicy, Field(discriminator="kind")]


class DemonstrationNoise(Strict):
    """Makes a stated share of the demonstrations wrong, so that rewards have something to teach."""

    wrong_share: float = Field(0.0, ge=0.0, le=1.0)
    """Share of demonstrations with one wrong character, drawn anew at each use."""


class PrivilegedSft(Strict):
    """Demonstrations that are also read after a teacher's context: the policy learns to use what only a teacher sees,
    and can then be its own teacher (SDPO, SRPO, OPSD), or revise what it wrote (SD-Zero)."""

    context: list[TeacherContext] = Field(min_length=1)
    """As in a scorer of kind teacher, whose contexts these should be word for word. `sibling` and `reference` are the
    prompt's demonstration; `completion`, the answer that is looked at, is the demonstration with `noise`, and `verdict`
    says whether it has any. Several take turns."""
    share: float = Field(1 / 3, gt=0.0, lt=1.0)
    """Share of all demonstrations that are read in a context; the others after the plain prompt."""
    noise: DemonstrationNoise = DemonstrationNoise()
    """Mistakes in the `completion` of contexts, drawn once for each; what is learnt behind it is right."""

    @model_validator(mode="after")
    def _known_before_any_rollout(self) -> "PrivilegedSft":
        for name in ("scores", "feedback"):
            if any(context.names(name) for context in self.context):
                raise ValueError(f"a warm-up has no rollouts, so {{{name}}} is not known: leave it out")
        for context in self.context:
            if context.names("verdict") and not context.names("completion"):
                raise ValueError("{verdict} is about {completion}, which this context does not show: name it too")
        if self.noise.wrong_share and not any(context.names("completion") for context in self.context):
            raise ValueError("privileged.noise has no effect: no context names {completion}; remove it")
        return self


class SftConfig(Strict):
    """Supervised training on the task's demonstrations."""

    steps: PositiveInt = 500
    """Updates."""
    batch: PositiveInt = 64
    """Demonstrations per step."""
    lr: PositiveFloat = 1e-3
    """Learning rate after its warm-up."""
    lr_warmup_steps: NonNegativeInt = 50
    """Updates over which the learning rate rises linearly."""
    weight_decay: NonNegativeFloat = 0.0
    """Times the learning rate: what each update takes off every matrix."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradient norm above which gradients are scaled down."""
    noise: DemonstrationNoise = DemonstrationNoise()
    """Mistakes put into the demonstrations, those that are read in a context apart: what they are told is right."""
    privileged: PrivilegedSft | None = None
    """Demonstrations read as a teacher reads; None: after their prompt alone."""


class WarmupConfig(Strict):
    """A starting policy, shared by all runs that name it."""

    policy: PolicyConfig
    """The model to start from."""
    task: str | None = None
    """Task whose train split gives the demonstrations and trains a bpe tokenizer; needed by `sft` and by bpe."""
    sft: SftConfig | None = None
    """None: the policy as it is."""
