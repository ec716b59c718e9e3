import os
import subprocess
import sys
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rollway.errors import RollwayError
from rollway.evaluation import pass_at_k
from rollway.store.atomic import write_json
from rollway.store.catalog import DATABASE, describe, open_catalog, write_database
from rollway.store.tables import TABLES
from rollway.store.views import documented
from store.synthetic import (
    GROUP,
    PROMPTS,
    make_results,
    rollout_rows,
    write,
    write_evaluation,
    write_round,
    write_run_info,
)

ROWS = PROMPTS * GROUP


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return make_results(tmp_path_factory.mktemp("a 'quoted' [x]=y*") / "results", {"a-s0": 2, "b-s0": 1})


def ask(results: Path, query: str):
    with open_catalog(results) as catalog:
        return catalog.execute(query).fetchall()


def test_base_views_take_run_and_round_from_the_path(results):
    assert ask(results, "SELECT run, round, count(*) FROM rollouts GROUP BY ALL ORDER BY ALL") == [
        ("a-s0", 0, ROWS),
        ("a-s0", 1, ROWS),
        ("b-s0", 0, ROWS),
    ]
    for view in ("scores", "batch", "evals"):
        assert ask(results, f"SELECT DISTINCT run, round FROM {view} WHERE run = 'b-s0' ORDER BY ALL")[0] == ("b-s0", 0)
    assert ask(results, "SELECT split, count(*) FROM prompts GROUP BY ALL ORDER BY ALL") == [
        ("heldout", 3),
        ("train", 3),
    ]


def test_metrics_hold_steps_and_nulls(results):
    train = "SELECT round, stage, step, value FROM metrics WHERE run = 'a-s0' AND name = 'train/grad_norm' ORDER BY ALL"
    assert ask(results, train) == [
        (0, "train", 1, 2.0),
        (0, "train", 2, 3.0),
        (1, "train", 1, 3.0),
        (1, "train", 2, 4.0),
    ]
    assert ask(results, "SELECT DISTINCT value FROM metrics WHERE name = 'groups_with_signal_share'") == [(None,)]


def test_scored_joins_scores_and_batch(results):
    query = "SELECT exact, format, reward, advantage, slots, correct FROM scored WHERE rollout_id = '{}'"
    assert ask(results, query.format("a-s0-1-0-1")) == [(1.0, 1.0, 7.0, -0.5, 1, False)]
    # Dropped by curation: the weighted sum of the scorers, and the verdict of `score.correct`, both from run.json.
    assert ask(results, query.format("a-s0-1-2-1")) == [(0.0, 1.0, 0.5, None, 0, False)]
    assert ask(results, "SELECT count(*), count(DISTINCT (run, rollout_id)) FROM scored") == [(3 * ROWS, 3 * ROWS)]


def test_groups(results):
    rows = ask(results, "SELECT samples, signal, truncated FROM groups WHERE run = 'b-s0' AND group_id = '0-2'")
    assert rows == [(GROUP, True, 0.25)]
    assert ask(results, "SELECT signal FROM groups WHERE run = 'b-s0' AND group_id = '0-0'") == [(False,)]


def test_learning_agrees_with_python(results):
    rows = ask(
        results,
        "SELECT round, prompts, samples, pass_1, pass_2, pass_4, pass_8 FROM learning WHERE run = 'a-s0' ORDER BY 1",
    )
    for round, prompts, samples, *passes in rows:
        assert (prompts, samples, passes[3]) == (PROMPTS, 4, None)
        assert passes[:3] == pytest.approx([pass_at_k(4, round + 1, k) for k in (1, 2, 4)], abs=1e-12)
    assert [row[0] for row in rows] == [0, 1, 2]


