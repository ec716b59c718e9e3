"""Rollouts through vLLM: one engine for all rounds, its weights updated in place and proven after every update.

The proof: a few sequences that the engine samples are scored by the trainer's own model, and the log-probs must agree.
An update that fails the check is made again by starting the engine anew; an engine that fails after a fresh start is
refused.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rollway.config.rollouts import Sampling, VllmEngine
from rollway.engines import vllm_launch
from rollway.engines.base import Completion, Request
from rollway.engines.vllm_client import Ask, Conversation, EngineDied, EngineOutOfMemory
from rollway.engines.vllm_process import frames
from rollway.errors import RollwayError
from rollway.policies import causal_lm
from rollway.policies.manifest import digest, named, read_manifest
from rollway.runtime.notice import notice, tick
from rollway.sampling import noise

if TYPE_CHECKING:
    from rollway.policies.causal_lm import CausalPolicy, Reader

TOLERANCE = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.5}
"""Nats, by the policy's number format: rounding in one forward, a wrong update in float32 being hundreds of times as
much."""
CHECK_ROWS = 8
CHECK_TOKENS = 32
MICRO_TOKENS = 8192
"""Tokens of one forward of the trainer's model here."""
_NAMES = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures", "_commit_hash")
"""Of a model's config.json: what says nothing of its shape."""


@dataclass(frozen=True)
class Weights:
    """What vLLM loads: a local folder, and an adapter over it or none."""

    policy: str
    """Names what the engine holds: the digest of policy.json and the name in it."""
    folder: Path
    adapter: Path | None
    lora_rank: int | None
    dtype: str
    architecture: str
    trust_remote_code: bool


@contextmanager
def session(engine: VllmEngine, policy_json: Path, reader: Reader, name: str = "main") -> Iterator[VllmSession]:
    """An engine that holds the named policy, for as long as the job samples; then it sleeps, or ends with the job."""
    vllm_launch.find_python()
    if not vllm_launch.gpus():
        _check_without_gpu(engine)
    found = vllm_launch.home()
    weights = weights_of(policy_json, name)
    with vllm_launch.lease(found):
        opened = VllmSession(engine, policy_json, name, weights, reader, found)
        try:
            opened.open()
            yield opened
        except BaseException:
            opened.close(failed=True)
            raise
        opened.close()


