"""`rollway status` and `rollway diff` on a real project: finished, changed, failed."""

from pathlib import Path

from workflow.project import ROOT, Project


def test_status_of_a_project_that_is_finished_then_changed_then_failed(tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.write_config(defaults={"rounds": 1}, mlflow={"enabled": False})
    for name in ("Snakefile", "workflow", "profiles"):
        (tmp_path / name).symlink_to(ROOT / name)
    before = project.rollway("status", "--configfile", "config.yaml", "--no-check").stdout
    assert "not started" in before
    project.snakemake()
    done = project.rollway("status", "--configfile", "config.yaml").stdout
    assert "1/1" in done
    assert "complete" in done
    assert "up to date: snakemake has nothing to do" in done

    differ = project.rollway("diff", "grpo-s0", "grpo-s0").stdout
    assert "config: the same" in differ
    assert "+0.000 [+0.000, +0.000]" in differ

    project.write_config(defaults={"train": {"optimizer": {"lr": 2.0e-3}}})
    stale = project.rollway("status", "--configfile", "config.yaml").stdout
    assert "train grpo-s0  rounds 0: train.optimizer.lr 0.001 -> 0.002" in stale
    assert "score" not in stale.split("to do")[1]
    assert project.planned()["train"] == 1, "asking does not change what is to be done"

    (tmp_path / "results/grpo-s0/r0000/batch.parquet").write_bytes(b"cut short")
    project.snakemake("--forcerun", "train", check=False)
    failed = project.rollway("status", "--configfile", "config.yaml", "--no-check").stdout
    assert "failed: grpo-s0: error: stage train:" in failed
