import json
import re
from html.parser import HTMLParser

import pytest

from rollway.report.build import build, curves_svg
from rollway.report.svg import nice_ticks, round_ticks
from rollway.report.table import before_after_table
from store.synthetic import HOSTILE, make_results, write_evaluation, write_prompts, write_round, write_run_info

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Collects text, tags and attributes, and checks that tags are nested properly."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parsed(path) -> tuple[Page, str]:
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    assert page.open == []
    return page, " ".join(" ".join(page.text).split())


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return make_results(
        tmp_path_factory.mktemp("report") / "results", {"grpo-s0": 2, "grpo-s1": 2, "rloo-s0": 2}, text=HOSTILE
    )


@pytest.fixture(scope="module")
def page(results):
    build(results, results / "report.html", title="my <project>")
    return parsed(results / "report.html")


def test_the_page_says_what_happened(page):
    _, text = page
    for part in (
        "my <project>",
        "held-out pass@1",
        "gradient norm",
        "round 0",
        "1+1=",
        "grpo-s1",
        "+0.500",
        "0.250",
        "0.750",
    ):
        assert part in text, part
    assert "not trained on" in text
    assert "lr: 0.001" in text
    assert "No figures yet for: right rollouts" in text


def test_model_output_is_inert(page):
    parsed_page, text = page
    assert "script" not in parsed_page.tags
    assert "<script>alert('x')</script>" in text, "shown as text"
    assert r"\x1b[31m" in text
    assert r"\u202e" in text
    assert not [a for a in parsed_page.attributes if a[1].startswith("on")]


def test_the_page_needs_no_network(page, results):
    parsed_page, _ = page
    links = [value for _, name, value in parsed_page.attributes if name in ("src", "href", "xlink:href")]
    assert all(link.startswith("#") for link in links)
    raw = (results / "report.html").read_text()
    assert "url(" not in raw
    assert "@import" not in raw
    policy = [v for t, n, v in parsed_page.attributes if t == "meta" and n == "content" and v.startswith("default-src")]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_curves_hold_means_bands_and_tooltips(results):
    raw = (results / "report.html").read_text()
    assert "<title>grpo, round 2: 0.75" in raw
    assert "<title>rloo, round 2: 0.75 [0.65, 0.85]</title>" in raw
    assert 'class="band c0"' in raw
    assert 'class="line seed c0"' in raw


def test_same_results_same_bytes(results, tmp_path):
    build(results, tmp_path / "again.html", title="my <project>")
    assert (tmp_path / "again.html").read_bytes() == (results / "report.html").read_bytes()


def test_empty_results(tmp_path):
    build(tmp_path, tmp_path / "report.html")
    _, text = parsed(tmp_path / "report.html")
    assert "holds no run yet" in text
    assert "no evaluation yet" in before_after_table(tmp_path)


def test_a_run_in_progress(tmp_path):
    write_prompts(tmp_path)
    write_run_info(tmp_path, "grpo-s0", rounds=5)
    write_run_info(tmp_path, "later-s0", rounds=5)
    write_round(tmp_path, "grpo-s0", 0, parts=("rollout", "score"))
    build(tmp_path, tmp_path / "report.html")
    _, text = parsed(tmp_path / "report.html")
    assert "Not all rounds of their config are there (running, failed or stopped): grpo-s0, later-s0" in text
    assert "No rollouts yet: later-s0" in text
    write_evaluation(tmp_path, "grpo-s0", 0)
    assert "grpo" in before_after_table(tmp_path)


def test_a_fork_is_shown_with_its_parents_rounds(tmp_path):
    make_results(tmp_path, {"grpo-s0": 2})
    write_run_info(tmp_path, "fork-s0", parent="grpo-s0", fork_round=1, fork_stage="score")
    build(tmp_path, tmp_path / "report.html")
    raw = (tmp_path / "report.html").read_text()
    assert "forked from grpo-s0, round 1, after score" in raw
    assert "<title>fork, round 1: 0.5 [" in raw


def test_where_time_went(results, tmp_path):
    for name, seconds in (("r0000/train.log", 2.0), ("r0001/train.log", 3.0), ("r0000/rollout-p0-000.log", 1.0)):
        path = tmp_path / "logs" / "grpo-s0" / name.replace(".log", ".usage.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"seconds": seconds, "cpu_seconds": 1.0, "peak_rss_mb": 100.0, "warm": True}))
    model = tmp_path / "logs/reward_models/taste-2.usage.json"
    model.parent.mkdir()
    model.write_text(json.dumps({"seconds": 0.5, "cpu_seconds": 0.5, "peak_rss_mb": 100.0, "warm": True}))
    build(results, tmp_path / "report.html", logs=tmp_path / "logs")
    _, text = parsed(tmp_path / "report.html")
    assert re.search(r"reward_model 1 0\.5", text)
    assert re.search(r"train 2 5\.0 2\.0 100 rollout 1 1\.0", text)


def test_before_after_table(results):
    lines = before_after_table(results).split("\n")
    assert lines[0].startswith("held-out pass@1")
    assert lines[3].split() == [
        "grpo",
        "2",
        "0",
        "->",
        "2",
        "0.250",
        "0.750",
        "+0.500",
        "[+0.500,",
        "+0.500]",
        "+0.500",
        "to",
        "+0.500",
    ]
    assert lines[4].split()[:2] == ["rloo", "1"]


def test_seeds_are_compared_at_rounds_they_share(tmp_path):
    make_results(tmp_path, {"grpo-s0": 2, "grpo-s1": 1})
    assert "0 -> 1" in before_after_table(tmp_path)


def test_curves_svg(results, tmp_path):
    import xml.etree.ElementTree as ElementTree

    curves_svg(results, tmp_path / "curves.svg")
    root = ElementTree.parse(tmp_path / "curves.svg").getroot()
    assert root.tag.endswith("svg")
    assert len([e for e in root.iter() if e.tag.endswith("polyline")]) >= 4


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (0.31, 0.34), (-5.0, 1200.0), (3.0, 3.0), (0.0, 0.0), (1e-9, 2e-9)]
)
def test_ticks_enclose_the_values(low, high):
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low + 1e-15
    assert ticks[-1] >= high - 1e-15
    assert 2 <= len(ticks) <= 8
    assert ticks == sorted(set(ticks))


def test_round_ticks_are_whole_and_few():
    assert round_ticks(0, 3) == [0, 1, 2, 3]
    assert round_ticks(0, 1000)[:2] == [0, 200]
    assert len(round_ticks(0, 999)) <= 7
