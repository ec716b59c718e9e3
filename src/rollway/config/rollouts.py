"""Rollouts: which prompts, how many samples, which engine, which sampling."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from rollway.config.base import Strict
from rollway.config.contexts import TeacherContext
from rollway.config.curation import SqlPart
from rollway.config.tasks import Extract
from rollway.config.teachers import OtherModel, PolicyTeacher, WarmupTeacher


class TransformersEngine(Strict):
    """Decoding in process with `transformers`."""

    kind: Literal["transformers"] = "transformers"
    batch: PositiveInt = 256
    """Most rollouts decoded at once."""


class VllmEngine(Strict):
    """Decoding by vLLM, in a process and an environment of its own (`make vllm`). One engine serves all rounds."""

    kind: Literal["vllm"] = "vllm"
    tensor_parallel: PositiveInt = 1
    """Devices over which each layer is split."""
    gpu_memory: float = Field(0.85, gt=0, le=1)
    """Share of a GPU's memory that vLLM may take, weights and KV cache together. The check of its log-probs needs room
    for the policy beside it."""
    kv_cache: float | None = Field(None, gt=0)
    """GiB of key-value cache. None: on a GPU what `gpu_memory` leaves, on the CPU 1 GiB."""
    max_model_len: PositiveInt | None = None
    """Longest prompt plus completion in tokens, at most the policy's context. None: the policy's context."""
    max_num_seqs: PositiveInt = 256
    """Most rollouts decoded at once."""
    enforce_eager: bool = False
    """Run without CUDA graphs and compilation: starts sooner, decodes slower."""
    prefix_caching: bool = True
    """Reuse the cache of prompts that start alike."""
    sleep: bool | None = None
    """Whether the engine gives the GPU's memory back at the end of each job, so that training has it. None: on a GPU
    yes; on the CPU there is no such thing, and true is refused."""
    logprob_tolerance: float | None = Field(None, gt=0)
    """Nats by which the engine's log-probs may differ from the trainer's, checked after every update of its weights.
    None: 0.001 for float32, 0.1 for float16, 0.5 for bfloat16."""
    start_seconds: PositiveInt = 1800
    """Seconds that an engine may take to start."""

    @model_validator(mode="after")
    def _one_size_of_the_cache(self) -> "VllmEngine":
        if self.kv_cache is not None and self.gpu_memory != VllmEngine.model_fields["gpu_memory"].default:
            raise ValueError(
                "rollout.engine: kv_cache sets the size of the cache and gpu_memory the share that it fills; keep one"
            )
        return self


class StoredEngine(Strict):
    """Nothing is sampled: completions are taken from files, of an import or of another run. Evaluation samples itself,
    with `transformers`."""

    kind: Literal["stored"] = "stored"
    files: list[str] = Field(min_length=1)
    """Parquet files of rollouts, as `rollway import` and every run write them. `{seed}` stands for the run's seed. Each
    group takes as many completions of its prompt from every file, as far as that goes."""

    @model_validator(mode="after")
    def _files_differ(self) -> "StoredEngine":
        twice = sorted({file for file in self.files if self.files.count(file) > 1})
        if twice:
            raise ValueError(f"rollout.engine.files names {twice[0]} twice; once is enough")
        return self


Engine = Annotated[TransformersEngine | VllmEngine | StoredEngine, Field(discriminator="kind")]


class Sampling(Strict):
    """How tokens are drawn. Stored log-probs are those of the distribution that was really sampled."""

    temperature: float = Field(1.0, ge=0.0)
    """0 is greedy (log-probs are then those at temperature 1; not for training). The trainer computes log-probs at this
    temperature, those of stored completions too."""
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    """1.0: off. Anything else truncates the sampler: training then needs `train.objective.correction`, unless all
    that it does is a divergence over the vocabulary."""
    top_k: int = Field(0, ge=0)
    """0: off. Anything else truncates the sampler, as `top_p` does."""
    max_tokens: PositiveInt = 64
    """Most tokens of one completion."""
    stop: list[str] = []
    """Texts that end a completion (finish = stop), besides the end-of-sequence token."""

    @property
    def truncates(self) -> bool:
        """Whether some tokens are never drawn."""
        return self.top_p < 1.0 or self.top_k > 0


class Refill(Strict):
    """Dynamic sampling (DAPO, arXiv 2503.14476): later passes draw prompts until enough groups survive the filter."""

    oversample: float = Field(1.0, ge=1.0)
    """Prompts drawn per missing group; groups that survive beyond the prompt batch are cut, the latest first."""


class TeacherMix(Strict):
    """Each token is drawn from share x teacher + (1 - share) x policy, both at the sampling temperature (teacher-mixed
    sampling, MiniLLM, arXiv 2306.08543). Stored log-probs are the mixture's: training needs a correction, unless its
    loss is a divergence over the vocabulary alone. `source` says `policy` all the same; `sampling` names the mixture.
    """

    model: OtherModel
    """Whose share it is, with the policy's tokenizer and an output layer that is not smaller; it reads what the policy
    reads, so the smaller window of the two ends a completion."""
    share: float = Field(0.2, gt=0.0, lt=1.0)
    """Of the teacher."""


MOST_PASSES = 10
"""Of one round, those of `derive` included: a pass is one digit of a folder's name."""

