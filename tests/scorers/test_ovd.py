"""The verbal judge of OVD, as its page has it: an integer from 0 to 9 of a teacher behind a URL is GRPO's reward."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from curation.tables import column, scored_table
from rollway.config.recipes import load_recipe
from rollway.curation import curate
from scorers.stub_judge import Stub

PAGE = Path(__file__).resolve().parents[2] / "docs" / "methods" / "ovd.md"


def test_a_score_of_0_to_9_is_the_reward_of_grpo(make_row: Any, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verdicts 9, 3 and 0: rewards 1, 1/3 and 0, standardised within the group; 10 is no verdict."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    own = yaml.safe_load(text)["runs"]["ovd"]
    recipe = load_recipe(own.pop("recipe"), own)
    judge = recipe.score.scorers["judge"]
    said = {"good": 9, "fair": 3, "bad": 0, "odd": 10}

    def answer(prompt: str, attempt: int) -> tuple[int, str, dict[str, str]]:
        (found,) = [word for word in said if f"a {word} answer" in prompt]
        return 200, json.dumps({"reason": "so", "score": said[found]}), {}

    server = Stub(answer)
    try:
        local = judge.model_copy(update={"url": server.url, "max_error_share": 0.5, "retries": 0})
        rows = [make_row(f"a {word} answer", number=n) for n, word in enumerate(said)]
        found = run(local, rows)
    finally:
        server.close()
    assert [row["reward"] for row in found[:3]] == pytest.approx([1.0, 1 / 3, 0.0])
    assert found[3]["error"] is not None
    table = scored_table([[0, 0, 1]], judge=[row["reward"] for row in found[:3]])
    batch = curate(table, recipe.curate)
    assert column(batch, "reward") == pytest.approx([1.0, 1 / 3, 0.0])
    mean, spread = 4 / 9, (((5 / 9) ** 2 + (1 / 9) ** 2 + (4 / 9) ** 2) / 2) ** 0.5
    expected = [(x - mean) / (spread + 1e-6) for x in (1.0, 1 / 3, 0.0)]
    assert column(batch, "advantage") == pytest.approx(expected)
