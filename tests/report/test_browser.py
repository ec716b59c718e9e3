"""The report in a real browser: clicks, filters, keys, hostile text, and no error in the console."""

import base64
import json
import threading
import time

import pyarrow.compute as pc
import pytest

from report.browser import browser, chromium
from rollway.report import serve
from rollway.report.build import build
from rollway.store import parquet
from store import synthetic
from store.synthetic import HOSTILE, make_results

BINARY = chromium()
pytestmark = pytest.mark.skipif(
    BINARY is None, reason="no Chromium or Chrome is installed; `apt-get install chromium` or set $CHROMIUM"
)


@pytest.fixture(scope="module")
def tab():
    with browser(BINARY) as opened:
        opened.size(1280, 820)
        yield opened


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser") / "results"
    make_results(folder, {"grpo-s0": 3, "grpo-s1": 3, "rloo-s0": 3}, text=HOSTILE)
    synthetic.write_run_info(folder, "fork-s0", parent="grpo-s0", fork_round=1, fork_stage="score", rounds=3)
    tokenizer(folder / "warmups/tiny-s0")
    usage = {"seconds": 2.5, "cpu_seconds": 2.0, "peak_rss_mb": 90.0}
    for stage in ("rollout-p0-000", "train", "evaluate"):
        path = folder / f"logs/grpo-s0/r0001/{stage}.usage.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(usage))
    return folder


def tokenizer(folder):
    """Ids of the synthetic rollouts as text: <b> is a token, and must be shown as one."""
    from tokenizers import Tokenizer, decoders, models

    made = Tokenizer(models.BPE(vocab={"<eos>": 2, "<b>": 5, "two": 6, "x": 0, "y": 1}, merges=[]))
    made.decoder = decoders.Fuse()
    folder.mkdir(parents=True)
    made.save(str(folder / "tokenizer.json"))
    (folder / "policy.json").write_text(json.dumps({"policies": {"main": {"folder": ""}}}))


@pytest.fixture(scope="module")
def address(results):
    build(results, results / "report.html", title="<i>a title</i>", logs=results / "logs")
    return (results / "report.html").as_uri()


def open_at(tab, address, view):
    tab.open(f"{address}#{view}")
    assert tab.run("document.documentElement.dataset.ready") == "yes"


def text(tab, selector):
    return tab.run(f"document.querySelector({selector!r}).innerText")


def calm(tab, address):
    """Nothing in the console, nothing asked of any network."""
    assert tab.errors == []
    assert {url.split("#")[0] for url in tab.requests} <= {address, "about:blank"}


@pytest.mark.parametrize("view", ["overview", "curves", "rollouts", "compare", "health", "cost", "runs"])
def test_every_view_opens_wide_and_narrow_light_and_dark(tab, address, view):
    for width, dark, phone in ((1280, False, False), (390, True, True)):
        tab.size(width, 820, dark=dark, phone=phone)
        open_at(tab, address, view)
        assert tab.run(f"document.querySelector('#view-{view}').hidden") is False
        assert tab.run("[...document.querySelectorAll('.view')].filter((v) => !v.hidden).length") == 1
        assert len(text(tab, f"#view-{view}")) > 40
        assert tab.run("document.documentElement.scrollWidth <= window.innerWidth"), "no sideways scrolling"
        background = tab.run("getComputedStyle(document.body).backgroundColor")
        assert background == ("rgb(20, 23, 26)" if dark else "rgb(255, 255, 255)")
        calm(tab, address)
    tab.size(1280, 820)


def test_what_a_model_wrote_is_text(tab, address):
    open_at(tab, address, "rollouts")
    assert tab.run("document.querySelectorAll('#view-rollouts script, #view-rollouts b b, h1 i').length") == 0
    assert "<i>a title</i>" in text(tab, "h1")
    tab.set("#colour", "none")
    tab.until("document.querySelector('.card .text').innerText.includes('<script>')")
    shown = text(tab, ".card .text")
    assert "<script>alert('x')</script>" in shown
    assert r"\x1b[31m" in shown
    assert r"\u202e" in shown
    tab.set("#colour", "logp")
    tab.until("document.querySelector('.card .tok')")
    assert text(tab, ".card .tok") == "<b>"
    calm(tab, address)


