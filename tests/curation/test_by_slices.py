"""Regular files by slices of groups: the same bits as DuckDB's own windows over all rows, from any number of threads;
everything else is left to the general path."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from rollway.config.assets import folder
from rollway.config.curation import STEP_FOLDERS, CurateConfig
from rollway.config.scorers import ScoreConfig
from rollway.curation import Curated, by_slices, curate_files, curate_into, regular
from rollway.curation.group_sql import group_sql
from rollway.curation.group_windows import FUNCTIONS, Groups, Values
from rollway.curation.memory import limit_bytes
from rollway.curation.sql_file import parse
from rollway.errors import RollwayError
from rollway.store.parquet import write, write_parts

SCORE = ScoreConfig.model_validate(
    {
        "scorers": {"exact": {"kind": "exact"}, "judge": {"kind": "length", "limit": 20, "cache": 4}},
        "reward": {"judge": 0.3, "exact": 1.0},
    }
)
Files = tuple[list[Path], dict[str, list[Path]]]


def rollout_table(groups: list[str], sizes: list[int], rng: np.random.Generator, number: int) -> pa.Table:
    names = [name for name, size in zip(groups, sizes, strict=True) for _ in range(size)]
    samples = [sample for size in sizes for sample in range(size)]
    rows = len(names)
    ids = [f"{name}-{sample:04d}" for name, sample in zip(names, samples, strict=True)]
    text = {name: ["x"] * rows for name in ("policy", "engine", "sampling", "text", "prompt_id")}
    lists = {name: [[1]] * rows for name in ("prompt_tokens", "tokens")}
    return pa.table(
        {
            **text,
            **lists,
            "rollout_id": pa.array(ids, pa.string()),
            "group_id": pa.array(names, pa.string()),
            "round": pa.array([number] * rows, pa.int32()),
            "pass": pa.array([0] * rows, pa.int32()),
            "policy_round": pa.array([number] * rows, pa.int32()),
            "sample": pa.array(samples, pa.int32()),
            "source": pa.array(np.where(rng.random(rows) < 0.05, "expert", "policy"), pa.string()),
            "finish": pa.array(np.where(rng.random(rows) < 0.3, "length", "stop"), pa.string()),
            "length": pa.array(rng.integers(1, 40, size=rows), pa.int32()),
            "logprobs": pa.array([[-0.5]] * rows, pa.list_(pa.float32())),
            "train_mask": [[True]] * rows,
            "segments": pa.array([[]] * rows, pa.list_(pa.struct([("start", pa.int32())]))).cast(pq_schema("segments")),
        }
    )


def pq_schema(column: str) -> pa.DataType:
    from rollway.store.tables import TABLES

    return TABLES["rollouts"].schema().field(column).type


def score_table(ids: pa.Array, scorer: str, rewards: np.ndarray) -> pa.Table:
    none = pa.array([[]] * len(ids), pa.map_(pa.string(), pa.float64()))
    return pa.table({"rollout_id": ids, "scorer": [scorer] * len(ids), "reward": rewards, "components": none})


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., Files]:
    """Two rounds of two shards, groups of 1 to 12; names of the second shard sort into those of the first."""

    def make(rows: int = 3000, **changed: Callable[[pa.Table], pa.Table]) -> Files:
        rng = np.random.default_rng(3)
        rollouts, scores = [], {"exact": [], "judge": []}
        for number in (0, 1):
            for shard in (0, 1):
                sizes = rng.integers(1, 13, size=rows // 26).tolist()
                names = [f"{'ba'[number]}-{i}{shard}" for i in range(10_000, 10_000 + len(sizes))]
                table = rollout_table(names, sizes, rng, number)
                exact = score_table(table["rollout_id"], "exact", rng.integers(0, 2, size=table.num_rows).astype(float))
                wide = 10.0 ** rng.integers(-6, 6, size=table.num_rows)
                judge = score_table(table["rollout_id"], "judge", rng.normal(size=table.num_rows) * wide)
                if shard:
                    table = changed.get("rollouts", lambda t: t)(table)
                    exact = changed.get("scores", lambda t: t)(exact)
                path = tmp_path / f"r{number}" / f"rollouts-{shard:03d}.parquet"
                rollouts.append(path)
                write(path, table, "rollouts")
                for name, verdicts in (("exact", exact), ("judge", judge)):
                    scores[name].append(tmp_path / f"r{number}" / f"{name}-{shard:03d}.parquet")
                    write(scores[name][-1], verdicts, "scores")
        return rollouts, scores

    return make


def curated(made: Files, threads: int = 2, **parts: Any) -> Curated:
    config = CurateConfig.model_validate({"replay": 1, **parts})
    return curate_files(*made, SCORE, config, round=1, threads=threads, given={"seed": 1, "round": 1})


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether calls were taken by slices; slices are small."""
    monkeypatch.setattr(by_slices, "ROWS_OF_A_SLICE", 500)
    taken: list[bool] = []
    real = by_slices.curate

    def call(*args: Any, **kwargs: Any) -> Any:
        found = real(*args, **kwargs)
        taken.append(found is not None)
        return found

    monkeypatch.setattr(by_slices, "curate", call)
    return taken


