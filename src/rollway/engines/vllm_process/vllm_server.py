"""The vLLM engine as a process: run by path in vLLM's own environment, answers one client at a time over a socket.

It needs vLLM and the standard library, nothing of rollway but `frames` beside it. It ends on SIGTERM, with the process
`--parent`, after `--idle` seconds without a client, and with its only connection where it was given one; everything
that it started lies in its process group and ends with it.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from array import array
from typing import Any, NoReturn

try:
    import frames
except ModuleNotFoundError:  # imported as a part of rollway, by its tests
    from rollway.engines.vllm_process import frames

POLL = 0.5
"""Seconds between looks at the parent, the clock and the client."""
GRACE = 15.0
"""Seconds that vLLM has to end by itself."""
DEAD_SECONDS = 5.0
"""Seconds that vLLM has to notice by itself that a process of its own is dead."""


class Life:
    """Ends the process when there is no more use for it. `busy` while a client is served."""

    def __init__(self, parent: int, idle: float) -> None:
        self.parent, self.idle = parent, idle
        self.birth = start_time(parent)
        self.busy = True
        self.since = time.monotonic()
        self.ending: float | None = None
        self.engine: Engine | None = None
        signal.signal(signal.SIGTERM, self._terminated)
        threading.Thread(target=self._watch, daemon=True).start()

    def used(self, busy: bool) -> None:
        self.busy, self.since = busy, time.monotonic()

    def _terminated(self, number: int, frame: object) -> None:
        if self.ending is None:
            self.ending = time.monotonic()
            raise SystemExit(0)

    def _watch(self) -> None:
        told = False
        alive = time.monotonic()
        while True:
            time.sleep(POLL)
            now = time.monotonic()
            if self.engine is None or self.ending is not None or not self.engine.dead():
                alive = now
            elif now - alive > DEAD_SECONDS:
                # The main thread waits for an answer that nobody will give.
                log("EngineDeadError: a process of vLLM was killed")
                end_group()
                os._exit(1)
            if self.ending is not None and now - self.ending > GRACE:
                kill_group()
            if told:
                continue
            if self.birth is None or start_time(self.parent) != self.birth:
                log(f"process {self.parent} is gone")
            elif not self.busy and now - self.since > self.idle:
                log(f"no client for {self.idle:g} s")
            else:
                continue
            told = True
            # vLLM may be deep in a call that no signal handler interrupts: the clock runs from here.
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(GRACE)
            kill_group()


class Engine:
    """vLLM's `LLM`, the policy that it holds, and what clients may ask."""

    def __init__(self, settings: dict[str, Any], model: str) -> None:
        import vllm
        from vllm.platforms import current_platform

        self.cuda = bool(current_platform.is_cuda_alike())
        if settings["sleep"] and not self.cuda:
            raise ValueError("sleep needs a GPU, and this is vLLM's CPU build")
        self.settings, self.model = settings, model
        self.sleeps = self.cuda and settings["sleep"] is not False
        self.lora: Any = None
        self.loras = 0
        self.asleep = False
        self.held: str | None = None
        self.how = "start"
        self.verified: float | None = None
        """Largest difference of its log-probs from the trainer's, nats; None since the last update of the weights."""
        lora: dict[str, Any] = {}
        if settings["lora_rank"] is not None:
            lora = {"enable_lora": True, "max_lora_rank": lora_rank(settings["lora_rank"]), "max_loras": 1}
        memory = settings["kv_cache_bytes"] or (None if self.cuda else 1 << 30)
        self.llm = vllm.LLM(
            model,
            tokenizer=model,
            dtype=settings["dtype"],
            trust_remote_code=settings["trust_remote_code"],
            tensor_parallel_size=settings["tensor_parallel"],
            gpu_memory_utilization=settings["gpu_memory"],
            kv_cache_memory_bytes=memory,
            max_model_len=settings["max_model_len"],
            max_num_seqs=settings["max_num_seqs"],
            enforce_eager=settings["enforce_eager"],
            enable_prefix_caching=settings["prefix_caching"],
            # Log-probs of the distribution that is sampled: after temperature, top_k and top_p.
            logprobs_mode="processed_logprobs",
            # A model's own sampling defaults must not join those that were asked for.
            generation_config="vllm",
            enable_sleep_mode=self.sleeps,
            worker_extension_cls="" if self.cuda else "vllm_cpu_weights.CpuWeights",
            **lora,
        )
        self.engine = self.llm.llm_engine
        self.version = vllm.__version__
        cache = self.engine.vllm_config.cache_config
        self.kv_tokens = (cache.num_gpu_blocks or 0) * cache.block_size

    def hello(self) -> dict[str, Any]:
        return {
            "version": frames.VERSION,
            "vllm": self.version,
            "pid": os.getpid(),
            "cuda": self.cuda,
            "sleeps": self.sleeps,
            "settings": self.settings,
            "held": self.held,
            "verified": self.verified,
            "max_model_len": self.engine.model_config.max_model_len,
            "kv_tokens": self.kv_tokens,
        }

    def load(self, policy: str, folder: str, adapter: str | None) -> dict[str, Any]:
        """Takes on another policy: an adapter, or all weights in place. Prefix caches are dropped."""
        begin = time.monotonic()
        self.held, self.verified = None, None
        if adapter is not None:
            self._wake()
            self._take_adapter(policy, adapter)
        elif folder == self.model and self.how == "start" and not self.asleep:
            # The engine was started from this folder and has not changed since.
            pass
        else:
            if self.asleep:
                # Room for the weights first: the KV cache is made when they have their place.
                self.llm.wake_up(tags=["weights"])
            self.llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
            if not self.cuda:
                self.llm.collective_rpc("pack_again")
            if self.asleep:
                self.llm.wake_up(tags=["kv_cache"])
                self.asleep = False
            self.how = "reload"
        self._drop_prefixes()
        self.held = policy
        return {"how": self.how, "seconds": time.monotonic() - begin}

    def _take_adapter(self, policy: str, adapter: str) -> None:
        from vllm.lora.request import LoRARequest

        if self.lora is not None:
            self.engine.remove_lora(self.lora.lora_int_id)
        self.loras += 1
        self.lora = LoRARequest(policy, self.loras, adapter)
        if not self.engine.add_lora(self.lora):
            raise RuntimeError(f"vLLM did not take the adapter {adapter}")
        self.how = "adapter"

    def _drop_prefixes(self) -> None:
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not drop its prefix cache")

    def _wake(self) -> None:
        if self.asleep:
            self.llm.wake_up()
            self.asleep = False

    def sleep(self) -> None:
        """Gives the GPU's memory back. Weights are dropped; those under an adapter wait in the machine's memory."""
        if not self.sleeps or self.asleep:
            return
        self.llm.sleep(level=1 if self.settings["lora_rank"] else 2)
        self.asleep = True
        if not self.settings["lora_rank"]:
            self.held = None

    def generate(
        self, connection: socket.socket, message: dict[str, Any], arrays: dict[str, array[Any]]
    ) -> tuple[dict[str, Any], dict[str, array[Any]]]:
        """Completions of all prompts, in their order. Raises ConnectionError when the client goes away meanwhile."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        if message["policy"] != self.held:
            return {"error": "policy", "message": f"the engine holds {self.held}"}, {}
        self._wake()
        prompts = frames.unpack(arrays["prompts"], arrays["prompt_lengths"])
        stop = message["stop"]
        names = [str(number) for number in range(len(prompts))]
        for name, prompt, seed, most in zip(names, prompts, arrays["seeds"], arrays["max_tokens"], strict=True):
            params = SamplingParams(
                temperature=message["temperature"],
                top_p=message["top_p"],
                top_k=message["top_k"],
                seed=seed,
                max_tokens=most,
                logprobs=0,
                flat_logprobs=True,
                stop=stop or None,
                stop_token_ids=message["stop_ids"],
                # The ids above name every end token.
                ignore_eos=True,
                detokenize=bool(stop),
                skip_special_tokens=True,
                include_stop_str_in_output=True,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            try:
                self.engine.add_request(name, TokensPrompt(prompt_token_ids=prompt), params, lora_request=self.lora)
            except ValueError:
                self._abandon(names)
                raise
        done = self._run(connection, names)
        tokens, logprobs, lengths, stopped = array("i"), array("f"), array("q"), array("B")
        for name in names:
            output = done[name].outputs[0]
            ids = list(output.token_ids)
            kept = [output.logprobs.logprobs[start] for start in output.logprobs.start_indices]
            if len(kept) != len(ids):
                raise RuntimeError(f"vLLM gave {len(kept)} log-probs for {len(ids)} tokens")
            tokens.extend(ids)
            logprobs.extend(kept)
            lengths.append(len(ids))
            stopped.append(output.finish_reason == "stop")
        return {}, {"tokens": tokens, "logprobs": logprobs, "lengths": lengths, "stopped": stopped}

    def _run(self, connection: socket.socket, names: list[str]) -> dict[str, Any]:
        done: dict[str, Any] = {}
        finished, tokens, looked = 0, 0, time.monotonic()
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                if output.finished:
                    done[output.request_id] = output
                    finished, tokens = finished + 1, tokens + len(output.outputs[0].token_ids)
            if time.monotonic() - looked > POLL:
                looked = time.monotonic()
                try:
                    tell(connection, finished, tokens)
                except OSError:
                    self._abandon([name for name in names if name not in done])
                    raise ConnectionError("the client is gone") from None
        return done

    def _abandon(self, names: list[str]) -> None:
        self.engine.abort_request(names)
        while self.engine.has_unfinished_requests():
            self.engine.step()

    def dead(self) -> bool:
        """Whether vLLM's own watch has seen the process die that computes."""
        return bool(self.engine.engine_core.resources.engine_dead)

    def close(self) -> None:
        self.engine.engine_core.shutdown()


