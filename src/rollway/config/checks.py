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
    replaces = train.advantage is not None and train.advantage.kind in ("returns", "gae")
    if replaces and recipe.curate.advantage is not None:
        raise ValueError(
            "curate.advantage: train.advantage (returns, gae) makes its own from the rewards; remove one of them"
        )
    if objective.anchors.kind != "none" and recipe.curate.route is None:
        raise ValueError(
            "train.objective.anchors: act on rows routed to `expert`, and none are: set curate.route: {sql: source}"
        )