Author = Annotated[WarmupTeacher | PolicyTeacher, Field(discriminator="kind")]


class Derive(Strict):
    """A further pass whose prompts are made of rollouts of the passes before it, once these are scored."""

    name: str = Field(pattern=r"[a-z][a-z0-9_]*")
    """What `source` says of its rollouts."""
    parents: SqlPart
    """Which rollouts it is made of: rollout_id, of a file in `workflow/sql/parents`. It sees `scored` with the rows of
    all earlier passes of the round, `curate.reward` applied."""
    context: list[TeacherContext] = Field(min_length=1)
    """What is read: templates over the parent's row, as a teacher's. The first counts whose `sibling` there is; a
    parent for which there is none has no derived rollouts. A rollout is right by `score.correct`."""
    extract: Extract = "none"
    """What of the parent's completion `{completion}` stands for in `prompt`: none (all of it), hash, boxed,
    last_number, or regex:PATTERN. A parent without it has no derived rollouts."""
    samples: PositiveInt = 1
    """Completions per parent."""
    attempts: PositiveInt = 1
    """Passes of the round with these settings, one after the other: `parents` sees what the earlier ones came to."""
    author: Author | None = None
    """Who writes: None: the policy that writes the round's other rollouts; else a warm-up's policy (a Hugging Face
    model as it is, say) or another policy of the run. It has the policy's tokenizer."""
    trained: Literal["as_read", "plain", "never"] = "as_read"
    """What stands before the completion when it is trained on: what was read; the task's prompt alone, which makes
    the engine's log-probs those of another context; or nothing: such rollouts (hints) are not to be trained on."""
    sampling: Sampling | None = None
    """How tokens are drawn; None: as the round's other rollouts."""
    overlong: Literal["error", "skip"] = "error"
    """Where what is read fills its author's window, or what is trained (prompt and the longest completion) may exceed
    the policy's: error: the stage stops; skip: that parent has no derived rollouts."""

    @model_validator(mode="after")
    def _parts_agree(self) -> "Derive":
        if self.name in ("policy", "expert", "offline", "teacher"):
            raise ValueError(f"derive.name: {self.name!r} is the source of other rollouts; choose another")
        for field in ("reference", "feedback"):
            if any(context.names(field) for context in self.context):
                raise ValueError(f"derive.context names `{{{field}}}`, which only a teacher's context has; remove it")
        if any(not context.needs_others for context in self.context[:-1]):
            raise ValueError("derive.context: one without sibling is always used, so it stands last in the list")
        if self.extract != "none" and not any("completion" in (context.prompt or "") for context in self.context):
            raise ValueError("derive.extract has no effect: no `prompt` names `{completion}`; remove it")
        return self


