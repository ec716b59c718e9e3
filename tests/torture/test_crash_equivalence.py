"""A few of the kills of `make torture`; the harness itself."""

from pathlib import Path

from torture import crash


def test_killed_runs_end_with_the_bytes_of_a_run_that_was_not(tmp_path: Path) -> None:
    outcome = crash.torture(4, seed=1, folder=tmp_path.resolve())
    assert len(outcome.kills) >= 4
    assert outcome.differing == []
    assert outcome.files > 30
    assert len(crash.by_stage(outcome.kills).splitlines()) == 1 + len({kill.stage for kill in outcome.kills})


def test_a_file_that_differs_is_seen(tmp_path: Path) -> None:
    for name, content in (("a", "1"), ("b", "2")):
        (tmp_path / name / "r0000").mkdir(parents=True)
        (tmp_path / name / "r0000/batch.parquet").write_text(content)
        (tmp_path / name / "report.html").write_text(content)
    a, b = crash.digests(tmp_path / "a"), crash.digests(tmp_path / "b")
    assert list(a) == list(b) == ["r0000/batch.parquet"]
    assert a != b
