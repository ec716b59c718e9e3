"""The part of the plan that teachers have: which policies the scores of one wait for, which files, and when one is
compared with the policy."""

from typing import TYPE_CHECKING, Any

from rollway.config.base import ConfigError
from rollway.config.scorers import Scorer, TeacherScorer, unchecked
from rollway.config.teachers import (
    LIVE_TEACHER,
    HuggingFaceTeacher,
    LiveModel,
    PolicyTeacher,
    TeacherModel,
    WarmupTeacher,
)
from rollway.config.training import LiveTeacher
from rollway.runtime import specs
from rollway.runtime.plan_reward_models import model_files
from rollway.runtime.specs import STAGE_VERSION

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
        stored = self._stored(w.run, round, scorer.model)
        return found | ({"teacher": stored[0]} if stored else {})

    def _stored(self, run: str, round: int, model: TeacherModel) -> list[str]:
        """policy.json of a teacher that is a policy of this experiment."""
        match model:
            case WarmupTeacher():
                return [self.plan.warmup_file(model.name, model.seed)]
            case PolicyTeacher():
                age = round if model.age == "initial" else model.age
                return [self.plan.policy_path(run, max(0, round - age))]
            case _:
                return []

    def files(self, scorer: Scorer) -> list[str]:
        """The local folder of a Hugging Face teacher and stored completions: editing them reruns the scores."""
        if scorer.kind != "teacher":
            return []
        folder = model_files(scorer.model.name) if isinstance(scorer.model, HuggingFaceTeacher) else []
        return [*folder, *scorer.references]

    def synced(self, run: str, round: int) -> list[str]:
        """policy.json of a live teacher that is renewed every `sync` rounds; nothing for others."""
        live = self.plan.recipe(run, round).train.teacher
        if live is None or live.weights != "synced":
            return []
        return [self.plan.policy_path(run, self._synced_at(run, round, live))]

    def _synced_at(self, run: str, round: int, live: LiveTeacher) -> int:
        """The round whose policy a teacher of weights `synced` is during `round`."""
        first = round
        while first > self._first(run) and self.plan.recipe(run, first - 1).train.teacher == live:
            first -= 1
        return first if live.sync is None else first + (round - first) // live.sync * live.sync

    def other(self, w: Any) -> list[str]:
        """Files of a live teacher that is another model: a warm-up's policy.json, or those of a local folder."""
        live = self.plan.recipe(w.run, int(w.next) - 1).train.teacher
        match None if live is None else live.model:
            case WarmupTeacher(name=name, seed=seed):
                return [self.plan.warmup_file(name, seed)]
            case HuggingFaceTeacher(name=name):
                return model_files(name)
            case _:
                return []

    def named(self, w: Any) -> dict[str, str]:
        """What the train spec says of it: `teacher`, the policy.json of a warm-up."""
        live = self.plan.recipe(w.run, int(w.next) - 1).train.teacher
        return {"teacher": self.other(w)[0]} if live is not None and isinstance(live.model, WarmupTeacher) else {}

    def mixed(self, w: Any) -> list[str]:
        """Files of a teacher that has a share in a pass's tokens. `w`: wildcards of the rule `rollout`."""
        rollout = self.plan.recipe(w.run, int(w.round)).rollout
        if rollout.mix is None or rollout.derived_in(int(w.p)) is not None:
            return []
        match rollout.mix.model:
            case WarmupTeacher(name=name, seed=seed):
                return [self.plan.warmup_file(name, seed)]
            case HuggingFaceTeacher(name=name):
                return model_files(name)

    def mixed_stored(self, w: Any) -> str | None:
        """Its policy.json, where it is a policy of this experiment."""
        mix = self.plan.recipe(w.run, int(w.round)).rollout.mix
        return self.mixed(w)[0] if mix is not None and isinstance(mix.model, WarmupTeacher) else None

    # ---- checks before use

    def checks(self, run: str) -> list[str]:
        """Figures of every comparison of a teacher with the policy that the run's training waits for."""
        rounds = range(self._first(run), self.plan.config_of(run).rounds)
        return [path for round in rounds for path in self._checks_of(run, round)]

    def checks_before(self, w: Any) -> list[str]:
        """Those before the round that the rule `train` makes its policy from."""
        return self._checks_of(w.run, int(w.next) - 1)

    def _checks_of(self, run: str, round: int) -> list[str]:
        names = [*self.plan.curated_score(run, round).scorers, LIVE_TEACHER]
        due = [name for name in names if self._is_due(run, round, name)]
        return [f"{self.plan.folder(run, round)}/teacher-{name}.json" for name in due]

    def _first(self, run: str) -> int:
        """The first round that the run trains itself."""
        fork = self.plan.config_of(run).fork
        return 0 if fork is None else fork.round + (fork.stage == "train")

    def _is_due(self, run: str, round: int, name: str) -> bool:
        scorer = self._used(run, round, name)
        if scorer is None or scorer.check is None or not scorer.is_checked():
            return False
        if round == self._first(run) or (scorer.check.every is not None and round % scorer.check.every == 0):
            return True
        before = self._used(run, round - 1, name)
        return before is None or unchecked(before) != unchecked(scorer)

    def _used(self, run: str, round: int, name: str) -> TeacherScorer | None:
        """A teacher that training goes by in the round, with the other model that the trainer asks in its place."""
        if name != LIVE_TEACHER and name not in self.plan.curated_score(run, round).scorers:
            return None
        scorer, live = self.named_so(run, round, name), self.plan.recipe(run, round).train.teacher
        if scorer is None or not isinstance(scorer.model, LiveModel) or live is None or live.model is None:
            return scorer
        return scorer.model_copy(update={"model": live.model})

    def named_so(self, run: str, round: int, name: str) -> TeacherScorer | None:
        """The teacher that a check is called after: a scorer, or the trainer's own model where none stands for it."""
        recipe = self.plan.recipe(run, round)
        scorer = recipe.live_model() if name == LIVE_TEACHER else recipe.score.scorers.get(name)
        return scorer if isinstance(scorer, TeacherScorer) else None

    def checked_model(self, w: Any) -> list[str]:
        return self._stored(w.run, int(w.round), self._asked(w).model)

    def checked_files(self, w: Any) -> list[str]:
        return self.files(self._asked(w))

    def checked_rollouts(self, w: Any) -> list[str]:
        return self.plan.rollout_paths(w.run, int(w.round), 0)

    def checked_needs(self, w: Any) -> list[str]:
        needs = self._asked(w).needs
        return [path for need in needs for path in self.plan.score_paths(w.run, int(w.round), 0, need)]

    def check_policy(self, w: Any) -> str:
        return self.plan.policy_path(w.run, int(w.round))

    def check_spec(self, w: Any) -> str:
        round = int(w.round)
        correct, scorer = self.plan.correctness(w.run, round)
        config = self._asked(w)
        return specs.dump(
            specs.CheckTeacherSpec(
                version=STAGE_VERSION["check_teacher"],
                seed=self.plan.runs[w.run][1],
                round=round,
                scorer=w.scorer,
                config=config.model_copy(update={"check": config.check and config.check.model_copy(update=_ONCE)}),
                sampling=self.plan.recipe(w.run, round).rollout.sampling,
                correct=correct,
                correctness=scorer,
                threshold=self.plan.recipe(w.run, round).score.threshold,
                trained=next(iter(self.plan.reward_models.applied_by(scorer)), None),
            )
        )

    def _asked(self, w: Any) -> TeacherScorer:
        """The scorer of the rule's wildcards; a live teacher as the policy that it is before the round's first step. Of
        a trust region the initial policy, whose logits are the larger share."""
        round = int(w.round)
        scorer, live = self.named_so(w.run, round, w.scorer), self.plan.recipe(w.run, round).train.teacher
        if scorer is None:
            raise ConfigError(f"{w.run}: round {round} has no teacher called {w.scorer}, so it has no check")
        if not isinstance(scorer.model, LiveModel):
            return scorer
        return scorer.model_copy(update={"model": self._before_the_round(w.run, round, live)})

    def _before_the_round(self, run: str, round: int, live: LiveTeacher | None) -> TeacherModel:
        if live is not None and live.model is not None:
            return live.model
        match None if live is None else live.weights:
            case "initial" | "trust_region":
                return PolicyTeacher(age="initial")
            case "ema":
                return PolicyTeacher(policy="ema")
            case "synced":
                assert live is not None
                age = round - self._synced_at(run, round, live)
                return PolicyTeacher(age=age) if age else PolicyTeacher()
            case _:
                return PolicyTeacher()


_ONCE = {"every": None}
"""How often a teacher is looked at decides nothing that one look finds."""
