"""`rollway verify` on a finished project, whole and with one thing wrong at a time."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rollway.cli import main
from rollway.errors import RollwayError
from rollway.runtime import retention
from rollway.runtime.plan_told import plan_of
from rollway.store import parquet, provenance
from rollway.store.lineage import read_runs
from rollway.verification import verify
from verification.edits import RUN, change, changed, keep_inputs


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


def with_figures(change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]], path: Path) -> None:
    held = json.loads(path.read_text())
    path.write_text(json.dumps(held | {"metrics": change(held["metrics"])}))


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
    **{
        f"{what} in {file}": (f"{folder}/{file}", partial(with_figures, change), said, stage)
        for file, folder, said, stage in (
            ("evals.json", "r0002", "figures that the samples do not give", "evaluate"),
            ("curate.json", "r0001", "figures that scores and SQL do not give", "curate"),
        )
        for what, change in (
            ("a figure told before the true one", lambda told: [told[0] | {"value": 1e3}, *told]),
            ("a figure of nothing", lambda told: [*told, {"step": 0, "name": "pass@64", "value": 1.0}]),
            ("a figure of another step", lambda told: [told[0] | {"step": 3}, *told[1:]]),
            ("a figure lost", lambda told: told[1:]),
        )
    },
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


def test_an_edited_score_is_named_before_the_batches_made_of_it(results: Path) -> None:
    scores = sorted((results / RUN / "r0001/p0/scores").glob("*.parquet"))
    for path in scores:
        change(path, "scores", lambda rows: [row | {"reward": float(n % 2)} for n, row in enumerate(rows)])
    found = verify(results, rollouts=0).findings
    assert [(f.file, f.stage) for f in found[:2]] == [(path, "score") for path in scores]
    assert "every file made from it has read" in found[0].wrong
    followed = {(f.file.parents[1].name, f.file.name, f.stage) for f in found[2:]}
    batches = {(run, name, "curate") for run in (RUN, "fork-s0") for name in ("batch.parquet", "curate.json")}
    assert followed == batches
    assert all("mend that first (score)" in f.wrong for f in found[2:])


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
    (found,) = verify(results, rollouts=0).findings
    assert (found.file, found.stage) == (rollouts, "rollout")
    assert all(name in found.wrong for name in ("exact-000.parquet", "batch.parquet", "metrics.json"))


def test_a_changed_prompt_is_named_itself(results: Path) -> None:
    """Train and held-out: not the files made from them, whose rerun would bless it."""
    for split in ("train", "heldout"):
        prompts = results / f"tasks/spell/{split}.parquet"
        change(prompts, "prompts", lambda rows: changed(rows, "messages", '[{"role": "user", "content": "zz>"}]'))
    found = verify(results, [RUN], rollouts=0).findings
    assert [(f.file.stem, f.stage) for f in found] == [("heldout", "prepare"), ("train", "prepare")]
    assert "r0001/evals.parquet" in found[0].wrong


def test_a_file_made_anew_beside_others_is_none_that_was_changed(results: Path) -> None:
    """Where one of several still fits, it is the others that are out of date."""
    path = results / RUN / SCORES
    said = json.loads(parquet.metadata(path)[provenance.KEY])
    rows = parquet.read(path)
    told = {provenance.KEY: json.dumps(said | {"rollouts": ["0" * 16]})}
    parquet.write(path, rows, "scores", told)
    found = verify(results, [RUN], rollouts=0).findings
    assert [(f.file.name, f.stage) for f in found[-1:]] == [("exact-000.parquet", "score")]
    assert any("made from other rollouts than lie there now" in f.wrong for f in found)


def keep_the_last(results: Path) -> None:
    """As if the run had been told to keep no more than its last policy."""
    shutil.rmtree(results / "fork-s0")  # which would need another
    path = results / RUN / "run.json"
    info = json.loads(path.read_text())
    info["config"]["keep"] = {"last": 1, "best": False, "every": None}
    path.write_text(json.dumps(info))


def test_pruned_weights_are_said_and_are_no_fault(results: Path) -> None:
    keep_the_last(results)
    shutil.rmtree(results / RUN / "r0001/weights")
    shutil.rmtree(results / RUN / "r0001/state")
    found = verify(results)
    assert found.findings == []
    assert found.left_out["policies without weights (pruned)"] == 1
    assert any("no log-prob" in why for why in found.left_out)


@pytest.mark.parametrize("kill", [1, 2])
def test_a_prune_that_is_killed_leaves_nothing_wrong_and_the_next_one_the_rest(
    results: Path, kill: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the midst of the weights, and of the state that goes after them."""
    keep_the_last(results)
    plan, folder = plan_of(results, RUN, read_runs(results)), results / RUN / "r0001"
    calls: list[Path] = []
    remove = shutil.rmtree

    def killed(path: Path, **how: object) -> None:
        calls.append(path)
        if len(calls) == kill:
            next(file for file in path.rglob("*") if file.is_file()).unlink()
            raise KeyboardInterrupt
        remove(path, **how)

    monkeypatch.setattr(retention.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        list(retention.prune(plan))
    monkeypatch.undo()
    found = verify(results, rollouts=0)
    assert found.findings == []
    assert found.left_out["policies without weights (pruned)"] == 1
    left = next(folder.glob(".tmp-*"))
    left.rename(left.with_name(f"{left.name.rpartition('-')[0]}-{2**30}"))  # of no process that lives
    assert list(retention.prune(plan)) == ([folder / "state"] if kill == 1 else [])
    assert not [path.name for path in folder.iterdir() if path.is_dir() and path.name != "p0"]
    assert (results / RUN / "r0002/weights").is_dir()


def test_a_state_that_is_gone_is_a_fault_of_what_is_kept_alone(results: Path) -> None:
    """Prune once took the state before the weights."""
    keep_the_last(results)
    shutil.rmtree(results / RUN / "r0001/state")
    found = verify(results, rollouts=0)
    assert found.findings == []
    assert found.left_out["policies without state (pruned)"] == 1
    shutil.rmtree(results / RUN / "r0002/state")
    (finding,) = verify(results, rollouts=0).findings
    assert finding.file == results / RUN / "r0002/policy.json"


@pytest.mark.parametrize("folder", ["grpo-s0/r0001", "grpo-s0/r0002", "warmups/tiny-s0"])
def test_weights_that_no_prune_lets_go_are_a_fault(results: Path, folder: str) -> None:
    """Of a policy that a fork sets out from, of the last one, and of the first."""
    shutil.rmtree(results / folder / "weights")
    found = verify(results, rollouts=0).findings
    assert [(f.file, f.wrong) for f in found] == [
        (results / folder / "policy.json", "its weights are gone, and they are none that `keep` lets go")
    ]


def test_the_command(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--results", str(results), "--rollouts", "0"]) == 0
    assert "nothing wrong" in capsys.readouterr().out
    (results / RUN / "r0000/p0/scores/exact-001.parquet").write_bytes(b"PAR1")
    assert main(["verify", "--results", str(results), "--rollouts", "0", "--runs", RUN]) == 1
    told = capsys.readouterr().out
    assert "exact-001.parquet: not a whole Parquet file" in told
    assert "2 wrong" in told  # not whole, and not what others were made from


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