class VllmSession:
    """See `session`. `generate` is the engine of `rollway.engines.base.Generate`, for one policy."""

    def __init__(
        self,
        engine: VllmEngine,
        policy_json: Path,
        name: str,
        weights: Weights,
        reader: Reader,
        found: vllm_launch.Home | None,
    ) -> None:
        self.engine, self.policy_json, self.name, self.weights = engine, policy_json, name, weights
        self.reader, self.home = reader, found
        self.tolerance = engine.logprob_tolerance or TOLERANCE[weights.dtype]
        self.settings = settings_of(engine, weights)
        self.talk: Conversation | None = None
        self.trainer: CausalPolicy | None = None
        self.fewer: int | None = None
        self.fresh = False
        """Whether the engine was started by this session: nothing was updated in place yet."""

    def open(self) -> None:
        """Connects to the engine that runs already, or starts one, and has it take on the policy."""
        server = None if self.home is None else vllm_launch.running(self.home)
        if server is not None:
            vllm_launch.say_awake(self.home, True)
            talk = Conversation(server)
            try:
                hello = talk.greet(self.engine.start_seconds)
            except EngineDied:
                notice("the vLLM engine of this workflow has died; another one is started")
                server.end()
            else:
                if hello["version"] == frames.VERSION and hello["settings"] == self.settings:
                    self.talk = talk
                else:
                    notice("the running vLLM engine has other settings than this job needs; another one is started")
                    server.end()
        if self.talk is None:
            self.start()
        elif self.talk.hello["held"] != self.weights.policy:
            try:
                self._load()
            except RollwayError as error:
                notice(f"vLLM did not take the weights in place, the engine is started anew: {_first_line(error)}")
                self.restart()

    def start(self) -> None:
        """A new engine with the policy's weights. Raises RollwayError with the end of its log when it fails."""
        notice("starting vLLM (half a minute, or minutes for a large model)")
        server = vllm_launch.launch(self.home, self.settings, self.weights.folder, max_num_seqs=self.fewer)
        self.talk = Conversation(server)
        self.talk.greet(self.engine.start_seconds)
        self.fresh = True
        self._load()

    def restart(self) -> None:
        assert self.talk is not None
        self.talk.server.end()
        self.start()

    def close(self, failed: bool = False) -> None:
        """The engine sleeps where it can, and waits for the next job; one of this job alone ends."""
        self.trainer = None
        if self.talk is None:
            return
        if self.home is None:
            self.talk.server.end()
            if failed:
                notice(f"vLLM's log is kept: {self.talk.server.log}")
            else:
                shutil.rmtree(self.talk.server.log.parent, ignore_errors=True)
            return
        if self.talk.dead:
            # It may be a while in ending, and its memory is wanted.
            self.talk.server.end()
            return
        try:
            if self.talk.hello.get("sleeps") and self.talk.server.alive():
                self.talk.sleep()
                vllm_launch.say_awake(self.home, False)
        except RollwayError as error:
            # It ended, and with it goes the memory that sleep would have given back; the job's own error stands.
            notice(f"the vLLM engine did not go to sleep: {_first_line(error)}")
        finally:
            self.talk.server.connection.close()

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, *, seed: int, entropy: bool = False
    ) -> list[Completion]:
        """One completion per request, in their order.

        Log-probs are those of the distribution that vLLM sampled from, temperature and truncation applied. Noise is
        vLLM's own under a seed per rollout: tokens are those of the rollout id, up to rounding, not those of another
        engine. Entropies are computed by the trainer's model. Raises RollwayError.
        """
        budgets = self._budgets(requests, sampling)
        if not requests:
            return []
        asks = [
            Ask(request.prompt_tokens, key, budget)
            for request, key, budget in zip(
                requests, seeds(seed, [r.rollout_id for r in requests]), budgets, strict=True
            )
        ]
        try:
            done = self._sampled(requests, asks, sampling)
        except EngineOutOfMemory as error:
            self._take_fewer(error)
            try:
                done = self._sampled(requests, asks, sampling)
            except EngineOutOfMemory as again:
                self._take_fewer(again)
                raise
        if entropy:
            done = self._with_entropy(requests, done)
        elif self.trainer is not None:
            self._release()
        return done

    def _sampled(self, requests: Sequence[Request], asks: list[Ask], sampling: Sampling) -> list[Completion]:
        assert self.talk is not None
        gap = self.talk.hello["verified"]
        if gap is None or gap > self.tolerance:
            self._prove(requests, sampling)
        special = self.reader.tokenizer
        by_id = dict(zip(special.all_special_tokens, special.all_special_ids, strict=True))
        # vLLM reads completions without special tokens, as they are stored: such a stop text stops by its id.
        texts = [text for text in sampling.stop if text not in by_id]
        ids = sorted({*self.reader.stop_ids, *(by_id[text] for text in sampling.stop if text in by_id)})
        asked = sampling.model_copy(update={"stop": texts})
        return self.talk.generate(self.weights.policy, asks, asked, ids, _bar())

    def _take_fewer(self, error: EngineOutOfMemory) -> None:
        """A new engine that decodes half as many rollouts at once; an error the second time."""
        most = self.fewer or self.engine.max_num_seqs
        if self.fewer is not None or most == 1:
            raise RollwayError(
                f"vLLM ran out of memory with {most} rollouts at once too; lower rollout.engine.max_num_seqs, "
                f"gpu_memory or max_model_len, or set enforce_eager: {_first_line(error)}"
            ) from error
        self.fewer = max(1, most // 2)
        notice(f"vLLM ran out of memory with {most} rollouts at once; once more with {self.fewer}")
        self.restart()

    def _load(self) -> None:
        assert self.talk is not None
        adapter = None if self.weights.adapter is None else str(self.weights.adapter.absolute())
        answer = self.talk.load(self.weights.policy, str(self.weights.folder.absolute()), adapter)
        if answer["how"] != "start":
            notice(f"vLLM took on the policy in place in {answer['seconds']:.2f} s ({answer['how']})")

    def _prove(self, requests: Sequence[Request], sampling: Sampling) -> None:
        """The engine's log-probs against the trainer's; once per update of the engine's weights."""
        assert self.talk is not None
        while True:
            worst, mean, count = self._gap(requests, sampling)
            notice(
                f"vLLM's log-probs differ from the trainer's by at most {worst:.2g} nats (mean {mean:.2g}, {count} "
                f"tokens; {self.tolerance:g} are allowed)"
            )
            if worst <= self.tolerance:
                self.talk.verified(worst)
                return
            if self.fresh:
                raise RollwayError(
                    f"vLLM's log-probs differ from the trainer's by up to {worst:.3g} nats, and "
                    f"rollout.engine.logprob_tolerance allows {self.tolerance:g}: a freshly started engine computes "
                    "another model than the trainer does, so its rollouts are refused; set `rollout.engine: {kind: "
                    "transformers}`, or raise the tolerance where the number format explains the difference"
                )
            notice("the update of vLLM's weights in place did not hold; the engine is started anew")
            self.restart()

    def _gap(self, requests: Sequence[Request], sampling: Sampling) -> tuple[float, float, int]:
        """Largest and mean |engine - trainer|, nats, over a few sequences that the engine samples; their tokens."""
        from rollway.policies.logprobs import Row, token_logprobs

        assert self.talk is not None
        prompts = sorted({tuple(request.prompt_tokens) for request in requests})
        chosen = [prompts[i * len(prompts) // CHECK_ROWS] for i in range(CHECK_ROWS)]
        plain = Sampling(temperature=sampling.temperature, max_tokens=min(CHECK_TOKENS, sampling.max_tokens))
        rows = [Request(f"check-{n}", prompt) for n, prompt in enumerate(chosen)]
        keys = seeds(0, [row.rollout_id for row in rows])
        asks = [
            Ask(row.prompt_tokens, key, budget)
            for row, key, budget in zip(rows, keys, self._budgets(rows, plain), strict=True)
        ]
        # To the end: a policy that stops early would leave few tokens to compare.
        done = self.talk.generate(self.weights.policy, asks, plain, [])
        scored = [Row(ask.prompt, completion.tokens) for ask, completion in zip(asks, done, strict=True)]
        logp = token_logprobs(
            self._trainer().model, scored, temperature=sampling.temperature or 1.0, micro_tokens=MICRO_TOKENS
        ).logp.cpu()
        gaps = np.concatenate(
            [np.abs(np.array(c.logprobs) - logp[i, : len(c.tokens)].numpy()) for i, c in enumerate(done)]
        )
        return float(gaps.max()), float(gaps.mean()), len(gaps)

    def _with_entropy(self, requests: Sequence[Request], done: list[Completion]) -> list[Completion]:
        from rollway.policies.logprobs import Row, token_logprobs

        rows = [Row(request.prompt_tokens, c.tokens) for request, c in zip(requests, done, strict=True)]
        found = token_logprobs(
            self._trainer().model, rows, temperature=1.0, micro_tokens=MICRO_TOKENS, entropy=True
        ).entropy
        assert found is not None
        return [replace(c, entropy=found[i, : len(c.tokens)].tolist()) for i, c in enumerate(done)]

    def _trainer(self) -> CausalPolicy:
        """The policy in this process, only for as long as it is needed: on a GPU it stands beside the engine."""
        if self.trainer is None:
            self.trainer = causal_lm.load(self.policy_json, self.name)
        return self.trainer

    def _release(self) -> None:
        import torch

        self.trainer = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _budgets(self, requests: Sequence[Request], sampling: Sampling) -> list[int]:
        """Most tokens of each completion: what is asked, and what the engine has room for."""
        if len({request.rollout_id for request in requests}) != len(requests):
            raise RollwayError("two rollout requests share a rollout_id; they would draw the same noise")
        assert self.talk is not None
        room = min(self.talk.hello["max_model_len"], self.talk.hello["kv_tokens"] or self.talk.hello["max_model_len"])
        for request in requests:
            size = len(request.prompt_tokens)
            if size == 0:
                raise RollwayError(f"rollout {request.rollout_id}: its prompt has no token")
            if size >= room:
                raise RollwayError(
                    f"rollout {request.rollout_id}: its prompt has {size} tokens, vLLM has room for {room}, prompt and "
                    "completion together; leave long prompts out, or raise rollout.engine.max_model_len (at most the "
                    "policy's context) or the memory of its KV cache"
                )
        return [min(sampling.max_tokens, room - len(request.prompt_tokens)) for request in requests]


def _check_without_gpu(engine: VllmEngine) -> None:
    """Raises RollwayError where an option would have no effect."""
    if engine.sleep:
        raise RollwayError(
            "rollout.engine.sleep: true needs a GPU whose memory it frees, and this job has none; remove it"
        )
    if engine.gpu_memory != VllmEngine.model_fields["gpu_memory"].default:
        raise RollwayError(
            "rollout.engine.gpu_memory: has no effect without a GPU; set rollout.engine.kv_cache (GiB) instead"
        )


def seeds(seed: int, names: Sequence[str]) -> list[int]:
    """Seeds of the rollouts' own generators in vLLM, below 2^63."""
    return [int(key) >> 1 for key in noise.keys(seed, names)]


def weights_of(policy_json: Path, name: str) -> Weights:
    """Where vLLM finds a named policy. Raises RollwayError when its base is not on this machine."""
    from transformers import AutoConfig

    spec = named(policy_json, read_manifest(policy_json), name)
    folder = policy_json.parent / (spec.folder or "")
    base = folder if spec.base is None else _local(spec.base, spec.revision)
    adapter = folder if spec.kind == "lora" else None
    rank = None
    if adapter is not None:
        rank = int(json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["r"])
    config = AutoConfig.from_pretrained(base, trust_remote_code=spec.trust_remote_code).to_dict()
    shape = {key: value for key, value in config.items() if key not in _NAMES}
    over = str(base.absolute()) if adapter is not None else ""
    architecture = hashlib.sha256(f"{json.dumps(shape, sort_keys=True, default=str)} {over}".encode()).hexdigest()[:16]
    return Weights(
        policy=f"{digest(policy_json)}/{name}",
        folder=base,
        adapter=adapter,
        lora_rank=rank,
        dtype=spec.dtype,
        architecture=architecture,
        trust_remote_code=spec.trust_remote_code,
    )


def settings_of(engine: VllmEngine, weights: Weights) -> dict[str, Any]:
    """What decides whether a running engine can serve: JSON, the first message of an engine repeats it."""
    import torch

    return {
        "architecture": weights.architecture,
        "dtype": weights.dtype,
        "trust_remote_code": weights.trust_remote_code,
        "lora_rank": weights.lora_rank,
        "tensor_parallel": engine.tensor_parallel,
        "gpu_memory": engine.gpu_memory,
        "kv_cache_bytes": None if engine.kv_cache is None else int(engine.kv_cache * 2**30),
        "max_model_len": engine.max_model_len,
        "max_num_seqs": engine.max_num_seqs,
        "enforce_eager": engine.enforce_eager,
        "prefix_caching": engine.prefix_caching,
        "sleep": engine.sleep,
        "threads": torch.get_num_threads(),
    }


def _local(base: str, revision: str | None) -> Path:
    """The folder of a model: its own, or that of the hub's cache, filled where it is not."""
    if Path(base).is_dir():
        return Path(base)
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py"]
    try:
        return Path(snapshot_download(base, revision=revision, allow_patterns=wanted))
    except (OSError, ValueError) as error:
        raise RollwayError(f"{base}: cannot be found for vLLM: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _bar() -> Callable[[int, int], None]:
    """Advances the stage's bar from totals of completions and tokens."""
    before = (0, 0)

    def told(finished: int, tokens: int) -> None:
        nonlocal before
        tick(finished - before[0], tokens=tokens - before[1])
        before = (finished, tokens)

    return told
