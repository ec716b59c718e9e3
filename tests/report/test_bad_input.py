"""Folders that are not as they should be: the page is made, opens, and says what is missing."""

import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from report.browser import browser, chromium
from report.page import Page
from rollway.errors import RollwayError
from rollway.report.build import build
from store import synthetic

BINARY = chromium()
STRANGE = "a\x00b\x1b[2Jc\u202ed\ufffde\u2028f</script><script>window.hacked = 1</script>\U0001f600"


def unscored(folder):
    """Rollouts alone: the run is going on, or its scorer failed."""
    synthetic.write_round(folder, "grpo-s0", 0, parts=("rollout",))


def with_gaps(folder):
    for round in (0, 3):
        synthetic.write_round(folder, "grpo-s0", round)
    synthetic.write_evaluation(folder, "grpo-s0", 3)


def failed(folder):
    """Killed in its first rollout job: only parts that no view reads."""
    part = folder / "grpo-s0/r0000/p0/.partial-abc/part-000.parquet"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"half a file")


def older_schema(folder):
    """A round of another version: scores without components and errors, rollouts without entropies."""
    unscored(folder)
    synthetic.write_round(folder, "grpo-s0", 1)
    rows = synthetic.rollout_rows("grpo-s0", 0)
    scores = [{"rollout_id": row["rollout_id"], "scorer": "exact", "reward": 1.0} for row in rows]
    path = folder / "grpo-s0/r0000/p0/scores/exact-000.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(scores), path)
    for old in (folder / "grpo-s0/r0000/p0").glob("rollouts-*.parquet"):
        pq.write_table(pq.read_table(old).drop_columns(["entropy"]), old)


def control_characters(folder):
    synthetic.write_round(folder, "grpo-s0", 0, STRANGE)


def long_completions(folder):
    rows = synthetic.rollout_rows("grpo-s0", 0, "word " * 80_000)
    long = {"tokens": list(range(100_000)), "logprobs": [-0.5] * 100_000, "train_mask": [True] * 100_000}
    synthetic.write(
        folder / "grpo-s0/r0000/p0/rollouts-000.parquet", [r | long | {"length": 100_000} for r in rows[:4]], "rollouts"
    )


def not_numbers(folder):
    rows = synthetic.rollout_rows("grpo-s0", 0)
    for row in rows:
        row["logprobs"] = [math.nan, -math.inf, math.nan]
    synthetic.write(folder / "grpo-s0/r0000/p0/rollouts-000.parquet", rows, "rollouts")
    values = [math.nan, math.inf, -math.inf, 0.5]
    scores = [
        {"rollout_id": r["rollout_id"], "scorer": "exact", "reward": values[i % 4], "components": [("part", math.nan)]}
        for i, r in enumerate(rows)
    ]
    synthetic.write(folder / "grpo-s0/r0000/p0/scores/exact-000.parquet", scores, "scores")
    synthetic.write_metrics(
        folder / "grpo-s0/r0000/curate.json", 0, "curate", {"reward_mean": None, "length_mean": 3.0}
    )


def scorers_that_failed(folder):
    synthetic.write_round(folder, "grpo-s0", 0, parts=("rollout",))
    rows = synthetic.rollout_rows("grpo-s0", 0)
    scores = [
        {"rollout_id": r["rollout_id"], "scorer": "exact", "reward": 0.0, "components": [], "error": "boom <b>"}
        for r in rows
    ]
    synthetic.write(folder / "grpo-s0/r0000/p0/scores/exact-000.parquet", scores, "scores")


def no_tokens(folder):
    """Imported as text alone, of prompts that no task has."""
    rows = [
        row | {"tokens": [], "logprobs": [], "train_mask": [], "length": 0, "prompt_id": "__proto__"}
        for row in synthetic.rollout_rows("grpo-s0", 0, "x" * 50_000)
    ]
    synthetic.write(folder / "grpo-s0/r0000/p0/rollouts-000.parquet", rows, "rollouts")


def nothing(folder):
    (folder / "grpo-s0/run.json").unlink()


CASES = (
    unscored,
    with_gaps,
    failed,
    older_schema,
    control_characters,
    long_completions,
    not_numbers,
    scorers_that_failed,
    no_tokens,
    nothing,
)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    found = {}
    for case in CASES:
        folder = tmp_path_factory.mktemp(case.__name__)
        synthetic.write_prompts(folder)
        synthetic.write_run_info(folder, "grpo-s0", rounds=5)
        case(folder)
        build(folder, folder / "report.html")
        found[case] = folder / "report.html"
    return found


def test_what_is_missing_is_said(pages):
    assert "No evaluation has finished yet" in Page(pages[unscored]).text
    missing = "rollout, score, curate, train of rounds 1-2, 4; evaluate of rounds 0-2, 4-5"
    assert (
        f"Not all rounds are there (running, failed or stopped); missing are: grpo-s0 ({missing})"
        in Page(pages[with_gaps]).text
    )
    assert Page(pages[with_gaps]).check("Completeness")["verdicts"] == [["grpo-s0", "watch", f"Missing: {missing}."]]
    assert "No rollouts yet: grpo-s0" in Page(pages[failed]).text
    assert "holds no run yet" in Page(pages[nothing]).text
    assert "not finite): reward_mean" in Page(pages[not_numbers]).text


