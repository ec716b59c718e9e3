"""Run in the place of vllm_server.py: the same process, socket and life, around an engine of the standard library.

TOY_VLLM says what it does wrong: die, oom, oom_always, start, garbage, version, slow. What it did goes to its log.
"""

import os
import sys
import time
from array import array
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "src/rollway/engines/vllm_process"))

import frames
import vllm_server

FAULT = os.environ.get("TOY_VLLM", "")


class Toy(vllm_server.Engine):
    def __init__(self, settings: dict[str, Any], model: str) -> None:
        if FAULT == "start":
            raise ValueError("weights of another planet")
        if FAULT == "garbage":
            os.write(connection_of(sys.argv), b"HTTP/1.1 400 Bad Request\r\n\r\n")
            time.sleep(5)
        self.settings, self.most = settings, settings["max_num_seqs"]
        self.held, self.verified, self.generated = None, None, 0
        vllm_server.log(f"model {model} max_num_seqs {self.most}")

    def hello(self) -> dict[str, Any]:
        return {
            "version": 0 if FAULT == "version" else frames.VERSION,
            "pid": os.getpid(),
            "cuda": False,
            "sleeps": bool(self.settings["sleep"]),
            "settings": self.settings,
            "held": self.held,
            "verified": self.verified,
            "max_model_len": 40,
            "kv_tokens": 400,
        }

    def load(self, policy: str, folder: str, adapter: str | None) -> dict[str, Any]:
        how = "start" if self.held is None else "reload"
        self.held, self.verified = policy, None
        vllm_server.log(f"load {Path(folder).parts[-3]} {how}")
        return {"how": how, "seconds": 0.0}

    def sleep(self) -> None:
        self.held = None
        vllm_server.log("sleep")

    def generate(self, connection: Any, message: dict[str, Any], arrays: dict[str, Any]) -> Any:
        if message["policy"] != self.held:
            return {"error": "policy", "message": f"the engine holds {self.held}"}, {}
        self.generated += 1
        # The first request is the check of log-probs.
        if FAULT == "die" and self.generated > 2:
            os._exit(7)
        if self.generated > 1 and (FAULT == "oom_always" or (FAULT == "oom" and self.most > 8)):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        if FAULT == "slow":
            time.sleep(1.0)
        vllm_server.log(f"generate {len(arrays['seeds'])} {message['temperature']} {message['stop']}")
        tokens, logprobs, lengths, stopped = array("i"), array("f"), array("q"), array("B")
        half = len(arrays["seeds"]) // 2
        vllm_server.tell(connection, half, sum(arrays["max_tokens"][:half]))
        for seed, most in zip(arrays["seeds"], arrays["max_tokens"], strict=True):
            tokens.extend((seed >> n) % 5 + 3 for n in range(most))
            logprobs.extend([-1.0] * most)
            lengths.append(most)
            stopped.append(seed % 2)
        return {}, {"tokens": tokens, "logprobs": logprobs, "lengths": lengths, "stopped": stopped}

    def dead(self) -> bool:
        return False

    def close(self) -> None:
        pass


def connection_of(argv: list[str]) -> int:
    return int(argv[argv.index("--connection") + 1])


vllm_server.Engine = Toy
vllm_server.main()
