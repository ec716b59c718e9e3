"""The part of the plan that lm-eval has: which policies it evaluates, what it reads, its spec."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollway.config.base import ConfigError
from rollway.runtime import specs
from rollway.runtime.specs import STAGE_VERSION

if TYPE_CHECKING:
    from rollway.runtime.plan import Plan


class LmEvals:
    """Paths, inputs and specs of the jobs that run lm-eval; none where no run has `lm_eval`."""

    def __init__(self, plan: "Plan") -> None:
        self.plan = plan

    def paths(self, run: str) -> list[str]:
        """The metrics files of a run: of its own policies, also of those that a fork takes from its parent."""
        config = self.plan.config_of(run)
        if config.lm_eval is None:
            return []
        return [f"{self.plan.folder(run, r)}/lm_eval.json" for r in config.lm_eval.rounds(config.rounds)]

    def policy(self, w: Any) -> str:
        return self.plan.policy_path(w.run, int(w.round))

    def files(self, w: Any) -> list[str]:
        """Task files of the user's own, so that editing them evaluates anew."""
        config = self.plan.config_of(w.run).lm_eval
        if config is None or config.include is None:
            return []
        folder = Path(config.include)
        if not folder.is_dir():
            raise ConfigError(f"runs of {w.run}: lm_eval.include: {config.include} is no folder")
        hidden = [path for path in folder.rglob("*") if any(part.startswith((".", "__")) for part in path.parts)]
        return sorted(str(path) for path in folder.rglob("*") if path.is_file() and path not in hidden)

    def spec(self, w: Any) -> str:
        config = self.plan.config_of(w.run).lm_eval
        if config is None:
            raise ConfigError(f"{w.run}: has no lm_eval in its config")
        return specs.dump(
            specs.LmEvalSpec(
                version=STAGE_VERSION["lm_eval"],
                seed=self.plan.runs[w.run][1],
                round=int(w.round),
                lm_eval=config.model_copy(update={"every": None}),
            )
        )