@pytest.mark.parametrize(
    ("gone", "missing"),
    [
        ("r0001/p0/rollouts-*.parquet", "rollout of round 1"),
        ("r0001/p0/scores/*.parquet", "score of round 1"),
        ("r0001/batch.parquet", "curate of round 1"),
        ("r0002/metrics.json", "train of round 1"),
        ("r0001/evals.parquet", "evaluate of round 1"),
        ("r0003/evals.parquet", "evaluate of round 3"),
    ],
)
def test_what_is_missing_of_a_round_in_the_middle_is_named(tmp_path, gone, missing):
    synthetic.make_results(tmp_path, {"grpo-s0": 3, "rloo-s0": 3})
    for run in ("grpo-s0", "rloo-s0"):
        synthetic.write_run_info(tmp_path, run, rounds=3)
    for path in tmp_path.glob(f"grpo-s0/{gone}"):
        path.unlink()
    build(tmp_path, tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert page.check("Completeness")["verdicts"] == [
        ["grpo-s0", "watch", f"Missing: {missing}."],
        ["rloo-s0", "good", "All rounds are there."],
    ]
    assert f"missing are: grpo-s0 ({missing})." in page.text


def test_older_files_are_read_beside_newer_ones(pages):
    found = Page(pages[older_schema]).parts["grpo-s0"]["rollouts"]
    assert set(found["round"]) == {0, 1}
    assert found["scores"]["exact"][0] == 1.0
    assert Page(pages[older_schema]).check("Scorer errors")["level"] == "good"


def test_entropies_of_a_middle_file_are_kept(tmp_path):
    synthetic.make_results(tmp_path, {"grpo-s0": 3})
    for path in tmp_path.glob("grpo-s0/r*/p0/rollouts-*.parquet"):
        table = pq.read_table(path).drop_columns(["entropy"])
        if "r0001" in str(path):
            entropy = pa.array([[0.25, 0.5, 0.75]] * table.num_rows, pa.list_(pa.field("element", pa.float32())))
            table = table.append_column("entropy", entropy)
        pq.write_table(table, path)
    build(tmp_path, tmp_path / "report.html")
    found = Page(tmp_path / "report.html").parts["grpo-s0"]["rollouts"]
    assert found["shown"] == [3] * 36
    middle = [found["entropy"][3 * i : 3 * i + 3] for i, round in enumerate(found["round"]) if round == 1]
    assert middle == [[25, 50, 75]] * 12


def test_long_completions_stay_small(pages):
    page = Page(pages[long_completions])
    assert pages[long_completions].stat().st_size < 500_000
    assert page.parts["grpo-s0"]["rollouts"]["shown"] == [1500] * 4
    assert page.parts["grpo-s0"]["rollouts"]["tokens"][998:1002] == [998, 999, 99_500, 99_501]
    assert pages[no_tokens].stat().st_size < 500_000


def test_what_is_no_number_is_no_number_in_the_page_either(pages):
    found = Page(pages[not_numbers]).parts["grpo-s0"]["rollouts"]
    assert found["scores"]["exact"][:4] == [None, None, None, 0.5]
    assert set(found["logp"]) == {9999, -9999}
    assert found["parts"]["0"] == [["exact: part", None]]


def test_a_scorer_that_failed_is_wrong_and_says_why(pages):
    page = Page(pages[scorers_that_failed])
    check = page.check("Scorer errors")
    assert check["level"] == "bad"
    assert "12 of 12 verdicts failed; exact, for example, said: boom <b>" in check["verdicts"][0][2]
    assert page.parts["grpo-s0"]["rollouts"]["parts"]["0"] == [["exact: error", "boom <b>"]]


def test_a_damaged_file_is_named(tmp_path):
    synthetic.make_results(tmp_path, {"grpo-s0": 1})
    (tmp_path / "grpo-s0/r0000/p0/rollouts-000.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(RollwayError, match=r"rollouts-000\.parquet"):
        build(tmp_path, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.skipif(BINARY is None, reason="no Chromium or Chrome is installed; `apt-get install chromium`")
def test_every_such_page_opens_without_an_error(pages):
    with browser(BINARY) as tab:
        for case, path in pages.items():
            for view in ("overview", "curves", "rollouts", "compare", "health", "cost", "runs"):
                tab.open(f"{path.as_uri()}#{view}")
                assert tab.run("document.documentElement.dataset.ready") == "yes", (case.__name__, view)
                assert tab.errors == [], (case.__name__, view, tab.errors)
        tab.open(f"{pages[control_characters].as_uri()}#rollouts?colour=none")
        shown = tab.run("document.querySelector('.card .text').innerText")
        assert shown == STRANGE.translate({0: r"\x00", 0x1B: r"\x1b", 0x202E: r"\u202e", 0x2028: r"\u2028"})
        assert tab.run("typeof window.hacked") == "undefined"
        assert tab.run("document.querySelectorAll('script').length") == tab.run(
            "document.querySelectorAll('body > script').length"
        )
        tab.open(f"{pages[long_completions].as_uri()}#rollouts")
        assert tab.run("document.querySelectorAll('.card')[0].querySelectorAll('.tok').length") == 400
        tab.click(".card .rest")
        assert tab.run("document.querySelectorAll('.card')[0].querySelectorAll('.tok').length") == 1500
        assert "98,500 tokens are not shown" in tab.run("document.querySelector('.card .gap').innerText")
        tab.open(f"{pages[no_tokens].as_uri()}#rollouts")
        assert "its text is not in results/tasks" in tab.run("document.querySelector('.prompt').innerText")


def test_metrics_json_of_another_kind_is_named(tmp_path):
    synthetic.make_results(tmp_path, {"grpo-s0": 1})
    (tmp_path / "grpo-s0/r0000/curate.json").write_text(json.dumps({"round": 0})[:-3])
    with pytest.raises(RollwayError, match=r"curate\.json"):
        build(tmp_path, tmp_path / "report.html")
