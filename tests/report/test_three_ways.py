"""docs/report.md: one rollout found with SQL, at the terminal, and in the page in a real browser."""

import re
import shlex
from pathlib import Path

import pytest

from report.browser import browser, chromium
from rollway.cli import main
from rollway.report.build import build

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs/cookbook/results"
SECTION = (ROOT / "docs/report.md").read_text(encoding="utf-8").split("## One rollout, found in three ways")[1]
BLOCKS = re.findall(r"^```(\w+)[^\n]*\n(.*?)^```", SECTION.split("\n## ")[0], re.MULTILINE | re.DOTALL)
ID = "08761e8b1f7a-00001-0004"


def printed(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(shlex.split(command)[1:]) == 0
    return capsys.readouterr().out


def test_with_sql_and_at_the_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (_, sql), (_, answer), (_, show), (_, shown) = BLOCKS
    assert printed(sql, capsys) == answer
    said = printed(show, capsys)
    first, rest = shown.split("...\n")
    assert said.startswith(first)
    assert rest in said
    assert f"\u2502 {ID} \u2502 1      \u2502 2.475" in said


@pytest.mark.skipif(chromium() is None, reason="no Chromium or Chrome is installed")
def test_in_the_page(tmp_path: Path) -> None:
    build(RESULTS, tmp_path / "report.html")
    address = f"{(tmp_path / 'report.html').as_uri()}#rollouts"
    assert f"#rollouts?run=grpo-s0&text={ID}" in SECTION
    chosen = "document.querySelector('#detail .card.chosen').innerText"
    with browser(chromium()) as tab:
        tab.open(f"{address}?run=grpo-s0&text={ID}")
        assert tab.run("document.querySelector('#detail .card.chosen .id').innerText") == ID
        assert tab.run("document.querySelectorAll('#list .line').length") == 1
        assert "advantage +2.475" in tab.run(chosen)
        assert "reward 1" in tab.run(chosen)
        assert tab.run("document.querySelectorAll('#detail .card').length") == 8
        assert "slype>" in tab.run("document.querySelector('#detail .prompt').innerText")
        assert tab.errors == []