@pytest.fixture
def general(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Curated]:
    def call(made: Files, **parts: Any) -> Curated:
        with monkeypatch.context() as patch:
            patch.setattr(by_slices, "curate", lambda *args, **kwargs: None)
            return curated(made, **parts)

    return call


METHODS: list[dict[str, Any]] = [
    {"filter": {"sql": "informative_groups"}, "advantage": {"sql": "grpo"}},
    {"filter": {"sql": "drop_all_correct", "r_max": 0.5}, "advantage": {"sql": "grpo", "ddof": 0}},
    {"advantage": {"sql": "dr_grpo"}},
    {"advantage": {"sql": "rloo"}, "route": {"sql": "correctness"}},
    {"reward": {"sql": "threshold", "threshold": 0.1}, "advantage": {"sql": "group_mean"}, "route": {"sql": "source"}},
    {"filter": {"sql": "anchors_where_failing", "at_most": 0.2}, "advantage": {"sql": "psr_nsr"}},
    {"filter": {"sql": "not_truncated"}, "advantage": {"sql": "grpo"}, "select": {"sql": "not_truncated"}},
    {"reward": {"sql": "overlong", "limit": 30, "cache_share": 0.5}, "advantage": {"sql": "grpo"}},
    {"advantage": {"sql": "dr_grpo"}, "route": {"sql": "wrong_to_teacher"}},
    {"advantage": {"sql": "grpo"}, "route": {"sql": "gate", "tau": 0.5}},
    {"filter": {"sql": "correct_only"}},
    {"filter": {"sql": "wrong_only"}, "advantage": {"sql": "grpo"}},
]


@pytest.mark.parametrize("parts", METHODS, ids=lambda parts: "-".join(part["sql"] for part in parts.values()))
def test_the_same_bits_as_over_all_rows(
    files: Callable, spy: list[bool], general: Callable, parts: dict[str, Any]
) -> None:
    made = files()
    whole = general(made, **parts)
    for threads in (1, 2, 5):
        sliced = curated(made, threads, **parts)
        assert sliced.batch.equals(whole.batch)
        assert sliced.metrics == pytest.approx(whole.metrics, rel=1e-12, abs=1e-12)
    assert spy == [True] * 3
    assert whole.batch.num_rows > 100


