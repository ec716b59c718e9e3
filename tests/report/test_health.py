"""Each check of the health page: what it says of a run that is well, and of one that is not."""

import json
import math

import numpy as np
import pytest

from report.page import Page
from rollway.report import health, symptoms
from rollway.report.build import build
from rollway.report.data import Point
from store import synthetic


def points(**metrics):
    """{"curate/reward_mean": [values by round]}, of a run called r."""
    found = {}
    for name, values in metrics.items():
        stage, _, metric = name.partition("__")
        found[stage, metric] = {"r": [Point(i, v) if isinstance(v, float) else v for i, v in enumerate(values)]}
    return found


@pytest.mark.parametrize(
    ("judge", "given", "level", "words"),
    [
        (health.signal, {"curate__groups_with_signal_share": [0.9, 0.8, 0.7, 0.7]}, "good", "30% of the groups"),
        (health.signal, {"curate__groups_with_signal_share": [0.9, 0.8, 0.5, 0.4]}, "watch", "at the start 10%"),
        (health.signal, {"curate__groups_with_signal_share": [0.1]}, "bad", "In the last round 90%"),
        (health.entropy, {"train__entropy_old": [1.0, 0.9, 0.8, 0.7]}, "good", "from 1 to 0.7 nats"),
        (health.entropy, {"train__entropy_old": [1.0, 0.9, 0.5, 0.3]}, "watch", "hardly differ"),
        (health.entropy, {"train__entropy": [1.0, 0.01]}, "bad", "from 1 to 0.01"),
        (health.length, {"curate__length_mean": [10.0, 40.0], "curate__reward_mean": [0.1, 0.5]}, "good", "to 40"),
        (
            health.length,
            {"curate__length_mean": [10.0, 14.0], "curate__reward_mean": [0.5, 0.5]},
            "watch",
            "earn nothing",
        ),
        (
            health.length,
            {"curate__length_mean": [10.0, 40.0], "curate__reward_mean": [0.5, 0.4]},
            "bad",
            "earn nothing",
        ),
        (health.truncated, {"curate__truncated_share": [0.0, 0.05]}, "good", "5.0%"),
        (health.truncated, {"curate__truncated_share": [0.0, 0.5]}, "bad", "max_tokens"),
        (health.mismatch, {"train__gap_mean": [1e-6, 2e-6]}, "good", "2e-06 nats"),
        (health.mismatch, {"train__gap_mean": [0.3, 0.01]}, "bad", "(round 0)"),
        (health.clipped, {"train__clip_share": [0.1, 0.4]}, "watch", "40.0%"),
        (health.gradient, {"train__grad_norm": [1.0, 1.0, 2.0]}, "good", "Median norm 1"),
        (health.gradient, {"train__grad_norm": [1.0, 1.0, 200.0]}, "bad", "in round 2"),
        (health.heldout, {"evaluate__pass@1": [0.2, 0.5]}, "good", "from 0.200 to 0.500"),
        (
            health.heldout,
            {"evaluate__pass@1": [Point(0, 0.5, 0.4, 0.6), Point(9, 0.8, 0.7, 0.9), Point(18, 0.65, 0.6, 0.7)]},
            "watch",
            "best 0.800 in round 9",
        ),
        (
            health.heldout,
            {"evaluate__pass@1": [Point(0, 0.5, 0.4, 0.6), Point(9, 0.1, 0.05, 0.2)]},
            "bad",
            "worse than the one it started from",
        ),
    ],
)
def test_judgements_of_curves(judge, given, level, words):
    found = judge("r", points(**given))
    assert found is not None
    assert found[0] == level, found
    assert words in found[1]


@pytest.mark.parametrize("judge", [judge for _, _, judge in health.OF_CURVES])
def test_nothing_is_said_where_nothing_is_known(judge):
    assert judge("r", {}) is None


def page_of(folder):
    build(folder, folder / "report.html")
    return Page(folder / "report.html")


def test_a_leak_between_train_and_held_out(tmp_path):
    synthetic.make_results(tmp_path, {"grpo-s0": 1})
    found = page_of(tmp_path).check("Leak")
    assert found["level"] == "bad", "the synthetic splits ask the same"
    assert (
        "Task add: 3 of 3 held-out prompts are also in its train split; 0 of 3 train prompts repeat"
        in found["verdicts"][0][2]
    )
    assert found["verdicts"][1][:2] == ["grpo-s0", "bad"]
    assert "3 of the 3 prompts that it is evaluated on are among those of its rollouts" in found["verdicts"][1][2]


def write_task(folder, task, **splits):
    """Splits: name -> {prompt_id: what the user says}."""
    for split, prompts in splits.items():
        rows = [
            {
                "prompt_id": name,
                "task": task,
                "split": split,
                "messages": json.dumps([{"role": "user", "content": text}]),
                "meta": "{}",
            }
            for name, text in prompts.items()
        ]
        synthetic.write(folder / f"tasks/{task}/{split}.parquet", rows, "prompts")


def a_run(folder):
    """Rollouts answer train-0 to train-2, evaluations heldout-0 to heldout-2."""
    synthetic.write_run_info(folder, "grpo-s0")
    synthetic.write_round(folder, "grpo-s0", 0)
    synthetic.write_evaluation(folder, "grpo-s0", 0)


