"""`rollway verify` on a finished project, whole and with one thing wrong at a time."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from rollway.cli import main
from rollway.config import deep_merge
from rollway.errors import RollwayError
from rollway.store import parquet, provenance
from rollway.verification import verify
from workflow.project import TINY, Project

RUN = "grpo-s0"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds of GRPO, and a fork of it, in two shards."""
    changes = {
        "defaults": {"rollout": {"shards": 2}, "keep": {"last": 2}},
        "runs": {"fork": {"recipe": "dr-grpo", "fork": {"run": "grpo", "round": 1, "stage": "score"}}},
        "mlflow": {"enabled": False},
    }
    config = deep_merge(TINY, changes)
    project = Project(tmp_path_factory.mktemp("verify"), config)
    project.snakemake()
    return project.folder / "results"


@pytest.fixture
def results(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "results")
    return tmp_path / "results"


def change(path: Path, table: str, edit: Callable[[list[dict]], list[dict]]) -> None:
    """Writes a table again, as a stage would, after `edit` of its rows."""
    rows = parquet.read(path)
    parquet.write(path, pa.Table.from_pylist(edit(rows.to_pylist()), schema=rows.schema), table)


def changed(rows: list[dict], column: str, value: object, at: int = 0) -> list[dict]:
    return [row | {column: value} if n == at else row for n, row in enumerate(rows)]