def test_which_packaged_files_run_on_slices() -> None:
    """What looks beyond its group, repeats rollouts, or names them in texts does not."""
    sliced = {
        (step, path.stem)
        for step, name in STEP_FOLDERS.items()
        if step != "parents"  # Those run in the rollout stage.
        for path in (folder("sql") / name).glob("*.sql")
        if group_sql(parse(path, step, path.read_text())) is not None
    }
    assert sliced == {
        *(("advantage", name) for name in ("grpo", "dr_grpo", "group_mean", "rloo", "psr_nsr")),
        *(("filter", name) for name in ("informative_groups", "drop_all_correct", "correct_only", "wrong_only")),
        *(("filter", name) for name in ("not_truncated", "anchors_where_failing", "has_teacher")),
        *(("reward", name) for name in ("overlong", "threshold", "verdict")),
        ("weight", "by_source"),
        *(("route", name) for name in ("correctness", "source", "wrong_to_teacher", "srpo", "gate")),
        ("select", "not_truncated"),
    } | {("route", "domain"), ("route", "imitate"), ("advantage", "grpo_own")} | {
        ("filter", name) for name in ("sampled", "srt", "supervised")
    }


@pytest.mark.parametrize(
    "text",
    [
        "SELECT rollout_id, reward - (SELECT avg(reward) FROM scored) AS advantage FROM scored",
        "SELECT rollout_id, reward - avg(reward) OVER () AS advantage FROM scored",
        "SELECT rollout_id, sum(reward) OVER (PARTITION BY prompt_id) AS advantage FROM scored",
        "SELECT rollout_id, 1 AS advantage FROM scored ORDER BY reward LIMIT 3",
        "SELECT DISTINCT rollout_id, 1 AS advantage FROM scored",
        "SELECT rollout_id, sum(reward) AS advantage FROM scored GROUP BY rollout_id",
        "SELECT a.rollout_id, 1 AS advantage FROM scored a JOIN scored b USING (rollout_id)",
        "SELECT rollout_id, md5_number_lower(rollout_id)::DOUBLE AS advantage FROM scored",
        "SELECT rollout_id, length(group_id) AS advantage FROM scored",
        "SELECT rollout_id, row_number() OVER (PARTITION BY group_id ORDER BY rollout_id) AS advantage FROM scored",
        "WITH s AS (SELECT * FROM scored) SELECT rollout_id, 1 AS advantage FROM s",
        "SELECT group_id AS rollout_id, 1 AS advantage FROM scored",
        "SELECT rollout_id, unnest([1, 2]) AS advantage FROM scored",
        "SELECT rollout_id, 1 AS advantage FROM scored UNION ALL SELECT rollout_id, 1 FROM scored",
        "SELECT rollout_id, 1 AS advantage FROM scored WHERE reward > (SELECT 1)",
        "SELECT rollout_id, 1 AS advantage, * FROM scored",
    ],
)
def test_sql_that_may_look_further_does_not_run_on_slices(text: str) -> None:
    assert group_sql(parse(Path("mine.sql"), "advantage", text)) is None


@pytest.mark.parametrize(
    ("text", "lifted"),
    [
        ("SELECT rollout_id, avg(reward) OVER (PARTITION BY group_id) AS advantage FROM scored", 1),
        ("SELECT rollout_id, avg(reward) OVER (PARTITION BY group_id ORDER BY sample) AS advantage FROM scored", 0),
        (
            "SELECT rollout_id, avg(reward) OVER (PARTITION BY group_id ORDER BY reward ROWS BETWEEN UNBOUNDED "
            "PRECEDING AND UNBOUNDED FOLLOWING) AS advantage FROM scored",
            0,
        ),
        (
            "SELECT rollout_id, reward - avg(reward) OVER (PARTITION BY group_id) AS advantage FROM scored "
            "QUALIFY count(*) OVER (PARTITION BY group_id) > 3 AND row_number() OVER (PARTITION BY group_id ORDER BY "
            "reward, sample) < 3",
            2,
        ),
        ("SELECT rollout_id, sum(reward) OVER (PARTITION BY group_id) AS advantage FROM scored WHERE correct", 0),
        ("SELECT rollout_id, sum(length) OVER (PARTITION BY group_id) AS advantage FROM scored", 1),
        ("SELECT rollout_id, max(length) OVER (PARTITION BY group_id) / 7.0 AS advantage FROM scored", 1),
    ],
)
def test_windows_of_other_frames_stay_with_duckdb(
    files: Callable, spy: list[bool], general: Callable, tmp_path: Path, text: str, lifted: int
) -> None:
    path = tmp_path / "mine.sql"
    path.write_text(f"-- allows: drops\n{text}")
    form = group_sql(parse(path, "filter", text.replace(" AS advantage", "")))
    assert form is not None
    assert len(form.windows) == lifted
    path.write_text(text)
    parts = {"advantage": {"sql": str(path)}}
    if "WHERE" in text or "QUALIFY" in text:
        path.write_text(text.replace(text[17 : text.index(" FROM")], ""))
        parts = {"filter": {"sql": str(path)}}
    made = files()
    assert curated(made, **parts).batch.equals(general(made, **parts).batch)


