"""`rollway compare` on small folders whose evaluations are known."""

import csv
import io
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from rollway.cli import main
from rollway.comparison import reading, render, runs
from rollway.comparison.runs import Outcome, RunComparison, compare_runs, judged
from rollway.errors import RollwayError
from rollway.evaluation import pass_at_k
from rollway.store.catalog import open_catalog
from rollway.store.lineage import inherited, read_runs
from rollway.store.queries import rows as rows_of
from store.synthetic import CONFIG, GROUP, PROMPTS, rollout_rows, write, write_prompts, write_round, write_run_info

SAMPLES, HELDOUT, ROUNDS = 4, 12, 2


def evaluate(root: Path, run: str, round: int, right: list[int], prompt: str = "heldout") -> None:
    """`right[i]` of the samples of prompt i are right."""
    rows = [
        {
            "prompt_id": f"{prompt}-{i:02d}",
            "sample": sample,
            "correct": sample < count,
            "reward": float(sample < count),
            "length": 3,
            "finish": "stop",
            "text": "abc",
            "answer": "abc",
            "tokens": [5],
            "logprobs": [-0.1],
        }
        for i, count in enumerate(right)
        for sample in range(SAMPLES)
    ]
    write(root / run / f"r{round:04d}" / "evals.parquet", rows, "evals")


def a_run(root: Path, name: str, seeds: int, level: int, **info: object) -> None:
    """`level` more samples right after the last round than a level of 0 has."""
    for seed in range(seeds):
        run = f"{name}-s{seed}"
        write_run_info(root, run, rounds=ROUNDS, **info)
        for round in range(ROUNDS + 1):
            gain = level if round == ROUNDS else 0
            evaluate(root, run, round, [min(SAMPLES, (i + seed) % 2 + gain) for i in range(HELDOUT)])


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("compare") / "results"
    a_run(root, "base", 5, 1)
    a_run(root, "up", 5, 2)
    a_run(root, "down", 5, 0)
    a_run(root, "like", 5, 1)
    a_run(root, "few", 3, 3)
    write_run_info(root, "waiting-s0", rounds=ROUNDS)
    return root


def of(comparison: RunComparison, name: str, k: int = 1) -> Outcome:
    return next(o for o in comparison.outcomes if (o.name, o.k) == (name, k))


def test_verdicts_in_plain_words(results: Path) -> None:
    found = compare_runs(results, "base", None)
    assert found.ks == [1, 4]
    verdicts = {name: of(found, name).verdict for name in ("base", "up", "down", "like", "few")}
    assert verdicts == {
        "base": "baseline",
        "up": "better",
        "down": "worse",
        "like": "no difference shown",
        "few": "fewer than 5 seeds: screening only",
    }
    assert found.left_out == ["waiting: not evaluated yet"]


def test_final_figures_and_paired_differences(results: Path) -> None:
    found = compare_runs(results, "base", [1, 2])
    base, up = of(found, "base", 2), of(found, "up", 2)
    expected = sum(pass_at_k(SAMPLES, n, 2) for n in (1, 2)) / 2
    assert (base.round, base.seeds, base.prompts) == (ROUNDS, 5, HELDOUT)
    assert base.value == pytest.approx(expected)
    assert base.low <= base.value <= base.high
    assert of(found, "up").difference == pytest.approx(1 / SAMPLES)
    # Every prompt of every seed gained the same: pairing leaves no noise.
    assert (of(found, "up").difference_low, of(found, "up").difference_high) == pytest.approx((0.25, 0.25))
    assert up.paired_seeds == 5
    assert of(found, "base").difference is None


def test_only_the_runs_asked_for_and_the_baseline(results: Path) -> None:
    """The correction is for the comparisons that are made: one here, several with all runs."""
    found = compare_runs(results, "base", [1], ["up"])
    assert [(o.name, o.verdict) for o in found.outcomes] == [("base", "baseline"), ("up", "better")]
    everything = compare_runs(results, "base", [1])
    assert of(found, "up").p_holm < of(everything, "up").p_holm
    with pytest.raises(RollwayError, match=r"--runs upp: .*did you mean up\?"):
        compare_runs(results, "base", [1], ["upp"])


