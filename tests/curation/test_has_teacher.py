"""`has_teacher`: SQL of a method with `curate.teacher` sees of which rollouts the teacher has something to say."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from curation.test_teacher import COLUMNS, SCORE, files, rollout
from rollway.config.curation import CurateConfig
from rollway.config.recipes import load_recipe
from rollway.config.scorers import ScoreConfig
from rollway.curation import check_method, curate_files
from rollway.errors import RollwayError
from rollway.store import parquet
from rollway.store.tables import TABLES


def told(root: Path, given: list[dict[str, float]]) -> dict[str, Any]:
    """One round of a group of four, the first of which is right; the teacher's components are given."""
    made = files(root, 1, 1)
    rows = [
        {"rollout_id": rollout(0, 0, s)["rollout_id"], "scorer": "wise", "reward": 0.0, "components": list(c.items())}
        | {name: ([-1.0] if "topk" not in name else [[-1.0]]) if c.get("given") else None for name in COLUMNS[:1]}
        for s, c in enumerate(given)
    ]
    table = pa.Table.from_pylist(rows, schema=TABLES["scores"].schema(COLUMNS[:1]))
    parquet.write_groups(made["scores"]["wise"][0], iter([table]), "scores", COLUMNS[:1])
    return made


def config(**given: Any) -> CurateConfig:
    return CurateConfig.model_validate({"teacher": "wise", **given})


def test_routes_of_srpo_from_files(tmp_path: Path) -> None:
    """Component `given`, whatever the teacher's reward is; a row that failed has none."""
    made = told(tmp_path, [{"given": 1.0}, {"given": 1.0}, {"given": 0.0}, {}])
    found = curate_files(**made, score=SCORE, curate=config(route={"sql": "srpo"}))
    assert found.batch.column("route").to_pylist() == ["policy", "distill", "policy", "policy"]
    assert found.metrics["route_distill_share"] == 0.25
    kept = curate_files(**made, score=SCORE, curate=config(filter={"sql": "has_teacher"}))
    assert kept.batch.column("rollout_id").to_pylist() == ["0-0-0", "0-0-1"]


def test_without_a_teacher_there_is_no_such_column() -> None:
    recipe = load_recipe("sdpo")
    check_method(recipe)
    alone = recipe.model_copy(update={"curate": CurateConfig.model_validate({"filter": {"sql": "has_teacher"}})})
    with pytest.raises(RollwayError, match="has_teacher"):
        check_method(alone)


def test_no_scorer_takes_its_name() -> None:
    with pytest.raises(ValueError, match="cannot be called 'has_teacher'"):
        ScoreConfig.model_validate({"scorers": {"has_teacher": {"kind": "exact"}, "exact": {"kind": "exact"}}})
