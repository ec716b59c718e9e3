"""Parents of derived passes, and derived rows in curation: which there are, and what counts them."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from rollway.config.curation import CurateConfig, SqlPart
from rollway.config.rollouts import Derive
from rollway.config.scorers import ScoreConfig
from rollway.curation import curate, curate_files, parents
from rollway.errors import RollwayError
from rollway.runtime.specs import STAGE_VERSION, CurateSpec
from rollway.stages import curate as stage
from rollway.store import parquet
from rollway.store.tables import DERIVED, ROLLOUTS, TABLES

SCORE = ScoreConfig.model_validate({"scorers": {"exact": {"kind": "exact"}, "form": {"kind": "exact"}}})
ADDED = ("train_prompt_tokens", "prefix_length")


def derive(**given: Any) -> Derive:
    return Derive.model_validate(
        {"name": "revision", "parents": {"sql": "each"}, "context": [{"prefix": "{completion}"}]} | given
    )


class Files:
    """Two groups of three; group b has no right rollout; both have derived rollouts in pass 1 where asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.rollouts: list[Path] = []
        self.scores: dict[str, list[Path]] = {"exact": [], "form": []}
        rows = [self.row(f"{g}{n}", g, n, "policy", 0) for g in "ba" for n in range(3)]
        self.add("p0", rows, {"a0": 1.0, "a1": 0.5})

    def row(self, name: str, group: str, sample: int, source: str, number: int, **more: Any) -> dict[str, Any]:
        length = 2 + sample
        return {
            **{"rollout_id": name, "round": 3, "pass": number, "policy": "p", "policy_round": 3, "group_id": group},
            **{"prompt_id": f"p{group}", "sample": sample, "source": source, "finish": "stop", "length": length},
            **{"engine": "e", "sampling": "{}", "prompt_tokens": [1, 2, 3], "tokens": [3] * length},
            **{"logprobs": [-1.0] * length, "train_mask": [True] * length, "segments": [], "text": "t", **more},
        }

    def add(self, name: str, rows: list[dict[str, Any]], right: dict[str, float]) -> None:
        made = any("prefix_length" in row for row in rows)
        table = pa.Table.from_pylist(rows, ROLLOUTS.schema(ADDED if made else ()))
        self.rollouts.append(self.root / f"{name}.parquet")
        parquet.write(self.rollouts[-1], table, "rollouts", {DERIVED: "revision"} if made else {})
        for scorer, files in self.scores.items():
            verdicts = [
                {"rollout_id": r["rollout_id"], "scorer": scorer, "components": {}}
                | {"reward": right.get(r["rollout_id"], 0.0) if scorer == "exact" else 0.25}
                for r in rows
            ]
            files.append(self.root / f"{name}-{scorer}.parquet")
            parquet.write(files[-1], pa.Table.from_pylist(verdicts, TABLES["scores"].schema()), "scores")

    def revise(self) -> None:
        rows = [
            self.row(f"r{g}{n}", g, 3 + n, "revision", 1, parent_id=f"{g}{n}", prefix_length=n + 1)
            for g in "ab"
            for n in range(3)
        ]
        self.add("p1", rows, {"rb1": 1.0, "ra0": 1.0})

    def parents(self, part: Derive, **given: Any) -> parents.Parents:
        read = parents.scorers_of(SCORE, given.get("reward"), part, {"round": 3, "seed": 0})
        return parents.parents_in_files(
            self.rollouts,
            {name: self.scores[name] for name in read.scorers},
            read,
            given.get("reward"),
            part,
            round=3,
            prompts=[],
            given={"round": 3, "seed": 0},
        )


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_parents_come_in_the_order_of_scored(files: Files) -> None:
    found = files.parents(derive())
    assert found.chosen == ["a0", "a1", "a2", "b0", "b1", "b2"]
    assert found.scored.to_pydict() == {
        "rollout_id": found.chosen,
        "group_id": [*"aaabbb"],
        "prompt_id": ["pa"] * 3 + ["pb"] * 3,
        "sample": [0, 1, 2] * 2,
        "correct": [True] + [False] * 5,
        "exact": [1.0, 0.5, 0.0, 0.0, 0.0, 0.0],
    }


def test_parents_by_sql_on_rewards_that_curation_shapes(files: Files, tmp_path: Path) -> None:
    (tmp_path / "low.sql").write_text("-- The low ones.\nSELECT rollout_id FROM scored WHERE reward < 0 AND form > 0\n")
    part = derive(parents={"sql": str(tmp_path / "low.sql")})
    assert sorted(parents.scorers_of(SCORE, None, part).scorers) == ["exact", "form"]
    assert files.parents(part).chosen == []
    assert files.parents(part, reward=SqlPart(sql="threshold", threshold=0.7, below=-1.0)).chosen == [
        *("a1", "a2", "b0", "b1", "b2")
    ]


def test_scorers_that_contexts_name_are_read() -> None:
    assert [*parents.scorers_of(SCORE, None, derive()).scorers] == ["exact"]
    named = derive(context=[{"prefix": "{completion} {scores.form}"}])
    assert [*parents.scorers_of(SCORE, None, named).scorers] == ["exact", "form"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SELECT rollout_id FROM scored WHERE judge > 0", 'Referenced column "judge" not found'),
        ("SELECT rollout_id, reward FROM scored", "returns reward, which nothing reads after a parents step"),
        ("-- param k: int, k\nSELECT rollout_id FROM scored WHERE sample < $k", "rollout.derive.parents.k: is missing"),
        ("SELECT group_id AS rollout_id FROM scored", None),
    ],
)
def test_files_are_tried_before_any_job(tmp_path: Path, text: str, message: str | None) -> None:
    (tmp_path / "mine.sql").write_text(text)
    part = derive(parents={"sql": str(tmp_path / "mine.sql")})
    if message is None:
        parents.check(SCORE, None, part)
        return
    with pytest.raises(RollwayError, match=message):
        parents.check(SCORE, None, part)


