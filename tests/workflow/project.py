"""A small project in a temporary folder, run through the real Snakemake and the real command line."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

import hangs

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent

TINY: dict[str, Any] = {
    "project": "test",
    "tasks": {
        "spell": {
            "source": {"kind": "jsonl", "path": "words.jsonl"},
            "prompt": "{word}>",
            "answer": "{answer}",
            "splits": {"heldout": 8},
        }
    },
    "warmups": {
        "tiny": {
            "task": "spell",
            "policy": {
                "kind": "scratch",
                "tokenizer": {"kind": "char", "alphabet": "abcdefghijklmnopqrstuvwxyz>"},
                "layers": 1,
                "hidden": 32,
                "heads": 2,
                "kv_heads": 1,
                "intermediate": 64,
                "context": 32,
            },
            "sft": {"steps": 60, "batch": 32, "lr": 3.0e-3, "lr_warmup_steps": 5},
        }
    },
    "defaults": {
        "task": "spell",
        "warmup": "tiny",
        "rounds": 2,
        "rollout": {"prompts": 4, "group": 4, "sampling": {"max_tokens": 4}},
        "train": {"optimizer": {"lr": 1.0e-3}},
        "evaluate": {"samples": 2, "k": [1, 2], "bootstrap": 50},
    },
    "runs": {"grpo": {"recipe": "grpo"}},
}


class Project:
    """One folder with a config; `snakemake(...)` runs the repository's Snakefile in it."""

    def __init__(self, folder: Path, config: dict[str, Any] | None = None, *, warm: bool = True) -> None:
        self.folder, self.warm = folder, warm
        folder.mkdir(parents=True, exist_ok=True)
        self.config = config or TINY
        words = [f"{a}{b}" for a in "abcdefgh" for b in "abcdefgh"]
        rows = [f'{{"word": "{w}", "answer": "{w[::-1]}"}}' for w in words]
        (folder / "words.jsonl").write_text("\n".join(rows) + "\n")
        self.write_config()

    def write_config(self, **changes: Any) -> None:
        from rollway.config import deep_merge

        self.config = deep_merge(self.config, changes)
        (self.folder / "config.yaml").write_text(yaml.safe_dump(self.config, sort_keys=False))

    def environment(self) -> dict[str, str]:
        # `mlflow.set_tracking_uri`, called by any other test of this process, leaves MLFLOW_TRACKING_URI behind.
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("ROLLWAY_", "MLFLOW_"))}
        environment["PATH"] = f"{BIN}:{environment['PATH']}"
        if not self.warm:
            environment["ROLLWAY_WORKER"] = "off"
        return environment

    def command(self, *args: str) -> list[str]:
        snakefile = str(ROOT / "Snakefile")
        return [str(BIN / "snakemake"), "--snakefile", snakefile, "--configfile", "config.yaml", *args]

    def snakemake(self, *args: str, check: bool = True, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """Runs `snakemake --cores 2 ARGS` and returns the finished process, stdout and stderr merged in `.stdout`.

        Run once more when it takes longer than `timeout` seconds (hangs.py).
        """

        def run(again: bool) -> subprocess.CompletedProcess[str]:
            if again:
                shutil.rmtree(self.folder / ".snakemake/locks", ignore_errors=True)
            more = ["--rerun-incomplete"] if again else []
            return self.finish(self.command("--cores", "2", *more, *args), timeout=timeout)

        done = hangs.once_more(run)
        if check and done.returncode != 0:
            raise AssertionError(f"snakemake {' '.join(args)} failed:\n{done.stdout}")
        return done

    def finish(self, command: list[str], *, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """Runs a command in the folder, stderr in stdout. Raises Hung, with what every process of it was doing, when it
        takes longer than `timeout` seconds; they are killed then."""
        try:
            return hangs.run(command, self.folder, self.environment(), timeout, stderr=subprocess.STDOUT)
        except hangs.Hung as hung:
            logs = [self.folder / "results/.worker/worker.log", *sorted(self.folder.glob("logs/**/*.log"))]
            told = [f"== {path}\n{_tail(path)}" for path in logs if path.exists()]
            raise hangs.Hung("\n".join([str(hung), *told])) from None

    def planned(self, *args: str) -> dict[str, int]:
        """Jobs by rule that a dry run announces; empty when there is nothing to be done."""
        output = self.snakemake("-n", *args).stdout
        jobs: dict[str, int] = {}
        table = re.search(r"^job\s+count\n[-\s]+\n(.*?)^total", output, re.MULTILINE | re.DOTALL)
        for line in table.group(1).splitlines() if table else []:
            if line.strip():
                name, count = line.split()
                jobs[name] = int(count)
        return jobs

    def rollway(self, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [str(BIN / "rollway"), *args],
            cwd=self.folder,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=300,
        )
        if check and done.returncode != 0:
            raise AssertionError(f"rollway {' '.join(args)} failed:\n{done.stdout}{done.stderr}")
        return done

    def bytes_of(self, pattern: str) -> dict[str, bytes]:
        """Relative path -> content of every file that matches."""
        found = sorted(path for path in (self.folder / "results").glob(pattern) if path.is_file())
        assert found, f"no file matches {pattern}"
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in found}


def _tail(path: Path) -> str:
    """The end of a log, without the lists of extension modules after faulthandler's stacks."""
    lines = path.read_text(errors="replace").splitlines()
    return "\n".join(line for line in lines if not line.startswith("Extension modules:"))[-5000:]
