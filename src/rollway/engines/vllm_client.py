"""One conversation with the vLLM process: requests, answers, and what its end means."""

from __future__ import annotations

import re
import select
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rollway.config.rollouts import Sampling
from rollway.engines.base import Completion
from rollway.engines.vllm_launch import Server
from rollway.engines.vllm_process import frames
from rollway.errors import RollwayError
from rollway.runtime.notice import notice

TELL_AFTER = 60.0
"""Seconds of an engine's start after which the user hears of it again."""
_OUT_OF_MEMORY = re.compile(
    r"out of memory|OutOfMemoryError|can't allocate memory|std::bad_alloc|MemoryError|No available memory"
)
_CACHE_TOO_SMALL = re.compile(
    r"KV cache is needed, which is larger than|is larger than the maximum number of tokens that can be stored in KV"
)
_ERROR_LINE = re.compile(r"\b(?:[A-Za-z_.]*(?:Error|Exception)|AssertionError): (?P<text>.+)")
_NOT_A_CAUSE = ("Engine core initialization failed", "WorkerProc initialization failed", "EngineCore encountered")


class EngineDied(RollwayError):
    """The vLLM process ended, or can do no more."""


class EngineOutOfMemory(EngineDied):
    """It ended for want of memory."""


@dataclass(frozen=True)
class Ask:
    """One completion that the engine shall sample."""

    prompt: Sequence[int]
    seed: int
    """Of its own noise, below 2^63."""
    max_tokens: int


