"""A teacher's columns in the batch: beside the rows that SQL chose, from files of several rounds and row groups."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rollway.config.base import ConfigError
from rollway.config.curation import CurateConfig
from rollway.config.recipes import load_recipe
from rollway.config.scorers import ScoreConfig
from rollway.curation import curate, curate_files
from rollway.curation import teacher as module
from rollway.errors import RollwayError
from rollway.store import parquet
from rollway.store.tables import TABLES, TEACHER_COLUMNS

SCORE = ScoreConfig.model_validate(
    {"scorers": {"exact": {"kind": "exact"}, "wise": {"kind": "teacher", "model": {"kind": "policy"}, "top_k": 2}}}
)
COLUMNS = [*TEACHER_COLUMNS[:4]]


def rollout(round: int, group: int, sample: int) -> dict[str, Any]:
    length = 1 + (3 * group + sample) % 4
    return {
        **{"rollout_id": f"{round}-{group}-{sample}", "round": round, "pass": 0, "policy": "p", "policy_round": round},
        **{"group_id": f"{round}-{group}", "prompt_id": "p", "sample": sample, "source": "policy", "finish": "stop"},
        **{"length": length, "engine": "test", "sampling": "{}", "prompt_tokens": [1], "tokens": [2] * length},
        **{"logprobs": [-0.5] * length, "train_mask": [True] * length, "segments": [], "text": "t"},
    }


def said(row: dict[str, Any], right: bool) -> dict[str, Any]:
    """What depends on the rollout alone; of group 1 nothing is said."""
    core = {"rollout_id": row["rollout_id"], "scorer": "wise", "reward": -1.0, "components": {}}
    if row["group_id"].endswith("-1"):
        return {**core, **dict.fromkeys(COLUMNS)}
    at = np.array([row["round"], int(row["group_id"][2:]), row["sample"]]) @ [100, 10, 1]
    values = [float(-at - t) for t in range(row["length"])]
    ids, logprobs = [[int(at), t] for t in range(row["length"])], [[v, v - 1] for v in values]
    return {**core, **dict(zip(COLUMNS, (values, [-v for v in values], ids, logprobs), strict=True))}


def files(root: Path, rounds: int, groups: int, columns: list[str] = COLUMNS) -> dict[str, Any]:
    """Of 4 samples the first is right. Score files of 3 rows a row group, in another order than the batch."""
    rollouts, exact, wise = [], [], []
    for r in range(rounds):
        rows = [rollout(r, g, s) for g in reversed(range(groups)) for s in range(4)]
        folder = root / f"r{r:04d}"
        rollouts.append(folder / "rollouts.parquet")
        parquet.write(rollouts[-1], pa.Table.from_pylist(rows, schema=TABLES["rollouts"].schema()), "rollouts")
        right = [
            {"rollout_id": w["rollout_id"], "scorer": "exact", "reward": float(w["sample"] == 0), "components": {}}
            for w in rows
        ]
        exact.append(folder / "exact.parquet")
        parquet.write(exact[-1], pa.Table.from_pylist(right, schema=TABLES["scores"].schema()), "scores")
        table = pa.Table.from_pylist([said(w, w["sample"] == 0) for w in rows], schema=TABLES["scores"].schema(columns))
        wise.append(folder / "wise.parquet")
        parts = (table.slice(start, 3) for start in range(0, len(table), 3))
        parquet.write_groups(wise[-1], parts, "scores", columns)
    return {"rollouts": rollouts, "scores": {"exact": exact, "wise": wise}, "round": rounds - 1}


def config(**given: Any) -> CurateConfig:
    return CurateConfig.model_validate({"advantage": {"sql": "grpo"}, "teacher": "wise", **given})


@pytest.mark.parametrize("at_once", [1, 60, 2**24])
def test_each_row_has_its_own_columns(tmp_path: Path, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NUMBERS_AT_ONCE", at_once)
    found = curate_files(**files(tmp_path, 2, 3), score=SCORE, curate=config(replay=1))
    assert found.batch.schema.equals(TABLES["batch"].schema(COLUMNS))
    rows = found.batch.to_pylist()
    assert len(rows) == 24
    for row in rows:
        round, group, sample = map(int, row["rollout_id"].split("-"))
        expected = said(rollout(round, group, sample), sample == 0)
        assert [row[name] for name in COLUMNS] == [expected[name] for name in COLUMNS]
    assert found.metrics["teacher_share"] == pytest.approx(2 / 3)


def test_the_rest_of_the_batch_is_what_it_is_without_a_teacher(tmp_path: Path) -> None:
    given = files(tmp_path, 1, 3)
    plain = curate_files(**given, score=SCORE, curate=CurateConfig.model_validate({"advantage": {"sql": "grpo"}}))
    taught = curate_files(**given, score=SCORE, curate=config())
    assert taught.batch.select(plain.batch.column_names).equals(plain.batch)
    assert {k: v for k, v in taught.metrics.items() if k != "teacher_share"} == plain.metrics


def test_repeats_have_them_each(tmp_path: Path) -> None:
    given = files(tmp_path, 1, 2)
    found = curate_files(
        **given,
        score=SCORE,
        curate=config(weight={"sql": "pf_ppo", "keep": "bw"}, select={"sql": "resample"}),
        given={"seed": 0, "round": 0},
    )
    rows = found.batch.to_pylist()
    assert max(row["slot"] for row in rows) > 0, "some rollout is drawn twice"
    for row in rows:
        round, group, sample = map(int, row["rollout_id"].split("-"))
        assert row["teacher_logprob"] == said(rollout(round, group, sample), True)["teacher_logprob"]


def test_a_batch_without_rows(tmp_path: Path) -> None:
    sql = tmp_path / "none.sql"
    sql.write_text("-- None.\nSELECT rollout_id FROM scored WHERE reward > 5\n")
    found = curate_files(**files(tmp_path, 1, 2), score=SCORE, curate=config(filter={"sql": str(sql)}))
    assert found.batch.schema.equals(TABLES["batch"].schema(COLUMNS))
    assert (found.batch.num_rows, "teacher_share" in found.metrics) == (0, False)


def test_scored_rows_may_bring_the_columns(tmp_path: Path) -> None:
    rows = [{**rollout(0, 0, s), **said(rollout(0, 0, s), False), "reward": float(s)} for s in range(4)]
    scored = pa.Table.from_pylist(rows)
    batch = curate(scored, config())
    assert batch.column("teacher_logprob").to_pylist() == [row["teacher_logprob"] for row in rows]
    with pytest.raises(RollwayError, match=r"curate.teacher: the scored rows have none of the columns teacher_logprob"):
        curate(scored.drop_columns(COLUMNS), config())


def test_files_of_something_else(tmp_path: Path) -> None:
    given = files(tmp_path, 1, 2)
    given["scores"]["wise"] = given["scores"]["exact"]
    with pytest.raises(
        RollwayError, match=r"exact.parquet: has no column teacher_logprob.* which curate.teacher: wise"
    ):
        curate_files(**given, score=SCORE, curate=config())
    fewer = files(tmp_path / "fewer", 2, 2)
    fewer["scores"]["wise"][1] = files(tmp_path / "other", 2, 2, COLUMNS[:1])["scores"]["wise"][1]
    with pytest.raises(
        RollwayError, match=r"other/r0001/wise.parquet: has no column teacher_entropy, teacher_topk_ids"
    ):
        curate_files(**fewer, score=SCORE, curate=config(replay=1))


def test_sql_reads_the_mean_log_prob_of_what_the_policy_wrote(tmp_path: Path) -> None:
    row = {**rollout(0, 0, 3), "length": 4, "tokens": [2] * 4, "logprobs": [-1.0, -2.0, -9.0, -4.5]}
    row["train_mask"] = [True, True, False, True]
    given = files(tmp_path, 1, 1)
    rows = [*(rollout(0, 0, s) for s in range(3)), row]
    parquet.write(given["rollouts"][0], pa.Table.from_pylist(rows, schema=TABLES["rollouts"].schema()), "rollouts")
    sql = tmp_path / "own.sql"
    sql.write_text("-- Own.\nSELECT rollout_id, -mean_logprob AS weight FROM scored\n")
    found = curate_files(**given, score=SCORE, curate=config(weight={"sql": str(sql)}))
    assert found.batch.column("weight").to_pylist() == [0.5, 0.5, 0.5, 2.5]


def test_wrong_ones_to_the_teacher(tmp_path: Path) -> None:
    """Group 1 has no teacher: what is routed to it there is refused by name."""
    given = files(tmp_path, 1, 1)
    found = curate_files(**given, score=SCORE, curate=config(route={"sql": "wrong_to_teacher"}))
    assert found.batch.column("route").to_pylist() == ["policy", "distill", "distill", "distill"]
    assert (found.metrics["route_policy_share"], found.metrics["route_distill_share"]) == (0.25, 0.75)
    given = files(tmp_path, 1, 2)
    with pytest.raises(RollwayError, match=r"sends rollout 0-1-1 to distill, and scorer wise has no teacher .*3 rows"):
        curate_files(**given, score=SCORE, curate=config(route={"sql": "wrong_to_teacher"}))


TAUGHT = {
    "score": {
        "scorers": {"exact": {"kind": "exact"}, "wise": {"kind": "teacher", "model": {"kind": "policy", "age": 1}}},
        "reward": {"exact": 1.0},
    },
    "curate": {"teacher": "wise"},
    "train": {"objective": {"distill": {}}},
}


def changed(**given: Any) -> dict[str, Any]:
    from rollway.config.base import deep_merge

    return deep_merge(TAUGHT, given)


def test_training_and_curation_agree() -> None:
    load_recipe("grpo", TAUGHT)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"curate": {"teacher": None}},
            r"reads teacher_logprob of a teacher, and the batch has none: set curate.teacher",
        ),
        ({"curate": {"teacher": "exact"}}, r"'exact' is not a scorer of kind teacher in score.scorers \(wise\)"),
        ({"train": {"objective": {"distill": None}}}, "curate.teacher: has no effect"),
        (
            {"train": {"objective": {"distill": {"estimate": {"kind": "topk", "k": 4}}}}},
            r"wise.top_k: training reads the 4 likeliest tokens, and 0 are stored",
        ),
        (
            {
                "train": {"objective": {"distill": {"emphasis": "entropy_weight"}}},
                "score": {"scorers": {"wise": {"entropy": False}}},
            },
            r"wise.entropy: training reads it",
        ),
        (
            {"score": {"scorers": {"wise": {"temperature": 0.5}}}},
            r"wise.temperature: 0.5 differs from rollout.sampling",
        ),
        (
            {"score": {"scorers": {"wise": {"model": {"kind": "live"}, "context": [{"prefix": "a"}]}}}},
            "stores no teacher_logprob",
        ),
    ],
)
def test_training_and_curation_disagree(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_recipe("grpo", changed(**given))
