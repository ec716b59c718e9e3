"""TRL's GRPOTrainer as a peer in a process of its own, stepping when it is told to.

python benchmarks/rl_trl.py BED SIZE --threads N --device D [--set KEY=JSON ...]

Reads lines from standard input and answers each with a line of JSON; an empty line or the end ends it.
`N`: runs N optimiser steps; a list of [wall seconds, CPU seconds], one per step.
`new KEY=JSON ...` (with --new): builds a new trainer on a fresh copy of the model and runs one step; both seconds of
the two together.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import rl_bed


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("bed", type=Path)
    options.add_argument("size")
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--device", default="cpu")
    options.add_argument("--new", action="store_true", help="answer `new` lines; a first step is run before")
    options.add_argument("--set", nargs="*", default=[], metavar="KEY=JSON", help="further settings of GRPOConfig")
    chosen = options.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(chosen.threads)
    answers = os.fdopen(os.dup(1), "w")
    # The trainer prints; standard output is for answers.
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(chosen.threads)
    # Imported here: neither side's imports are timed.
    import trl.trainer.grpo_trainer  # noqa: F401

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    if chosen.new:
        _warm(chosen)
        answer("ready")
        for line in sys.stdin:
            if not line.strip():
                return
            start = now()
            trainer = build(chosen.bed, chosen.size, chosen.device, 1, settings(line.split()[1:]))
            trainer.train()
            answer(since(start))
        return
    trainer = build(chosen.bed, chosen.size, chosen.device, 1_000_000, settings(chosen.set))
    trainer.add_callback(_stepper(answer))
    with contextlib.suppress(EOFError):
        trainer.train()


def now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def since(start: tuple[float, float]) -> tuple[float, float]:
    """Wall seconds and CPU seconds of this process."""
    wall, cpu = now()
    return wall - start[0], cpu - start[1]


def settings(words: list[str]) -> dict[str, Any]:
    return {word.partition("=")[0]: json.loads(word.partition("=")[2]) for word in words}


def build(bed: Path, size: str, device: str, steps: int, more: dict[str, Any]) -> Any:
    """A trainer that does what a round of ours does: 32 x 8 completions, one update, no reference, no logging."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    sys.path.insert(0, str(bed))
    import reward  # written beside the prompts: the reward of both sides

    rows = rl_bed.PROMPTS * rl_bed.GROUP
    arguments: dict[str, Any] = {
        "output_dir": str(bed / "trl"),
        "max_steps": steps,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": 1,
        "generation_batch_size": rows,
        "num_generations": rl_bed.GROUP,
        "max_completion_length": rl_bed.TOKENS,
        "temperature": 1.0,
        "top_k": 0,
        "beta": 0.0,
        "loss_type": "grpo",
        "learning_rate": rl_bed.LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
        "use_cpu": device == "cpu",
        "bf16": device != "cpu",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 0,
        **more,
    }
    prompts = [json.loads(line)["prompt"] for line in (bed / "prompts.jsonl").read_text().splitlines()]
    model = AutoModelForCausalLM.from_pretrained(
        bed / "model", dtype=getattr(torch, rl_bed.SIZES[size].dtype), use_safetensors=True
    )
    tokenizer = AutoTokenizer.from_pretrained(bed / "model", padding_side="left")
    return GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=reward.reward,
        args=GRPOConfig(**arguments),
        train_dataset=Dataset.from_dict({"prompt": prompts[: rl_bed.TRAIN_PROMPTS]}),
    )


def _stepper(answer: Any) -> Any:
    from transformers import TrainerCallback

    class Stepper(TrainerCallback):
        """Waits between steps; a step's seconds are all that lies between two waits."""

        left = 0
        seconds: list[tuple[float, float]] = []
        start = (0.0, 0.0)

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            answer("ready")
            self.wait()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seconds.append(since(self.start))
            self.left -= 1
            if self.left == 0:
                answer(self.seconds)
                self.wait()
            else:
                self.start = now()

        def wait(self) -> None:
            line = sys.stdin.readline()
            if not line.strip():
                raise EOFError
            self.left, self.seconds, self.start = int(line), [], now()

    return Stepper()


def _warm(chosen: argparse.Namespace) -> None:
    build(chosen.bed, chosen.size, chosen.device, 1, {}).train()


if __name__ == "__main__":
    main()
