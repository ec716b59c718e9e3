"""The bed of the benches against TRL: a random Qwen3, prompts of one length, a reward that always differs in a group.

Both sides read the same model folder and the same prompts. The end token lies outside the model's vocabulary, so every
completion has all its tokens, and neither side pays for forbidding it.
"""

import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:;!?'\"+-*/=()<>[]{}#$%&@^_|~\\\n"
PROMPTS, GROUP, TOKENS, PROMPT_TOKENS = 32, 8, 64, 16
LEARNING_RATE = 1e-5
TRAIN_PROMPTS = 4096
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Size:
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    dtype: str


SIZES = {
    "0.8M": Size(4, 128, 4, 2, 32, 384, len(LETTERS), "float32"),
    "0.6B": Size(28, 1024, 16, 8, 128, 3072, 151_936, "bfloat16"),
}


def size_for(device: str) -> str:
    """What a CPU of two cores trains in seconds, or what a GPU is busy with."""
    return "0.8M" if device == "cpu" else "0.6B"


def write(folder: Path, size: str, *, context: int = 256) -> None:
    """`model/` in Hugging Face form, `prompts.jsonl` and `reward.py` in `folder`."""
    _write_model(folder / "model", SIZES[size], context)
    draw = random.Random(0)
    worded: dict[str, None] = {}
    while len(worded) < TRAIN_PROMPTS + 8:
        worded["".join(draw.choices(LETTERS[:62], k=PROMPT_TOKENS))] = None
    lines = [json.dumps({"prompt": prompt}) for prompt in worded]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "reward.py").write_text(_REWARD)


_REWARD = '''"""Share of even token ids: cheap, and different within every group."""


def even(tokens):
    return sum(token % 2 == 0 for token in tokens) / len(tokens)


def score(row):
    return even(row["tokens"])


def reward(completions, completion_ids, **others):
    return [even(tokens) for tokens in completion_ids]
'''


def _write_model(folder: Path, size: Size, context: int) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models
    from transformers import GenerationConfig, PreTrainedTokenizerFast
    from transformers.models.qwen3 import Qwen3Config, Qwen3ForCausalLM

    special = {"<pad>": size.vocabulary, "<eos>": size.vocabulary + 1}
    letters = {letter: number for number, letter in enumerate(LETTERS)}
    backend = Tokenizer(models.BPE(vocab=letters | special, merges=[]))
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=size.vocabulary,
            hidden_size=size.hidden,
            intermediate_size=size.intermediate,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.kv_heads,
            head_dim=size.head_size,
            max_position_embeddings=context,
            tie_word_embeddings=False,
            pad_token_id=None,
            eos_token_id=None,
            bos_token_id=None,
            attn_implementation="sdpa",
            dtype=size.dtype,
        )
    ).to(getattr(torch, size.dtype))
    model.generation_config = GenerationConfig(
        eos_token_id=special["<eos>"], pad_token_id=special["<pad>"], bos_token_id=None
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def config(
    folder: Path,
    size: str,
    runs: dict[str, dict[str, Any]],
    *,
    rounds: int,
    results: str = "results",
    defaults: dict[str, Any] | None = None,
) -> Path:
    """Writes `config.yaml` for `runs` into `folder`; the run folders lie under `folder`/`results`."""
    settings: dict[str, Any] = {
        "project": "bench",
        "results": str(folder / results),
        "tasks": {
            "bed": {
                "source": {"kind": "jsonl", "path": str(folder / "prompts.jsonl")},
                "prompt": "{prompt}",
                "answer": None,
                "splits": {"heldout": 8},
            }
        },
        "warmups": {
            "random": {
                "policy": {"kind": "huggingface", "name": str(folder / "model"), "dtype": SIZES[size].dtype},
            }
        },
        "defaults": {
            "task": "bed",
            "warmup": "random",
            "rounds": rounds,
            "rollout": {"prompts": PROMPTS, "group": GROUP, "sampling": {"max_tokens": TOKENS}},
            "score": {
                "scorers": {"even": {"kind": "python", "function": f"{folder}/reward.py:score"}},
                "reward": {"even": 1.0},
                "correct": "even",
            },
            "train": {"optimizer": {"lr": LEARNING_RATE}},
            **(defaults or {}),
        },
        "runs": runs,
        "mlflow": {"enabled": False},
    }
    path = folder / f"{results}.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


def snakemake(config_path: Path, targets: Sequence[str], threads: dict[str, int], *, cores: int = 2) -> list[str]:
    """Arguments of `python -m snakemake` that make `targets`; `threads` by stage, of those that compute."""
    pinned = [f"{stage}={number}" for stage, number in threads.items()]
    command = ["-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--configfile", str(config_path)]
    return [*command, "--cores", str(cores), "--quiet", "all", "--set-threads", *pinned, "--", *targets]


def environment(threads: int, device: str) -> dict[str, str]:
    """For processes of either side: their OpenMP threads, no GPU unless asked for, and this Python's `rollway`."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    settings = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, "PATH": path, **settings, **hidden}


class Side:
    """A process that waits for a line on its standard input, does what it says, and answers with a line of JSON."""

    def __init__(self, script: str, *arguments: str, threads: int, device: str, log: Path, wait: bool = True) -> None:
        command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments, "--threads", str(threads)]
        self.log = log
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment(threads, device),
                text=True,
            )
        if wait:
            self.answer()

    def ask(self, line: str) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> Any:
        """The next line; the first one says that it is ready. Ends this process, with the log, when the side died."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args} ended:\n{self.log.read_text()[-4000:]}")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