def test_no_baseline_gives_intervals_alone(results: Path) -> None:
    found = compare_runs(results, None, [1])
    assert {o.verdict for o in found.outcomes} == {"no baseline named"}
    assert "name one with --baseline" in render.runs_table(found)


def outcome(name: str, p_bootstrap: float, p_seeds: float | None, seeds: int = 5, difference: float = 0.1) -> Outcome:
    return Outcome(
        *(name, "grpo", 1, seeds, 3, 10, 0.5, 0.4, 0.6, difference, 0.0, 0.2),
        paired_seeds=seeds,
        p_bootstrap=p_bootstrap,
        p_seeds=p_seeds,
    )


def test_holm_is_over_all_comparisons_and_takes_the_larger_p() -> None:
    made = [outcome("a", 0.001, 0.01), outcome("b", 0.02, 0.002), outcome("c", 0.03, 0.03), outcome("d", 0.9, None, 1)]
    found = {o.name: (o.p_holm, o.verdict) for o in judged(made)}
    # Sorted 0.01, 0.02, 0.03, 0.9, times 4, 3, 2, 1, made monotone.
    assert [p for p, _ in found.values()] == pytest.approx([0.04, 0.06, 0.06, 0.9])
    assert [verdict for _, verdict in found.values()] == [
        "better",
        "no difference shown",
        "no difference shown",
        "fewer than 5 seeds: screening only",
    ]
    assert judged([outcome("a", 0.01, 0.01, difference=-0.1)])[0].verdict == "worse"


def test_runs_that_cannot_be_compared_fairly_are_not(tmp_path: Path) -> None:
    a_run(tmp_path, "base", 2, 1)
    a_run(tmp_path, "hot", 2, 1, config={**CONFIG, "evaluate": {"temperature": 0.5}})
    write_run_info(tmp_path, "later-s7", rounds=ROUNDS)
    evaluate(tmp_path, "later-s7", ROUNDS, [1] * HELDOUT)
    write_run_info(tmp_path, "elsewhere-s0", rounds=ROUNDS)
    evaluate(tmp_path, "elsewhere-s0", ROUNDS, [1] * HELDOUT, prompt="other")
    found = compare_runs(tmp_path, "base", [1])
    assert of(found, "hot").verdict == "not compared: evaluated with other settings (temperature 0.5 against 1.0)"
    assert of(found, "later").verdict == "not compared: no seed in common with the baseline"
    assert of(found, "elsewhere").verdict == "not compared: other held-out prompts (0 of 24 shared)"
    assert all(o.p_holm is None for o in found.outcomes)


def scored_as(scorer: dict[str, Any], name: str = "exact", threshold: float = 1.0, **more: Any) -> dict[str, Any]:
    """A run's config, with this scorer to say what is right."""
    score = {"scorers": {name: scorer}, "reward": {name: 1.0}, "correct": name, "threshold": threshold}
    return {**CONFIG, "score": score, **more}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (scored_as({"kind": "exact"}), None),
        (scored_as({"kind": "exact", "max_error_share": 0.5}, name="right"), None),
        (
            scored_as({"kind": "exact", "ignore_case": True}),
            "scorer {'kind': 'exact', 'ignore_case': True} against {'kind': 'exact'}",
        ),
        (scored_as({"kind": "exact"}, threshold=0.5), "threshold 0.5 against 1.0"),
        ({**CONFIG, "rollout": {"sampling": {"max_tokens": 7}}}, "max_tokens 7 against 64"),
        # Of a schedule counts what holds in the last round: evaluation uses that.
        ({**CONFIG, "schedule": [{"from": 1, "rollout": {"sampling": {"max_tokens": 7}}}]}, "max_tokens 7 against 64"),
        ({**CONFIG, "schedule": [{"from": 1, "score": {"threshold": 0.5}}]}, "threshold 0.5 against 1.0"),
        (
            {
                **CONFIG,
                "rollout": {"sampling": {"max_tokens": 7}},
                "schedule": [{"from": 1, "rollout": {"sampling": {"max_tokens": 64}}}],
            },
            None,
        ),
    ],
)
def test_what_right_means_must_agree_at_the_last_round(
    tmp_path: Path, config: dict[str, Any], says: str | None
) -> None:
    a_run(tmp_path, "base", 2, 1)
    a_run(tmp_path, "other", 2, 1, config=config)
    found = of(compare_runs(tmp_path, "base", [1]), "other")
    if says is None:
        assert found.difference == 0.0
    else:
        assert found.verdict == f"not compared: evaluated with other settings ({says})"


