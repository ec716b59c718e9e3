"""Is a teacher any better than the policy: what is asked, what it comes to, and who hears of it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pydantic import ValidationError

from rollway.config import deep_merge, load_experiment
from rollway.config.policies import CharTokenizer, ScratchPolicy, SftConfig
from rollway.config.rollouts import Sampling
from rollway.config.scorers import ExactScorer, ScoreConfig, TeacherScorer, same_scorer
from rollway.config.teachers import LIVE_TEACHER, PolicyTeacher
from rollway.errors import RollwayError
from rollway.policies import causal_lm
from rollway.policies.manifest import PolicyManifest, write_manifest
from rollway.report import health
from rollway.report.data import Run, read_points
from rollway.runtime import status
from rollway.runtime.plan import Plan
from rollway.runtime.specs import CheckTeacherSpec
from rollway.scorers.teacher_check import compared
from rollway.stages import check_teacher as stage
from rollway.store import parquet
from rollway.store.catalog import open_catalog, run_sql
from rollway.store.tables import ROLLOUTS, TABLES, TEACHER_CHECKS
from rollway.terminal.status import notes
from rollway.training.sft import Demonstration, sft
from workflow.project import TINY

LETTERS = "abcdef"


def answers(pairs: dict[str, list[tuple[bool, bool]]]) -> pa.Table:
    """(policy, teacher) right or wrong, by prompt."""
    rows = [
        {
            **{"rollout_id": f"{prompt}-{n}", "prompt_id": prompt, "scorer": "wise", "context": 0},
            **{"policy_correct": policy, "teacher_correct": teacher, "policy_text": "", "teacher_text": ""},
            **{"policy_length": 1, "teacher_length": 1, "teacher_prompt_tokens": [1]},
        }
        for prompt, of_prompt in pairs.items()
        for n, (policy, teacher) in enumerate(of_prompt)
    ]
    return pa.Table.from_pylist(rows, TEACHER_CHECKS.schema())


def test_shares_are_means_over_prompts() -> None:
    found = compared(answers({"p": [(True, True), (False, True)], "q": [(False, True)], "r": [(True, False)]}))
    assert (found.rollouts, found.prompts) == (4, 3)
    assert found.policy == pytest.approx((0.5 + 0.0 + 1.0) / 3)
    assert found.teacher == pytest.approx((1.0 + 1.0 + 0.0) / 3)
    assert found.difference == pytest.approx(found.teacher - found.policy)
    assert found.low < 0 < found.high
    assert not found.better
    assert "is not shown to be better" in found.words()


def test_the_interval_decides() -> None:
    """The standard error of the mean of n gaps that are 1 in a share p of the prompts and else 0."""
    share, count = 0.3, 200
    pairs = {f"p{n}": [(False, n < share * count)] for n in range(count)}
    found = compared(answers(pairs))
    error = (share * (1 - share) / count) ** 0.5
    assert found.better
    assert found.low == pytest.approx(share - 1.96 * error, abs=0.01)
    assert found.high == pytest.approx(share + 1.96 * error, abs=0.01)
    worse = compared(answers({p: [(teacher, policy) for policy, teacher in of] for p, of in pairs.items()}))
    assert not worse.better
    assert "is WORSE than the policy" in worse.words()


def test_nothing_to_ask_is_no_success() -> None:
    found = compared(answers({}))
    assert found.figures() == {"rollouts": 0.0, "prompts": 0.0, "better": 0.0}
    assert "could not be compared" in found.words()


# ---- the stage


def taught(demonstrations: list[tuple[str, str]], folder: Path, seed: int = 0) -> Path:
    """A tiny policy that has learnt what follows what."""
    config = ScratchPolicy(
        tokenizer=CharTokenizer(alphabet=LETTERS + ">:"),
        layers=1,
        hidden=32,
        heads=2,
        kv_heads=1,
        intermediate=64,
        context=16,
    )
    policy = causal_lm.build(config, [], seed, device="cpu")
    policy.model.requires_grad_(True)
    encode = policy.tokenizer
    rows = [
        Demonstration(str(n), encode(read, add_special_tokens=False)["input_ids"], said)
        for n, (read, said) in enumerate(demonstrations)
    ]
    given = SftConfig(steps=120, batch=16, lr=5e-3, lr_warmup_steps=5)
    sft(policy.model, policy.tokenizer, rows, given, seed=seed)
    entries = {"main": causal_lm.save(folder, policy)}
    write_manifest(folder / "policy.json", PolicyManifest("causal_lm", entries))
    return folder / "policy.json"


class Bed:
    """Prompts of one letter whose answer is the letter; three policies, and two rollouts of each prompt."""

    def __init__(self, root: Path) -> None:
        torch.set_num_threads(1)
        self.root = root
        wrong = {letter: LETTERS[(n + 1) % len(LETTERS)] for n, letter in enumerate(LETTERS)}
        # It is wrong by itself, and copies what it is told.
        alone, told = [(f"{x}:", wrong[x]) for x in LETTERS], [(f"{x}>{y}:", x) for x in LETTERS for y in LETTERS]
        self.student = taught([*alone * 6, *told], root / "student")
        self.knows = taught([(f"{x}:", x) for x in LETTERS], root / "knows", 1)
        prompts = [
            {
                **{"prompt_id": x, "task": "t", "split": "train", "answer": x},
                "messages": json.dumps([{"role": "user", "content": f"{x}:"}]),
                "meta": json.dumps({"format": "plain", "demonstration": x}),
            }
            for x in LETTERS
        ]
        parquet.write(root / "prompts.parquet", pa.Table.from_pylist(prompts), "prompts")
        reader = causal_lm.load_reader(self.student).tokenizer
        rollouts, scores = [], []
        for x in LETTERS:
            for n, text in enumerate((wrong[x], x, x)):
                name, source = f"{x}-{n}", "expert" if n == 2 else "policy"
                tokens = [*reader(text, add_special_tokens=False)["input_ids"], reader.eos_token_id]
                rollouts.append(
                    {
                        **{"rollout_id": name, "round": 0, "pass": 0, "policy": "d", "policy_round": 0},
                        **{"group_id": x, "prompt_id": x, "sample": n, "source": source, "finish": "stop"},
                        **{"length": 2, "engine": "transformers", "sampling": "{}", "tokens": tokens, "text": text},
                        **{"prompt_tokens": reader(f"{x}:", add_special_tokens=False)["input_ids"]},
                        **{"logprobs": [-1.0] * 2, "train_mask": [True] * 2, "segments": []},
                    }
                )
                # No rollout of the first two prompts is right, so they have no sibling.
                right = float(text == x and x not in LETTERS[:2])
                scores.append({"rollout_id": name, "scorer": "exact", "reward": right, "components": {}})
        parquet.write(root / "rollouts.parquet", pa.Table.from_pylist(rollouts, ROLLOUTS.schema()), "rollouts")
        table = pa.Table.from_pylist(scores, schema=TABLES["scores"].schema())
        parquet.write(root / "exact-000.parquet", table, "scores")

    def check(self, folder: Path, teacher: Path, **given: Any) -> list[dict[str, Any]]:
        scorer = given.pop("scorer", "wise")
        config = TeacherScorer.model_validate({"model": {"kind": "warmup", "name": "big"}, **given})
        spec = CheckTeacherSpec(
            version=1,
            seed=0,
            round=0,
            scorer=scorer,
            config=config,
            sampling=Sampling(max_tokens=4),
            correct="exact",
            correctness=ExactScorer(),
            threshold=1.0,
        )
        folder.mkdir(parents=True, exist_ok=True)
        stage.run(
            spec,
            prompts=self.root / "prompts.parquet",
            rollouts=[self.root / "rollouts.parquet"],
            needs=[self.root / "exact-000.parquet"] if config.needs else [],
            policy=self.student,
            teacher=[teacher],
            answers=folder / "teacher-wise.parquet",
            metrics=folder / "teacher-wise.json",
            cache=self.root,
        )
        return parquet.read(folder / "teacher-wise.parquet").to_pylist()


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Bed:
    return Bed(tmp_path_factory.mktemp("bed"))


def figures(folder: Path) -> dict[str, float]:
    written = json.loads((folder / "teacher-wise.json").read_text())
    assert (written["round"], written["stage"]) == (0, "check_teacher")
    return {m["name"]: m["value"] for m in written["metrics"]}


def test_a_teacher_that_knows_better(bed: Bed, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = bed.check(tmp_path, bed.knows)
    # One rollout of each group before the second of any, and none of an expert.
    assert [row["rollout_id"] for row in rows] == [f"{x}-{n}" for n in (0, 1) for x in LETTERS]
    found = figures(tmp_path)
    assert found["wise/policy"] < 0.2 and found["wise/teacher"] > 0.8 and found["wise/better"] == 1.0
    assert found["wise/teacher"] == pytest.approx(np.mean([row["teacher_text"] == row["prompt_id"] for row in rows]))
    said = capsys.readouterr().err
    assert "rollway: round 0: teacher wise is better than the policy: right on" in said and "WARNING" not in said


def test_one_that_is_worse_is_told_aloud_or_stops(bed: Bed, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The student itself, in a context that tells it nothing."""
    useless = [{"prompt": "{prompt}"}]
    bed.check(tmp_path, bed.student, context=useless)
    assert figures(tmp_path)["wise/better"] == 0.0
    said = capsys.readouterr().err
    assert "rollway: WARNING: round 0: teacher wise is" in said and "teach it to read this context first" in said
    with pytest.raises(RollwayError, match=r"teacher wise is .*; teach it .*check.otherwise: warn"):
        bed.check(tmp_path / "stop", bed.student, context=useless, check={"otherwise": "stop"})
    assert not list((tmp_path / "stop").iterdir())
    # The trainer's own model, without a scorer: what is set, and where.
    with pytest.raises(
        RollwayError, match=r"teacher train\.teacher is .*; take a better model.* set train\.teacher\.check\.otherwise"
    ):
        bed.check(tmp_path / "stop", bed.student, scorer=LIVE_TEACHER, check={"otherwise": "stop"})


