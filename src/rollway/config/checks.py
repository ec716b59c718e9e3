"""Parts of a recipe that only make sense together: refused at planning time, with the mend."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rollway.config.recipes import Recipe


def check_recipe(recipe: "Recipe") -> None:
    """Raises ValueError on parts that contradict each other."""
    train, sampling = recipe.train, recipe.rollout.sampling
    truncated = sampling.top_p < 1.0 or sampling.top_k > 0
    if truncated and not train.objective.corrects_behaviour():
        raise ValueError(
            "rollout.sampling.top_p/top_k truncate what is sampled, so old log-probs of the full softmax are biased: "
            "set train.objective.correction (tis or mis), or sample from the full distribution"
        )
    if sampling.temperature == 0.0:
        raise ValueError("rollout.sampling.temperature: 0 is greedy; rollouts to train on need a positive temperature")
    uses_gae = train.advantage is not None and train.advantage.kind == "gae"
    if uses_gae != (train.critic is not None):
        raise ValueError("train.critic and train.advantage.kind: gae go together: set both, or neither")
    _check_advantages(recipe)
    _check_experts(recipe)
    _check_pairs_and_weights(recipe)
    ratio = train.objective.ratio
    if ratio is not None and ratio.kind == "fibre_domain" and recipe.curate.route is None:
        raise ValueError(
            "train.objective.ratio: fibre_domain needs to know each row's domain: set curate.route, for example "
            "{sql: domain, key: domain}, or use ratio fibre"
        )
    if any(s.kind == "length" and s.limit > sampling.max_tokens for s in recipe.score.scorers.values()):
        raise ValueError(
            f"score.scorers: a length limit above rollout.sampling.max_tokens ({sampling.max_tokens}) never reaches -1"
        )
    reward = recipe.curate.reward
    limit = reward.params.get("limit") if reward is not None and reward.sql == "overlong" else None
    if isinstance(limit, int) and limit > sampling.max_tokens:
        raise ValueError(
            f"curate.reward.limit {limit} is above rollout.sampling.max_tokens ({sampling.max_tokens}): the penalty "
            "would never reach -1; leave `limit` out"
        )
    schedule = train.optimizer.schedule
    if (schedule.kind == "constant") == (schedule.horizon is not None):
        raise ValueError(
            f"train.optimizer.schedule: {schedule.kind} "
            + ("needs" if schedule.horizon is None else "ignores")
            + " `horizon`"
        )


def _check_advantages(recipe: "Recipe") -> None:
    """An advantage that nothing reads is an option without effect."""
    train, objective = recipe.train, recipe.train.objective
    imitates = objective.preference.kind != "none" or (objective.gate is not None and objective.gate.kind == "sft")
    if train.advantage is not None and imitates:
        raise ValueError("train.advantage: the objective reads no advantage (it imitates or compares); remove it")
    replaces = train.advantage is not None and train.advantage.kind in ("returns", "gae", "leave_one_out")
    if replaces and recipe.curate.advantage is not None:
        raise ValueError(
            "curate.advantage: train.advantage (returns, gae, leave_one_out) makes its own from the rewards; remove "
            "one of them, for example with `curate: {advantage: null}`"
        )
    if objective.anchors.kind != "none" and recipe.curate.route is None:
        raise ValueError(
            "train.objective.anchors: act on rows routed to `expert`, and none are: set curate.route: {sql: source}"
        )


def _check_experts(recipe: "Recipe") -> None:
    """Expert solutions and what stands in for their ratio go together."""
    objective = recipe.train.objective
    if recipe.rollout.experts and not objective.places_experts():
        raise ValueError(
            "rollout.experts: nobody sampled an expert's solution, and the objective's ratio or correction would take "
            "it for the policy's own: set train.objective.anchors: unit and curate.route: {sql: source}, or leave "
            "experts out"
        )
    if objective.anchors.kind != "none" and not recipe.rollout.experts and recipe.rollout.engine.kind != "stored":
        raise ValueError(
            "train.objective.anchors: act on experts' rollouts, and the groups have none: set `rollout.experts: 1`, or "
            "`anchors: none`"
        )


def _check_pairs_and_weights(recipe: "Recipe") -> None:
    """Pairs where they are compared, weights where they weigh, and a scale only where something keeps it."""
    curate, objective = recipe.curate, recipe.train.objective
    preference = objective.preference
    whole_groups = preference.kind == "copg" and preference.form == "group"
    if preference.kind != "none" and not whole_groups and curate.pair is None:
        mend = ", or use `form: group`" if preference.kind == "copg" else ""
        raise ValueError(
            f"train.objective.preference: {preference.kind} compares pairs, and curation makes none: set curate.pair, "
            f"for example {{sql: right_wrong}}{mend}"
        )
    if whole_groups and curate.weight is not None:
        raise ValueError(
            "curate.weight: copg compares all rows of a group alike (form: group), so weights scale nothing: drop rows "
            "with curate.filter, or use `form: pair`"
        )
    weighs = curate.weight is not None or curate.select is not None
    if objective.aggregate is not None and objective.aggregate.weights == "numerator" and not weighs:
        raise ValueError(
            "train.objective.aggregate.weights: numerator has no effect, since no row has a weight: set curate.weight, "
            "or leave `weights` out"
        )
    weights = recipe.score.reward
    if len(weights) == 1 and _standardises(recipe):
        name, weight = next(iter(weights.items()))
        if weight > 0.0 and weight != 1.0:
            raise ValueError(
                f"score.reward.{name}: {weight:g} cancels, since the advantage divides by the reward's standard "
                "deviation and no other scorer is weighed against it: set it to 1.0, or use an advantage that keeps "
                "the scale (curate.advantage: {sql: dr_grpo})"
            )


def _standardises(recipe: "Recipe") -> bool:
    """Whether the reward reaches nothing but an advantage that is free of its scale."""
    curate, advantage = recipe.curate, recipe.train.advantage
    steps = [name for name in ("reward", "filter", "weight", "pair", "select") if getattr(curate, name) is not None]
    by_group = curate.advantage is not None and curate.advantage.sql == "grpo" and _small(curate.advantage.params)
    by_batch = advantage is not None and advantage.kind == "whiten"
    return not steps and (by_group or by_batch)


def _small(params: dict[str, object]) -> bool:
    """Whether `eps`, which is added to the standard deviation, leaves it the divisor."""
    eps = params.get("eps", 0.0)
    return isinstance(eps, float | int) and eps < 1e-3
