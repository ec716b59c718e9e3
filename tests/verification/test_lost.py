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
from rollway.verification.provenance import Lineage
from verification.edits import RUN, change, changed, keep_inputs


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


NEEDED = {
    "tasks/spell/heldout.parquet": ["tasks/spell/heldout.parquet"],
    "warmups/tiny-s0": ["warmups/tiny-s0/policy.json", "warmups/tiny-s0/metrics.json"],
    "warmups/tiny-s0/metrics.json": ["warmups/tiny-s0/metrics.json"],
}


@pytest.mark.parametrize("lost", NEEDED)
def test_what_all_runs_need(results: Path, lost: str) -> None:
    """A warm-up that was taught demonstrations has figures, which the rule of its policy writes."""
    remove(results / lost)
    found = verify(results, rollouts=0).findings
    stage, made = ("warmup", "policy.json") if "warmups" in lost else ("prepare", "heldout.parquet")
    assert [(f.file, f.stage, f.wrong) for f in found] == [(results / name, stage, "missing") for name in NEEDED[lost]]
    assert all(f"snakemake --force {f.file.with_name(made)}`" in str(f) for f in found)


DAMAGED: dict[str, Callable[[Path], object]] = {
    "gone": lambda path: path.unlink(),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "no mapping": lambda path: path.write_text("[]"),
    "without a config": lambda path: path.write_text('{"name": "grpo", "seed": 0}'),
    "of another seed": lambda path: rewrite(path, seed=5),
    "without a task": lambda path: rewrite(path, task=None),
    "without a warm-up": lambda path: rewrite(path, warmup=None),
    "of another task than its config's": lambda path: rewrite(path, task="other"),
    "with a text for a fork": lambda path: rewrite(path, config=json.loads(path.read_text())["config"] | {"fork": "x"}),
    "with a list for a fork": lambda path: rewrite(path, config=json.loads(path.read_text())["config"] | {"fork": [1]}),
    "forked nowhere": lambda path: rewrite(path, parent="fork-s0"),
}


def rewrite(path: Path, **values: object) -> None:
    """Sets or, where None, removes keys of a JSON file."""
    told = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in told.items() if value is not None}))


@pytest.mark.parametrize("how", DAMAGED)
def test_a_damaged_run_json_is_one_finding_and_the_rest_is_looked_at(results: Path, how: str) -> None:
    """Also of the run that forks it, it is the one that is named; and no run counts as imported for it."""
    DAMAGED[how](results / RUN / "run.json")
    (results / RUN / "r0001/batch.parquet").write_bytes(b"PAR1")
    found = verify(results, rollouts=0)
    assert [(f.file.name, f.stage) for f in found.findings] == [("run.json", "describe"), ("batch.parquet", "curate")]
    assert found.findings[0].file.parent.name == RUN
    assert found.left_out


def without_a_name(path: Path) -> None:
    rewrite(path, metrics=[{"step": 0, "value": 0.5}, *json.loads(path.read_text())["metrics"]])


SHAPELESS: dict[str, tuple[str, str, Callable[[Path], None]]] = {
    "inputs that are no lists": (f"{RUN}/r0001/metrics.json", "train", lambda p: rewrite(p, inputs={"batch": 5})),
    "inputs that are no digests": (f"{RUN}/r0001/metrics.json", "train", lambda p: rewrite(p, inputs={"batch": [[1]]})),
    "a text for inputs": ("warmups/tiny-s0/metrics.json", "warmup", lambda p: rewrite(p, inputs="x")),
    "a figure of a batch without a name": (f"{RUN}/r0001/curate.json", "curate", without_a_name),
    "a figure of an evaluation without a name": (f"{RUN}/r0001/evals.json", "evaluate", without_a_name),
    "a number for figures": (f"{RUN}/r0001/curate.json", "curate", lambda p: rewrite(p, metrics=5)),
    "rows that are texts": (f"{RUN}/r0001/evals.json", "evaluate", lambda p: rewrite(p, metrics=["pass@1"])),
    "a figure too large": (f"{RUN}/r0001/evals.json", "evaluate", lambda p: rewrite(p, metrics=[LARGE])),
    "policies that are a list": (f"{RUN}/r0001/policy.json", "train", lambda p: rewrite(p, policies=[1])),
    "files that are a text": (f"{RUN}/r0001/policy.json", "train", lambda p: rewrite(p, policies={"main": FILES})),
    "files of a state that are numbers": (f"{RUN}/r0001/policy.json", "train", lambda p: rewrite(p, state={"x": {}})),
}
LARGE = {"step": 0, "name": "pass@1", "value": 10**400}
FILES = {"kind": "full", "folder": "weights/main", "files": "x"}