def test_the_policy_in_a_context_that_it_can_read(bed: Bed, tmp_path: Path) -> None:
    rows = bed.check(tmp_path, bed.student, context=[{"prompt": "{answer}>{prompt}"}])
    reader = causal_lm.load_reader(bed.student).tokenizer
    assert all(reader.decode(row["teacher_prompt_tokens"]) == f"{row['prompt_id']}>{row['prompt_id']}:" for row in rows)
    assert figures(tmp_path)["wise/teacher"] > 0.8


def test_only_rollouts_with_a_context_are_asked(bed: Bed, tmp_path: Path) -> None:
    rows = bed.check(tmp_path, bed.student, context=[{"prompt": "{sibling}>{prompt}"}], needs=["exact"])
    # The right rollout's only right sibling is the expert's.
    assert {row["prompt_id"] for row in rows} == set(LETTERS[2:])
    few = bed.check(
        tmp_path, bed.student, context=[{"prompt": "{sibling}>{prompt}"}], needs=["exact"], check={"rollouts": 3}
    )
    assert [row["rollout_id"] for row in few] == ["c-0", "d-0", "e-0"]


def test_a_context_without_rows_is_told(bed: Bed, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given: dict[str, Any] = {"context": [{"prompt": "{sibling}>{prompt}"}], "needs": ["exact"], "threshold": 2.0}
    assert bed.check(tmp_path, bed.student, **given) == []
    assert figures(tmp_path) == {"wise/rollouts": 0.0, "wise/prompts": 0.0, "wise/better": 0.0}
    assert "WARNING: round 0: teacher wise could not be compared" in capsys.readouterr().err


def test_a_context_beyond_the_window(bed: Bed, tmp_path: Path) -> None:
    with pytest.raises(RollwayError, match=r"scorer wise: the teacher can read no rollout; .*window is 16"):
        bed.check(tmp_path, bed.student, context=[{"prompt": "{prompt}" * 9}])


def test_the_same_bytes_twice(bed: Bed, tmp_path: Path) -> None:
    for name in ("one", "two"):
        bed.check(tmp_path / name, bed.knows)
    files = ("teacher-wise.parquet", "teacher-wise.json")
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)


