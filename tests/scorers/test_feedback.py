"""What a scorer writes about a rollout, and a teacher reads: stored beside the reward, beside or in place of a sibling;
siblings without their thinking; contexts of at most so many tokens."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rollway.config.scorers import PythonScorer, ScoreConfig, TeacherScorer
from rollway.runtime.specs import ScoreSpec
from rollway.scorers.rows import Row
from rollway.scorers.run import score
from rollway.stages import score as stage
from rollway.store import parquet
from rollway.template import render
from scorers.test_teacher import RIGHT, Bench

CODE = """
def notes(row):
    right = row["completion"] in ("cdef", "a")
    said = {"ab": "two letters", "zz": "  "}.get(row["completion"])
    return {"reward": float(right), "letters": len(row["completion"]), "feedback": said}

def lists(row):
    return {"reward": 0.0, "feedback": ["no text"]}
"""
NOTES: dict[str, Any] = {"kind": "python", "function": "mine.py:notes", "feedback": True}


def noted(bench: Bench, config: PythonScorer) -> list[dict[str, Any]]:
    (bench.root / "mine.py").write_text(CODE)
    rows = [
        Row(r["rollout_id"], "p", r["group_id"], r["sample"], r["text"], r["length"], "stop", [], "t", [], "2", {})
        for r in bench.rollouts
    ]
    rows = [Row(**{**vars(row), "messages": [{"role": "user", "content": "1+1="}]}) for row in rows]
    table = score("notes", config, rows, needs={}, threads=1, root=bench.root)
    parquet.write(bench.root / "notes-000.parquet", table, "scores")
    return parquet.read(bench.root / "notes-000.parquet").to_pylist()


def taught(bench: Bench, context: list[dict[str, str]], **given: Any) -> list[dict[str, Any]]:
    """What the teacher stores of the rollouts, right or wrong by `exact`, with the notes beside."""
    config = TeacherScorer.model_validate({"model": {"kind": "live"}, "context": context, **given})
    spec = ScoreSpec(version=1, scorer="wise", config=config, policy=str(bench.policy), teacher=None)
    files = {name: bench.root / f"{name}-000.parquet" for name in ("exact", "notes")}
    out = bench.root / "wise-000.parquet"
    stage.run(
        spec,
        prompts=bench.root / "prompts.parquet",
        rollouts=bench.root / "rollouts.parquet",
        needs=[files[name] for name in config.needs],
        scores=out,
        cache=bench.root,
    )
    return parquet.read(out).to_pylist()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    made = Bench(tmp_path_factory.mktemp("feedback"), False)
    noted(made, PythonScorer.model_validate(NOTES))
    return made


def test_texts_are_stored_beside_the_reward(bench: Bench) -> None:
    rows = parquet.read(bench.root / "notes-000.parquet").to_pylist()
    assert [row["feedback"] for row in rows] == ["two letters", None, None, None, None]
    assert [row["reward"] for row in rows] == list(RIGHT.values())
    assert dict(rows[0]["components"]) == {"letters": 2.0}


def test_without_the_option_a_text_is_an_error_and_no_column(bench: Bench, tmp_path: Path) -> None:
    config = PythonScorer(function="mine.py:notes", max_error_share=1.0)
    other = Bench(tmp_path, False)
    rows = noted(other, config)
    assert "feedback" not in rows[0]
    assert rows[0]["error"] == "returned a str as 'feedback', not a number"
    listed = noted(other, PythonScorer(function="mine.py:lists", feedback=True, max_error_share=1.0))
    assert listed[0]["error"] == "returned a list as 'feedback', not a text or None"


def test_feedback_beside_a_sibling_and_alone(bench: Bench) -> None:
    """The first context whose fields there are: both, a sibling, feedback; who has neither has no teacher."""
    contexts = [
        {"prompt": "{prompt} {sibling} {feedback}"},
        {"prompt": "{prompt} {sibling}"},
        {"prompt": "{prompt} told {feedback}"},
    ]
    rows = taught(bench, contexts, needs=["exact", "notes"])
    read = [row["teacher_prompt_tokens"] for row in rows]
    assert read == [
        bench.asked("1+1= cdef two letters"),
        bench.asked("1+1= a"),
        bench.asked("1+1= cdef"),
        None,
        None,
    ]
    assert [dict(row["components"]).get("context") for row in rows] == [0.0, 1.0, 1.0, None, None]
    assert [dict(row["components"])["given"] for row in rows] == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_feedback_only_where_there_is_no_sibling(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    contexts = [{"prompt": "{prompt} {sibling}"}, {"prompt": "{prompt} told {feedback}"}]
    rows = taught(bench, contexts, needs=["exact", "notes"])
    assert rows[0]["teacher_prompt_tokens"] == bench.asked("1+1= cdef")
    rows = taught(bench, contexts[1:], needs=["notes"])
    assert [row["teacher_prompt_tokens"] for row in rows] == [bench.asked("1+1= told two letters"), *[None] * 4]


def test_the_sibling_without_its_thinking() -> None:
    said = {"sibling": " <think>no, 3\n\nwait</think>\n\nso 2 <think></think>. "}
    assert render("{sibling|without_think}", said, "here") == "so 2 ."
    assert render("{sibling|without_think}", {"sibling": "<think>never ends"}, "here") == "<think>never ends"


@pytest.mark.parametrize("overlong", ["error", "cut"])
def test_contexts_of_at_most_so_many_tokens(bench: Bench, overlong: str) -> None:
    context = [{"prompt": "{prompt} {sibling}"}]
    given: dict[str, Any] = {"needs": ["exact"], "context_tokens": 7, "overlong": overlong, "max_error_share": 1.0}
    rows = taught(bench, context, **given)
    whole = bench.asked("1+1= cdef")
    assert len(whole) == 9
    assert rows[1]["teacher_prompt_tokens"] == bench.asked("1+1= a"), "six tokens fit"
    if overlong == "cut":
        assert rows[0]["teacher_prompt_tokens"] == whole[2:]
        assert dict(rows[0]["components"])["cut"] == 2.0
        return
    assert "context and completion have 9 + 3 tokens" in rows[0]["error"]
    assert "context_tokens 7" in rows[0]["error"]


EXACT = {"kind": "exact"}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"context": [{"prompt": "{feedback}"}]}, "set `needs`"),
        ({"context": [{"prompt": "a"}, {"prompt": "{feedback}"}], "needs": ["notes"]}, "stands last"),
        ({"context_tokens": 5}, "`context_tokens` has no effect on the policy's own"),
    ],
)
def test_what_does_not_go_together(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        TeacherScorer.model_validate({"model": {"kind": "policy"}, **given})


def test_feedback_that_nobody_writes() -> None:
    wise = {"kind": "teacher", "model": {"kind": "policy"}, "context": [{"prompt": "{feedback}"}]}
    scorers = {"exact": EXACT, "notes": {**NOTES, "feedback": False}, "wise": {**wise, "needs": ["exact", "notes"]}}
    with pytest.raises(
        ValidationError, match="'wise': a context names feedback, and no scorer that it needs writes any"
    ):
        ScoreConfig.model_validate({"scorers": scorers})
    ScoreConfig.model_validate({"scorers": {**scorers, "notes": NOTES}})