def flip_a_byte(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 0x10
    path.write_bytes(content)


def test_a_whole_folder_has_nothing_wrong(whole: Path) -> None:
    found = verify(whole)
    assert found.findings == []
    assert found.batches == 3  # two of the run, and the fork's own
    assert found.recomputed > 0
    assert 0 < found.largest < 1e-4
    assert found.left_out == {}


ROLLOUTS, SCORES = "r0001/p0/rollouts-000.parquet", "r0001/p0/scores/exact-000.parquet"
PLANTED: dict[str, tuple[str, Callable[[Path], object], str, str]] = {
    "a rollout file cut short": (
        ROLLOUTS,
        lambda path: path.write_bytes(path.read_bytes()[:-200]),
        "not a whole Parquet file",
        "rollout",
    ),
    "a byte of a rollout file flipped": (ROLLOUTS, lambda path: flip_a_byte(path, 0.1), "changed after", "rollout"),
    "a rollout lost": (
        ROLLOUTS,
        lambda path: change(path, "rollouts", lambda rows: rows[1:]),
        "do not have samples 0 to 3",
        "rollout",
    ),
    "a rollout twice": (
        ROLLOUTS,
        lambda path: change(path, "rollouts", lambda rows: [*rows, rows[0]]),
        "stands in several rows",
        "rollout",
    ),
    "a shard lost": ("r0001/p0/rollouts-001.parquet", lambda path: path.unlink(), "missing", "rollout"),
    "a log-prob that is no number": (
        ROLLOUTS,
        lambda path: change(
            path, "rollouts", lambda rows: changed(rows, "logprobs", [float("nan")] * rows[0]["length"])
        ),
        "log-probs are not finite",
        "rollout",
    ),
    "log-probs of another policy": (
        ROLLOUTS,
        lambda path: change(path, "rollouts", lambda rows: changed(rows, "logprobs", [-0.7] * rows[0]["length"])),
        "log-probs differ from the policy's",
        "rollout",
    ),
    "a policy that did not write them": (
        ROLLOUTS,
        lambda path: change(path, "rollouts", lambda rows: [row | {"policy": "0" * 16} for row in rows]),
        "but policy.json of round 1 is",
        "rollout",
    ),
    "a prompt of another task": (
        ROLLOUTS,
        lambda path: change(path, "rollouts", lambda rows: changed(rows, "prompt_id", "zz")),
        "prompts that the task does not have (zz)",
        "rollout",
    ),
    "a score lost": (
        SCORES,
        lambda path: change(path, "scores", lambda rows: rows[1:]),
        "1 rollouts have no score",
        "score",
    ),
    "a reward that is no number": (
        SCORES,
        lambda path: change(path, "scores", lambda rows: changed(rows, "reward", float("inf"))),
        "rewards that are not finite in 1 rows",
        "score",
    ),
    "an advantage edited": (
        "r0001/batch.parquet",
        lambda path: change(path, "batch", lambda rows: changed(rows, "advantage", 0.123)),
        "advantage is not what scores and SQL give in 1 rows",
        "curate",
    ),
    "a batch row of nothing": (
        "r0001/batch.parquet",
        lambda path: change(path, "batch", lambda rows: changed(rows, "rollout_id", "zz")),
        "rollouts that the round does not have (zz)",
        "curate",
    ),
    "weights changed": (
        "r0002/policy.json",
        lambda path: flip_a_byte(path.parent / "weights/main/model.safetensors", 0.9),
        "is not what",
        "train",
    ),
    "metrics cut short": (
        "r0002/metrics.json",
        lambda path: path.write_text(path.read_text()[:100]),
        "damaged",
        "train",
    ),
    "an evaluation made better": (
        "r0002/evals.json",
        lambda path: path.write_text(
            json.dumps(json.loads(path.read_text()) | {"metrics": [{"step": 0, "name": "pass@1", "value": 0.99}]})
        ),
        "figures that the samples do not give",
        "evaluate",
    ),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_what_is_wrong_is_found_and_the_stage_named(results: Path, planted: str) -> None:
    file, spoil, words, stage = PLANTED[planted]
    path = results / RUN / file
    spoil(path)
    found = [finding for finding in verify(results).findings if finding.file == path]
    assert any(words in finding.wrong for finding in found), found
    assert {finding.stage for finding in found} == {stage}
    assert f"snakemake --force {path}" in str(found[0])


def test_an_edited_score_shows_in_the_batch_made_of_it(results: Path) -> None:
    for path in sorted((results / RUN / "r0001/p0/scores").glob("*.parquet")):
        change(path, "scores", lambda rows: [row | {"reward": float(n % 2)} for n, row in enumerate(rows)])
    found = verify(results).findings
    assert {(f.file.name, f.stage) for f in found} == {("batch.parquet", "curate")}
    assert {f.file.parents[1].name for f in found} == {RUN, "fork-s0"}


def keep_inputs(path: Path, table: str, edit: Callable[[list[dict]], list[dict]]) -> None:
    """As `change`, by somebody who leaves the file's own account of itself in place."""
    said = parquet.metadata(path)[provenance.KEY]
    rows = parquet.read(path)
    parquet.write(path, pa.Table.from_pylist(edit(rows.to_pylist()), schema=rows.schema), table, {provenance.KEY: said})


def test_files_name_what_they_were_made_from_and_an_edit_shows_in_what_follows(results: Path) -> None:
    """From prompts to policy: a text that was changed, in a file that is whole by itself."""
    run = results / RUN
    rollouts, scores, batch = (run / p for p in (ROLLOUTS, SCORES, "r0001/batch.parquet"))
    made = {
        "rollouts": provenance.recorded(rollouts),
        "scores": provenance.recorded(scores),
        "batch": provenance.recorded(batch),
        "evals": provenance.recorded(run / "r0001/evals.parquet"),
        "policy": provenance.recorded(run / "r0002/metrics.json"),
    }
    assert made["scores"]["rollouts"] == [provenance.digest(rollouts)]
    assert made["rollouts"]["policy"] == [provenance.digest(run / "r0001/policy.json")]
    assert made["rollouts"]["prompts"] == [provenance.digest(results / "tasks/spell/train.parquet")]
    assert provenance.digest(scores) in made["batch"]["scores"]
    assert made["policy"]["batch"] == [provenance.digest(batch)]
    assert made["policy"]["policy"] == made["evals"]["policy"] == made["rollouts"]["policy"]

    keep_inputs(rollouts, "rollouts", lambda rows: changed(rows, "text", "another"))
    found = {(str(f.file.relative_to(results)), f.stage) for f in verify(results, [RUN], rollouts=0).findings}
    assert found == {
        (f"{RUN}/{SCORES}", "score"),
        (f"{RUN}/r0001/batch.parquet", "curate"),
        (f"{RUN}/r0002/metrics.json", "train"),
    }


def test_a_changed_prompt_shows_in_the_rollouts(results: Path) -> None:
    prompts = results / "tasks/spell/train.parquet"
    change(prompts, "prompts", lambda rows: changed(rows, "messages", '[{"role": "user", "content": "zz>"}]'))
    said = [str(f) for f in verify(results, [RUN], rollouts=0).findings if f.stage == "rollout"]
    assert len(said) == 4  # two rounds, two shards
    assert all("made from other prompts than lie there now" in line for line in said)


def test_pruned_weights_are_said_and_are_no_fault(results: Path) -> None:
    shutil.rmtree(results / RUN / "r0001/weights")
    shutil.rmtree(results / RUN / "r0001/state")
    found = verify(results)
    assert found.findings == []
    assert found.left_out["policies without weights (pruned)"] == 1
    assert any("log-probs" in why for why in found.left_out)


def test_the_command(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--results", str(results), "--rollouts", "0"]) == 0
    assert "nothing wrong" in capsys.readouterr().out
    (results / RUN / "r0000/p0/scores/exact-001.parquet").write_bytes(b"PAR1")
    assert main(["verify", "--results", str(results), "--rollouts", "0", "--runs", RUN]) == 1
    told = capsys.readouterr().out
    assert "exact-001.parquet: not a whole Parquet file" in told
    assert "1 wrong" in told


def test_an_unknown_run_and_folder_are_refused(results: Path) -> None:
    with pytest.raises(RollwayError, match="it has fork-s0, grpo-s0"):
        verify(results, ["gpro-s0"])
    with pytest.raises(RollwayError, match="no such results folder"):
        verify(results / "nowhere")


def test_the_files_that_decide_are_arguments_of_their_stages() -> None:
    import importlib
    import inspect

    for stage, roles in provenance.READ.items():
        arguments = inspect.signature(importlib.import_module(f"rollway.stages.{stage}").run).parameters
        assert set(roles) <= set(arguments), stage
