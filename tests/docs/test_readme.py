"""The commands of the README and the queries of the docs, run as they are written, on a small finished project."""

import re
import shutil
from typing import Any

import pytest
import yaml

from rollway.config import deep_merge
from workflow.project import ROOT, Project

SMALL: dict[str, Any] = {
    "defaults": {
        "rounds": 4,
        "rollout": {"prompts": 4, "group": 4},
        "evaluate": {"every": 1, "samples": 4, "k": [1, 4], "bootstrap": 50},
    }
}
BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: str, language: str) -> list[str]:
    """Fenced blocks of a page that are meant to run: those whose info string is the language alone."""
    found = BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))
    return [text for name, more, text in found if name == language and not more.strip()]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The default config made small, in a folder laid out like a checkout, finished."""
    folder = tmp_path_factory.mktemp("readme")
    small = Project(folder, small_config())
    (folder / "config").mkdir()
    shutil.move(folder / "config.yaml", folder / "config/config.yaml")
    for name in ("Snakefile", "workflow", "profiles", "config/examples", "config/recipes"):
        (folder / name).symlink_to(ROOT / name)
    run(small, "snakemake --cores 2")
    return small


def small_config() -> dict[str, Any]:
    config = yaml.safe_load((ROOT / "config/config.yaml").read_text(encoding="utf-8"))
    for task in config["tasks"].values():
        task["source"]["size"] = 200
        task["splits"]["heldout"] = 8
    for warmup in config["warmups"].values():
        warmup["sft"]["steps"] = 40
    return deep_merge(config, SMALL)


def run(project: Project, script: str) -> str:
    """The block in bash, in the project's folder; it must end well."""
    done = project.finish(["bash", "-euo", "pipefail", "-c", script])
    assert done.returncode == 0, f"{script}\n{done.stdout}"
    return done.stdout


@pytest.mark.parametrize("script", blocks("README.md", "sh"))
def test_commands_of_the_readme(project: Project, script: str) -> None:
    output = run(project, script)
    assert output.strip()
    if "rollway sql" in script and "rollway show" not in script:
        assert "(0 rows)" not in output, output


def test_the_readme_has_commands() -> None:
    text = "\n".join(blocks("README.md", "sh"))
    for word in ("rollway sql", "rollway show", "rollway table", "--force", "schedule", "fork", "rounds", "examples"):
        assert word in text


@pytest.mark.parametrize("query", blocks("docs/sql.md", "sql") + blocks("docs/tables.md", "sql"))
def test_queries_of_the_docs(project: Project, query: str) -> None:
    project.rollway("sql", query)


def test_nothing_is_left_to_do_after_the_commands(project: Project) -> None:
    """The forced stage wrote the same bytes, and `-n` wrote nothing."""
    run(project, "snakemake --cores 2 --force results/grpo-s0/r0003/batch.parquet")
    assert "Nothing to be done" in run(project, "snakemake -n")


@pytest.mark.parametrize("number", range(2))
def test_the_page_of_exports(project: Project, number: int) -> None:
    run(project, blocks("docs/export.md", "sh")[number])
