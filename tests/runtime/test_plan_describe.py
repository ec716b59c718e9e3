"""What run.json says of a run, from the config."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from rollway.config import deep_merge, load_experiment
from rollway.runtime.plan import Plan
from workflow.project import TINY


@pytest.mark.parametrize("sft", [True, False])
def test_whether_the_warm_up_was_taught_is_said_where_it_was(
    sft: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only there: of another the spec is what it always was, and no run of it is described again."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.jsonl").write_text('{"word": "a", "answer": "a"}\n')
    config = TINY if sft else deep_merge(TINY, {"warmups": {"tiny": {"sft": None, "task": None}}})
    info = json.loads(Plan(load_experiment(config)).describe_spec(SimpleNamespace(run="grpo-s0")))["info"]
    assert info.get("warmup_sft") is (True if sft else None)
