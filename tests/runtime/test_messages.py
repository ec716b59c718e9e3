"""What a stage or a command says may quote what a policy wrote: it cannot steer the terminal, nor who reads the log."""

from pathlib import Path

import pytest

from rollway.cli import main
from rollway.config.scorers import ExactScorer
from rollway.errors import RollwayError
from rollway.runtime.jobs import run_stage
from rollway.runtime.notice import notice
from rollway.runtime.specs import STAGE_VERSION, ScoreSpec, dump

STEERS = "bad \x1b]0;owned\x07\x1b[31m \u202etxt"
SHOWN = r"bad \x1b]0;owned\x07\x1b[31m \u202etxt"


@pytest.mark.parametrize("error", [RollwayError(f"scorer mine: {STEERS}\nin two\tlines"), ValueError(STEERS)])
def test_a_stage(
    error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stage(spec: object, *, prompts: Path, rollouts: Path, needs: list[Path], scores: Path, cache: Path) -> None:
        raise error

    monkeypatch.setattr("rollway.stages.score.run", stage)
    spec = dump(ScoreSpec(version=STAGE_VERSION["score"], scorer="s", config=ExactScorer()))
    files = [word for name in ("prompts", "rollouts", "scores", "cache") for word in (f"--{name}", "x")]
    log = tmp_path / "score.log"
    assert run_stage(["score", "--spec", spec, "--log", str(log), *files]) == 1
    said = capsys.readouterr().err
    for text in (said, log.read_text()):
        assert SHOWN in text
        assert "\x1b" not in text and "\u202e" not in text
    if isinstance(error, RollwayError):
        assert "\nin two\tlines" in said


def test_a_command_and_a_notice(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def command(args: object) -> int:
        raise RollwayError(STEERS)

    monkeypatch.setattr("rollway.cli._command", command)
    assert main(["status"]) == 1
    notice(STEERS)
    assert capsys.readouterr().err == f"rollway: error: {SHOWN}\nrollway: {SHOWN}\n"
