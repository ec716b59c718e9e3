"""Derived passes beside the rest of a recipe: refused at planning time, with the mend."""

from typing import TYPE_CHECKING

from rollway.config.scorers import ScoreConfig, Scorer, TeacherScorer

if TYPE_CHECKING:
    from rollway.config.recipes import Recipe
    from rollway.config.rollouts import Derive


def check_derived(recipe: "Recipe") -> None:
    """Raises ValueError on passes of `rollout.derive` whose rows training would take for what they are not."""
    for step in recipe.rollout.derive:
        place = f"rollout.derive.{step.name}"
        judged = any(context.names(field) for context in step.context for field in ("verdict", "sibling"))
        if judged and recipe.score.correct is None:
            raise ValueError(f"{place}.context: names what is right, and nothing says so: set score.correct")
        if step.trained == "never":
            _check_left_out(recipe, place)
            continue
        _check_sampler(recipe, step, place)
        _check_author(recipe, step, place)
        if step.trained == "plain":
            _check_other_prompt(recipe, place)


def check_verdicts(score: ScoreConfig) -> None:
    """A teacher's verdict on a rollout is that of `score.correct`: one scorer and one threshold for both, and for its
    right siblings. Raises ValueError."""
    for name, scorer in score.scorers.items():
        if scorer.kind != "teacher" or not _judges(scorer) or score.correct is None:
            continue
        if scorer.needs[0] != score.correct:
            raise ValueError(
                f"score.scorers.{name}.needs: begins with {scorer.needs[0]}, by which verdicts and siblings of its "
                f"contexts are right, and everything else goes by score.correct, {score.correct}: name that first"
            )
        if scorer.threshold != score.threshold:
            raise ValueError(
                f"score.scorers.{name}.threshold: {scorer.threshold:g} is not score.threshold, {score.threshold:g}, so "
                f"a reward of {score.correct} between them is right for one and wrong for the other: make them equal"
            )


def gives_verdicts(score: ScoreConfig) -> bool:
    """Whether a teacher reads whether the rollout is right."""
    teachers = [scorer for scorer in score.scorers.values() if scorer.kind == "teacher"]
    return any(context.names("verdict") for scorer in teachers for context in scorer.context)


def check_phases(score: ScoreConfig, before: "Recipe") -> None:
    """Settings under which a teacher gives verdicts, after rounds whose derived passes taught the policy to read them
    (of the run itself, or of one that it forks): what was wrong there is wrong here. Raises ValueError."""
    taught = any(context.names("verdict") for step in before.rollout.derive for context in step.context)
    if not taught or not gives_verdicts(score):
        return
    if score.threshold != before.score.threshold:
        raise ValueError(
            f"score.threshold: {score.threshold:g}, and the verdicts that the policy learnt to read in the rounds "
            f"before were given at {before.score.threshold:g}: make them equal"
        )
    # Not the names: two runs may call the same scorer otherwise.
    if _judge(score) != _judge(before.score):
        raise ValueError(
            f"score.correct: {score.correct} is not the scorer that gave the verdicts which the policy learnt to read "
            f"in the rounds before, where it was {before.score.correct}: name it, and declare it alike"
        )


def _judge(score: ScoreConfig) -> Scorer | None:
    return None if score.correct is None else score.scorers[score.correct]


def _judges(scorer: TeacherScorer) -> bool:
    return any(context.names(field) for context in scorer.context for field in ("verdict", "sibling"))


def _check_left_out(recipe: "Recipe", place: str) -> None:
    """Rows that cannot be trained on need SQL that leaves them out of the batch."""
    if recipe.curate.filter is None and recipe.curate.pair is None:
        raise ValueError(
            f"{place}.trained: never, and nothing leaves its rollouts out of the batch, where training would stop at "
            "them: set curate.filter, for example {sql: sampled}, which keeps what the policy sampled for the task's "
            "prompts"
        )


def _check_sampler(recipe: "Recipe", step: "Derive", place: str) -> None:
    """As for `rollout.sampling`: old log-probs are of the full softmax."""
    objective = recipe.train.objective
    own = recipe.rollout.sampling if step.sampling is None else step.sampling
    imitated = objective.imitate is not None or (not objective.reads_advantage() and not objective.distils_samples())
    if own.truncates and not (imitated or objective.takes_foreign_samples()):
        raise ValueError(
            f"{place}.sampling.top_p/top_k truncate what is sampled, so old log-probs of the full softmax are biased: "
            "sample from the full distribution, set train.objective.correction (tis or mis), or `trained: never` and "
            "a curate.filter that leaves these rollouts out"
        )


def _check_author(recipe: "Recipe", step: "Derive", place: str) -> None:
    """As for `rollout.experts`: another model's text is no sample of the policy."""
    objective = recipe.train.objective
    if step.author is None or objective.places_experts():
        return
    known = objective.divides_by_behaviour() or objective.corrects_behaviour()
    if step.trained == "as_read" and known:
        return
    raise ValueError(
        f"{place}.author: the policy did not sample these rollouts, and the objective's ratio would take them for its "
        "own: set train.objective.imitate and curate.route: {sql: imitate}, ratio.denominator: behavior (where they "
        "are trained as read), or `trained: never` and a curate.filter that leaves them out"
    )


def _check_other_prompt(recipe: "Recipe", place: str) -> None:
    """Rollouts that are trained under another prompt than the engine read: its log-probs are not theirs."""
    objective = recipe.train.objective
    if objective.divides_by_behaviour():
        raise ValueError(
            f"{place}.trained: plain replaces the prompt, so the engine's log-probs are of another context, and "
            "the ratio divides by them: set train.objective.ratio.denominator: old"
        )
    if objective.corrects_behaviour():
        raise ValueError(
            f"{place}.trained: plain replaces the prompt, so the engine's log-probs are of another context, and "
            "train.objective.correction weighs by them: set `correction: none`"
        )
    if objective.distils_samples() and (not objective.is_distill_routed() or _routes_by_reward_alone(recipe)):
        routed = "curate.route.sql gate sends them to the teacher by their reward, as if they were: set "
        anyone = "train.objective.distill takes every row for such a sample: set `distill.rows: routed`, or "
        raise ValueError(
            f"{place}.trained: plain makes rows that the policy did not sample under the prompt that is trained, and "
            + (routed if objective.is_distill_routed() else anyone)
            + "estimate topk or exact, without `importance`"
        )


def _routes_by_reward_alone(recipe: "Recipe") -> bool:
    """Whether derived rows are distilled as sampled ones are. Other routes, which may tell them apart, are judged by
    the rows that come out, in training."""
    route, kept = recipe.curate.route, recipe.curate.filter
    return route is not None and route.sql == "gate" and (kept is None or kept.sql != "sampled")