class Conversation:
    """Requests to a `Server`, after `greet`. Raises EngineDied, EngineOutOfMemory, or RollwayError."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.hello: dict[str, Any] = {}
        self.dead = False

    def greet(self, seconds: float) -> dict[str, Any]:
        """Waits until the engine is ready, and free, and returns what it says of itself.

        A version other than ours is returned too, for the caller to end it.
        """
        deadline = time.monotonic() + seconds
        told = time.monotonic()
        arrived = select.poll()
        arrived.register(self.server.connection, select.POLLIN)
        while not arrived.poll(1000):
            now = time.monotonic()
            if not self.server.alive():
                raise self.fault("start")
            if now > deadline:
                raise self._not_ready(seconds)
            if now - told > TELL_AFTER:
                told = now
                notice(f"the vLLM engine is still starting (log: {self.server.log})")
        # The rest of a message follows its first byte; what was received of it is lost when the time is over.
        self.server.connection.settimeout(max(1.0, deadline - time.monotonic()))
        try:
            self.hello = self._receive("start")[0]
        except TimeoutError:
            raise self._not_ready(seconds) from None
        self.server.connection.settimeout(None)
        return self.hello

    def _not_ready(self, seconds: float) -> RollwayError:
        self.server.end()
        return RollwayError(
            f"the vLLM engine was not ready after {seconds:.0f} s; raise rollout.engine.start_seconds, or see why in "
            f"its log {self.server.log}:\n{self.server.tail()}"
        )

    def request(
        self,
        message: dict[str, Any],
        arrays: dict[str, array[Any]] | None = None,
        told: Callable[[int, int], None] | None = None,
    ) -> tuple[dict[str, Any], dict[str, array[Any]]]:
        """The answer. told: is called with (completions, tokens) that are finished, while they are sampled."""
        try:
            frames.send(self.server.connection, message, arrays)
        except OSError:
            raise self.fault(message["op"]) from None
        answer, results = self._receive(message["op"])
        while "finished" in answer:
            if told is not None:
                told(answer["finished"], answer["tokens"])
            answer, results = self._receive(message["op"])
        match answer.get("error"):
            case None:
                return answer, results
            case "dead":
                raise self.fault(message["op"], str(answer["message"]))
            case "policy":
                raise RollwayError(
                    f"the vLLM engine does not hold the policy that was asked for ({answer['message']}); another job "
                    "changed it meanwhile: run again"
                )
            case _:
                raise RollwayError(f"vLLM refused the request: {answer['message']}")

    def load(self, policy: str, folder: str, adapter: str | None) -> dict[str, Any]:
        answer, _ = self.request({"op": "load", "policy": policy, "folder": folder, "adapter": adapter})
        self.hello.update(held=policy, verified=None)
        return answer

    def verified(self, gap: float) -> None:
        """Notes by how many nats the weights that the engine holds now were found to differ from the trainer's."""
        self.request({"op": "verified", "gap": gap})
        self.hello["verified"] = gap

    def sleep(self) -> None:
        self.request({"op": "sleep"})

    def generate(
        self,
        policy: str,
        asks: Sequence[Ask],
        sampling: Sampling,
        stop_ids: list[int],
        told: Callable[[int, int], None] | None = None,
    ) -> list[Completion]:
        """Completions in the order of `asks`; raises RollwayError when the engine does not hold `policy`. told: see
        `request`; called once more at the end."""
        prompts, lengths = frames.pack([list(ask.prompt) for ask in asks])
        message = {
            "op": "generate",
            "policy": policy,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "stop": sampling.stop,
            "stop_ids": stop_ids,
        }
        arrays = {
            "prompts": prompts,
            "prompt_lengths": lengths,
            "seeds": array("q", [ask.seed for ask in asks]),
            "max_tokens": array("q", [ask.max_tokens for ask in asks]),
        }
        _, got = self.request(message, arrays, told)
        try:
            tokens = frames.unpack(got["tokens"], got["lengths"])
            logprobs = frames.unpack(got["logprobs"], got["lengths"])
            stopped = got["stopped"].tolist()
        except (KeyError, ValueError) as error:
            raise RollwayError(f"the vLLM engine answered with something else than completions ({error})") from None
        if not len(tokens) == len(stopped) == len(asks):
            raise RollwayError(f"the vLLM engine answered {len(tokens)} of {len(asks)} requests")
        if not np.isfinite(np.frombuffer(got["logprobs"], dtype=np.float32)).all():
            raise RollwayError("the vLLM engine gave log-probs that are not finite: its weights hold NaN or overflow")
        if told is not None:
            told(len(tokens), sum(map(len, tokens)))
        return [
            Completion(ids, logp, "stop" if end else "length")
            for ids, logp, end in zip(tokens, logprobs, stopped, strict=True)
        ]

    def fault(self, doing: str, told: str = "") -> EngineDied:
        """What the end of the engine means, from its log."""
        self.dead = True
        tail = f"\nthe end of its log {self.server.log}:\n{self.server.tail()}"
        try:
            log = self.server.log.read_text(errors="replace")[-100_000:]
        except OSError:
            log = ""
        cause = _cause(log) or told or "it was killed, or crashed without a word"
        if _CACHE_TOO_SMALL.search(log):
            return EngineDied(
                f"vLLM's KV cache is smaller than one sequence of the longest length ({cause}); lower "
                f"rollout.engine.max_model_len, or raise rollout.engine.gpu_memory or kv_cache{tail}"
            )
        if _OUT_OF_MEMORY.search(log) or _OUT_OF_MEMORY.search(told):
            return EngineOutOfMemory(
                f"the vLLM engine ran out of memory ({cause}); lower rollout.engine.max_num_seqs, max_model_len or "
                f"gpu_memory{tail}"
            )
        if doing == "start":
            return EngineDied(f"the vLLM engine did not start: {cause}{tail}")
        return EngineDied(
            f"the vLLM engine died in the middle of `{doing}` ({cause}); finished parts are kept, run again to go on"
            f"{tail}"
        )

    def _receive(self, doing: str) -> tuple[dict[str, Any], dict[str, array[Any]]]:
        try:
            answer = frames.receive(self.server.connection)
        except ValueError as error:
            raise RollwayError(
                f"what listens on the socket of the vLLM engine is no such engine ({error}); delete the vllm-* files "
                "in the results folder's .worker"
            ) from None
        except ConnectionError:
            answer = None
        if answer is None:
            raise self.fault(doing)
        return answer


def _cause(log: str) -> str:
    """The last error that vLLM's log names, without those that only pass another one on."""
    found = [match.group(0) for match in _ERROR_LINE.finditer(log)]
    real = [text for text in found if not any(other in text for other in _NOT_A_CAUSE)]
    return real[-1][:300] if real else ""
