"""The judge scorer against a real server: that of `transformers`, with a model that was taught to give verdicts."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from rollway.config.policies import CharTokenizer, ScratchPolicy, SftConfig
from rollway.config.scorers import JudgeScorer
from rollway.policies import causal_lm
from rollway.scorers import score
from rollway.scorers.rows import Row
from rollway.training.sft import Demonstration, sft

PROMPT = "Rate {completion}"
VERDICTS = {"5": '{"score": 9}', "4": '{"score": 2}'}
"""Completion -> what the model learns to say of it."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    alphabet = "".join(sorted(set("".join(["Rate >", *VERDICTS, *VERDICTS.values()]))))
    tiny = ScratchPolicy(tokenizer=CharTokenizer(alphabet=alphabet), layers=1, hidden=64, heads=2, kv_heads=1)
    built = causal_lm.build(tiny, [], 0)
    built.model.requires_grad_(True)
    built.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}>"
    taught = [
        Demonstration(given, built.tokenizer.encode(f"Rate {given}>", add_special_tokens=False), verdict)
        for given, verdict in VERDICTS.items()
    ]
    sft(built.model, built.tokenizer, taught, SftConfig(steps=150, batch=8, lr=3e-3), seed=0)
    folder = tmp_path_factory.mktemp("judge")
    causal_lm.save(folder, built)
    return folder / "weights" / "main"


@pytest.fixture(scope="module")
def url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`transformers serve` on a free local port, ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [Path(sys.executable).with_name("transformers"), "serve", model, "--device", "cpu"]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("wb") as out:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=out,
            stderr=out,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )
        try:
            deadline = time.monotonic() + 180
            while not _ready(f"http://127.0.0.1:{port}/health"):
                assert server.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            server.wait(30)


def test_verdicts_of_a_served_model(url: str, model: Path, tmp_path: Path) -> None:
    config = JudgeScorer(url=url, model=str(model), prompt=PROMPT, low=1, high=10, parallel=2)
    rows = [_row(n, given) for n, given in enumerate(["5", "4", "5"])]
    found = score("judge", config, rows, needs={}, threads=1, root=tmp_path, cache=tmp_path / "cache")
    assert found["error"].to_pylist() == [None] * 3
    assert found["reward"].to_pylist() == pytest.approx([8 / 9, 1 / 9, 8 / 9])
    assert len(list((tmp_path / "cache").rglob("*.json"))) == 2

    unreachable = config.model_copy(update={"url": url, "timeout": 0.001, "retries": 0})
    again = score("judge", unreachable, rows, needs={}, threads=1, root=tmp_path, cache=tmp_path / "cache")
    assert again["reward"].to_pylist() == found["reward"].to_pylist(), "verdicts come from the cache"


def _ready(address: str) -> bool:
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address, timeout=2):
            return True
    except OSError:
        return False


def _row(n: int, completion: str) -> Row:
    return Row(
        rollout_id=f"r{n}",
        prompt_id="p",
        group_id="g",
        sample=n,
        completion=completion,
        length=1,
        finish="stop",
        tokens=[1],
        task="t",
        messages=[{"role": "user", "content": "?"}],
        answer="5",
        meta={},
    )