def test_unfinished_and_missing_seeds_are_said(tmp_path: Path) -> None:
    a_run(tmp_path, "base", 2, 1)
    write_run_info(tmp_path, "base-s2", rounds=ROUNDS)
    write_run_info(tmp_path, "slow-s0", rounds=9)
    evaluate(tmp_path, "slow-s0", 1, [1] * HELDOUT)
    found = compare_runs(tmp_path, None, None)
    assert of(found, "base").note == "seed 2 not evaluated"
    assert of(found, "slow").note == "unfinished: round 1 of 9"


def test_tokens_and_seconds(tmp_path: Path) -> None:
    root = tmp_path / "results"
    a_run(root, "base", 2, 1)
    for seed in range(2):
        for round in range(ROUNDS + 1):  # the last round's rollouts came after the policy that is compared
            write_round(root, f"base-s{seed}", round, parts=("rollout",))
    assert of(compare_runs(root, None, [1]), "base").tokens_per_seed == 3 * PROMPTS * GROUP * ROUNDS
    assert of(compare_runs(root, None, [1]), "base").seconds_per_seed is None
    for seed in range(2):
        for round in range(1, ROUNDS + 1):
            folder = tmp_path / "logs" / f"base-s{seed}" / f"r{round:04d}"
            folder.mkdir(parents=True)
            for job, seconds in (("train", 2.0), ("evaluate", 100.0), ("rollout-p0-000", 1.0 + seed)):
                (folder / f"{job}.usage.json").write_text(json.dumps({"seconds": seconds}))
    assert of(compare_runs(root, None, [1]), "base").seconds_per_seed == pytest.approx(ROUNDS * (2.0 + 1.5))
    (tmp_path / "logs" / "base-s1" / "r0002" / "train.usage.json").unlink()
    (root / "base-s1" / "r0002" / "policy.json").write_text("{}")
    found = compare_runs(root, None, [1])
    assert of(found, "base").seconds_per_seed is None
    assert "unknown" in render.runs_table(found)


def with_a_fork(root: Path) -> Path:
    """base-s0, and a fork of it after the scores of round 1 that has evaluated one inherited round anew."""
    write_prompts(root)
    write_run_info(root, "base-s0", rounds=3)
    for round in range(3):
        write_round(root, "base-s0", round, parts=("rollout",))
    for round in range(4):
        evaluate(root, "base-s0", round, [round] * HELDOUT)
    write_run_info(root, "fork-s0", rounds=3, parent="base-s0", fork_round=1, fork_stage="score")
    write_round(root, "fork-s0", 2, parts=("rollout",))
    evaluate(root, "fork-s0", 1, [4] * HELDOUT)
    evaluate(root, "fork-s0", 2, [2] * HELDOUT)
    return root


