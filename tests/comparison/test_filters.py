"""`rollway filter-fit` on a small results folder: the recipes' own weights, hand-made bins, and what it refuses."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rollway.cli import main
from rollway.comparison import filters
from rollway.config import load_recipe
from rollway.curation import curate
from rollway.evaluation.filter_fit import least_squares
from rollway.store.importing import import_into
from store.synthetic import rollout_rows, write, write_prompts, write_run_info

RUN = "ppo-s0"
WORKED = (0.1, 0.7, -0.4, 0.7, -0.9)


def truth_of(reward: float, sample: int) -> float:
    """Reliable at the ends, noise in between: the paper's premise."""
    return float(reward > 0.5) if abs(reward) > 0.5 else 0.25 * (sample % 3)


def write_scores(root: Path, run: str, round: int, scorer: str, values: dict[str, float], **columns: Any) -> None:
    made = [
        {"rollout_id": name, "scorer": scorer, "reward": value, "components": [], **columns}
        for name, value in values.items()
    ]
    write(root / run / f"r{round:04d}" / "p0" / "scores" / f"{scorer}-000.parquet", made, "scores")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Two rounds of eight groups of five; the rewards of the first group of round 0 are the worked ones."""
    root = tmp_path / "results"
    write_prompts(root)
    write_run_info(root, RUN, recipe="pf-ppo")
    rng = np.random.default_rng(0)
    pattern = rollout_rows(RUN, 0)[0]
    for round in range(2):
        rows, reward, truth = [], {}, {}
        for group in range(8):
            given = WORKED if (round, group) == (0, 0) else np.round(rng.uniform(-1, 1, 5), 3).tolist()
            for sample, value in enumerate(given):
                name = f"{round}-{group}-{sample}"
                rows.append({**pattern, "rollout_id": name, "round": round, "group_id": f"{round}-{group}"})
                rows[-1] |= {"sample": sample}
                reward[name], truth[name] = value, truth_of(value, sample)
        write(root / RUN / f"r{round:04d}" / "p0" / "rollouts-000.parquet", rows, "rollouts")
        write_scores(root, RUN, round, "rm", reward)
        write_scores(root, RUN, round, "tests", truth)
        write_scores(root, RUN, round, "flat", dict.fromkeys(reward, 0.5))
        write_scores(root, RUN, round, "coin", {name: float(value > 0) for name, value in reward.items()})
        if round == 0:
            write_scores(root, RUN, round, "only_first", reward)
    return root


def command(results: Path, *more: str, reward: str = "rm", truth: str = "tests", run: str = RUN) -> int:
    given = ["--results", str(results), "--run", run, "--reward", reward, "--truth", truth]
    return main(["filter-fit", *given, *([] if "--rounds" in more else ["--rounds", "0", "1"]), *more])


def answer(results: Path, capsys: pytest.CaptureFixture[str], *more: str, **given: str) -> dict[str, dict[str, Any]]:
    assert command(results, "--format", "json", *more, **given) == 0
    return {row["filter"]: row for row in json.loads(capsys.readouterr().out)}


def test_weights_are_those_of_the_recipe(results: Path) -> None:
    """By rank within the group: the SQL of `curate.weight`, on the recipe's own way through curation."""
    table, _ = filters.scored(results, RUN, [0], "rm", "tests")
    wanted = {
        "none": (0.2,) * 5,
        "bon": (0, 1, 0, 0, 0),
        "br": (0.125, 0.5, 0.125, 0.125, 0.125),
        "bw": (0, 0.5, 0, 0, 0.5),
    }
    for name, first in wanted.items():
        recipe = load_recipe("pf-ppo", {"curate": {"weight": {"keep": name}}})
        batch = curate(table.drop_columns(["truth"]), recipe.curate)
        one = next(f for f in filters.filters(None, None) if f.name == name)
        reward, truth, weight = filters.weighted(table, one.weight)
        assert weight.tolist() == batch.column("weight").to_pylist()
        assert reward.tolist() == batch.column("reward").to_pylist()
        assert weight[:5].tolist() == pytest.approx(first)
        assert weight.reshape(8, 5).sum(1).tolist() == pytest.approx([1.0] * 8)
        assert truth.tolist() == [truth_of(r, n % 5) for n, r in enumerate(reward)]


