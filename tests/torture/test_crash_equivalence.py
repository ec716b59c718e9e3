"""A few of the kills of `make torture`; the harness itself."""

import random
from pathlib import Path

from torture import crash, page, subject
from torture.kills import WAYS, Kill


def test_killed_runs_end_with_the_bytes_of_a_run_that_was_not(tmp_path: Path) -> None:
    stages = ("rollout", "curate", "train")
    outcome = crash.torture(4, 1, tmp_path.resolve(), kind="few", stages=stages, cold_every=0)
    assert len(outcome.kills) == 4
    assert {kill.stage for _, kill in outcome.kills} <= {*stages}
    assert outcome.differing == []
    assert outcome.files > 30


USUAL = [crash.Job(stage, f"logs/{stage}-{n}.log", n, 0.5) for n, stage in enumerate(["rollout", "score", "train"] * 3)]


def test_every_stage_is_aimed_at_in_the_order_of_its_jobs() -> None:
    made = crash.aims(USUAL, random.Random(0), warm=True)
    assert sorted(aim.stage for aim in made) == ["rollout", "rollout", "score", "train", "train"]
    assert [aim.log for aim in made] == [job.log for job in USUAL if job.log in {aim.log for aim in made}]
    assert all(0.0 <= aim.delay <= 0.5 for aim in made)
    assert made == crash.aims(USUAL, random.Random(0), warm=True)
    assert made != crash.aims(USUAL, random.Random(1), warm=True)


def test_over_a_few_projects_every_way_is_taken() -> None:
    ways = {aim.way for n in range(8) for aim in crash.aims(USUAL, random.Random(n), warm=True)}
    assert ways == {*WAYS}
    assert "worker" not in {aim.way for n in range(8) for aim in crash.aims(USUAL, random.Random(n), warm=False)}


def test_a_file_that_differs_is_seen(tmp_path: Path) -> None:
    projects = []
    for name, content in (("a", "1"), ("b", "2")):
        project = subject.Project(tmp_path / name)
        (project.folder / "results/grpo-s0/r0000").mkdir(parents=True)
        (project.folder / "results/grpo-s0/r0000/batch.parquet").write_text(content)
        projects.append(project)
    leftover = projects[1].folder / "results/grpo-s0/r0000/.tmp-batch.parquet-1"
    leftover.write_text("")
    a, b = (subject.contents(project) for project in projects)
    assert subject.differing(a, b) == ["grpo-s0/r0000/.tmp-batch.parquet-1", "grpo-s0/r0000/batch.parquet"]


def test_the_log_is_kept_in_the_docs_and_replaced_there() -> None:
    outcome = crash.Outcome(0, [(0, Kill("train", "logs/r0001/train.log", "power", 0.1, True))], 1, 0, 40, [], 0.5)
    rows = crash.by_stage([kill for _, kill in outcome.kills])
    text = "\n".join([*page.said(outcome, "every"), *page.table(rows)])
    assert "1 kills (seed 0)" in text and "**all are equal**" in text
    assert "| train | 1 |  |  |  |  |  |  | 1 | 1 |" in text
    before = page.PAGE.read_text()
    for kind in ("every", "further", "scorers"):
        once = page.with_kills(before, text, kind)
        assert text in once and page.with_kills(once, "other", kind).count("other") >= 1
        assert text not in page.with_kills(once, "other", kind)
        assert before.startswith(once.split(page.begin(kind))[0])
        assert once.endswith(before.split(page.begin(kind))[1].split(page.END, 1)[1])