# ---- who hears of it


def test_tables_status_and_report(bed: Bed, tmp_path: Path) -> None:
    bed.check(tmp_path / "good-s0" / "r0000", bed.knows)
    bed.check(tmp_path / "poor-s0" / "r0000", bed.student, context=[{"prompt": "{prompt}"}])
    query = "SELECT run, round, scorer, count(*) AS n FROM teacher_checks GROUP BY ALL ORDER BY ALL"
    assert json.loads(run_sql(tmp_path, query, "json")) == [
        {"run": run, "round": 0, "scorer": "wise", "n": 12} for run in ("good-s0", "poor-s0")
    ]
    told = notes(status.of_folder(tmp_path))
    assert len(told) == 1 and told[0].startswith("teacher: poor-s0: wise is ") and told[0].endswith("(round 0)")
    with open_catalog(tmp_path) as catalog:
        points, _ = read_points(catalog)
    runs = [Run(f"{name}-s0", name, 0, {}) for name in ("good", "other", "poor")]
    (check,) = health._checked(runs, points)
    assert [(v.run, v.level == "good") for v in check.verdicts] == [("poor-s0", False), ("good-s0", True)]
    assert "cannot be expected to help" in check.verdicts[0].text
    assert health._checked(runs[1:2], points) == []


# ---- the plan


