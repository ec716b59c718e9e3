"""The part of the plan that teachers have: which policies the scores of one wait for, and which files."""

from typing import TYPE_CHECKING, Any

from rollway.config.scorers import Scorer
from rollway.config.teachers import HuggingFaceTeacher, PolicyTeacher, WarmupTeacher
from rollway.runtime.plan_reward_models import model_files

if TYPE_CHECKING:
    from rollway.runtime.plan import Plan


class Teachers:
    """Inputs of the jobs of scorers of kind teacher. `w`: wildcards of the rule `score`."""

    def __init__(self, plan: "Plan") -> None:
        self.plan = plan

    def policies(self, w: Any) -> list[str]:
        return list(dict.fromkeys(self.read(w).values()))

    def read(self, w: Any) -> dict[str, str]:
        """policy.json files by their names in the score spec: `policy`, whose tokens are scored, and `teacher`, where
        it is a policy of this experiment. Nothing for other scorers."""
        round = int(w.round)
        scorer = self.plan.recipe(w.run, round).score.scorers.get(w.scorer)
        if scorer is None or scorer.kind != "teacher":
            return {}
        # Any policy of the run has its tokenizer.
        found = {"policy": self.plan.warmup_path(w.run)}
        match scorer.model:
            case WarmupTeacher() as model:
                found["teacher"] = self.plan.warmup_file(model.name, model.seed)
            case PolicyTeacher() as model:
                age = round if model.age == "initial" else model.age
                found["teacher"] = self.plan.policy_path(w.run, max(0, round - age))
        return found

    def files(self, scorer: Scorer) -> list[str]:
        """The local folder of a Hugging Face teacher and stored completions: editing them reruns the scores."""
        if scorer.kind != "teacher":
            return []
        folder = model_files(scorer.model.name) if isinstance(scorer.model, HuggingFaceTeacher) else []
        return [*folder, *scorer.references]