def tell(connection: socket.socket, finished: int, tokens: int) -> None:
    """Says how far a request is, before its answer. Raises OSError when the client is gone."""
    if frames.hung_up(connection):
        raise ConnectionError("the client is gone")
    frames.send(connection, {"finished": finished, "tokens": tokens})


class Garbled(Exception):
    """What a client sent is no request."""


def serve(engine: Engine, connection: socket.socket) -> None:
    """Answers one client until it closes. Raises Garbled, ConnectionError, or what leaves the engine unusable."""
    frames.send(connection, engine.hello())
    while True:
        try:
            request = frames.receive(connection)
        except (ValueError, KeyError, TypeError) as error:
            raise Garbled(str(error)) from None
        if request is None:
            return
        message, arrays = request
        answer: dict[str, Any] = {}
        results: dict[str, array[Any]] = {}
        match message.get("op"):
            case "load":
                answer = engine.load(message["policy"], message["folder"], message["adapter"])
            case "verified":
                engine.verified = float(message["gap"])
            case "generate":
                try:
                    answer, results = engine.generate(connection, message, arrays)
                except ValueError as error:
                    answer = {"error": "request", "message": str(error)}
            case "sleep":
                engine.sleep()
            case other:
                answer = {"error": "request", "message": f"unknown request {other!r}"}
        frames.send(connection, answer, results)


