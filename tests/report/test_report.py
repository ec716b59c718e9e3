import base64
import hashlib
import json
import re
import xml.etree.ElementTree as ElementTree

import pytest

from report.page import Page
from rollway.report import bundle, pieces, rollouts
from rollway.report.build import build, title_of
from rollway.report.picture import curves_svg
from rollway.report.svg import nice_ticks, round_ticks
from rollway.report.table import before_after_table
from store.synthetic import HOSTILE, make_results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return make_results(
        tmp_path_factory.mktemp("report") / "results", {"grpo-s0": 2, "grpo-s1": 2, "rloo-s0": 2}, text=HOSTILE
    )


@pytest.fixture(scope="module")
def page(results):
    build(results, results / "report.html", title="my <project>")
    return Page(results / "report.html")


def test_without_scripts_the_page_has_the_table(page):
    for part in ("my <project>", "3 runs of 2 configurations", "grpo", "rloo", "+0.500", "0.250", "0.750"):
        assert part in page.text, part
    assert "No figures yet for: right rollouts" in page.text
    assert "Metrics without a number in some round (of nothing, or not finite): groups_with_signal_share" in page.text


def test_the_title_survives_a_rebuild(page, results, tmp_path):
    assert title_of(results) == "my <project>"
    assert title_of(tmp_path) == "rollway"


