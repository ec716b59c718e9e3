"""The part of the plan that discriminators have: one per run, scorer and round, each made of the one before."""

import os
from typing import TYPE_CHECKING, Any

from rollway.config.scorers import DiscriminatorScorer, Scorer
from rollway.runtime import specs
from rollway.runtime.specs import STAGE_VERSION, DiscriminatorSpec

if TYPE_CHECKING:
    from rollway.runtime.plan import Plan


class Discriminators:
    """Paths, inputs and specs of the rule `discriminator`, whose wildcards `w` are run, round and scorer."""

    def __init__(self, plan: "Plan") -> None:
        self.plan = plan

    def path(self, run: str, round: int, scorer: str) -> str:
        """A fork takes its parent's where it takes the scores made with it."""
        home = self.plan.score_home(run, round, scorer)
        return f"{self.plan.folder(home, round)}/discriminators/{scorer}/reward_model.json"

    def applied_by(self, run: str, round: int, scorer: str) -> list[str]:
        """The file that the scores of a round wait for, where their scorer is a discriminator."""
        return [self.path(run, round, scorer)] if self._find(run, round, scorer) is not None else []

    def metrics(self, run: str) -> list[str]:
        """Figures of all that the run taught itself."""
        rounds = range(self.plan.config_of(run).rounds)
        due = [
            (r, name) for r in rounds for name in self.plan.curated_score(run, r).scorers if self._find(run, r, name)
        ]
        return [self._metrics(r, run, name) for r, name in due if self.plan.score_home(run, r, name) == run]

    def _metrics(self, round: int, run: str, scorer: str) -> str:
        return f"{self.plan.folder(run, round)}/discriminator-{scorer}.json"

    def _find(self, run: str, round: int, scorer: str) -> DiscriminatorScorer | None:
        found: Scorer | None = self.plan.recipe(run, round).score.scorers.get(scorer)
        return found if isinstance(found, DiscriminatorScorer) else None

    # ---- inputs of the rule

    def rollouts(self, w: Any) -> list[str]:
        """Those of the round's first pass: what later passes draw may hang on this model's own scores."""
        return self.plan.rollout_paths(w.run, int(w.round), 0)

    def references(self, w: Any) -> list[str]:
        """Files of the teacher's text; one that some job writes is that job's output, however it is spelled."""
        scorer = self._find(w.run, int(w.round), w.scorer)
        files = [] if scorer is None else scorer.references
        named = [file.replace("{seed}", str(self.plan.runs[w.run][1])) for file in files]
        return [self.plan.made_by_place.get(os.path.abspath(file), file) for file in named]

    def previous(self, w: Any) -> list[str]:
        """The round's before, where there was one under this name."""
        before = int(w.round) - 1
        if before < 0 or self._find(w.run, before, w.scorer) is None:
            return []
        return [self.path(w.run, before, w.scorer)]

    def policy(self, w: Any) -> list[str]:
        """Where the first one starts."""
        return [] if self.previous(w) else [self.plan.warmup_path(w.run)]

    def spec(self, w: Any) -> str:
        scorer = self._find(w.run, int(w.round), w.scorer)
        assert scorer is not None, f"{w.scorer} is no discriminator of {w.run}"
        spec = DiscriminatorSpec(
            version=STAGE_VERSION["discriminator"],
            seed=self.plan.runs[w.run][1],
            round=int(w.round),
            scorer=w.scorer,
            config=scorer,
        )
        return specs.dump(spec)
