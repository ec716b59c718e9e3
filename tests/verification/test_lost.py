"""`rollway verify` where something is gone, damaged beside the tables, or changed with valid checksums."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rollway.runtime import spec_files
from rollway.runtime.specs import CurateSpec, ScoreSpec
from rollway.store import parquet, provenance
from rollway.verification import verify
from verification.edits import RUN, keep_inputs


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


PASS = [(f"{RUN}/r0001/p0/rollouts-00{n}.parquet", "rollout") for n in (0, 1)]
PASS += [(f"{RUN}/r0001/p0/scores/exact-00{n}.parquet", "score") for n in (0, 1)]
BATCH = [(f"{RUN}/r0001/{name}", "curate") for name in ("batch.parquet", "curate.json")]
POLICY = [(f"{RUN}/r0001/{name}", "train") for name in ("policy.json", "metrics.json")]
EVALS = [(f"{RUN}/r0001/{name}", "evaluate") for name in ("evals.parquet", "evals.json")]
LOST = {
    "r0001/p0/rollouts-*.parquet": PASS[:2],
    "r0001/p0": PASS,
    "r0001/p0/scores/*": PASS[2:],
    "r0001": [*POLICY, *EVALS, *PASS, *BATCH],
    "r0002": [(f"{RUN}/r0002/policy.json", "train")],
    "r0001/batch.parquet": BATCH[:1],
    "r0001/curate.json": BATCH[1:],
    "r0001/policy.json": POLICY[:1],
    "r0001/metrics.json": POLICY[1:],
    "r0001/evals.parquet": EVALS[:1],
    "r0002/evals.json": [(f"{RUN}/r0002/evals.json", "evaluate")],
}


@pytest.mark.parametrize("lost", LOST)
def test_every_lost_file_is_named_with_its_stage_and_nothing_else(results: Path, lost: str) -> None:
    for path in sorted((results / RUN).glob(lost)):
        remove(path)
    found = verify(results, rollouts=0).findings
    assert [(str(f.file.relative_to(results)), f.stage) for f in found] == LOST[lost]
    assert all(f.wrong.startswith("missing") for f in found)


def test_what_comes_after_the_last_file_is_one_finding(results: Path) -> None:
    remove(results / RUN / "r0002")
    (found,) = verify(results, rollouts=0).findings
    after = ", ".join(f"{RUN}/r0002/{name}" for name in ("metrics.json", "evals.parquet", "evals.json"))
    assert found.wrong == f"missing, lost or not made yet, and so is {after}"


@pytest.mark.parametrize(("lost", "stage"), [("tasks/spell/heldout.parquet", "prepare"), ("warmups/tiny-s0", "warmup")])
def test_what_all_runs_need(results: Path, lost: str, stage: str) -> None:
    remove(results / lost)
    (found,) = verify(results, rollouts=0).findings
    assert (found.stage, found.wrong) == (stage, "missing")


DAMAGED: dict[str, Callable[[Path], object]] = {
    "gone": lambda path: path.unlink(),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "no mapping": lambda path: path.write_text("[]"),
    "without a config": lambda path: path.write_text('{"name": "grpo", "seed": 0}'),
    "of another seed": lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | {"seed": 5})),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_a_damaged_run_json_is_one_finding_and_the_rest_is_looked_at(results: Path, how: str) -> None:
    """Also of the run that forks it, it is the one that is named; and no run counts as imported for it."""
    DAMAGED[how](results / RUN / "run.json")
    (results / RUN / "r0001/batch.parquet").write_bytes(b"PAR1")
    found = verify(results, rollouts=0)
    assert [(f.file.name, f.stage) for f in found.findings] == [("run.json", "describe"), ("batch.parquet", "curate")]
    assert found.findings[0].file.parent.name == RUN
    assert found.left_out


def test_a_policy_that_cannot_be_loaded_costs_no_other_finding(results: Path) -> None:
    """Its manifest fits: the files were already no model when it was written."""
    manifest = results / "warmups/tiny-s0/policy.json"
    weights = manifest.parent / "weights/main/model.safetensors"
    weights.write_bytes(b"junk")
    raw = json.loads(manifest.read_text())
    from rollway.policies.manifest import file_sha256

    raw["policies"]["main"]["files"]["model.safetensors"] = file_sha256(weights)
    manifest.write_text(json.dumps(raw))
    (results / RUN / "r0002/metrics.json").write_text("{")
    found = verify(results).findings
    assert {(f.file.name, f.stage) for f in found} >= {("policy.json", "warmup"), ("metrics.json", "train")}


def less(row: dict) -> dict:
    return row | {"logprobs": [value - 0.5 for value in row["logprobs"]]}


CHANGED: dict[str, tuple[Callable[[list[dict]], list[dict]], str]] = {
    "log-probs": (lambda rows: [less(row) for row in rows], "log-probs differ from the policy's by up to 0.5 nats"),
    "text": (lambda rows: [row | {"text": "another"} for row in rows], "the text is not what the tokens say"),
    "mask": (lambda rows: [row | {"train_mask": [False] * row["length"]} for row in rows], "every file made from it"),
}


@pytest.mark.parametrize("column", CHANGED)
def test_what_is_changed_in_a_later_shard_is_its_own_fault(results: Path, column: str) -> None:
    """Not that of its consumers, whose rerun would bless it; and it is seen from the content alone, where it can be."""
    edit, words = CHANGED[column]
    path = results / RUN / "r0001/p0/rollouts-001.parquet"
    keep_inputs(path, "rollouts", edit)
    found = verify(results).findings
    assert {(f.file, f.stage) for f in found} == {(path, "rollout")}
    assert "every file made from it has read" in found[0].wrong
    assert any(words in f.wrong for f in found)


def test_what_belongs_to_no_round(results: Path) -> None:
    for name, content in {
        "reward_models/judge/reward_model.json": '{"tru',
        "reward_models/judge/metrics.json": "nope",
        "reward_models/other/weights/model.safetensors": "",
        "grpo-s0/r0001/discriminators/told/reward_model.json": "{",
        "grpo-s0/r0001/discriminator-told.json": "{",
        "grpo-s0/r0001/lm_eval.json": "{",
        "grpo-s0/r0001/lm_eval_results.json": "{",
        "grpo-s0/tracked.json": "{",
        "rollway.duckdb": "junk",
    }.items():
        (results / name).parent.mkdir(parents=True, exist_ok=True)
        (results / name).write_text(content)
    found = {(str(f.file.relative_to(results)), f.stage) for f in verify(results, rollouts=0).findings}
    assert found == {
        ("reward_models/judge/reward_model.json", "reward_model"),
        ("reward_models/judge/metrics.json", "reward_model"),
        ("reward_models/other/reward_model.json", "reward_model"),
        ("grpo-s0/r0001/discriminators/told/reward_model.json", "discriminator"),
        ("grpo-s0/r0001/discriminator-told.json", "discriminator"),
        ("grpo-s0/r0001/lm_eval.json", "lm_eval"),
        ("grpo-s0/r0001/lm_eval_results.json", "lm_eval"),
        ("grpo-s0/tracked.json", "track"),
        ("rollway.duckdb", "catalog"),
    }


def test_figures_of_a_batch_are_made_again(results: Path) -> None:
    path = results / RUN / "r0001/curate.json"
    told = json.loads(path.read_text())
    figure = next(row for row in told["metrics"] if row["name"] == "reward_mean")
    figure["value"] += 0.25
    path.write_text(json.dumps(told))
    (found,) = verify(results, rollouts=0).findings
    assert (found.file, found.stage) == (path, "curate")
    assert "scores and SQL do not give (reward_mean)" in found.wrong


def test_samples_of_an_evaluation_are_complete(results: Path) -> None:
    keep_inputs(results / RUN / "r0001/evals.parquet", "evals", lambda rows: rows[:-1])
    found = [f for f in verify(results, rollouts=0).findings if f.file.name == "evals.parquet"]
    assert len(found) == 1
    assert "1 prompts do not have 2 samples" in found[0].wrong


def test_metrics_of_a_warm_up_name_its_prompts(whole: Path) -> None:
    read = provenance.recorded(whole / "warmups/tiny-s0/metrics.json")
    assert read == {"prompts": [provenance.digest(whole / "tasks/spell/train.parquet")]}


def test_files_that_a_spec_names_are_accounted_for(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user's own code and SQL, a model trained here; nothing where a project has none of them."""
    monkeypatch.chdir(tmp_path)
    for name in ("mine.py", "own.sql", "reward_model.json"):
        (tmp_path / name).write_text("")

    def score(config: dict, **more: str) -> dict[str, list[Path]]:
        spec = {"version": 1, "scorer": "a", "config": config} | more
        return spec_files.of_spec("score", ScoreSpec.model_validate(spec))

    assert score({"kind": "python", "function": "mine.py:judge"}) == {"code": [Path("mine.py")]}
    assert score({"kind": "python", "function": "package.mine:judge"}) == {}
    assert score({"kind": "exact"}) == {}
    taught = score({"kind": "reward_model", "trained": "judge"}, trained="reward_model.json")
    assert taught == {"trained": [Path("reward_model.json")]}

    def curate(sql: str) -> dict[str, list[Path]]:
        given = {"version": 1, "seed": 0, "round": 0, "score": {}, "curate": {"advantage": {"sql": sql}}}
        return spec_files.of_spec("curate", CurateSpec.model_validate(given))

    assert curate("grpo") == {}
    assert curate("own.sql") == {"sql": [Path("own.sql")]}
    assert set(provenance.recorded(whole / RUN / "r0001/batch.parquet")) == {"prompts", "rollouts", "scores"}


def test_an_imported_run_is_none_whose_run_json_was_lost(results: Path) -> None:
    shutil.copytree(results / RUN / "r0000/p0", results / "theirs/r0000/p0")
    assert verify(results, rollouts=0).findings == []
    path = results / "theirs/r0000/p0/scores/exact-000.parquet"
    parquet.write(path, parquet.read(path).slice(1), "scores")
    (found,) = verify(results, rollouts=0).findings
    assert (found.file, found.stage) == (path, "import")