@pytest.mark.parametrize("sizes", [[8] * 300, list(range(1, 60)), [1, 700, 2]])
def test_windows_have_the_bits_of_duckdb(sizes: list[int]) -> None:
    rng = np.random.default_rng(0)
    groups = Groups(np.array(sizes))
    rows = int(groups.sizes.sum())
    values = rng.normal(size=rows) * 10.0 ** rng.integers(-9, 9, size=rows)
    right = rng.integers(0, 2, size=rows).astype(bool)
    table = pa.table(
        {"g": groups.to_rows(np.arange(len(sizes))), "s": np.arange(rows), "value": values, "truth": right}
    )
    with duckdb.connect(config={"threads": 1}) as con:
        con.register("scored", table)
        for name, function in FUNCTIONS.items():
            column = "truth" if name.startswith("bool") else "value"
            window = "(PARTITION BY g ORDER BY s ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING)"
            theirs = con.sql(f"SELECT {name}({column}) OVER {window} AS v FROM scored ORDER BY s").to_arrow_table()
            ours = groups.to_rows(function(Values(right if column == "truth" else values, groups)))
            expected = theirs.column("v").to_numpy()
            assert np.array_equal(ours.astype(float), np.asarray(expected, float), equal_nan=True), name


def swapped(table: pa.Table) -> pa.Table:
    return table.take([1, 0, *range(2, table.num_rows)])


@pytest.mark.parametrize(
    "changed",
    [
        {"rollouts": swapped},
        {"scores": swapped},
        {"rollouts": swapped, "scores": swapped},
        {"scores": lambda t: pa.concat_tables([t, t.slice(0, 1).set_column(0, "rollout_id", pa.array(["other"]))])},
    ],
)
def test_irregular_files_give_the_same_batch(files: Callable, spy: list[bool], changed: dict) -> None:
    parts: dict[str, Any] = {"filter": {"sql": "informative_groups"}, "advantage": {"sql": "grpo"}}
    regular = curated(files(), **parts)
    other = curated(files(**changed), **parts)
    assert spy == [True, False]
    assert other.batch.equals(regular.batch)


def with_nan(table: pa.Table) -> pa.Table:
    rewards = table.column("reward").to_numpy().copy()
    rewards[0] = float("nan")
    return table.set_column(2, "reward", pa.array(rewards))


def test_mistakes_are_said_by_the_general_path(files: Callable, spy: list[bool], tmp_path: Path) -> None:
    grpo = {"advantage": {"sql": "grpo"}}
    made = files(scores=lambda t: t.slice(1))
    with pytest.raises(RollwayError, match=r"scorer exact: 2 rollouts have no score"):
        curated(made, **grpo)
    made = files(scores=with_nan)
    with pytest.raises(RollwayError, match=r"scorer exact: 2 scores are NaN"):
        curated(made, **grpo)
    rollouts, scores = files()
    with pytest.raises(RollwayError, match="occurs 8 times"):
        curated(([*rollouts, rollouts[0]], {name: [*paths, paths[0]] for name, paths in scores.items()}), **grpo)
    bad = tmp_path / "bad.sql"
    bad.write_text("SELECT rollout_id, 1 / (reward - reward) AS advantage FROM scored")
    with pytest.raises(RollwayError, match=r"bad\.sql: advantage is"):
        curated((rollouts, scores), advantage={"sql": str(bad)})
    assert not any(spy)


