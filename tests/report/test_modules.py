"""What the page's own modules compute, asked of them in a browser and checked against closed forms and SciPy."""

import json

import pytest
from scipy import stats

from report.browser import browser, chromium
from rollway.report import bundle

BINARY = chromium()
pytestmark = pytest.mark.skipif(
    BINARY is None, reason="no Chromium or Chrome is installed; `apt-get install chromium` or set $CHROMIUM"
)


@pytest.fixture(scope="module")
def ask():
    """ask("series.js", "quantileOfT(3)"): the value of an expression over a module's exports."""
    with browser(BINARY) as tab:
        loaded = "const modules = {};\n" + "\n".join(map(bundle.module, bundle.MODULES[:-1]))

        def value(module, expression):
            return tab.run(f"(() => {{ {loaded}\nconst m = modules['{module}']; return m.{expression}; }})()")

        yield value


def test_quantiles_of_t(ask):
    for degrees in (1, 2, 5, 15, 16, 20, 30, 60, 120, 1000):
        assert ask("series.js", f"quantileOfT({degrees})") == pytest.approx(stats.t.ppf(0.975, degrees), rel=2e-3)


def test_means_and_bands_over_seeds(ask):
    series = {"a-s0": [[0, 1, 2], [1.0, 2.0, 3.0]], "a-s1": [[0, 1], [3.0, 5.0]], "b-s0": [[0], [7.0], [6.0], [8.0]]}
    runs = [{"run": "a-s0", "name": "a"}, {"run": "a-s1", "name": "a"}, {"run": "b-s0", "name": "b"}]

    def lines(**options):
        return ask("series.js", f"linesOf({json.dumps(series)}, {json.dumps(runs)}, {json.dumps(options)})")

    mean, alone = lines(band="t")
    assert (mean["x"], mean["y"]) == ([0, 1], [2.0, 3.5]), "rounds that all seeds have reached"
    low, high = stats.t.interval(0.95, 1, loc=3.5, scale=stats.sem([2.0, 5.0]))
    assert (mean["low"][1], mean["high"][1]) == pytest.approx((low, high), rel=1e-3)
    assert (alone["low"], alone["high"]) == ([6.0], [8.0]), "a single seed keeps its own interval"
    assert lines(band="range")[0]["low"] == [1.0, 2.0]
    assert lines(band="none")[0]["low"] is None
    assert [line["thin"] for line in lines(seeds=True)] == [True, True, False, False]
    smooth = lines(smooth=0.5)[0]["y"]
    assert smooth == pytest.approx([2.0, (0.5 * 2.0 + 3.5) / 1.5])


def test_columns_share_one_axis(ask):
    lines = [{"x": [0, 2], "y": [1, 2], "low": None}, {"x": [1, 2], "y": [3, 4], "low": [2, 3], "high": [4, 5]}]
    columns = ask("series.js", f"columnsOf({json.dumps(lines)})")
    assert columns == [[0, 1, 2], [1, None, 2], [None, 3, 4], [None, 2, 3], [None, 4, 5]]


def row(policy, tokens, logp, prompt="p"):
    return {"policy": policy, "tokens": tokens, "logp": logp, "prompt": prompt, "length": len(tokens), "mask": None}


def test_the_ratio_is_known_where_two_policies_wrote_the_same_beginning(ask):
    mine = row(1, [5, 6, 7], [-1.0, -2.0, -3.0])
    others = [
        row(1, [5, 6, 7], [-1.0, -1.0, -1.0]),
        row(3, [5, 9], [-0.5, -0.5]),
        row(2, [5, 6, 8], [-0.75, -1.0, -1.0]),
        row(9, [5, 6, 7], [0.0, 0.0, 0.0], prompt="another"),
    ]
    found = ask("tokens.js", f"referenceOf({json.dumps(mine)}, {json.dumps(others)})")
    assert (found["row"]["policy"], found["shared"]) == (2, 2), "another policy, the same prompt, the longest beginning"
    ratios = ask("tokens.js", f"valuesOf({json.dumps(mine)}, 'ratio', {json.dumps(found)})")
    assert ratios[:2] == pytest.approx([1.2840254, 2.7182818])
    assert ratios[2] is None
    back = ask("tokens.js", f"valuesOf({json.dumps(others[2])}, 'ratio', {{row: {json.dumps(mine)}, shared: 2}})")
    assert back[:2] == pytest.approx(ratios[:2]), "later over earlier, whichever of the two is looked at"


def test_a_reference_without_log_probs_gives_way_to_one_that_has_them(ask):
    mine = row(1, [5, 6, 7], [-1.0, -2.0, -3.0])
    unknown = row(4, [5, 6, 7], [None, None, None])
    known = row(2, [5, 6, 8], [-0.75, -1.0, -1.0])
    found = ask("tokens.js", f"referenceOf({json.dumps(mine)}, {json.dumps([unknown, known])})")
    assert (found["row"]["policy"], found["shared"]) == (2, 2)
    assert ask("tokens.js", f"referenceOf({json.dumps(mine)}, {json.dumps([unknown])})") is None
    blind = row(1, [5, 6], [None, None])
    assert ask("tokens.js", f"referenceOf({json.dumps(blind)}, {json.dumps([known])})") is None


