"""check_teacher: a round's rollouts, policy and teacher -> what both answer to the same prompts, and who is right."""

from pathlib import Path

from rollway.config.teachers import LIVE_TEACHER
from rollway.errors import RollwayError
from rollway.runtime import phases
from rollway.runtime.notice import notice, progress
from rollway.runtime.paths import by_scorer
from rollway.runtime.specs import CheckTeacherSpec
from rollway.scorers import teacher_check
from rollway.stages.score import feedback_of, rewards_of
from rollway.store import parquet, provenance
from rollway.store.atomic import write_json


def run(
    spec: CheckTeacherSpec,
    *,
    prompts: Path,
    rollouts: list[Path],
    needs: list[Path],
    policy: Path,
    teacher: list[Path],
    answers: Path,
    metrics: Path,
    cache: Path,
) -> None:
    """Writes both answers and the difference of the shares of right ones, and says aloud where the teacher is not shown
    to be better. Raises RollwayError there if `check.otherwise` is stop."""
    check = spec.config.check
    if check is None:
        raise RollwayError(f"{spec.scorer}: its `check` is off, there is nothing to do")
    asked, files = parquet.read(prompts), by_scorer(needs)
    with progress(f"check {spec.scorer} r{spec.round}", 2 * check.rollouts):
        phases.mark("work")
        table = teacher_check.answers(
            spec,
            asked,
            rollouts,
            needs={name: rewards_of(paths) for name, paths in files.items()},
            feedback=feedback_of([files[name] for name in spec.config.needs if name in files]),
            policy=policy,
            teacher=teacher[0] if teacher else None,
            root=Path.cwd(),
            cache=cache,
        )
    found = teacher_check.compared(table)
    said = f"round {spec.round}: teacher {spec.scorer} {found.words()}"
    if not found.better and check.otherwise == "stop":
        place = spec.scorer if spec.scorer == LIVE_TEACHER else f"score.scorers.{spec.scorer}"
        raise RollwayError(f"{said}; {_mend(spec)}, or set {place}.check.otherwise: warn")
    phases.mark("write")
    parquet.write(answers, table, "teacher_checks")
    named = [{"step": 0, "name": f"{spec.scorer}/{name}", "value": value} for name, value in found.figures().items()]
    write_json(metrics, {"round": spec.round, "stage": "check_teacher", "metrics": named, **provenance.said()})
    notice(said if found.better else f"WARNING: {said}; {_mend(spec)}")


def _mend(spec: CheckTeacherSpec) -> str:
    if spec.config.context:
        return "teach it to read this context first (warmups.NAME.sft), give it another one, or take a better model"
    return "take a better model, or train it longer"
