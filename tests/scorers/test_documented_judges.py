"""The two judges of docs/scorers.md, as they stand there."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from rollway.config.recipes import Recipe, load_recipe
from rollway.scorers import score
from scorers.stub_judge import Stub

DOCS = Path(__file__).resolve().parents[2] / "docs" / "scorers.md"
MIX = "3+4=7;7*2=14;14-5=9"


def block(language: str, holds: str) -> str:
    found = [b for b in re.findall(rf"```{language}\n(.*?)```", DOCS.read_text(), re.DOTALL) if holds in b]
    assert len(found) == 1
    return found[0]


def dagrpo_with(text: str) -> Recipe:
    return load_recipe("dagrpo", yaml.safe_load(text))


@pytest.mark.parametrize(
    ("completion", "right", "expected"),
    [
        (MIX, 1.0, (10, 1)),
        ("3+4=7;7*2=14;14-5=8", 0.0, (5, 2 / 3)),
        ("3+4=8;8*2=15;15-6=1 9", 1.0, (4, 0)),
        ("9", 1.0, (4, 0)),
        ("", 0.0, (1, 0)),
        ("3+4=7;7*2=14;14-5=9;9=9;9=9", 1.0, (10, 1)),
        ("3+4=-7;7*2=14", 0.0, (3, 1 / 3)),
    ],
)
def test_the_program(
    tmp_path: Path, make_row: Any, completion: str, right: float, expected: tuple[float, float]
) -> None:
    (tmp_path / "steps.py").write_text(block("python", "RESULT"))
    recipe = dagrpo_with(block("yaml", "steps.py:judge"))
    row = make_row(completion, meta={"format": "plain", "demonstration": MIX})
    needs = {"exact": {row.rollout_id: right}}
    table = score("judge", recipe.score.scorers["judge"], [row], needs=needs, threads=1, root=tmp_path, cache=None)
    (found,) = table.to_pylist()
    assert found["error"] is None
    assert (found["reward"], dict(found["components"])["steps"]) == pytest.approx(expected)
    assert recipe.score.reward == {"exact": 1.0}


def test_the_prompt(make_row: Any, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    config = dagrpo_with(block("yaml", "normalise: false")).score.scorers["judge"]
    server = Stub(lambda prompt, attempt: (200, json.dumps({"reason": "sound", "score": 8}), {}))
    try:
        local = config.model_copy(update={"url": server.url, "max_error_share": 0.5})
        found = run(
            local,
            [make_row("3+4=7", meta={"demonstration": MIX}), make_row("x", number=1, meta={"demonstration": None})],
        )
    finally:
        server.close()
    assert found[0]["reward"] == 8
    assert "null on this row" in found[1]["error"]
    (request,) = server.requests
    prompt = request["messages"][0]["content"]
    for part in ("2+2=", MIX, "3+4=7", "Final answer", "Validity of the reasoning", "Completeness of steps"):
        assert part in prompt
    assert prompt.endswith('{"reason": "one sentence", "score": 7}\n')
    assert "{meta" not in prompt
    assert "{{" not in prompt