def test_a_leak_from_another_tasks_train_split(tmp_path):
    """It is only worth a look, unless a run has sampled those prompts. A task without held-out prompts says nothing."""
    a_run(tmp_path)
    write_task(tmp_path, "add", train={f"train-{i}": f"{i}+{i}=" for i in range(3)})
    write_task(tmp_path, "add", heldout={f"heldout-{i}": f"{i}*{i}\n= " for i in range(3)})
    write_task(tmp_path, "more", train={"a": "1*1 =", "b": "5+5=", "c": "5+5="})
    found = page_of(tmp_path).check("Leak")
    more = "3 held-out prompts are also in its train split, 1 in that of more; 0 of 3 train prompts repeat another one."
    assert found["verdicts"] == [
        ["", "watch", f"Task add: 0 of {more}"],
        ["grpo-s0", "good", "0 of the 3 prompts that it is evaluated on are among those of its rollouts."],
    ]


@pytest.mark.parametrize("same", ["id", "wording"])
def test_held_out_prompts_that_a_run_samples(tmp_path, same):
    """In no train split, or with no prompt file at all: the rollouts tell."""
    a_run(tmp_path)
    if same == "wording":
        write_task(tmp_path, "add", heldout={f"heldout-{i}": f"What is {i}?" for i in range(3)}, train={"x": "y"})
        write_task(tmp_path, "imported", train={f"train-{i}": f"what  is {i + 1}?\n" for i in range(3)})
    else:
        rows = synthetic.rollout_rows("grpo-s0", 0)
        rows = [row | {"prompt_id": row["prompt_id"].replace("train-2", "heldout-2")} for row in rows]
        synthetic.write(tmp_path / "grpo-s0/r0000/p0/rollouts-000.parquet", rows, "rollouts")
        (tmp_path / "grpo-s0/r0000/p0/rollouts-001.parquet").unlink()
    found = page_of(tmp_path).check("Leak")
    count = 2 if same == "wording" else 1
    text = f"{count} of the 3 prompts that it is evaluated on are among those of its rollouts."
    assert ["grpo-s0", "bad", text] in found["verdicts"] and found["level"] == "bad"


def test_rollouts_that_repeat_each_other(tmp_path):
    synthetic.make_results(tmp_path, {"grpo-s0": 1})
    text = page_of(tmp_path).check("Duplicates")["verdicts"][0]
    # Three groups of four with one text, of which one rollout each is right: 3 of 4 repeat, and 2 of the 3 wrong ones.
    assert "75% of the rollouts repeat another of their group word for word" in text[2]
    assert "among the wrong ones 67%" in text[2]
    assert text[1] == "watch"


def test_scorers_in_conflict(tmp_path):
    synthetic.write_prompts(tmp_path)
    synthetic.write_run_info(tmp_path, "grpo-s0")
    synthetic.write_round(tmp_path, "grpo-s0", 0, parts=("rollout",))
    rows = synthetic.rollout_rows("grpo-s0", 0)
    for scorer, sign in (("exact", 1.0), ("brief", -1.0), ("flat", 0.0)):
        # The prompt's own level goes the same way in all scorers: only what differs within a group may count.
        scores = [
            {
                "rollout_id": r["rollout_id"],
                "scorer": scorer,
                "reward": sign * r["sample"] + 10.0 * (i // 4),
                "components": [],
            }
            for i, r in enumerate(rows)
        ]
        synthetic.write(tmp_path / f"grpo-s0/r0000/p0/scores/{scorer}-000.parquet", scores, "scores")
    found = page_of(tmp_path).check("Reward parts")
    assert found["level"] == "bad"
    assert "Within groups, brief and exact correlate by -1.00" in found["verdicts"][0][2]


@pytest.mark.parametrize("kind", ["python", "teacher"])
def test_parts_of_one_scorer_in_conflict(tmp_path, kind):
    """style and truth go against each other within groups; what is constant, alone or no number counts for nothing."""
    synthetic.write_prompts(tmp_path)
    scorers = {"judge": {"kind": kind}, "exact": {"kind": "exact"}}
    synthetic.write_run_info(tmp_path, "grpo-s0", config={"score": {"scorers": scorers}})
    synthetic.write_round(tmp_path, "grpo-s0", 0, parts=("rollout",))
    rows = synthetic.rollout_rows("grpo-s0", 0)
    noise = [0.3, -0.1, 0.2, 0.05]
    parts = [
        {
            "style": row["sample"] + 10.0 * (i // 4),
            "truth": -row["sample"] + noise[row["sample"]] * (1 + i // 4) + 10.0 * (i // 4),
            "flat": 0.1,
            "none": math.nan,
        }
        for i, row in enumerate(rows)
    ]
    for scorer, given in (("judge", parts), ("exact", [{"alone": float(row["sample"])} for row in rows])):
        scores = [
            {"rollout_id": row["rollout_id"], "scorer": scorer, "reward": 1.0, "components": list(part.items())}
            for row, part in zip(rows, given, strict=True)
        ]
        synthetic.write(tmp_path / f"grpo-s0/r0000/p0/scores/{scorer}-000.parquet", scores, "scores")
    found = page_of(tmp_path).check("Reward parts")
    if kind == "teacher":
        assert found["verdicts"] == [] and found["unknown"] == ["grpo-s0"]
        return
    table = np.array([[part["style"], part["truth"]] for part in parts]).reshape(3, 4, 2)
    centred = (table - table.mean(axis=1, keepdims=True)).reshape(12, 2)
    expected = np.corrcoef(centred.T)[0, 1]
    assert found["level"] == "bad"
    text = f"Within groups, judge: style and judge: truth correlate by {expected:+.2f}."
    assert text in found["verdicts"][0][2]
    assert "Rollouts that judge: style rewards are those that judge: truth punishes." in found["verdicts"][0][2]


def test_ends_are_quarters():
    series = [Point(i, float(i)) for i in range(8)]
    assert health.ends(series) == (0.5, 6.5, 2)
    assert health.ends(series[:1]) == (0.0, 0.0, 1)


def test_no_scorer_no_correlation():
    assert symptoms.correlations(None, []) == {}
    assert symptoms.scorer_errors(None, []) == []
