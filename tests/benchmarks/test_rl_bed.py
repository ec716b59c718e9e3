"""What the benches against TRL stand on: completions of one length, a signal in every group, all memory seen."""

import json
import subprocess
import sys
import time
from pathlib import Path

import process_memory
import pytest
import rl_bed
import rl_stages

from rollway.store import parquet


@pytest.mark.slow
def test_a_round_of_the_bed_is_the_work_that_it_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(rl_bed.ROOT)
    rl_bed.write(tmp_path, "0.8M")
    config = rl_bed.config(tmp_path, "0.8M", {"bed": {"recipe": "grpo"}}, rounds=1)
    rounds = rl_stages.Rounds(config, "bed-s0", threads=1)
    rounds.warm_up()
    rounds.next()
    folder = tmp_path / "results" / "bed-s0"
    rollouts = parquet.read(folder / "r0000" / "p0" / "rollouts-000.parquet")
    assert rollouts.num_rows == rl_bed.PROMPTS * rl_bed.GROUP
    assert set(rollouts.column("length").to_pylist()) == {rl_bed.TOKENS}
    assert {len(prompt) for prompt in rollouts.column("prompt_tokens").to_pylist()} == {rl_bed.PROMPT_TOKENS}
    advantages = parquet.read(folder / "r0000" / "batch.parquet").column("advantage").to_pylist()
    # Two samples of a group may well agree with its mean; a group in which all do carries no signal.
    groups = [advantages[i : i + rl_bed.GROUP] for i in range(0, len(advantages), rl_bed.GROUP)]
    assert len(groups) == rl_bed.PROMPTS and all(any(group) for group in groups)
    metrics = json.loads((folder / "r0001" / "metrics.json").read_text())["metrics"]
    assert {row["value"] for row in metrics if row["name"] == "rows"} == {256.0}
    assert {row["value"] for row in metrics if row["name"] == "skipped"} == {0.0}


def test_memory_of_a_grandchild_is_seen() -> None:
    hold = "held = bytearray(b'1' * (200 << 20)); print('held', flush=True); input()"
    command = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}])"
    child = subprocess.Popen([sys.executable, "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    with process_memory.watched(child.pid) as peak:
        while not peak.samples:
            time.sleep(process_memory.INTERVAL)
    child.communicate("\n")
    assert peak.total > 200 << 20
    assert len(peak.parts) == 2


def test_a_process_that_is_gone_weighs_nothing() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert process_memory.proportional(child.pid) == 0