def plan(run: dict[str, Any], **more: dict[str, Any]) -> Plan:
    runs = {"grpo": {"recipe": "grpo", "rounds": 4, **run}, **more}
    warmups = {"bigger": TINY["warmups"]["tiny"]}
    return Plan(load_experiment(deep_merge(TINY, {"warmups": warmups, "runs": runs})))


def distilled(model: dict[str, Any], **given: Any) -> dict[str, Any]:
    scorers = {"exact": {"kind": "exact"}, "wise": {"kind": "teacher", "model": model, **given}}
    return {
        "score": {"scorers": scorers, "reward": {"exact": 1.0}},
        "curate": {"teacher": "wise"},
        "train": {"objective": {"distill": {}}},
    }


WARMUP = {"kind": "warmup", "name": "bigger"}
TOLD = [{"prompt": "{answer}>{prompt}"}]


def checks(made: Plan, run: str = "grpo-s0") -> list[str]:
    return [path.removeprefix("results/") for path in made.teachers.checks(run)]


def test_training_waits_for_the_check() -> None:
    made = plan(distilled(WARMUP))
    before = [made.teachers.checks_before(SimpleNamespace(run="grpo-s0", next=f"{r:04d}")) for r in range(1, 5)]
    assert before == [["results/grpo-s0/r0000/teacher-wise.json"], [], [], []]
    assert checks(made) == ["grpo-s0/r0000/teacher-wise.json"]
    w = SimpleNamespace(run="grpo-s0", round="0000", scorer="wise")
    assert made.teachers.checked_model(w) == ["results/warmups/bigger-s0/policy.json"]
    assert json.loads(made.teachers.check_spec(w))["correct"] == "exact"


def test_what_is_not_checked() -> None:
    assert checks(plan({})) == []
    assert checks(plan(distilled(WARMUP, check=None))) == []
    # A policy of the run in its own context is a reference or an opponent; a recorded scorer teaches nothing.
    assert checks(plan(distilled({"kind": "policy", "age": 1}))) == []
    recorded = distilled(WARMUP)
    assert checks(plan({"score": recorded["score"]})) == []
    with pytest.raises(ValidationError, match="`check` has no effect on a policy of the run in its own context"):
        TeacherScorer.model_validate({"model": {"kind": "policy"}, "check": {"otherwise": "stop"}})