def test_figures_are_those_of_bins_made_by_hand(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(results, capsys, "--bins", "5", "--rounds", "0")
    table, _ = filters.scored(results, RUN, [0], "rm", "tests")
    reward, truth = (table.column(n).to_numpy().reshape(8, 5) for n in ("reward", "truth"))
    best, worst = reward.argmax(1), reward.argmin(1)
    lines = np.arange(8)
    kept = {"bw": [(n, i) for n in lines for i in (best[n], worst[n])], "bon": [(n, best[n]) for n in lines]}
    for name, places in kept.items():
        r, s = (np.array([values[place] for place in places]) for values in (reward, truth))
        width = (r.max() - r.min()) / 5
        place = np.minimum(((r - r.min()) / width).astype(int), 4)
        bins = sorted(set(place))
        if len(bins) < 3:
            continue
        line = least_squares(*(np.array([v[place == b].mean() for b in bins]) for v in (r, s)))
        assert found[name]["r2"] == pytest.approx(line.r2, abs=1e-12)
        assert (found[name]["slope"], found[name]["intercept"]) == pytest.approx((line.slope, line.intercept))
        assert (found[name]["bins"], found[name]["rows"]) == (len(bins), len(r))
        assert found[name]["mean_reward"] == pytest.approx(r.mean())
    assert found["none"]["rows"] == 40
    assert found["bon"]["mean_reward"] >= found["br"]["mean_reward"] >= found["none"]["mean_reward"]


def test_worked_means_of_one_group(tmp_path: Path) -> None:
    """E[R] under each filter, and the pow-2 weights, of the worked rewards."""
    names = [f"r{n}" for n in range(5)]
    columns = {"rollout_id": names, "group_id": ["g"] * 5, "sample": list(range(5)), "reward": list(WORKED)}
    table = pa.table({**columns, "truth": [0.0] * 5})
    means = {}
    for one in filters.filters(0.7, -0.9):
        reward, _, weight = filters.weighted(table, one.weight)
        means[one.name] = float(reward @ weight)
        if one.name == "pow-2":
            assert weight.tolist() == pytest.approx([0.005102, 0.25, 0.081633, 0.25, 0.413265], abs=5e-7)
    assert means["none"] == pytest.approx(0.04, abs=5e-7)
    assert means["br"] == pytest.approx(0.2875, abs=5e-7)
    assert means["bw"] == pytest.approx(-0.1, abs=5e-7)
    assert means["bon"] == pytest.approx(0.7)
    assert means["top_bottom"] == pytest.approx((0.7 + 0.7 - 0.9) / 3)


def test_the_choice_keeps_negatives(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(results, capsys, "--high", "0.5", "--low", "-0.5")
    assert {n for n, row in found.items() if not row["keeps_negatives"]} == {"bon", "top"}
    chosen = [name for name, row in found.items() if row["chosen"]]
    allowed = {name: row["r2"] for name, row in found.items() if row["keeps_negatives"] and row["r2"] is not None}
    assert chosen == [max(allowed, key=lambda name: allowed[name])]
    # Where the reward is noise in the middle and right at both ends, leaving out the middle fits best.
    assert found["bw"]["r2"] > found["none"]["r2"]
    assert found["top_bottom"]["r2"] > found["none"]["r2"]


def test_table_and_csv(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(results) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"line of tests on rm in 6 bins: {RUN}, rounds 0, 1, 80 rollouts of 16 groups\n")
    assert "chosen: " in text and "curate.weight: {sql: " in text
    assert "top" not in text
    assert command(results, "--format", "csv") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["filter"] for row in rows] == ["none", "bon", "br", "bw", "pow-1", "pow-2", "pow-3"]


def test_a_filter_that_cannot_be_fitted_leaves_the_others(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(results, capsys, "--high", "2.0", "--low", "-0.95")
    # Nothing is as high: top and top_random would be `none`, top_bottom keeps a few at the bottom.
    for name in ("top", "top_random"):
        assert found[name]["r2"] is None
        assert found[name]["reason"].startswith("no reward reaches 2 (the largest is 0.9")
    assert found["top_bottom"]["reason"] != found["top"]["reason"]
    everything = answer(results, capsys, "--high", "-2.0")
    assert everything["top"]["reason"] == "it keeps every rollout, so all weigh the same, as under none"
    table, _ = filters.scored(results, RUN, [0], "rm", "tests")
    second = sorted(table.column("reward").to_pylist())[-2]
    few = answer(results, capsys, "--high", str(second), "--rounds", "0")
    assert (few["top"]["r2"], few["top"]["rows"]) == (None, None)
    assert few["top"]["reason"] == "the rewards fill 2 of 6 bins, and a line needs 3"
    assert few["none"]["r2"] is not None
    assert command(results, "--high", str(second), "--rounds", "0") == 0
    assert "left out: top: the rewards fill 2 of 6 bins" in capsys.readouterr().out
    assert command(results, reward="coin") == 1
    assert "no filter can be fitted; none: the rewards fill 2 of 6 bins" in capsys.readouterr().err


def test_failed_scores_are_told(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, failed = filters.scored(results, RUN, [0], "rm", "tests")
    assert failed == 0
    ids = table.column("rollout_id").to_pylist()
    broken = {name: 0.1 * n for n, name in enumerate(ids)}
    write_scores(results, RUN, 0, "broken", broken, error="timed out")
    assert command(results, "--rounds", "0", truth="broken") == 0
    assert "a scorer failed on 40 rollouts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "more", "says"),
    [
        ({"reward": "judge"}, (), ["--reward judge", "round 0", "coin, flat, only_first, rm, tests"]),
        ({"reward": "*"}, (), ["--reward *", "round 0", "coin, flat, only_first, rm, tests"]),
        ({"reward": "[rt]m"}, (), ["--reward [rt]m", "round 0"]),
        ({"truth": "../scores/tests"}, (), ["--truth ../scores/tests", "round 0"]),
        ({"truth": "only_first"}, (), ["--truth only_first", "round 1", "coin, flat, rm, tests"]),
        ({"run": "grpo-s1"}, (), ["--run grpo-s1", RUN]),
        ({}, ("--rounds", "7"), ["--round 7", "rounds 0 to 1"]),
        ({"reward": "flat"}, (), ["--reward flat", "0.5", "another scorer"]),
        ({"truth": "flat"}, (), ["true score of every bin is 0.5"]),
        ({"truth": "rm"}, (), ["--truth rm", "itself"]),
        ({}, ("--bins", "2"), ["--bins 2", "3 to 20"]),
        ({}, ("--bins", "21"), ["--bins 21", "3 to 20"]),
        ({}, ("--low", "0.1"), ["--low", "--high"]),
        ({}, ("--high", "0.1", "--low", "0.1"), ["--low 0.1", "below --high 0.1"]),
    ],
)
def test_mistakes_are_one_sentence(
    results: Path, capsys: pytest.CaptureFixture[str], given: dict[str, str], more: tuple[str, ...], says: list[str]
) -> None:
    assert command(results, *more, **given) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(part in error for part in says), error


@pytest.mark.parametrize(("value", "says"), [(float("nan"), "is nan"), (None, "have no score")])
def test_scores_that_are_not_there(
    results: Path, capsys: pytest.CaptureFixture[str], value: float | None, says: str
) -> None:
    table, _ = filters.scored(results, RUN, [0], "rm", "tests")
    values = dict(zip(table.column("rollout_id").to_pylist(), table.column("truth").to_pylist(), strict=True))
    if value is None:
        del values["0-0-0"]
    else:
        values["0-0-0"] = value
    write_scores(results, RUN, 0, "holes", values)
    assert command(results, "--rounds", "0", truth="holes") == 1
    error = capsys.readouterr().err
    assert "0-0-0" in error and says in error


def test_an_import_with_two_scores(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same file imported once per scorer; there is no run.json, and no policy to take gradients of."""
    rng = np.random.default_rng(1)
    rows = [
        {"q": f"{n % 4}", "a": f"{n}", "rm": round(float(x), 3), "right": float(x > 0.1)}
        for n, x in enumerate(rng.uniform(-1, 1, 40))
    ]
    source = tmp_path / "other.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"prompt": "q", "completion": "a"}
    import_into(results, source, "other", {**columns, "reward": "rm"}, scorer="rm")
    import_into(results, source, "other", {**columns, "reward": "right"}, scorer="right")
    found = answer(results, capsys, "--rounds", "0", run="other", truth="right")
    assert found["none"]["rows"] == 40
    assert found["none"]["mean_truth"] == pytest.approx(np.mean([row["right"] for row in rows]))
    assert command(results, "--rounds", "1", run="other", truth="right") == 1
    assert "it has rounds 0 to 0" in capsys.readouterr().err
    gradients = ["compare-gradients", "--results", str(results), "--run", "other", "--round", "0", "--recipes", "grpo"]
    assert main(gradients) == 1
    assert "rollouts that are imported have no policy" in capsys.readouterr().err