def test_filters_sorting_and_search(tab, address):
    open_at(tab, address, "rollouts?run=grpo-s0")
    assert text(tab, "#count").startswith("36 of 36 in 9 groups")
    tab.set("#round", "1")
    assert text(tab, "#count").startswith("12 of 36 in 3 groups")
    tab.set("#finish", "length")
    assert text(tab, "#count").startswith("3 of 36")
    tab.click("#clear")
    assert text(tab, "#count").startswith("12 of 36")
    tab.set("#right", "right")
    tab.set("#used", "yes")
    assert text(tab, "#count").startswith("2 of 36")
    tab.click("#clear")
    tab.set("#scorer", "exact")
    tab.set("#filter-low", "1")
    assert text(tab, "#count").startswith("5 of 36")
    tab.click("#clear")
    tab.set("#search", "1+1=")
    assert text(tab, "#count").startswith("4 of 36")
    assert tab.run("document.activeElement.id") != "round"
    tab.click("#clear")
    tab.set("#sort", "advantage")
    lowest = tab.run("document.querySelector('#list .line').innerText")
    assert "-2.5" in lowest
    tab.set("#filter-advantageLow", "0.25")
    assert text(tab, "#count").startswith("2 of 36")
    tab.set("#filter-advantageHigh", "0.25")
    assert text(tab, "#count").startswith("0 of 36")
    tab.click("#clear")
    tab.set("#sort", "finish")
    facts = "document.querySelector('#detail .card.chosen .facts').innerText"
    assert "length" in tab.run(facts)
    tab.set("#sort", "-score:exact")
    assert tab.run("document.querySelector('#list .line').classList.contains('right')")
    calm(tab, address)


def test_any_text_can_be_searched_and_kept_in_the_address(tab, address):
    for text_in_address, searched in (("%", "%"), ("%2541", "%41")):
        open_at(tab, address, f"rollouts?text={text_in_address}")
        assert tab.run("document.querySelector('#search').value") == searched
        calm(tab, address)


def test_one_prompt_in_common_has_no_interval(tab, tmp_path):
    make_results(tmp_path, {"grpo-s0": 2})
    for path in sorted(tmp_path.glob("*/r*/evals.parquet")):
        table = parquet.read(path)
        parquet.write(path, table.filter(pc.equal(table["prompt_id"], table["prompt_id"][0])), "evals")
    build(tmp_path, tmp_path / "report.html")
    open_at(tab, (tmp_path / "report.html").as_uri(), "compare?a=grpo-s0@0&b=grpo-s0@2")
    assert "(one prompt: no interval)" in text(tab, "#difference")
    assert "95 %" not in text(tab, "#difference")


def test_a_group_stands_side_by_side_and_leads_to_other_rounds(tab, address):
    open_at(tab, address, "rollouts?run=grpo-s0&round=1")
    assert tab.run("document.querySelectorAll('#detail .card').length") == 4
    assert "Round 1: 4 rollouts" in text(tab, "#detail")
    tab.run("document.querySelector('#detail .tok').dispatchEvent(new Event('pointerover', {bubbles: true}))")
    about = text(tab, ".about")
    assert "log-prob -0.100" in about
    assert "prob 0.9048" in about
    assert "exact: part" in text(tab, ".card .parts")
    tab.set("#colour", "ratio")
    tab.until("document.querySelector('#colour').value === 'ratio'")
    assert "Against the policy of round 2: the same 3 of 3 tokens" in text(tab, "#detail")
    assert tab.run("document.querySelectorAll('.across .column').length") == 3
    tab.run("document.querySelectorAll('.across .column')[2].dispatchEvent(new Event('click'))")
    tab.until("document.querySelector('.group-title').innerText.startsWith('Round 2')")
    tab.set("#colour", "entropy")
    assert "No entropies are stored" in text(tab, "#detail")
    tab.set("#colour", "logp")
    calm(tab, address)


def test_on_a_phone_a_rollout_leads_to_its_group_and_back(tab, address):
    tab.size(390, 780, phone=True)
    open_at(tab, address, "rollouts")
    top = "Math.round(document.querySelector('#detail').getBoundingClientRect().top)"
    assert tab.run(top) > 300
    tab.run("document.querySelectorAll('#list .line')[2].click()")
    tab.until(f"{top} < 150 && {top} > 40")
    tab.key("c")
    tab.until("document.querySelector('#colour').value === 'entropy'")
    assert tab.run(f"{top} < 150 && {top} > 40"), "another colouring moves nothing"
    tab.set("#colour", "logp")
    tab.key("Escape")
    tab.until(f"{top} > 300")
    tab.size(1280, 820)
    calm(tab, address)


def test_the_keyboard(tab, address):
    open_at(tab, address, "overview")
    tab.key("3")
    tab.until("!document.querySelector('#view-rollouts').hidden && document.querySelector('#list .line')")
    place = "[...document.querySelectorAll('#list .line')].findIndex((l) => l.classList.contains('chosen'))"
    assert tab.run(place) == 0
    tab.key("j")
    tab.until(f"{place} === 1")
    tab.key("k")
    tab.until(f"{place} === 0")
    tab.key("ArrowRight")
    tab.until("document.querySelector('#round').value === '0'")
    tab.key("/")
    tab.until("document.activeElement.id === 'search'")
    tab.key("2")
    assert tab.run("!document.querySelector('#view-rollouts').hidden"), "typing is no command"
    tab.key("Escape")
    tab.key("?")
    tab.until("document.querySelector('#help').open")
    tab.run("document.querySelector('#help').close()")
    tab.key("t")
    assert tab.run("document.documentElement.dataset.theme") == "light"
    tab.run("localStorage.clear()")
    calm(tab, address)