def test_model_output_is_inert(page):
    """It is in the packed data alone, whose alphabet holds no `<`; and the one script that may run is the report's."""
    assert "alert(" not in page.raw
    assert page.parts["grpo-s0"]["rollouts"]["text"][0] == HOSTILE
    assert not [a for a in page.elements.attributes if a[1].startswith("on")]
    runs = [text for attributes, text in page.elements.scripts if "type" not in attributes]
    assert len(runs) == 1
    for attributes, text in page.elements.scripts[:-1]:
        assert attributes["type"] == "application/octet-stream"
        assert re.fullmatch(r"[A-Za-z0-9+/=]+", text)
    digest = base64.b64encode(hashlib.sha256(runs[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page.raw


def test_no_script_of_the_report_makes_html_of_text():
    for name in bundle.MODULES:
        source = bundle.module(name)
        for forbidden in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
            used = [line for line in source.splitlines() if forbidden in line and not line.startswith("//")]
            assert not used, (name, used)
    assert "</script" not in bundle.script().lower()


def test_the_page_needs_no_network(page):
    links = [value for _, name, value in page.elements.attributes if name in ("src", "href", "xlink:href")]
    assert links == ["#main"]
    assert "url(" not in bundle.styles()
    assert "@import" not in bundle.styles()
    policies = [v for t, n, v in page.elements.attributes if t == "meta" and n == "content" and "default-src" in v]
    assert len(policies) == 1
    assert policies[0].startswith("default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-")
    assert "connect-src" not in policies[0]


def test_every_import_of_a_module_is_there_before_it():
    for place, name in enumerate(bundle.MODULES):
        for names, source in re.findall(r"const \{([^}]*)\} = modules\[\"([\w.-]+)\"\];", bundle.module(name)):
            assert source in bundle.MODULES[:place], (name, source)
            offered = re.search(r"return \{ (.*) \};\n\}\)\(\);$", bundle.module(source))
            missing = {n.strip() for n in names.split(",") if n.strip()} - set(offered[1].split(", "))
            assert not missing, (name, source, missing)
        assert "import " not in re.sub(r"//.*", "", bundle.module(name)), name


def test_curves_are_those_of_the_metrics(page):
    assert page.curve("held-out pass@1")["rloo-s0"] == [
        [0, 1, 2],
        [0.25, 0.5, 0.75],
        [0.15, 0.4, 0.65],
        [0.35, 0.6, 0.85],
    ]
    assert page.curve("reward")["grpo-s1"] == [[0, 1], [0.5, 1.5]]
    assert page.curve("tokens")["grpo-s0"] == [[0, 1], [36.0, 36.0]]
    assert page.summary["metrics"]["train: grad_norm"]["grpo-s0"] == [[0, 1], [2.5, 3.5]]


def test_rollouts_are_whole_groups_with_their_figures(page):
    found = page.parts["grpo-s0"]["rollouts"]
    assert len(found["id"]) == 2 * 3 * 4
    assert page.summary["limits"]["shown"] == page.summary["limits"]["rollouts"] == 72
    row = found["id"].index("grpo-s0-1-0-3")
    assert (found["round"][row], found["sample"][row], found["finish"][row], found["length"][row]) == (
        1,
        3,
        "length",
        3,
    )
    assert (found["advantage"][row], found["reward"][row], found["correct"][row], found["slots"][row]) == (
        -2.5,
        7.0,
        False,
        1,
    )
    dropped = found["id"].index("grpo-s0-1-2-0")
    assert (found["slots"][dropped], found["advantage"][dropped], found["reward"][dropped]) == (0, None, 1.5)
    assert found["scores"]["exact"][row] == 0.0
    assert found["parts"][str(row)] == [["exact: part", 0.25], ["format: part", 0.25]]
    assert found["tokens"][:3] == [5, 6, 2]
    assert found["logp"][:3] == [-10, -200, -400]
    assert found["mask"][:3] == [1, 1, 0]
    assert "entropy" not in found
    assert page.summary["prompts"]["train-1"] == ["add", "train", [["user", "1+1="]], "2"]


def test_held_out_samples_and_counts(page):
    counts = page.summary["heldout"]
    assert sorted(counts["prompts"]) == ["heldout-0", "heldout-1", "heldout-2"]
    assert counts["points"]["rloo-s0"]["1"] == {"n": 4, "c": [2, 2, 2]}
    assert len(page.parts["rloo-s0"]["samples"]["text"]) == 3 * 3 * 4


def test_long_completions_and_crowds_are_cut_and_the_page_says_so(tmp_path, monkeypatch):
    for name, value in {"HEAD": 2, "TAIL": 1, "TEXT_HEAD": 4, "TEXT_TAIL": 2, "MAX_GROUP": 3}.items():
        monkeypatch.setattr(rollouts, name, value)
    from store import synthetic

    rows = synthetic.rollout_rows("grpo-s0", 0, "0123456789")
    long = {"tokens": [10, 11, 12, 13, 14], "logprobs": [-1.0, -2.0, -3.0, -4.0, -5.0], "train_mask": [True] * 5}
    rows = [row | long | {"length": 5} for row in rows]
    synthetic.write_prompts(tmp_path)
    synthetic.write(tmp_path / "grpo-s0/r0000/p0/rollouts-000.parquet", rows, "rollouts")
    build(tmp_path, tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    found = page.parts["grpo-s0"]["rollouts"]
    assert found["shown"] == [3] * 9, "three of each group of four"
    assert found["tokens"][:3] == [10, 11, 14]
    assert found["logp"][:3] == [-100, -200, -500]
    assert found["text"][0] == "0123\n[...]\n89"
    assert page.summary["limits"] == page.summary["limits"] | {
        "shown": 9,
        "rollouts": 12,
        "group": 3,
        "head": 2,
        "tail": 1,
    }


def test_beyond_the_limits_the_same_prompts_are_shown_in_every_round(tmp_path, monkeypatch):
    monkeypatch.setattr(rollouts, "MAX_ROLLOUTS", 16)
    make_results(tmp_path, {"grpo-s0": 2})
    build(tmp_path, tmp_path / "report.html")
    found = Page(tmp_path / "report.html").parts["grpo-s0"]["rollouts"]
    rounds = {r: {p for p, at in zip(found["prompt"], found["round"], strict=True) if at == r} for r in (0, 1)}
    assert len(found["id"]) == 16
    assert rounds[0] == rounds[1]
    assert len(rounds[0]) == 2


def test_same_results_same_bytes(results, page, tmp_path):
    build(results, tmp_path / "again.html", title="my <project>")
    assert (tmp_path / "again.html").read_bytes() == (results / "report.html").read_bytes()


def test_pieces_keep_leading_spaces_and_broken_bytes(tmp_path):
    from tokenizers import Tokenizer, decoders, models

    backend = Tokenizer(models.BPE(vocab={"a": 0, "\u0120b": 1, "\u00c3": 2}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    assert [pieces.piece(backend, token) for token in (0, 1, 2)] == ["a", " b", "\ufffd"]
    assert pieces.Pieces(tmp_path).of("grpo-s0", {}, [0], [1]) is None


def test_where_time_went(results, tmp_path):
    for name, seconds in (("r0001/train.log", 2.0), ("r0002/train.log", 3.0), ("r0000/rollout-p0-000.log", 1.0)):
        path = tmp_path / "logs" / "grpo-s0" / name.replace(".log", ".usage.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"seconds": seconds, "cpu_seconds": 1.0, "peak_rss_mb": 100.0, "warm": True}))
    (tmp_path / "logs/grpo-s0/r0000/score.usage.json").write_text('{"seconds": 1')
    model = tmp_path / "logs/reward_models/taste-2.usage.json"
    model.parent.mkdir()
    model.write_text(json.dumps({"seconds": 0.5, "cpu_seconds": 0.5, "peak_rss_mb": 100.0, "warm": True}))
    build(results, tmp_path / "report.html", logs=tmp_path / "logs")
    page = Page(tmp_path / "report.html")
    assert page.summary["totals"] == [
        ["train", 2, 5.0, 2.0, 100.0],
        ["rollout", 1, 1.0, 1.0, 100.0],
        ["reward_model", 1, 0.5, 0.5, 100.0],
    ]
    assert page.curve("seconds")["grpo-s0"] == [[0, 1], [3.0, 3.0]], "a round's train log lies with the next policy"


def test_before_after_table(results):
    lines = before_after_table(results).split("\n")
    assert lines[0].startswith("held-out pass@1")
    expected = "grpo 2 0 -> 2 0.250 0.750 +0.500 [+0.500, +0.500] +0.500 to +0.500"
    assert lines[3].split() == expected.split()
    assert lines[4].split()[:2] == ["rloo", "1"]


def test_seeds_are_compared_at_rounds_they_share(tmp_path):
    make_results(tmp_path, {"grpo-s0": 2, "grpo-s1": 1})
    assert "0 -> 1" in before_after_table(tmp_path)


def test_curves_svg(results, tmp_path):
    curves_svg(results, tmp_path / "curves.svg")
    raw = (tmp_path / "curves.svg").read_text()
    assert "<title>grpo, round 2: 0.75" in raw
    assert "<title>rloo, round 2: 0.75 [0.65, 0.85]</title>" in raw
    assert 'class="band c0"' in raw
    assert 'class="line seed c0"' in raw
    root = ElementTree.fromstring(raw)
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
