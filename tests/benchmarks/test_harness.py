"""What a bench reports is what it measured, in the direction that its bar says."""

import argparse
import json

import harness
import table


def result(bar, ours=(1.0, 2.0, 4.0), theirs=(2.0, 2.0, 2.0)):
    return harness.Result("bench", "case", list(ours), list(theirs), "peer", bar, note="a note")


def test_at_most_compares_our_cost_with_the_peers():
    assert result(harness.at_most(1.0)).figures() == [0.5, 1.0, 2.0]
    assert harness.entry(result(harness.at_most(1.0)))["reached"] is True
    assert harness.entry(result(harness.at_most(0.99)))["reached"] is False


def test_at_least_is_how_many_times_faster_we_are():
    assert result(harness.at_least(1.5)).figures() == [2.0, 1.0, 0.5]
    assert harness.entry(result(harness.at_least(1.5)))["reached"] is False
    assert harness.entry(result(harness.at_least(1.0)))["reached"] is True


def test_the_figure_is_the_median_of_pairs_not_a_ratio_of_medians():
    slowed = result(harness.at_most(1.0), ours=(1.0, 10.0, 3.0), theirs=(2.0, 20.0, 1.0))
    assert slowed.figure() == 0.5


def test_without_a_peer_the_bar_is_on_the_cost():
    alone = harness.measure("bench", "case", lambda: 0.25, bar=harness.at_most(0.3), repeats=3)
    assert alone.figure() == 0.25 and harness.entry(alone)["reached"] is True and harness.entry(alone)["theirs"] is None


def test_race_swaps_the_order_and_repeats_both_sides_alike():
    calls = []
    raced = harness.race(
        "bench",
        "case",
        lambda: calls.append("ours"),
        lambda: calls.append("peer"),
        peer_name="peer",
        bar=None,
        repeats=2,
        warmup=1,
    )
    assert calls == ["ours", "peer", "ours", "peer", "peer", "ours"]
    assert len(raced.ours) == len(raced.theirs) == 2 and min(raced.ours) >= 0.0


def test_a_cost_that_the_work_measured_itself_is_taken_as_it_is():
    assert harness.cost(lambda: 123.0) == 123.0


def test_record_adds_a_line_with_machine_versions_and_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "HISTORY", tmp_path / "history.jsonl")
    options = argparse.Namespace(record=True, threads=2, device="cpu")
    harness.finish([result(harness.at_most(1.0))], options)
    harness.finish([result(harness.at_most(1.0))], options)
    rows = [json.loads(row) for row in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert {"machine", "versions", "commit", "changed", "date", "threads", "load"} <= rows[0].keys()
    assert rows[0]["ours"] == {"median": 2.0, "min": 1.0, "max": 4.0}


def test_the_table_shows_the_latest_result_and_the_history_all(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "HISTORY", tmp_path / "history.jsonl")
    options = argparse.Namespace(record=True, threads=2, device="cpu")
    harness.finish([result(harness.at_most(1.0), ours=(8.0, 8.0, 8.0))], options)
    harness.finish([result(harness.at_most(1.0))], options)
    text = table.render([json.loads(row) for row in (tmp_path / "history.jsonl").read_text().splitlines()])
    row = next(line for line in text.splitlines() if line.startswith("| `bench` | case (1)"))
    assert "peer: 2 s" in row and "1 (0.5 to 2) x" in row and "at most 1" in row and "| yes |" in row
    assert "1. a note" in text and "4 (" in text


def test_the_page_is_what_the_history_says():
    assert table.history()
    assert table.PAGE.read_text() == table.page(), "run `python benchmarks/run.py --table`"