def run(engine: Engine, life: Life, listener: socket.socket | None, only: socket.socket | None) -> None:
    """Serves clients one after the other. A fault inside vLLM is told to the client and ends the process."""
    while True:
        life.used(busy=False)
        if only is None:
            assert listener is not None
            connection, _ = listener.accept()
        else:
            connection = only
        life.used(busy=True)
        with connection:
            try:
                serve(engine, connection)
            except (ConnectionError, Garbled) as error:
                log(f"client left: {error}")
            except Exception as error:
                traceback.print_exc()
                if listener is not None:
                    # Nobody else shall come: it takes a while to end.
                    listener.close()
                with contextlib.suppress(OSError):
                    frames.send(connection, {"error": "dead", "message": f"{type(error).__name__}: {error}"})
                raise SystemExit(1) from None
        if only is not None:
            return
        gc.collect()


def start_time(pid: int) -> int | None:
    """Clock ticks since boot at which a process started: with the pid, its identity. None when it is dead."""
    try:
        with open(f"/proc/{pid}/stat", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def lora_rank(rank: int) -> int:
    """The smallest rank that vLLM's kernels know and that holds adapters of `rank`."""
    return next((known for known in (8, 16, 32, 64, 128, 256, 320, 512) if known >= rank), rank)


def group_members() -> list[int]:
    """Other processes of this one's group, but for trackers of shared memory, which end last and by themselves."""
    found = []
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError, ValueError):
            pid = int(entry)
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                tracker = b"resource_tracker" in file.read()
            if pid != os.getpid() and os.getpgid(pid) == os.getpgrp() and not tracker and start_time(pid) is not None:
                found.append(pid)
    return found


def end_group(seconds: float = 3.0) -> None:
    """SIGTERM to what vLLM left running in this process's group, SIGKILL after `seconds`."""
    deadline = time.monotonic() + seconds
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in group_members():
            with contextlib.suppress(OSError):
                os.kill(pid, number)
        while group_members() and time.monotonic() < deadline:
            time.sleep(0.05)


def kill_group() -> NoReturn:
    """This process leads its group, and all that vLLM started is in it."""
    sys.stderr.flush()
    os.killpg(os.getpgrp(), signal.SIGKILL)
    raise AssertionError("unreachable")


def log(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} vllm_server {os.getpid()}: {message}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settings", required=True, help="JSON of what the engine is made of")
    parser.add_argument("--model", required=True, help="folder of the first weights")
    parser.add_argument("--max-num-seqs", type=int, help="fewer rollouts at once than the settings say")
    parser.add_argument("--parent", type=int, required=True, help="process whose end ends this one")
    parser.add_argument("--idle", type=float, default=float("inf"), help="seconds without a client after which to end")
    parser.add_argument("--listener", type=int, help="descriptor of a listening socket")
    parser.add_argument("--connection", type=int, help="descriptor of the only connection")
    args = parser.parse_args()
    life = Life(args.parent, args.idle)
    engine: Engine | None = None
    code = 1
    try:
        listener = None if args.listener is None else socket.socket(fileno=args.listener)
        only = None if args.connection is None else socket.socket(fileno=args.connection)
        settings = json.loads(args.settings)
        begin = time.monotonic()
        engine = Engine({**settings, "max_num_seqs": args.max_num_seqs or settings["max_num_seqs"]}, args.model)
        # Clients compare this with what they want; fewer rollouts at once are no other engine.
        engine.settings = settings
        life.engine = engine
        log(f"ready after {time.monotonic() - begin:.1f} s, for process {args.parent}")
        run(engine, life, listener, only)
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    log(f"ends with {code}")
    life.ending = life.ending or time.monotonic()
    with contextlib.suppress(BaseException):
        if engine is not None:
            engine.close()
    end_group()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
