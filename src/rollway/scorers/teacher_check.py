"""Is a teacher any better? It and the policy answer the prompts of the same rollouts, the teacher after its context."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from rollway.config.teachers import LIVE_TEACHER
from rollway.errors import RollwayError
from rollway.evaluation.intervals import paired_difference
from rollway.scorers.rows import COLUMNS, Row, join
from rollway.scorers.run import Needs, score
from rollway.store import parquet
from rollway.store.tables import TEACHER_CHECKS

if TYPE_CHECKING:
    from rollway.engines.base import Completion
    from rollway.policies.causal_lm import CausalPolicy
    from rollway.runtime.specs import CheckTeacherSpec
    from rollway.scorers.teacher import Context

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Compared:
    """Shares of right answers over `rollouts` pairs of them, and the interval of their difference."""

    rollouts: int
    prompts: int
    policy: float = 0.0
    teacher: float = 0.0
    difference: float = 0.0
    low: float = 0.0
    high: float = 0.0

    @property
    def better(self) -> bool:
        """The whole interval lies above 0."""
        return self.low > 0.0

    def figures(self) -> dict[str, float]:
        """Metrics by name; where nothing could be asked, the counts alone."""
        counts = {"rollouts": float(self.rollouts), "prompts": float(self.prompts), "better": float(self.better)}
        if not self.rollouts:
            return counts
        shares = {"policy": self.policy, "teacher": self.teacher, "difference": self.difference}
        return counts | shares | {"difference/low": self.low, "difference/high": self.high}

    def words(self) -> str:
        """The end of a sentence that begins with the teacher's name."""
        if not self.rollouts:
            return "could not be compared with the policy: no rollout has what its context names"
        verdict = "is better than the policy" if self.better else "is not shown to be better than the policy"
        verdict = "is WORSE than the policy" if self.high < 0.0 else verdict
        return (
            f"{verdict}: right on {self.teacher:.3f} of {self.rollouts} answers, the policy on {self.policy:.3f} "
            f"(difference {self.difference:+.3f}, 95 % interval {self.low:+.3f} to {self.high:+.3f})"
        )


@dataclass(frozen=True)
class _Case:
    """One rollout asked again: what policy and teacher read."""

    row: Row
    own: list[int]
    ids: list[int]
    context: int


def answers(
    spec: CheckTeacherSpec,
    prompts: pa.Table,
    rollouts: Sequence[Path],
    *,
    needs: Needs,
    feedback: Mapping[str, str | None],
    policy: Path,
    teacher: Path | None,
    root: Path,
    cache: Path | None,
) -> pa.Table:
    """A row of `teacher_checks` per rollout that is asked again, at most `check.rollouts`, one of each group first.

    Both models draw with the same noise, at the rollouts' sampling settings. Experts' rollouts, and those without what
    the context names, are not asked. policy: the policy.json that the round updates. teacher: that of a teacher which
    is stored here.
    Raises RollwayError where the teacher cannot be loaded or has another vocabulary, and where its context fits the
    window on no rollout.
    """
    from rollway.policies import causal_lm
    from rollway.scorers.teacher import Context, check_same, load_teacher

    student = causal_lm.load(policy, "main")
    who = _who(spec)
    wise = load_teacher(who, spec.config.model, root, teacher)
    if wise is None:
        raise RollwayError(f"{who}: the spec of its check names no model")
    own, reader = causal_lm.reader_of(student), causal_lm.reader_of(wise)
    check_same(who, reader, own)

    def context(file: Path) -> Context:
        return Context(spec.scorer, spec.config, reader, file, needs, root, feedback)

    cases = _cases(spec, prompts, rollouts, context)
    rows = [case.row for case in cases]
    by_policy = _draw(student, rows, [case.own for case in cases], spec)
    by_teacher = _draw(wise, rows, [case.ids for case in cases], spec)
    texts = [[causal_lm.decode(own, done.tokens) for done in drawn] for drawn in (by_policy, by_teacher)]
    right = [
        _right(spec, rows, drawn, said, root, cache) for drawn, said in zip((by_policy, by_teacher), texts, strict=True)
    ]
    count = len(cases)
    columns = {
        "rollout_id": [row.rollout_id for row in rows],
        "prompt_id": [row.prompt_id for row in rows],
        "scorer": [spec.scorer] * count,
        "context": [case.context for case in cases],
        "policy_correct": right[0],
        "teacher_correct": right[1],
        "policy_text": texts[0],
        "teacher_text": texts[1],
        "policy_length": [len(done.tokens) for done in by_policy],
        "teacher_length": [len(done.tokens) for done in by_teacher],
        "teacher_prompt_tokens": [case.ids for case in cases],
    }
    return pa.table(columns, schema=TEACHER_CHECKS.schema())


