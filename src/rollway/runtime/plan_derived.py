"""The part of the plan that derived passes have: what each is made of, who writes it, and its spec."""

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from rollway.config.assets import find, relative
from rollway.config.curation import STEP_FOLDERS
from rollway.config.rollouts import Derive
from rollway.config.scorers import ScoreConfig
from rollway.config.teachers import PolicyTeacher, WarmupTeacher
from rollway.runtime.specs import STAGE_VERSION, RolloutSpec

if TYPE_CHECKING:
    from rollway.runtime.plan import Plan


class DerivedPasses:
    """`w`: wildcards of the rule `rollout`. Everything is None or empty for passes that sample the task's prompts."""

    def __init__(self, plan: "Plan") -> None:
        self.plan = plan
        self._read = lru_cache(maxsize=None)(self._scorers_read)

    def of(self, w: Any) -> Derive | None:
        return self.plan.recipe(w.run, int(w.round)).rollout.derived_in(int(w.p))

    def others(self, run: str, round: int) -> list[int]:
        """Passes of a round that sample the task's prompts."""
        rollout = self.plan.recipe(self.plan.home(run, round, "rollout"), round).rollout
        return [p for p in self.plan.passes(run, round) if rollout.derived_in(p) is None]

    def scorers(self, w: Any) -> ScoreConfig | None:
        """Scorers of the earlier passes that choosing parents and wording contexts read."""
        if self.of(w) is None:
            return None
        return self._read(*self.plan.segment(w.run, int(w.round)), int(w.p))

    def sql(self, w: Any) -> str | None:
        derive = self.of(w)
        if derive is None:
            return None
        return relative(find("sql", derive.parents.sql, ".sql", STEP_FOLDERS["parents"]))

    def author(self, w: Any) -> list[str]:
        """policy.json of an author that is not the policy of the round's other rollouts."""
        derive, round = self.of(w), int(w.round)
        match None if derive is None else derive.author:
            case WarmupTeacher(name=name, seed=seed):
                return [self.plan.warmup_file(name, seed)]
            case PolicyTeacher(age=age):
                return [self.plan.policy_path(w.run, 0 if age == "initial" else max(0, round - age))]
        return []

    def spec(self, w: Any) -> RolloutSpec | None:
        derive, round = self.of(w), int(w.round)
        if derive is None:
            return None
        recipe, score = self.plan.recipe(w.run, round), self.scorers(w)
        assert score is not None
        return RolloutSpec(
            version=STAGE_VERSION["rollout"],
            seed=self.plan.runs[w.run][1],
            round=round,
            pass_number=int(w.p),
            policy_round=self._author_round(w, derive),
            shard=int(w.shard),
            rollout=recipe.rollout.model_copy(
                update={"passes": 1, "refill": None, "offset": 0, "mix": None, "derive": [_once(derive)]}
            ),
            score=score,
            reward=recipe.curate.reward,
            horizon=self._horizon(w, derive),
            author=next(iter(self.author(w)), None),
        )

    def _author_round(self, w: Any, derive: Derive) -> int:
        round = int(w.round)
        match derive.author:
            case WarmupTeacher():
                return 0
            case PolicyTeacher(age=age):
                return 0 if age == "initial" else max(0, round - age)
        return self.plan.policy_round(w.run, round)

    def _horizon(self, w: Any, derive: Derive) -> int | None:
        from rollway.curation.parents import takes_progress

        curate = self.plan.recipe(w.run, int(w.round)).curate
        return curate.horizon if takes_progress(curate.reward, derive.parents) else None

    def _scorers_read(self, name: str, segment: int, pass_number: int) -> ScoreConfig:
        from rollway.curation import given_values
        from rollway.curation.parents import scorers_of

        recipe = self.plan.settings(name, segment)
        derive = recipe.rollout.derived_in(pass_number)
        assert derive is not None
        given = given_values(recipe.curate, round=segment, seed=0)
        return scorers_of(recipe.score, recipe.curate.reward, derive, given)


def _once(derive: Derive) -> Derive:
    """How many attempts there may be decides nothing that one of them writes."""
    return derive.model_copy(update={"attempts": 1})
