"""The whole pipeline through the real Snakemake: what is run, what is rerun, what is left alone."""

import base64
import json
import re
import shutil
import socket
import sqlite3
import time
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest

from rollway.config import deep_merge
from workflow.project import ROOT, TINY, Project


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A finished run of two rounds."""
    project = Project(tmp_path_factory.mktemp("finished"))
    project.snakemake()
    return project


@pytest.fixture
def project(finished: Project, tmp_path: Path) -> Project:
    """A copy of the finished run, to be changed at will."""
    shutil.copytree(finished.folder, tmp_path / "p", symlinks=True)
    return Project(tmp_path / "p", finished.config)


def test_every_stage_left_its_file(finished: Project) -> None:
    results = finished.folder / "results"
    for name in (
        "tasks/spell/train.parquet",
        "tasks/spell/heldout.parquet",
        "warmups/tiny-s0/policy.json",
        "grpo-s0/r0000/p0/rollouts-000.parquet",
        "grpo-s0/r0000/p0/scores/exact-000.parquet",
        "grpo-s0/r0000/batch.parquet",
        "grpo-s0/r0000/evals.parquet",
        "grpo-s0/r0001/policy.json",
        "grpo-s0/r0002/policy.json",
        "grpo-s0/r0002/metrics.json",
        "grpo-s0/r0002/evals.parquet",
        "grpo-s0/tracked.json",
        "report.html",
        "rollway.duckdb",
    ):
        assert (results / name).is_file(), name
    assert not list(results.rglob(".tmp-*")), "no temporary file is left"
    assert not list(results.rglob(".partial*")), "no partial rollouts are left"


def test_a_second_run_has_nothing_to_do(finished: Project) -> None:
    assert "Nothing to be done" in finished.snakemake().stdout


def test_results_hold_no_path_host_or_time(finished: Project) -> None:
    for name, content in finished.bytes_of("grpo-s0/r*/*.json").items():
        assert str(finished.folder).encode() not in content, name
    secrets = [str(finished.folder), socket.gethostname(), "grpo-s0", time.strftime("%Y-%m-%d")]
    for path in (finished.folder / "results/grpo-s0").glob("r*/**/*.parquet"):
        table = pq.read_table(path)
        shown = [str(table.schema.metadata), *(str(table.column(n).to_pylist()) for n in table.column_names)]
        found = [secret for secret in secrets for text in shown if secret in text]
        assert not found, f"{path} holds {found}"


def test_two_runs_with_the_same_seed_write_the_same_bytes_warm_or_cold(finished: Project, tmp_path: Path) -> None:
    again = Project(tmp_path / "again", warm=False)
    again.snakemake("results/grpo-s0/r0001/policy.json")
    compared = 0
    patterns = ("tasks/**/*.parquet", "warmups/**/*", "grpo-s0/r0000/p0/**/*.parquet", "grpo-s0/r0001/**/*")
    for pattern in (*patterns, "grpo-s0/r0000/batch.parquet", "grpo-s0/r0000/curate.json"):
        ours, theirs = finished.bytes_of(pattern), again.bytes_of(pattern)
        shared = [name for name in theirs if ("evals" not in name and "/p0/" not in name) or "r0000" in name]
        assert [name for name in shared if ours[name] != theirs[name]] == []
        compared += len(shared)
    assert compared > 15


def test_more_rounds_plan_only_the_new_ones(project: Project) -> None:
    project.write_config(defaults={"rounds": 4})
    jobs = project.planned()
    assert {k: jobs[k] for k in ("rollout", "score", "curate", "train", "evaluate")} == {
        "rollout": 2,
        "score": 2,
        "curate": 2,
        "train": 2,
        "evaluate": 2,
    }
    assert "warmup" not in jobs
    assert "prepare" not in jobs


def test_an_extra_scorer_plans_only_its_scores(project: Project) -> None:
    scorers = {"exact": {"kind": "exact"}, "short": {"kind": "format", "pattern": "[a-z]{2}"}}
    project.write_config(defaults={"score": {"scorers": scorers, "reward": {"exact": 1.0}, "correct": "exact"}})
    jobs = project.planned()
    assert set(jobs) - {"all", "report", "track", "catalog", "describe"} == {"score"}
    assert jobs["score"] == 2


def test_a_forced_identical_rerun_replans_nothing(project: Project) -> None:
    target = "results/grpo-s0/r0001/p0/rollouts-000.parquet"
    before = (project.folder / target).read_bytes()
    project.snakemake("-f", target, "--rerun-triggers", "mtime")
    assert (project.folder / target).read_bytes() == before
    assert project.planned() == {}


def test_a_learning_rate_change_from_a_round_leaves_earlier_rounds(project: Project) -> None:
    project.write_config(runs={"grpo": {"schedule": [{"from": 1, "train": {"optimizer": {"lr": 1.0e-4}}}]}})
    jobs = project.planned()
    assert jobs["train"] == 1
    assert "rollout" not in jobs
    assert jobs["evaluate"] == 1


def test_a_fork_reuses_its_parents_rounds_and_rollouts(project: Project) -> None:
    forks = {
        "dr": {"recipe": "dr-grpo", "fork": {"run": "grpo", "round": 1, "stage": "score"}},
        "rl": {"recipe": "rloo", "fork": {"run": "grpo", "round": 1, "stage": "score"}},
    }
    project.write_config(runs=forks)
    jobs = project.planned()
    assert {k: jobs.get(k, 0) for k in ("warmup", "rollout", "score", "curate", "train")} == {
        "warmup": 0,
        "rollout": 0,
        "score": 0,
        "curate": 2,
        "train": 2,
    }
    project.snakemake()
    for run in ("dr-s0", "rl-s0"):
        assert not (project.folder / "results" / run / "r0000").exists()
    rows = project.rollway("sql", "SELECT run, count(*) FROM seen_rollouts GROUP BY run", "--format", "csv").stdout
    counts = dict(line.split(",") for line in rows.strip().splitlines()[1:])
    assert counts["dr-s0"] == counts["grpo-s0"] == counts["rl-s0"]


def test_one_stage_can_be_forced(project: Project) -> None:
    output = project.snakemake("-f", "results/grpo-s0/r0000/batch.parquet", "--rerun-triggers", "mtime").stdout
    assert "1 of 1 steps (100%) done" in output


def test_named_targets(project: Project) -> None:
    for target in ("all_rollouts", "all_scores", "all_evals"):
        assert "Nothing to be done" in project.snakemake(target).stdout


def test_lint_finds_nothing(project: Project) -> None:
    assert "Congratulations" in project.snakemake("--lint").stdout


def test_snakemake_report_works_offline(project: Project) -> None:
    project.snakemake("--report", "report.html")
    page = (project.folder / "report.html").read_text()
    packed = {name: rf'<script id="{name}">\s*var {name} = (.*);\s*</script>' for name in ("results", "categories")}
    found = {name: json.loads(re.findall(pattern, page)[0]) for name, pattern in packed.items()}
    assert found["categories"] == {"Runs": {"Report": ["results/report.html"]}}
    [shown] = found["results"].values()
    assert shown["labels"] == {
        "page": "learning curves and rollouts",
        "about": "curves, rollout browser, comparison, health, time, configs",
    }
    caption = (ROOT / "workflow/report/report.rst").read_text()
    assert " ".join(caption.split()) == " ".join(re.sub("<[^>]*>", "", shown["caption"]).split())
    kind, _, content = shown["data_uri"].partition(";base64,")
    assert kind.startswith("data:text/html;charset=utf8;")
    assert base64.b64decode(content) == (project.folder / "results/report.html").read_bytes()


def test_a_plan_imports_no_torch(project: Project) -> None:
    probe = (
        "import sys; from snakemake.cli import main\n"
        f"try: main({['--snakefile', *project.command()[2:], '-n', '--cores', '1']!r})\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules, 'torch was imported'\n"
    )
    import subprocess
    import sys

    subprocess.run([sys.executable, "-c", probe], cwd=project.folder, check=True, capture_output=True)


def test_a_thousand_rounds_can_be_planned(tmp_path: Path) -> None:
    config = deep_merge(TINY, {"defaults": {"rounds": 1000, "evaluate": {"every": 100}}})
    project = Project(tmp_path, config)
    assert project.planned()["train"] == 1000


def test_sql_answers_the_first_questions(finished: Project) -> None:
    def ask(query: str) -> list[dict[str, object]]:
        return json.loads(finished.rollway("sql", query, "--format", "json").stdout)

    best = ask("SELECT rollout_id, text, reward FROM scored WHERE round = 1 ORDER BY reward DESC, rollout_id LIMIT 3")
    assert len(best) == 3
    by_round = ask("SELECT round, avg(reward) AS reward FROM scored GROUP BY round ORDER BY round")
    assert [row["round"] for row in by_round] == [0, 1]
    lengths = ask("SELECT length, avg(advantage) AS advantage FROM scored GROUP BY length ORDER BY length")
    assert lengths
    assert ask("SELECT count(*) AS n FROM learning")[0]["n"]
    shown = finished.rollway("show", str(best[0]["rollout_id"])).stdout
    assert str(best[0]["text"]) in shown


def test_any_duckdb_client_opens_the_catalogue(finished: Project) -> None:
    with duckdb.connect(str(finished.folder / "results/rollway.duckdb"), read_only=True) as connection:
        rows = connection.execute("SELECT count(*) FROM rollouts").fetchall()
    assert rows == [(2 * 4 * 4,)]


def test_mlflow_holds_the_run(finished: Project) -> None:
    with sqlite3.connect(finished.folder / "mlflow.db") as database:
        names = {row[0] for row in database.execute("SELECT DISTINCT key FROM metrics")}
    assert "eval/pass_at_1" in names
    assert "train/loss" in names


def test_shards_do_not_change_the_tokens(finished: Project, tmp_path: Path) -> None:
    sharded = Project(tmp_path, deep_merge(TINY, {"defaults": {"rounds": 1, "rollout": {"shards": 2}}}))
    sharded.snakemake("all_rollouts")
    query = "SELECT rollout_id, tokens FROM read_parquet('{}') ORDER BY rollout_id"
    whole = duckdb.sql(query.format(finished.folder / "results/grpo-s0/r0000/p0/*.parquet")).fetchall()
    parts = duckdb.sql(query.format(sharded.folder / "results/grpo-s0/r0000/p0/*.parquet")).fetchall()
    assert whole == parts


def test_lag_takes_rollouts_from_the_round_before(tmp_path: Path) -> None:
    project = Project(tmp_path, deep_merge(TINY, {"defaults": {"rounds": 3, "lag": 1}}))
    project.snakemake("all_rollouts")
    query = "SELECT DISTINCT round, policy_round FROM read_parquet('results/grpo-s0/r*/p0/*.parquet') ORDER BY round"
    rows = duckdb.sql(query.replace("results", str(tmp_path / "results"))).fetchall()
    assert rows == [(0, 0), (1, 0), (2, 1)]


def test_dynamic_sampling_refills_in_later_passes(tmp_path: Path) -> None:
    rollout = {"prompts": 8, "group": 2, "passes": 3, "refill": {}}
    config = deep_merge(TINY, {"defaults": {"rounds": 1, "rollout": rollout}, "runs": {"grpo": {"recipe": "dapo"}}})
    project = Project(tmp_path, config)
    project.snakemake("all_scores")
    query = (
        "SELECT pass, count(DISTINCT group_id) FROM read_parquet('{}/results/grpo-s0/r0000/p*/*.parquet') GROUP BY pass"
    )
    drawn = dict(duckdb.sql(query.format(tmp_path)).fetchall())
    assert drawn[0] == 8
    assert sum(drawn.values()) > 8, "some first-pass group had no signal and was replaced"


def test_prune_keeps_what_the_config_names(project: Project) -> None:
    project.write_config(runs={"grpo": {"keep": {"last": 1, "best": False}}})
    weights = project.folder / "results/grpo-s0/r0001/weights"
    assert weights.is_dir()
    project.rollway("prune", "--configfile", "config.yaml")
    assert not weights.exists()
    assert (project.folder / "results/grpo-s0/r0001/policy.json").exists()
    assert set(project.planned()) <= {"all", "describe", "report", "track", "catalog"}
    project.write_config(defaults={"rounds": 3})
    project.snakemake()