def test_refilled_rounds_are_cut_alike(files: Callable, spy: list[bool], general: Callable) -> None:
    later = {"rollouts": lambda t: t.set_column(t.schema.get_field_index("pass"), "pass", pa.array([1] * len(t)))}
    made = files(**later)
    parts: dict[str, Any] = {"filter": {"sql": "not_truncated"}, "advantage": {"sql": "grpo"}}
    sliced = curated(made, **parts)
    assert spy == [True]
    assert sliced.metrics["groups_surplus"] > 0
    whole = general(made, **parts)
    assert sliced.batch.equals(whole.batch)
    assert sliced.metrics == pytest.approx(whole.metrics, rel=1e-12, abs=1e-12)


def test_the_batch_comes_in_parts_whose_file_is_the_same(files: Callable, spy: list[bool], tmp_path: Path) -> None:
    config = CurateConfig.model_validate({"replay": 1, "advantage": {"sql": "grpo"}})
    made = files()
    written, metrics = set(), []
    for threads in (1, 2, 3):
        path = tmp_path / f"batch-{threads}.parquet"
        call = partial(write_parts, path, table="batch")
        metrics.append(curate_into(call, *made, SCORE, config, round=1, threads=threads))
        written.add(path.read_bytes())
    found = curate_files(*made, SCORE, config, round=1)
    write(tmp_path / "whole.parquet", found.batch, "batch")
    assert written == {(tmp_path / "whole.parquet").read_bytes()}
    assert metrics == [found.metrics] * 3


def test_a_batch_that_cannot_be_written_is_an_error(files: Callable, tmp_path: Path) -> None:
    (tmp_path / "batch.parquet").mkdir()
    config = CurateConfig.model_validate({"replay": 1, "advantage": {"sql": "grpo"}})
    call = partial(write_parts, tmp_path / "batch.parquet", table="batch")
    made = files()
    with pytest.raises(RollwayError, match="cannot be written"):
        curate_into(call, *made, SCORE, config, round=1)


def test_too_little_memory_is_one_sentence_and_leaves_nothing(files: Callable, tmp_path: Path) -> None:
    config = CurateConfig.model_validate({"replay": 1, "advantage": {"sql": "ngrpo"}})
    made, spill = files(60_000), tmp_path / "spill"
    with pytest.raises(RollwayError, match=r"Out of Memory.*more"):
        curate_into(list, *made, SCORE, config, round=1, memory_limit="3MB", spill_in=spill)
    assert list(spill.iterdir()) == []


def test_rows_beyond_the_memory_limit_are_left_to_duckdb(
    files: Callable, spy: list[bool], general: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """60,000 rows: 3.6 MB of ids, numbers and rewards, 5.8 MB while they are sorted; DuckDB needs more."""
    parts: dict[str, Any] = {"filter": {"sql": "informative_groups"}, "advantage": {"sql": "grpo"}}
    made, config = files(60_000), CurateConfig.model_validate({"replay": 1, **parts})
    limited = partial(curate_files, *made, SCORE, config, round=1, threads=2)
    sliced = limited(memory_limit="6MB")
    with pytest.raises(RollwayError, match="Out of Memory"):
        limited(memory_limit="5MB")
    assert spy == [True, False]
    monkeypatch.setattr(regular, "WHILE_SORTING", 20.0)
    assert limited(memory_limit="60MB").batch.equals(sliced.batch)
    assert limited(memory_limit="90MB").batch.equals(sliced.batch)
    assert spy == [True, False, False, True]
    assert general(made, **parts).batch.equals(sliced.batch)


@pytest.mark.parametrize("text", ["2000MB", "1.5GiB", "3kb", "7 B", "1TiB", "512KiB"])
def test_limits_are_read_as_duckdb_reads_them(text: str) -> None:
    with duckdb.connect() as con:
        (expected,) = con.execute("SELECT parse_formatted_bytes(?)", [text]).fetchone() or (None,)
    assert int(limit_bytes(text)) == expected
    assert limit_bytes("80%") == limit_bytes(None) == float("inf")