@pytest.mark.parametrize("how", SHAPELESS)
def test_json_of_another_shape_costs_no_other_finding(results: Path, how: str) -> None:
    name, stage, spoil = SHAPELESS[how]
    spoil(results / name)
    (results / RUN / "r0000/batch.parquet").write_bytes(b"PAR1")
    (results / "fork-s0/r0002/metrics.json").write_text("{")
    found = {(f.file, f.stage) for f in verify(results, rollouts=0).findings}
    assert found >= {
        (results / name, stage),
        (results / RUN / "r0000/batch.parquet", "curate"),
        (results / "fork-s0/r0002/metrics.json", "train"),
    }


def test_an_account_of_a_table_that_is_none(results: Path) -> None:
    path = results / RUN / "r0001/p0/scores/exact-000.parquet"
    parquet.write(path, parquet.read(path), "scores", {provenance.KEY: '{"rollouts": 5}'})
    found = [f.wrong for f in verify(results, rollouts=0).findings if f.file == path]
    assert any("is no digests by role" in wrong for wrong in found)


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


def test_metrics_of_a_warm_up_name_its_prompts(results: Path) -> None:
    path, prompts = results / "warmups/tiny-s0/metrics.json", results / "tasks/spell/train.parquet"
    assert provenance.recorded(path) == {"prompts": [provenance.digest(prompts)]}
    shutil.copytree(results / "tasks/spell", results / "tasks/other")
    change(results / "tasks/other/train.parquet", "prompts", lambda rows: rows[1:])
    assert verify(results, rollouts=0).findings == []
    rewrite(path, inputs={"prompts": ["0" * 16]})
    (found,) = verify(results, rollouts=0).findings
    assert (found.file, found.stage) == (path, "warmup")
    assert found.wrong == "made from other prompts than lie there now: 1 of 1 changed since"


def test_metrics_of_a_reward_model_name_what_it_read(results: Path) -> None:
    """Of whichever run: no run.json has its settings."""
    path, read = results / "reward_models/judge/metrics.json", results / RUN / "r0000/p0"
    path.parent.mkdir(parents=True)
    inputs = {
        "prompts": [provenance.digest(results / "tasks/spell/train.parquet")],
        "rollouts": [provenance.digest(read / f"rollouts-00{n}.parquet") for n in (0, 1)],
        "scores": [provenance.digest(read / f"scores/exact-00{n}.parquet") for n in (0, 1)],
        "policy": [provenance.digest(results / "warmups/tiny-s0/policy.json")],
    }
    for role in (None, *inputs):
        told = inputs if role is None else inputs | {role: [*inputs[role][1:], "0" * 16]}
        path.write_text(json.dumps({"metrics": [], "inputs": told}))
        found = [f for f in verify(results, rollouts=0).findings if f.file == path]
        assert [f.stage for f in found] == ([] if role is None else ["reward_model"])
        assert all(f"made from other {role} than lie there now: 1 of {len(told[role])}" in f.wrong for f in found)
    path.write_text(json.dumps({"metrics": [], "inputs": inputs}))
    keep_inputs(read / "rollouts-001.parquet", "rollouts", lambda rows: changed(rows, "text", "another"))
    found = [f for f in verify(results, rollouts=0).findings if f.stage != "reward_model"]
    assert {(f.file, f.stage) for f in found} == {(read / "rollouts-001.parquet", "rollout")}
    assert "r0001/metrics.json and 1 more" in found[0].wrong, "the reward model's figures beside three files"


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


def test_of_two_inputs_with_equal_content_one_is_changed(tmp_path: Path) -> None:
    """As two shards of a pass that writes none, or prompts of two tasks."""
    first, second, made, other = (tmp_path / name for name in ("a", "b", "made.json", "other.json"))
    first.write_text("the same")
    second.write_text("the same")
    read = provenance.digest(first)
    made.write_text(json.dumps({"inputs": {"rollouts": [read, read]}}))
    other.write_text(json.dumps({"inputs": {"rollouts": [read]}}))

    def found() -> list[tuple[Path, str]]:
        lineage = Lineage()
        lineage.add(made, "curate", rollouts=[(first, "rollout"), (second, "rollout")])
        lineage.add(other, "score", rollouts=[(first, "rollout")])
        return [(finding.file, finding.stage) for finding in lineage.findings()]

    assert found() == []
    second.write_text("another")
    assert found() == [(second, "rollout")]
    first.write_text("another")
    assert found() == [(first, "rollout"), (second, "rollout")]
    second.unlink()
    assert found() == [(first, "rollout"), (made, "curate")]


def test_an_imported_run_is_none_whose_run_json_was_lost(results: Path) -> None:
    shutil.copytree(results / RUN / "r0000/p0", results / "theirs/r0000/p0")
    assert verify(results, rollouts=0).findings == []
    path = results / "theirs/r0000/p0/scores/exact-000.parquet"
    parquet.write(path, parquet.read(path).slice(1), "scores")
    (found,) = verify(results, rollouts=0).findings
    assert (found.file, found.stage) == (path, "import")