class RolloutConfig(Strict):
    """One round's rollouts."""

    prompts: PositiveInt = 32
    """Prompts per round: the prompt batch."""
    offset: NonNegativeInt = Field(0, exclude_if=lambda value: value == 0)
    """Prompts of the stream that are passed over before round 0: round r begins at `offset` + r x `prompts`. A fork
    whose rounds have another size than its parent's goes on with prompts that these have not asked."""
    group: PositiveInt = 8
    """Completions per prompt (G)."""
    sampling: Sampling = Sampling()
    """How tokens are drawn."""
    engine: Engine = TransformersEngine()
    """What decodes."""
    shards: int = Field(1, ge=1, le=1000)
    """Files (and jobs) one pass of a round is cut into; tokens do not depend on it."""
    part: PositiveInt = 4096
    """Rollouts per resumable part inside a shard."""
    passes: int = Field(1, ge=1, le=MOST_PASSES)
    """Most passes of a round; more than one needs `refill`."""
    refill: Refill | None = None
    """How later passes make up for groups that the filter drops; None: there is one pass."""
    entropy: bool = False
    """Also store the policy's full-vocabulary entropy of every token, in nats at temperature 1."""
    experts: int = Field(0, ge=0, le=1)
    """Expert solutions added to each group as rows of source `expert`: the prompt's demonstration. They are no part of
    `group`, and what counts the policy's rollouts leaves them out."""
    mix: TeacherMix | None = Field(None, exclude_if=lambda value: value is None)
    """A teacher that has a share in every token; None: the policy alone. Derived passes and evaluation are without."""
    derive: list[Derive] = Field([], exclude_if=lambda value: not value)
    """Further passes of the round, one after the other, whose prompts are made of scored rollouts of the passes
    before."""

    def whose(self, derive: Derive | None = None) -> str | None:
        """What makes tokens another distribution's than their policy's, in words; None where nothing does. derive: of
        the passes that it makes."""
        own = None if derive is None else derive.sampling
        if (own or self.sampling).truncates:
            return "a truncated sampler (top_p, top_k)"
        return "a mixture with a teacher (rollout.mix)" if self.mix is not None and derive is None else None

    @property
    def all_passes(self) -> int:
        """Passes of a round, derived ones included."""
        return self.passes + sum(step.attempts for step in self.derive)

    def derived_in(self, pass_number: int) -> Derive | None:
        """What makes the prompts of a pass; None where it samples the task's prompts."""
        first = self.passes
        for step in self.derive:
            first += step.attempts
            if self.passes <= pass_number < first:
                return step
        return None

    @model_validator(mode="after")
    def _derived_passes_fit(self) -> "RolloutConfig":
        if self.all_passes > MOST_PASSES:
            raise ValueError(
                f"rollout.derive: {self.all_passes} passes in a round, and {MOST_PASSES} are the most: fewer attempts, "
                "or fewer passes"
            )
        names = [step.name for step in self.derive]
        if len(set(names)) < len(names):
            raise ValueError(f"rollout.derive: two entries have one name ({', '.join(names)}); rename one of them")
        for step in self.derive:
            own = self.sampling if step.sampling is None else step.sampling
            if step.trained != "never" and own.temperature != self.sampling.temperature:
                raise ValueError(
                    f"rollout.derive.{step.name}.sampling.temperature: {own.temperature:g} is not the "
                    f"{self.sampling.temperature:g} of rollout.sampling, at which the trainer computes log-probs: make "
                    "them equal, or set `trained: never`"
                )
        return self

    @model_validator(mode="after")
    def _passes_need_refill(self) -> "RolloutConfig":
        if (self.passes > 1) != (self.refill is not None):
            raise ValueError("rollout.passes > 1 and rollout.refill go together: set both, or neither")
        return self

    @model_validator(mode="after")
    def _a_mixture_is_drawn_here(self) -> "RolloutConfig":
        if self.mix is None:
            return self
        kind = self.engine.kind
        if kind != "transformers":
            raise ValueError(
                f"rollout.mix: engine {kind} cannot draw from two models; set `engine: {{kind: transformers}}`"
            )
        if self.sampling.truncates:
            raise ValueError("rollout.mix: top_p and top_k are not defined of a mixture; leave them out")
        if self.sampling.temperature == 0.0:
            raise ValueError("rollout.mix: has no effect at temperature 0; remove one of them")
        return self

    @model_validator(mode="after")
    def _stored_completions_are_not_sampled(self) -> "RolloutConfig":
        if not isinstance(self.engine, StoredEngine):
            return self
        idle = {
            "rollout.refill": (self.refill is not None, "raise rollout.prompts instead"),
            "rollout.derive": (bool(self.derive), "let an engine sample"),
            "rollout.entropy": (self.entropy, "remove it"),
            "rollout.sampling.top_p": (self.sampling.top_p < 1.0, "remove it"),
            "rollout.sampling.top_k": (self.sampling.top_k > 0, "remove it"),
        }
        for key, (given, mend) in idle.items():
            if given:
                raise ValueError(f"{key}: has no effect on stored completions, nothing is sampled; {mend}")
        return self