def test_checks_come_again() -> None:
    every = plan(distilled({"kind": "policy"}, context=TOLD, check={"every": 2}))
    assert checks(every) == [f"grpo-s0/r000{r}/teacher-wise.json" for r in (0, 2)]
    changed = {"score": {"scorers": {"wise": {"context": [{"prompt": "{prompt}{answer}"}]}}}}
    other = plan({**distilled({"kind": "policy"}, context=TOLD), "schedule": [{"from": 3, **changed}]})
    assert checks(other) == [f"grpo-s0/r000{r}/teacher-wise.json" for r in (0, 3)]
    fork = {"recipe": "grpo", "rounds": 4, "fork": {"run": "grpo", "round": 1, "stage": "score"}, **distilled(WARMUP)}
    assert checks(plan({}, other=fork), "other-s0") == ["other-s0/r0001/teacher-wise.json"]


def test_a_live_teacher_is_the_policy_before_the_round() -> None:
    live = distilled({"kind": "live"}, context=TOLD)
    live["train"] |= {"ema": 0.1, "teacher": {"kind": "live", "weights": "ema", "context": "privileged"}}
    live["train"]["objective"] = {"distill": {"estimate": "exact"}}
    made = plan(live)
    w = SimpleNamespace(run="grpo-s0", round="0000", scorer="wise")
    assert json.loads(made.teachers.check_spec(w))["config"]["model"] == {"kind": "policy", "policy": "ema"}
    assert made.teachers.checked_model(w) == ["results/warmups/tiny-s0/policy.json"]


@pytest.mark.parametrize(
    ("weights", "models", "files"),
    [
        # Replaced every second round, from the policy that the first one started from.
        ({"weights": "synced", "sync": 2}, [{}, {"age": 1}, {}, {"age": 1}], ["w", "w", "r0002", "r0002"]),
        ({"weights": "synced"}, [{}, {"age": 1}, {"age": 2}, {"age": 3}], ["w", "w", "w", "w"]),
        # Of a mean of logits the fixed share.
        ({"weights": "trust_region", "mix": 0.1}, [{"age": "initial"}] * 4, ["w", "w", "w", "w"]),
        ({"weights": "initial"}, [{"age": "initial"}] * 4, ["w", "w", "w", "w"]),
        ({"weights": "policy"}, [{}] * 4, ["w", "r0001", "r0002", "r0003"]),
    ],
)
def test_a_live_teacher_is_checked_as_the_weights_that_the_round_asks(
    weights: dict[str, Any], models: list[dict[str, Any]], files: list[str]
) -> None:
    live = distilled({"kind": "live"}, context=TOLD, check={"every": 1})
    live["train"] |= {"teacher": {"kind": "live", "context": "privileged", **weights}}
    live["train"]["objective"] = {"distill": {"estimate": "exact"}, "kl": "none"}
    made = plan(live)
    at = [SimpleNamespace(run="grpo-s0", round=f"{r:04d}", scorer="wise") for r in range(4)]
    assert [json.loads(made.teachers.check_spec(w))["config"]["model"] for w in at] == [
        {**PolicyTeacher().model_dump(exclude_defaults=True), "kind": "policy", **model} for model in models
    ]
    wanted = ["warmups/tiny-s0" if file == "w" else f"grpo-s0/{file}" for file in files]
    assert [made.teachers.checked_model(w) for w in at] == [[f"results/{folder}/policy.json"] for folder in wanted]
    if weights["weights"] == "synced":
        trained = [made.teachers.synced("grpo-s0", r) for r in range(4)]
        assert trained == [made.teachers.checked_model(w) for w in at]


def test_how_it_is_checked_reruns_no_scores() -> None:
    w = SimpleNamespace(run="grpo-s0", round="0001", p="0", shard="000", scorer="wise", next="0002")
    plain, stops = plan(distilled(WARMUP)), plan(distilled(WARMUP, check={"otherwise": "stop", "every": 3}))
    assert plain.score_spec(w) == stops.score_spec(w)
    assert plain.curate_spec(w) == stops.curate_spec(w)
    mine, theirs = (
        ScoreConfig.model_validate({"scorers": {"exact": {"kind": "exact"}, "wise": {"kind": "teacher", **given}}})
        for given in ({"model": WARMUP}, {"model": WARMUP, "check": None})
    )
    assert same_scorer(mine, theirs, "wise")
    assert "check" not in json.loads(TeacherScorer.model_validate({"model": WARMUP}).model_dump_json())
