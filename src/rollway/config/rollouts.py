"""Rollouts: which prompts, how many samples, which engine, which sampling."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from rollway.config.base import Strict


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
    """1.0: off. Anything else truncates the sampler: training then needs `train.objective.correction`."""
    top_k: int = Field(0, ge=0)
    """0: off. Anything else truncates the sampler: training then needs `train.objective.correction`."""
    max_tokens: PositiveInt = 64
    """Most tokens of one completion."""
    stop: list[str] = []
    """Texts that end a completion (finish = stop), besides the end-of-sequence token."""


class Refill(Strict):
    """Dynamic sampling (DAPO, arXiv 2503.14476): later passes draw prompts until enough groups survive the filter."""

    oversample: float = Field(1.0, ge=1.0)
    """Prompts drawn per missing group; groups that survive beyond the prompt batch are cut, the latest first."""


class RolloutConfig(Strict):
    """One round's rollouts."""

    prompts: PositiveInt = 32
    """Prompts per round: the prompt batch."""
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
    passes: int = Field(1, ge=1, le=10)
    """Most passes of a round; more than one needs `refill`."""
    refill: Refill | None = None
    """How later passes make up for groups that the filter drops; None: there is one pass."""
    entropy: bool = False
    """Also store the policy's full-vocabulary entropy of every token, in nats at temperature 1."""
    experts: int = Field(0, ge=0, le=1)
    """Expert solutions added to each group as rows of source `expert`: the prompt's demonstration. They are no part of
    `group`, and what counts the policy's rollouts leaves them out."""

    @model_validator(mode="after")
    def _passes_need_refill(self) -> "RolloutConfig":
        if (self.passes > 1) != (self.refill is not None):
            raise ValueError("rollout.passes > 1 and rollout.refill go together: set both, or neither")
        return self

    @model_validator(mode="after")
    def _stored_completions_are_not_sampled(self) -> "RolloutConfig":
        if not isinstance(self.engine, StoredEngine):
            return self
        idle = {
            "rollout.refill": (self.refill is not None, "raise rollout.prompts instead"),
            "rollout.entropy": (self.entropy, "remove it"),
            "rollout.sampling.top_p": (self.sampling.top_p < 1.0, "remove it"),
            "rollout.sampling.top_k": (self.sampling.top_k > 0, "remove it"),
        }
        for key, (given, mend) in idle.items():
            if given:
                raise ValueError(f"{key}: has no effect on stored completions, nothing is sampled; {mend}")
        return self