class Staged:
    """Rounds of one run through the real Snakemake, each call going on where the last one stopped."""

    def __init__(self, folder: Path, config_path: Path, results: str, run: str, *, threads: int, device: str) -> None:
        self.folder, self.config, self.run = folder, config_path, folder / results / run
        self.threads, self.device, self.rounds = threads, device, 0

    def more(self, rounds: int, *, cores: int = 2) -> list[float]:
        """Runs so many further rounds; seconds from one policy to the next, without the workflow's start."""
        self.start(rounds, cores=cores).finish()
        return self.between()[-(rounds - 1) :]

    def start(self, rounds: int, *, cores: int = 2) -> "Workflow":
        self.rounds += rounds
        target = str(self.run / f"r{self.rounds:04d}" / "policy.json")
        threads = {"rollout": self.threads, "train": self.threads}
        command = [sys.executable, *snakemake(self.config, [target], threads, cores=cores)]
        return Workflow(command, self.folder, environment(self.threads, self.device))

    def between(self) -> list[float]:
        """Seconds from each policy to the next, by the times at which their files were written."""
        files = [self.run / f"r{number:04d}" / "policy.json" for number in range(1, self.rounds + 1)]
        times = [file.stat().st_mtime_ns / 1e9 for file in files]
        return [later - earlier for earlier, later in pairwise(times)]

    def job_seconds(self, stage: str) -> float:
        """Median over the rounds of what a stage's job says it took, from its first line to its last."""
        return statistics.median(end - begin for begin, end in self.spans(stage))

    def spans(self, stage: str) -> list[tuple[float, float]]:
        """When a stage's jobs began and ended, seconds since 1970, round by round."""
        logs = sorted((self.run.parent / "logs" / self.run.name).glob(f"r*/{stage}.usage.json"))
        usages = [json.loads(log.read_text()) for log in logs]
        return [(usage["began"], usage["began"] + usage["seconds"]) for usage in usages]


class Workflow:
    """One `snakemake` that runs."""

    def __init__(self, command: Sequence[str], folder: Path, environment: dict[str, str]) -> None:
        self.log = folder / "snakemake.log"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output)

    def finish(self) -> None:
        if self.process.wait():
            raise SystemExit(f"snakemake failed:\n{self.log.read_text()[-4000:]}")