def compared(table: pa.Table) -> Compared:
    """What a table of `teacher_checks` of one teacher comes to; the bootstrap draws prompts."""
    by_prompt: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    columns = (table.column(name).to_pylist() for name in ("prompt_id", "policy_correct", "teacher_correct"))
    for prompt, policy, teacher in zip(*columns, strict=True):
        by_prompt[prompt].append((policy, teacher))
    if not by_prompt:
        return Compared(0, 0)
    policy, teacher = (
        {prompt: sum(pair[n] for pair in pairs) / len(pairs) for prompt, pairs in by_prompt.items()} for n in (0, 1)
    )
    found = paired_difference(policy, teacher, RESAMPLES, CONFIDENCE)
    return Compared(
        rollouts=table.num_rows,
        prompts=len(by_prompt),
        policy=sum(policy.values()) / len(policy),
        teacher=sum(teacher.values()) / len(teacher),
        difference=found.value,
        low=found.low,
        high=found.high,
    )


def _cases(
    spec: CheckTeacherSpec, prompts: pa.Table, rollouts: Sequence[Path], context_of: Callable[[Path], Context]
) -> list[_Case]:
    """Rollouts by their number within the group, of equal ones by id, as far as the teacher has something to read."""
    assert spec.config.check is not None
    found: list[tuple[Row, list[int], Context]] = []
    for file in rollouts:
        context = context_of(file)
        for part in parquet.read_in_parts(file, [*COLUMNS, "prompt_tokens", "source"]):
            sources, fed = part["source"].to_pylist(), part["prompt_tokens"].to_pylist()
            rows = join(part, prompts)
            found += [(r, p, context) for r, p, s in zip(rows, fed, sources, strict=True) if s != "expert"]
    found.sort(key=lambda case: (case[0].sample, case[0].rollout_id))
    cases: list[_Case] = []
    refused: RollwayError | None = None
    for row, own, context in found:
        if len(cases) == spec.config.check.rollouts:
            break
        try:
            read = context.of(row, own)
        except RollwayError as error:
            refused = refused or error
            continue
        if read is not None:
            ids, components = read
            cases.append(_Case(row, own, ids, int(components.get("context", 0.0))))
    if refused is not None and not cases:
        raise RollwayError(f"{_who(spec)}: the teacher can read no rollout; the first: {refused}")
    return cases


def _who(spec: CheckTeacherSpec) -> str:
    return spec.scorer if spec.scorer == LIVE_TEACHER else f"scorer {spec.scorer}"


def _draw(
    model: CausalPolicy, rows: Sequence[Row], read: Sequence[list[int]], spec: CheckTeacherSpec
) -> list[Completion]:
    """One answer each. The noise hangs on the rollout and not on the model."""
    from rollway.config.rollouts import TransformersEngine
    from rollway.engines import Request, make

    requests = [Request(f"check-{row.rollout_id}", ids) for row, ids in zip(rows, read, strict=True)]
    return make(TransformersEngine())(model, requests, spec.sampling, seed=spec.seed)


def _right(
    spec: CheckTeacherSpec,
    rows: Sequence[Row],
    drawn: Sequence[Completion],
    texts: Sequence[str],
    root: Path,
    cache: Path | None,
) -> list[bool]:
    answered = [
        replace(row, completion=text, tokens=done.tokens, length=len(done.tokens), finish=done.finish)
        for row, done, text in zip(rows, drawn, texts, strict=True)
    ]
    trained = Path(spec.trained) if spec.trained else None
    verdicts = score(
        spec.correct, spec.correctness, answered, needs={}, threads=1, root=root, cache=cache, trained=trained
    )
    return [reward >= spec.threshold for reward in verdicts.column("reward").to_pylist()]