def test_parents_that_are_not_there(files: Files, tmp_path: Path) -> None:
    (tmp_path / "mine.sql").write_text("SELECT group_id AS rollout_id FROM scored WHERE sample = 0")
    with pytest.raises(RollwayError, match="rows that are not in `scored`"):
        files.parents(derive(parents={"sql": str(tmp_path / "mine.sql")}))


def test_figures_of_a_round_leave_derived_rows_out(files: Files) -> None:
    config = CurateConfig.model_validate({"advantage": {"sql": "grpo"}})
    before = curate_files(files.rollouts, files.scores, SCORE, config, round=3).metrics
    files.revise()
    after = curate_files(files.rollouts, files.scores, SCORE, config, round=3)
    for name in ("rollouts", "groups", "reward_mean", "reward_std", "correct_share", "groups_none_correct", "passes"):
        assert after.metrics[name] == before[name], name
    assert after.metrics["derived_revision_rollouts"] == 6.0
    assert after.metrics["derived_revision_reward_mean"] == pytest.approx(1 / 3)
    assert after.metrics["derived_revision_correct_share"] == pytest.approx(1 / 3)
    assert (after.metrics["batch_rows"], after.metrics["kept_share"]) == (12.0, 1.0)
    assert after.batch.column("group_id").to_pylist() == ["a"] * 6 + ["b"] * 6


def test_self_revision_training_rows(files: Files, tmp_path: Path) -> None:
    """SD-Zero, eq. 1 to 4: right revisions alone, each twice; weights make one mean the sum of two."""
    files.revise()
    spec = CurateSpec(
        version=STAGE_VERSION["curate"],
        seed=0,
        round=3,
        score=SCORE,
        curate=CurateConfig.model_validate({"filter": {"sql": "srt"}, "weight": {"sql": "srt"}}),
    )
    stage.run(
        spec,
        prompts=tmp_path / "none",
        rollouts=files.rollouts,
        scores=[path for paths in renamed(files, tmp_path).values() for path in paths],
        batch=tmp_path / "batch.parquet",
        metrics=tmp_path / "curate.json",
    )
    rows = parquet.read(tmp_path / "batch.parquet").to_pylist()
    # ra0: 5 tokens behind a prefix of 1; rb1: 6 tokens behind one of 2.
    assert [(r["rollout_id"], r["span"], r["slot"]) for r in rows] == [
        ("ra0", "turn", 0),
        ("ra0", "completion", 1),
        ("rb1", "turn", 0),
        ("rb1", "completion", 1),
    ]
    whole = 11 + 14
    assert [r["weight"] for r in rows] == [whole / 14, whole / 11, whole / 14, whole / 11]


def renamed(files: Files, root: Path) -> dict[str, list[Path]]:
    """Score files as the workflow calls them."""
    out: dict[str, list[Path]] = {}
    for scorer, paths in files.scores.items():
        for number, path in enumerate(paths):
            target = root / f"scores/{scorer}-{number:03d}.parquet"
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(path.read_bytes())
            out.setdefault(scorer, []).append(target)
    return out


def test_without_the_filter_the_data_are_others(files: Files, tmp_path: Path) -> None:
    files.revise()
    (tmp_path / "all.sql").write_text("-- Wrong ones too.\nSELECT rollout_id FROM scored WHERE prefix_length > 0\n")
    rows = []
    for sql in ("srt", str(tmp_path / "all.sql")):
        config = CurateConfig.model_validate({"filter": {"sql": sql}, "weight": {"sql": "srt"}})
        rows.append(curate_files(files.rollouts, files.scores, SCORE, config, round=3).batch.num_rows)
    assert rows == [4, 12]


def test_no_right_revision_leaves_no_rows(files: Files) -> None:
    rows = [files.row("ra0", "a", 3, "revision", 1, parent_id="a0", prefix_length=1)]
    files.add("p1", rows, {"ra0": 0.5})  # Half right is wrong.
    config = CurateConfig.model_validate({"filter": {"sql": "srt"}, "weight": {"sql": "srt"}})
    assert curate_files(files.rollouts, files.scores, SCORE, config, round=3).batch.num_rows == 0


def test_a_span_survives_sql_that_runs_on_slices(files: Files, tmp_path: Path) -> None:
    """Rows of pass 0 alone would run on slices, whose batch has no such column."""
    (tmp_path / "w.sql").write_text(
        "-- All of the turn.\nSELECT rollout_id, 1.0 AS weight, 'turn' AS span FROM scored\n"
    )
    config = CurateConfig.model_validate({"weight": {"sql": str(tmp_path / "w.sql")}})
    made = curate_files(files.rollouts, files.scores, SCORE, config, round=3).batch
    assert set(made.column("span").to_pylist()) == {"turn"}
    scored = pa.table({"rollout_id": ["a"], "group_id": ["g"], "sample": [0], "reward": [1.0]})
    assert curate(scored, config).column("span").to_pylist() == ["turn"]