def test_what_is_read_is_what_the_catalogue_shows(tmp_path: Path) -> None:
    """The rows of its views, those of forks too, from one query over the files themselves."""
    root = with_a_fork(tmp_path / "results")
    lineage = inherited(read_runs(root))
    with open_catalog(root) as catalog:
        shown = rows_of(catalog, "SELECT run, round, prompt_id, n, c FROM by_prompt ORDER BY ALL")
        lengths = rows_of(
            catalog, "SELECT run, round, sum(length) FROM seen_rollouts WHERE source = 'policy' GROUP BY ALL"
        )
    found = reading.evaluations(root, lineage)
    mine = [(r, n, p, *c) for r, rounds in found.items() for n, counts in rounds.items() for p, c in counts.items()]
    assert sorted(mine) == shown
    assert {run: list(rounds) for run, rounds in found.items()} == {"base-s0": [0, 1, 2, 3], "fork-s0": [0, 1, 2]}
    assert {c for _, c in found["fork-s0"][1].values()} == {4}
    every = [(run, round) for run in ("base-s0", "fork-s0") for round in range(5)]
    assert reading.sampled_tokens(root, lineage, every) == {(run, round): n for run, round, n in lengths}
    (root / "base-s0" / "r0001" / "evals.parquet").write_bytes(b"PAR1")
    with pytest.raises(RollwayError, match=r"r0001/evals\.parquet.*delete the damaged file"):
        reading.evaluations(root, lineage)


def test_stored_completions_cost_no_tokens(tmp_path: Path) -> None:
    a_run(tmp_path, "mixed", 1, 1)
    a_run(tmp_path, "stored", 1, 1)
    for run, sources in {"mixed-s0": ["policy", "offline", "expert", "policy"], "stored-s0": ["offline"] * 4}.items():
        for round in range(ROUNDS):
            made = [{**row, "source": sources[row["sample"]]} for row in rollout_rows(run, round)]
            write(tmp_path / run / f"r{round:04d}" / "p0" / "rollouts-000.parquet", made, "rollouts")
    found = compare_runs(tmp_path, None, [1])
    assert of(found, "mixed").tokens_per_seed == 3 * PROMPTS * 2 * ROUNDS
    assert of(found, "stored").tokens_per_seed == 0


def test_mistakes_are_one_sentence(results: Path, tmp_path: Path) -> None:
    with pytest.raises(RollwayError, match=r"--baseline bsae: .*did you mean base\?"):
        compare_runs(results, "bsae", None)
    with pytest.raises(RollwayError, match="has 4 samples of some prompt; lower --k"):
        compare_runs(results, None, [1, 8])
    with pytest.raises(RollwayError, match="at least 1"):
        compare_runs(results, None, [0])
    with pytest.raises(RollwayError, match="no run is evaluated yet"):
        compare_runs(tmp_path, None, None)
    write_run_info(tmp_path, "a-s0")
    write_run_info(tmp_path, "a-s1")
    evaluate(tmp_path, "a-s0", 1, [1, 1])
    evaluate(tmp_path, "a-s1", 1, [1, 1], prompt="other")
    with pytest.raises(RollwayError, match="different prompts in round 1"):
        compare_runs(tmp_path, None, None)


def test_the_command_writes_tables_rows_and_curves(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["compare", "--results", str(results), "--baseline", "base", "--k", "1"]
    assert main([*given, "--svg", str(tmp_path / "curves.svg")]) == 0
    text = capsys.readouterr().out
    assert "Holm-corrected for 4 comparisons" in text
    assert "left out: waiting: not evaluated yet" in text
    picture = ElementTree.parse(tmp_path / "curves.svg").getroot()
    assert len([e for e in picture.iter() if e.get("class", "").startswith("band")]) == 5
    assert main([*given, "--format", "csv"]) == 0
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [line["name"] for line in lines] == ["base", "down", "few", "like", "up"]
    assert main([*given, "--format", "json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert list(records[0]) == runs.rows(compare_runs(results, "base", [1])).column_names
    assert main(["compare", "--results", str(results), "--baseline", "none"]) == 1