def test_pass_at_k_macro_agrees_with_python_and_refuses_large_k(results):
    cases = [(n, c, k) for n in (1, 3, 8, 64) for c in range(0, n + 1, max(1, n // 8)) for k in {1, n // 2 or 1, n}]
    values = ", ".join(f"({n}, {c}, {k})" for n, c, k in cases)
    found = ask(results, f"SELECT pass_at_k(n, c, k) FROM (VALUES {values}) AS t(n, c, k)")
    assert [row[0] for row in found] == pytest.approx([pass_at_k(*case) for case in cases], abs=1e-10)
    with pytest.raises(duckdb.Error, match="take a smaller k"):
        ask(results, "SELECT pass_at_k(2, 1, 3)")


def test_missing_tables_are_empty_views_with_the_declared_columns(tmp_path):
    with open_catalog(tmp_path) as catalog:
        for name, table in TABLES.items():
            described = {row[0]: row[1] for row in catalog.execute(f"DESCRIBE {name}").fetchall()}
            assert set(table.names()) <= set(described)
            assert catalog.execute(f"SELECT * FROM {name}").fetchall() == []
        for view in ("metrics", "scored", "groups", "learning", "lineage"):
            assert catalog.execute(f"SELECT * FROM {view}").fetchall() == []


def test_empty_and_full_views_have_the_same_columns(results, tmp_path):
    with open_catalog(results) as full, open_catalog(tmp_path) as empty:
        for name in [*TABLES, "metrics", "seen_rollouts", "seen_evals", "groups", "learning"]:
            assert full.execute(f"DESCRIBE {name}").fetchall() == empty.execute(f"DESCRIBE {name}").fetchall(), name


def test_views_see_files_that_come_later(tmp_path):
    make_results(tmp_path, {"a-s0": 1})
    with open_catalog(tmp_path) as catalog:
        write_round(tmp_path, "a-s0", 1)
        assert catalog.execute("SELECT count(*) FROM rollouts").fetchone() == (2 * ROWS,)


def test_solved_counts_prompts_over_rounds(tmp_path):
    """Prompt 2 is first solved in round 2; solving 0 and 1 again counts once; an expert's solution solves nothing."""
    make_results(tmp_path, {"a-s0": 3})
    for number in (0, 1):
        failed = [
            {"rollout_id": row["rollout_id"], "scorer": "exact", "reward": reward, "components": []}
            for row in rollout_rows("a-s0", number)
            for reward in [float(row["sample"] == 0 and row["prompt_id"] != "train-2")]
        ]
        expert = rollout_rows("a-s0", number)[-1] | {"rollout_id": f"expert-{number}", "sample": 4, "source": "expert"}
        failed.append({"rollout_id": expert["rollout_id"], "scorer": "exact", "reward": 1.0, "components": []})
        write(tmp_path / f"a-s0/r{number:04d}/p0/rollouts-002.parquet", [expert], "rollouts")
        write(tmp_path / f"a-s0/r{number:04d}/p0/scores/exact-000.parquet", failed, "scores")
    query = "SELECT round, asked, solved FROM solved WHERE run = 'a-s0' ORDER BY ALL"
    assert ask(tmp_path, query) == [(0, 3, 2), (1, 3, 2), (2, 3, 3)]


def test_a_fork_sees_its_parents_rounds(tmp_path):
    make_results(tmp_path, {"a-s0": 3})
    write_run_info(tmp_path, "f-s0", parent="a-s0", fork_round=1, fork_stage="score")
    write_round(tmp_path, "f-s0", 1, parts=("curate", "train"))
    write_round(tmp_path, "f-s0", 2)
    write_evaluation(tmp_path, "f-s0", 2)
    homes = "SELECT round, home FROM seen_{} WHERE run = 'f-s0' GROUP BY ALL ORDER BY ALL"
    parent, own = "a-s0", "f-s0"
    assert ask(tmp_path, homes.format("rollouts")) == [(0, parent), (1, parent), (2, own)]
    assert ask(tmp_path, homes.format("scores")) == [(0, parent), (1, parent), (2, own)]
    assert ask(tmp_path, homes.format("batch")) == [(0, parent), (1, own), (2, own)]
    assert ask(tmp_path, homes.format("evals")) == [(0, parent), (1, parent), (2, own)]
    trained = "SELECT round, home FROM seen_metrics WHERE run = 'f-s0' AND stage = 'train' GROUP BY ALL ORDER BY ALL"
    assert ask(tmp_path, trained) == [(0, parent), (1, own), (2, own)]
    assert ask(
        tmp_path, "SELECT round, count(*), count(exact) FROM scored WHERE run = 'f-s0' GROUP BY ALL ORDER BY ALL"
    ) == [
        (0, ROWS, ROWS),
        (1, ROWS, ROWS),
        (2, ROWS, ROWS),
    ]
    assert ask(tmp_path, "SELECT count(*) FROM scored WHERE run = 'a-s0'") == [(3 * ROWS,)]


def test_a_fork_of_a_fork_and_its_own_evaluation(tmp_path):
    make_results(tmp_path, {"a-s0": 3})
    write_run_info(tmp_path, "f-s0", parent="a-s0", fork_round=1, fork_stage="train")
    write_run_info(tmp_path, "g-s0", parent="f-s0", fork_round=2, fork_stage="rollout")
    write_round(tmp_path, "f-s0", 2)
    write_round(tmp_path, "g-s0", 2, parts=("score", "curate", "train"))
    write_evaluation(tmp_path, "g-s0", 0)
    assert ask(tmp_path, "SELECT round, home FROM seen_rollouts WHERE run = 'g-s0' GROUP BY ALL ORDER BY ALL") == [
        (0, "a-s0"),
        (1, "a-s0"),
        (2, "f-s0"),
    ]
    assert ask(tmp_path, "SELECT round, home FROM seen_evals WHERE run = 'g-s0' GROUP BY ALL ORDER BY ALL") == [
        (0, "g-s0"),
        (1, "a-s0"),
        (2, "a-s0"),
    ]


def test_files_of_an_older_schema_are_read_by_name(tmp_path):
    import pyarrow.parquet as pq

    make_results(tmp_path, {"a-s0": 1, "b-s0": 1})
    path = tmp_path / "a-s0" / "r0000" / "batch.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["age", "correct"]), path)
    assert ask(tmp_path, "SELECT run, count(*), count(correct) FROM batch GROUP BY ALL ORDER BY ALL") == [
        ("a-s0", 8, 0),
        ("b-s0", 8, 8),
    ]


def test_damage_is_named(tmp_path):
    make_results(tmp_path, {"a-s0": 1})
    (tmp_path / "a-s0" / "r0000" / "batch.parquet").write_bytes(b"PAR1 cut short")
    with pytest.raises(RollwayError, match=r"batch\.parquet"):
        open_catalog(tmp_path)
    with pytest.raises(RollwayError, match="no such results folder"):
        open_catalog(tmp_path / "nowhere")
    (tmp_path / "a-s0" / "run.json").write_text("{")
    with pytest.raises(RollwayError, match=r"run\.json"):
        open_catalog(tmp_path)


def test_a_circle_of_forks_is_refused(tmp_path):
    for run, parent in (("a-s0", "b-s0"), ("b-s0", "a-s0")):
        write_run_info(tmp_path, run, parent=parent, fork_round=1, fork_stage="score")
    with pytest.raises(RollwayError, match="circle"):
        open_catalog(tmp_path)


def test_a_scorer_named_like_a_column_gets_a_prefix(tmp_path):
    make_results(tmp_path, {"a-s0": 1})
    folder = tmp_path / "a-s0" / "r0000" / "p0" / "scores"
    (folder / "format-000.parquet").rename(folder / "length-000.parquet")
    assert "score_length" in [row[0] for row in ask(tmp_path, "DESCRIBE scored")]


def test_the_database_opens_in_any_client_from_anywhere(results):
    path = write_database(results)
    first = path.read_bytes()
    query = "SELECT count(*), max(pass_at_k(4, 2, 2)) FROM scored"
    code = f"import duckdb; print(duckdb.connect({str(path)!r}, read_only=True).execute({query!r}).fetchall())"
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"[({3 * ROWS}, 0.8333")
    with duckdb.connect() as other:
        other.execute(f"ATTACH '{str(path).replace(chr(39), 2 * chr(39))}' AS elsewhere (READ_ONLY)")
        assert other.execute("SELECT count(*) FROM elsewhere.learning").fetchone() == (5,)
    assert write_database(results).read_bytes() == first
    assert [name for name in os.listdir(results) if name.startswith(".tmp")] == []


def test_a_reader_keeps_its_database_while_it_is_replaced(tmp_path):
    make_results(tmp_path, {"a-s0": 1})
    with duckdb.connect(str(write_database(tmp_path)), read_only=True) as reader:
        write_database(tmp_path)
        assert reader.execute("SELECT count(*) FROM rollouts").fetchone() == (ROWS,)
    assert (tmp_path / DATABASE).is_file()


def test_every_documented_example_runs(results):
    assert {view.kind for view in documented()} == {"macro", "view"}
    for view in documented():
        assert view.meaning.startswith(f"{view.name}")
        ask(results, view.example.replace("grpo-s0", "a-s0"))
        assert view.meaning in describe(results)


def test_unfinished_run_folders_do_not_disturb(tmp_path):
    make_results(tmp_path, {"a-s0": 1})
    partial = tmp_path / "a-s0" / "r0001" / "p0" / ".partial-key"
    partial.mkdir(parents=True)
    (partial / "rollouts-000.parquet").write_bytes(b"half")
    (tmp_path / "a-s0" / "r0001" / ".tmp-batch.parquet-1").write_bytes(b"half")
    write_json(tmp_path / "a-s0" / "r0001" / "policy.json", {})
    assert ask(tmp_path, "SELECT count(*) FROM rollouts") == [(ROWS,)]


def all_columns(results: Path) -> list[tuple]:
    with open_catalog(results) as catalog:
        return catalog.execute(
            "SELECT table_name, column_name, data_type, column_index FROM duckdb_columns() ORDER BY ALL"
        ).fetchall()


def test_views_made_on_empty_ones_have_the_columns_of_those_made_on_files(results, monkeypatch):
    quickly = all_columns(results)
    monkeypatch.setattr("rollway.store.views._columns_in", lambda views: [])
    assert all_columns(results) == quickly
    assert len(quickly) > 100


def test_a_column_that_nobody_declared_is_in_every_view_of_all(tmp_path):
    """Of a newer rollway, or of a tool of the user's: views on top are then made on the files."""
    make_results(tmp_path, {"a-s0": 1})
    for path in (tmp_path / "a-s0/r0000/p0").glob("rollouts-*.parquet"):
        table = pq.ParquetFile(path).read()
        pq.write_table(table.append_column("mood", pa.array(["good"] * len(table))), path)
    assert ask(tmp_path, "SELECT DISTINCT mood FROM rollouts") == [("good",)]
    assert ask(tmp_path, "SELECT DISTINCT mood FROM seen_rollouts") == [("good",)]
    assert ask(tmp_path, "SELECT count(*) FROM scored") == [(ROWS,)]


@pytest.mark.parametrize("teacher", [False, True])
def test_the_catalogue_of_some_runs_holds_what_they_see(tmp_path, teacher):
    """A fork of a fork, with the same rows as in the catalogue of all runs, and nothing of another run."""
    results = make_results(tmp_path / "results [x]", {"a-s0": 4, "other-s0": 2})
    write_run_info(results, "b-s0", parent="a-s0", fork_round=2)
    write_round(results, "b-s0", 3)
    write_run_info(results, "c-s0", parent="b-s0", fork_round=3)
    write_evaluation(results, "c-s0", 4)
    if teacher:
        for run in ("a-s0", "other-s0"):
            path = results / run / "r0000/p0/scores/teacher-000.parquet"
            columns = {"logprobs": pa.array([[-1.0]], pa.list_(pa.float32()))}
            scored = pq.read_table(path.with_name("exact-000.parquet")).slice(0, 1)
            for name, values in columns.items():
                scored = scored.append_column(name, values)
            pq.write_table(scored, path)
    views = [*TABLES, *(f"seen_{name}" for name in ("rollouts", "scores", "batch", "evals", "metrics")), "scored"]
    views = [view for view in [*views, "metrics", "groups", "learning", "lineage"] if view != "prompts"]
    with open_catalog(results) as whole, open_catalog(results, of=["c-s0"], look_at_all=not teacher) as some:
        has = {row[0] for row in whole.execute("SELECT DISTINCT table_name FROM duckdb_columns()").fetchall()}
        for view in [view for view in views if view in has]:
            columns = ", ".join(c for c in _columns(some, view) if c in _columns(whole, view))
            query = f"SELECT {columns} FROM {view} WHERE run = 'c-s0' ORDER BY ALL"
            assert some.execute(query).fetchall() == whole.execute(query).fetchall(), view
        assert some.execute("SELECT DISTINCT run FROM rollouts ORDER BY 1").fetchall() == [("a-s0",), ("b-s0",)]
        assert some.execute("SELECT count(DISTINCT run) FROM seen_rollouts WHERE run = 'c-s0'").fetchone() == (1,)


def _columns(catalog, view: str) -> list[str]:
    return [row[0] for row in catalog.execute(f"DESCRIBE {view}").fetchall()]
