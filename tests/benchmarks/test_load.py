"""The line through the memory, the page of the docs, the picture."""

import math
from xml.etree import ElementTree

import load
import pytest


def test_the_slope_and_its_interval() -> None:
    x = list(range(100))
    exact, half = load.slope_of(x, [3.0 + 0.5 * n for n in x])
    assert math.isclose(exact, 0.5) and half < 1e-9
    # Residuals of +1 and -1 in turns: their variance is 1 (times 100/98), Sxx = (100^3 - 100) / 12.
    slope, half = load.slope_of(x, [1.0 if n % 2 else -1.0 for n in x])
    assert abs(slope) < half
    assert math.isclose(half, 1.96 * math.sqrt(100 / 98 / ((100**3 - 100) / 12)), rel_tol=1e-3)
    assert load.slope_of([1, 2], [1, 2]) == (0.0, math.inf)


@pytest.mark.parametrize("case", ["plan", "rounds", "wide", "rescore"])
def test_every_case_has_its_place_on_the_page(case: str) -> None:
    page = load.PAGE.read_text()
    once = load.with_case(page, case, ["| a table |", "|---|"])
    assert "| a table |" in once and once.startswith(page.split(f"<!-- {case}")[0])
    assert "| a table |" not in load.with_case(once, case, ["other"])


def test_the_curve_and_the_figures_of_rounds() -> None:
    seen = [load.Sample(n, 2.0 * n, 500.0, 600.0 + n, 8, 100.0 + 0.1 * n) for n in range(1, 101)]
    drawn = ElementTree.fromstring(load.drawn(seen))
    lines = [e for e in drawn if e.tag.endswith("polyline")]
    assert [len(line.attrib["points"].split()) for line in lines] == [100, 100, 100]
    row = load._row(seen, "snakemake_rss", "Snakemake")
    assert row.startswith("| Snakemake | 100.1 | 110.0 | +10.00 ")
    assert load._pace(seen) == "2.00 s a round in the first quarter, 2.00 s in the last"


def test_the_project_of_a_case_is_valid(tmp_path, monkeypatch) -> None:
    import yaml

    from rollway.config import load_experiment

    load.write(tmp_path, load.config(rounds=7, evaluate={"every": 100}), 64)
    monkeypatch.chdir(tmp_path)
    experiment = load_experiment(yaml.safe_load((tmp_path / "config.yaml").read_text()))
    assert experiment.resolved["grpo"].rounds == 7
    assert len((tmp_path / "words.jsonl").read_text().splitlines()) == 64