def test_the_sample_advantage_stands_for_the_tokens_that_the_policy_wrote(ask):
    one = row(0, [5, 6], [-1.0, -1.0]) | {"advantage": 0.5, "mask": [1, 0], "tokenAdvantage": None}
    assert ask("tokens.js", f"valuesOf({json.dumps(one)}, 'advantage')") == [0.5, None]
    assert ask("tokens.js", f"valuesOf({json.dumps(one | {'tokenAdvantage': [1, 2]})}, 'advantage')") == [1, 2]


def test_flips_cross_one_half_on_prompts_that_both_were_asked(ask):
    heldout = {
        "prompts": ["a", "b", "c", "d"],
        "points": {"x": {"0": {"n": 4, "c": [0, 2, 4, 1]}, "1": {"n": [4, 4, 4, 2], "c": [2, 1, -1, 1]}}},
    }
    sides = ({"run": "x", "round": 0}, {"run": "x", "round": 1})
    found = ask("compare.js", f"outcome({json.dumps(heldout)}, {json.dumps(sides[0])}, {json.dumps(sides[1])})")
    assert found == [
        {"id": "a", "a": 0, "b": 0.5, "flip": "better"},
        {"id": "b", "a": 0.5, "b": 0.25, "flip": "worse"},
        {"id": "d", "a": 0.25, "b": 0.5, "flip": "better"},
    ]


def test_rows_get_their_own_part_of_the_token_lists(ask):
    columns = {
        "shown": [2, 0, 1],
        "tokens": [7, 8, 9],
        "logp": [-50, 9999, -100],
        "round": [0, 0, 1],
        "prompt": ["p", "p", "q"],
        "scores": {"exact": [1, None, 0]},
        "parts": {"2": [["exact: part", 0.5]]},
    }
    rows = ask("data.js", f"rowsOf('r', 'rollouts', {json.dumps(columns)}, 9999)")
    assert [r["tokens"] for r in rows] == [[7, 8], [], [9]]
    assert [r["logp"] for r in rows] == [[-0.5, None], [], [-1]]
    assert rows[2]["parts"] == [["exact: part", 0.5]]
    assert [r["scores"]["exact"] for r in rows] == [1, None, 0]


def test_the_gain_over_prompts_has_an_interval_where_prompts_differ(ask):
    rows = [{"a": a, "b": b} for a, b in ((0.0, 1.0), (0.5, 0.25), (0.25, 0.5), (0.0, 0.0))]
    differences = [row["b"] - row["a"] for row in rows]
    found = ask("compare.js", f"gainOf({json.dumps(rows)})")
    low, high = stats.norm.interval(0.95, loc=0.25, scale=stats.sem(differences))
    assert found["gain"] == pytest.approx(0.25)
    assert (found["low"], found["high"]) == pytest.approx((low, high), rel=1e-4)
    for without in (rows[:1], [rows[0], rows[0]]):
        found = ask("compare.js", f"gainOf({json.dumps(without)})")
        assert found == {"gain": 1.0, "low": None, "high": None}


@pytest.mark.parametrize(
    ("address", "read"),
    [
        ("", {"page": "overview"}),
        ("#rollouts", {"page": "rollouts"}),
        ("#rollouts?text=%", {"page": "rollouts", "text": "%"}),
        ("#rollouts?text=%2541", {"page": "rollouts", "text": "%41"}),
        ("#rollouts?text=a%3Fb+c%26d&round=2", {"page": "rollouts", "text": "a?b c&d", "round": "2"}),
        ("#rollouts?text=why?", {"page": "rollouts", "text": "why?"}),
    ],
)
def test_an_address_is_decoded_once_and_never_refused(ask, address, read):
    assert ask("state.js", f"addressOf({json.dumps(address)})") == read


def test_rows_are_filtered_by_advantage_and_sorted_by_finish_and_scorer(ask):
    figures = [
        (0.5, "stop", 1.0, 3.0),
        (-1.0, "length", None, 1.0),
        (None, "stop", 0.0, 2.0),
        (0.0, "abort", 2.0, None),
    ]
    rows = [
        {"place": i, "advantage": advantage, "finish": finish, "scores": {"exact": exact, "a-b": other}, "length": 1}
        for i, (advantage, finish, exact, other) in enumerate(figures)
    ]

    def places(**query):
        found = ask("filters.js", f"selected({json.dumps(rows)}, {json.dumps(query)}, () => '')")
        return [row["place"] for row in found]

    assert places(advantageLow="0") == [0, 3]
    assert places(advantageHigh="-0.5") == [1]
    assert places(advantageLow="-1", advantageHigh="0") == [1, 3]
    assert places(sort="finish") == [3, 1, 0, 2]
    assert places(sort="score:exact") == [2, 0, 3, 1], "what has no value comes last"
    assert places(sort="-score:exact") == [3, 0, 2, 1]
    assert places(sort="-score:a-b") == [0, 2, 1, 3]
    assert places(sort="score:a-b") == [1, 2, 0, 3]
    assert places(sort="-advantage") == [0, 3, 1, 2]