def test_curves_overlay_hide_and_mark(tab, address):
    open_at(tab, address, "curves")
    tab.until("document.querySelectorAll('figure.chart canvas').length > 3")
    values = "document.querySelector('figure[data-title=\"reward\"] .values')"
    assert tab.run(f"{values}.querySelectorAll('.swatch').length") == 3
    tab.run("[...document.querySelectorAll('.chip')].find((c) => c.innerText.trim() === 'rloo').click()")
    tab.until(f"{values} && {values}.querySelectorAll('.swatch').length === 2")
    tab.set("#round-slider", "1")
    tab.until(f"{values}.innerText.includes('round 1')")
    assert "1.5" in tab.run(f"{values}.innerText")
    calm(tab, address)


def test_two_policies_on_the_same_prompts(tab, address):
    open_at(tab, address, "compare?a=grpo-s0@0&b=grpo-s0@2")
    assert "3 flipped right" in text(tab, "#view-compare")
    assert "0 flipped wrong" in text(tab, "#view-compare")
    assert "A is right in 25.0 % of the samples and B in 75.0 %: +0.5" in text(tab, "#difference")
    tab.click("#list .line")
    tab.until("document.querySelectorAll('#pair .card').length === 8")
    calm(tab, address)


def test_health_time_and_forks_in_words(tab, address):
    open_at(tab, address, "health")
    assert "Gradient" in text(tab, "#view-health")
    assert "Most checks look at the last quarter of the rounds" in text(tab, "#view-health")
    open_at(tab, address, "cost")
    assert "rollout" in text(tab, "#view-cost table")
    open_at(tab, address, "runs")
    assert "fork-s0 forked from grpo-s0, round 1, after score" in text(tab, "#view-runs")
    calm(tab, address)


def test_pages_of_empty_and_unfinished_folders_open(tab, tmp_path):
    build(tmp_path, tmp_path / "report.html")
    for view in ("overview", "curves", "rollouts", "compare", "health", "cost", "runs"):
        open_at(tab, (tmp_path / "report.html").as_uri(), view)
        assert tab.errors == []
    assert "holds no run yet" in text(tab, "#notices") or tab.run("location.hash") != "#overview"
    synthetic.write_prompts(tmp_path)
    synthetic.write_run_info(tmp_path, "grpo-s0", rounds=5)
    synthetic.write_round(tmp_path, "grpo-s0", 0, parts=("rollout",))
    build(tmp_path, tmp_path / "report.html")
    for view in ("overview", "rollouts", "health"):
        open_at(tab, (tmp_path / "report.html").as_uri(), view)
        assert tab.errors == []


def test_the_live_page_says_when_there_is_something_new(tab, tmp_path):
    make_results(tmp_path / "results", {"grpo-s0": 1})
    made = serve.server(tmp_path / "results", 0)
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    try:
        tab.open(f"http://127.0.0.1:{made.server_address[1]}/#rollouts")
        tab.until("document.querySelector('.live')?.innerText === 'live'")
        assert tab.run("document.querySelectorAll('#list .line').length") == 12
        synthetic.write_round(tmp_path / "results", "grpo-s0", 1)
        tab.until("document.querySelector('.fresh')")
        tab.click(".fresh")
        tab.until("document.querySelectorAll('#list .line').length === 24")
        assert tab.errors == []
    finally:
        made.shutdown()
        made.server_close()
        thread.join()


def test_the_page_works_inside_a_snakemake_report(tab, address, results, tmp_path):
    """It shows HTML results in a frame with a data: address, where there is neither storage nor an address to keep."""
    content = base64.b64encode((results / "report.html").read_bytes()).decode()
    outer = tmp_path / "outer.html"
    outer.write_text(
        f'<iframe style="width:100%;height:700px" src="data:text/html;charset=utf8;base64,{content}"></iframe>'
    )
    tab.open(outer.as_uri(), wait=False)

    def inside(expression):
        tree = tab.send("Page.getFrameTree")["frameTree"]
        frame = tree["childFrames"][0]["frame"]["id"]
        world = tab.send("Page.createIsolatedWorld", frameId=frame)["executionContextId"]
        return tab.send("Runtime.evaluate", expression=expression, contextId=world, returnByValue=True)["result"].get(
            "value"
        )

    tab.until("document.querySelector('iframe')")
    deadline = time.monotonic() + 20
    while inside("document.documentElement.dataset.ready") is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert inside("document.documentElement.dataset.ready") == "yes", tab.errors
    inside("document.querySelector('[data-page=rollouts]').click()")
    while not inside("document.querySelectorAll('#list .line').length") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert inside("document.querySelectorAll('#list .line').length") > 5
    assert tab.errors == []
