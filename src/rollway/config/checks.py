"""Parts of a recipe that only make sense together: refused at planning time, with the mend."""

import math
from typing import TYPE_CHECKING

from rollway.config.derived_checks import check_derived, check_verdicts
from rollway.config.objective_parts import Correction
from rollway.config.teachers import TeacherCheck

if TYPE_CHECKING:
    from rollway.config.objectives import Objective
    from rollway.config.recipes import Recipe
    from rollway.config.rollouts import TeacherMix


def check_recipe(recipe: "Recipe") -> None:
    """Raises ValueError on parts that contradict each other."""
    train, sampling = recipe.train, recipe.rollout.sampling
    if sampling.truncates and not train.objective.takes_foreign_samples():
        raise ValueError(
            "rollout.sampling.top_p/top_k truncate what is sampled, so old log-probs of the full softmax are biased: "
            "set train.objective.correction (tis or mis), or sample from the full distribution"
        )
    mix = recipe.rollout.mix
    if mix is not None and (why := mixture_refused(mix, train.objective)) is not None:
        raise ValueError(f"rollout.mix: {why}")
    if sampling.temperature == 0.0:
        raise ValueError("rollout.sampling.temperature: 0 is greedy; rollouts to train on need a positive temperature")
    uses_gae = train.advantage is not None and train.advantage.kind == "gae"
    if uses_gae != (train.critic is not None):
        raise ValueError("train.critic and train.advantage.kind: gae go together: set both, or neither")
    _check_refill(recipe)
    _check_advantages(recipe)
    _check_versions(recipe)
    _check_experts(recipe)
    check_derived(recipe)
    check_verdicts(recipe.score)
    _check_pairs_and_weights(recipe)
    _check_teacher(recipe)
    _check_live_check(recipe)
    _check_average(recipe)
    _check_discriminators(recipe)
    _check_axes(recipe)
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
    if schedule.kind == "constant" and schedule.floor > 0.0:
        raise ValueError("train.optimizer.schedule: constant ignores `floor`; remove it, or set kind and horizon")
    if (schedule.kind == "constant") == (schedule.horizon is not None):
        raise ValueError(
            f"train.optimizer.schedule: {schedule.kind} "
            + ("needs" if schedule.horizon is None else "ignores")
            + " `horizon`"
        )


def check_carried(before: "Objective", after: "Objective") -> None:
    """Raises ValueError where a round with objective `after` cannot take up what one with `before` left."""
    held, asked = _dual_variables(before), _dual_variables(after)
    if held and asked and held != asked:
        raise ValueError(
            f"train.objective.gate.dual.versions asks for {asked} dual variables, and the checkpoint of the round "
            f"before holds {held}: keep their number"
        )


def _dual_variables(objective: "Objective") -> int:
    gate = objective.gate
    return gate.dual.versions if gate is not None and gate.kind == "variance" and gate.dual.kind == "ascent" else 0


def _check_versions(recipe: "Recipe") -> None:
    versions, ages = _dual_variables(recipe.train.objective), recipe.curate.replay + 1
    if versions > ages:
        raise ValueError(
            f"train.objective.gate.dual.versions: {versions} dual variables, one per age, and curate.replay: "
            f"{recipe.curate.replay} shows no rows of age {ages}: set versions: {ages}, or replay more rounds"
        )


def _check_refill(recipe: "Recipe") -> None:
    """Later passes draw again what the filter dropped."""
    if recipe.rollout.refill is not None and recipe.curate.filter is None:
        raise ValueError(
            "rollout.refill: makes up for groups that curate.filter drops, and there is no filter, so later passes "
            "would be empty: set curate.filter, or `rollout: {passes: 1, refill: null}`"
        )


def _check_advantages(recipe: "Recipe") -> None:
    """An advantage that nothing reads is an option without effect."""
    train, objective = recipe.train, recipe.train.objective
    if train.advantage is not None and not objective.reads_advantage():
        raise ValueError("train.advantage: the objective reads no advantage (it imitates or compares); remove it")
    by_token = train.advantage is not None and train.advantage.kind != "leave_one_out"
    if by_token and objective.ratio is not None and objective.ratio.kind == "sequence":
        raise ValueError(
            "train.advantage: makes one advantage per token, and ratio sequence takes one per row: set "
            "`ratio: sequence_token`, or remove it and set curate.advantage"
        )
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
    if objective.imitate is not None and recipe.curate.route is None:
        raise ValueError(
            "train.objective.imitate: acts on rows routed to `imitate`, and none are: set curate.route, for example "
            "{sql: imitate}"
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
    others = recipe.rollout.experts or recipe.rollout.derive or recipe.rollout.engine.kind == "stored"
    if objective.imitate is not None and not others:
        raise ValueError(
            "train.objective.imitate: copies what the policy does not write by itself, and the groups have nothing "
            "else: set rollout.derive (explanations) or `rollout.experts: 1`, or remove it"
        )


def _check_pairs_and_weights(recipe: "Recipe") -> None:
    """Pairs where they are compared, weights where they weigh, and a scale only where something keeps it."""
    curate, objective = recipe.curate, recipe.train.objective
    preference = objective.preference
    whole_groups = preference.kind != "none" and not objective.compares_pairs()
    if objective.compares_pairs() and curate.pair is None:
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
    if whole_groups and curate.pair is not None:
        raise ValueError(
            "curate.pair: copg compares all rows of a group (form: group), and rows of several pairs would stand in it "
            "several times: remove it with `curate: {pair: null}`, or use `form: pair`"
        )
    weighs = curate.weight is not None or curate.select is not None
    aggregate = objective.aggregate
    may_weigh = aggregate is not None and aggregate.kind != "group_mean_token_sum"
    if aggregate is not None and may_weigh and aggregate.weights == "numerator" and not weighs:
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


def _check_teacher(recipe: "Recipe") -> None:
    """What training reads of a teacher is what a scorer stores and curation carries."""
    name, distill, read = recipe.curate.teacher, recipe.train.objective.distill, recipe.train.reads_teacher()
    teachers = ", ".join(n for n, s in recipe.score.scorers.items() if s.kind == "teacher") or "there are none"
    if name is None:
        if read:
            raise ValueError(
                f"train: reads {', '.join(sorted(read))} of a teacher, and the batch has none: set curate.teacher to a "
                f"scorer of kind teacher in score.scorers ({teachers})"
            )
        return
    teacher = recipe.score.scorers.get(name)
    if teacher is None or teacher.kind != "teacher":
        raise ValueError(f"curate.teacher: {name!r} is not a scorer of kind teacher in score.scorers ({teachers})")
    if not read:
        raise ValueError(
            "curate.teacher: has no effect, training reads nothing that scoring stores of a teacher: set "
            "train.objective.distill, or remove it"
        )
    place = f"score.scorers.{name}"
    if "teacher_prompt_tokens" in read and not teacher.context:
        raise ValueError(
            f"{place}.context: the live teacher shall read a context of its own, and there is none; give one, or set "
            "train.teacher.context: policy"
        )
    if teacher.model.kind == "live":
        if lost := sorted(read - {"teacher_prompt_tokens"}):
            raise ValueError(f"{place}.model: kind live stores no {lost[0]}, which training reads; name a model")
        return
    if "teacher_entropy" in read and not teacher.entropy:
        raise ValueError(f"{place}.entropy: training reads it; set it to true")
    sampled = recipe.rollout.sampling.temperature
    if "teacher_topk_ids" in read:
        wanted = 1 if distill is None or distill.estimate.kind != "topk" else distill.estimate.k or 1
        if teacher.top_k < wanted:
            raise ValueError(
                f"{place}.top_k: training reads the {wanted} likeliest tokens, and {teacher.top_k} are stored; raise it"
            )
        if "teacher_logprob" not in read and teacher.temperature != 1.0:
            raise ValueError(
                f"{place}.temperature: the top k are stored at 1, train.objective.distill.temperature divides them; "
                "remove it"
            )
    if "teacher_logprob" in read and teacher.temperature != sampled:
        raise ValueError(
            f"{place}.temperature: {teacher.temperature:g} differs from rollout.sampling.temperature {sampled:g}, at "
            "which the policy's log-probs of sampled tokens are read; make them equal"
        )
    live = recipe.train.teacher is not None and distill is not None and distill.estimate.kind != "sampled"
    if live and distill is not None and recipe.train.advantage_of_teacher() and distill.temperature != sampled:
        raise ValueError(
            f"train.objective.distill.temperature: {distill.temperature:g} differs from rollout.sampling.temperature "
            f"{sampled:g}, at which train.advantage compares the same policy and teacher: set it to {sampled:g}"
        )
    if distill is None or distill.estimate.kind != "topk" or "teacher_topk_ids" not in read:
        return
    if distill.estimate.outside == "tail" and distill.temperature != recipe.train.top_k_temperature(sampled):
        raise ValueError(
            f"train.objective.distill.temperature: {distill.temperature:g} differs from {place}.temperature "
            f"{teacher.temperature:g}, at which the top k are stored, and their tail at another is unknown: set it to "
            f"{teacher.temperature:g}, or use `estimate: {{kind: topk, outside: renormalise}}`"
        )


def _check_live_check(recipe: "Recipe") -> None:
    """A check of the live teacher where its scorer's own is the one that counts."""
    live = recipe.train.teacher
    if live is not None and live.check != TeacherCheck() and recipe.live_model() is None:
        raise ValueError(
            f"train.teacher.check: has no effect, score.scorers.{recipe.curate.teacher} stands for this teacher and "
            "has a `check` of its own: set that, and remove this one"
        )


def _check_average(recipe: "Recipe") -> None:
    """A moving average that nobody reads, and rows that no route sends to the teacher."""
    live, distill = recipe.train.teacher, recipe.train.objective.distill
    scored = [s for s in recipe.score.scorers.values() if s.kind == "teacher" and s.model.kind == "policy"]
    read = (live is not None and live.weights == "ema") or any(
        s.model.kind == "policy" and s.model.policy == "ema" for s in scored
    )
    if recipe.train.ema is not None and not read:
        raise ValueError(
            "train.ema: has no effect, nothing reads the average: set `train.teacher: {kind: live, weights: ema}`, or "
            "`policy: ema` in the model of a scorer of kind teacher"
        )
    if distill is not None and distill.experts is not None and recipe.curate.route is None:
        raise ValueError(
            "train.objective.distill.experts: is the divergence of rows routed to `expert`, and none are: set "
            "curate.route: {sql: source}"
        )
    if distill is not None and distill.rows == "routed" and recipe.curate.route is None:
        raise ValueError(
            "train.objective.distill.rows: routed goes by the rows' routes, and none has one: set curate.route, for "
            "example {sql: wrong_to_teacher}"
        )


def mixture_refused(mix: "TeacherMix", objective: "Objective") -> str | None:
    """Why the objective cannot be trained on rollouts that a teacher had a share in; None where it can."""
    if not objective.takes_mixture():
        return (
            "what is sampled is not the policy's own, which this objective takes it for: set "
            "train.objective.correction (tis or mis) where it has a policy's loss, and leave `kl` out, which nothing "
            "corrects; or take a recipe whose loss is a divergence over the vocabulary alone"
        )
    # Rounded: 1 / (1 - 0.9) is a little more than 10.
    correction, most = objective.correction, round(1.0 / (1.0 - mix.share), 6)
    if not isinstance(correction, Correction):
        return None
    if correction.level == "sequence":
        return "a row's weight is a product, which any cap cuts: set train.objective.correction.level: token"
    if correction.cap < most:
        return (
            f"train.objective.correction.cap: {correction.cap:g} would cut weights, which are {most:g} at most where "
            f"the teacher has the share {mix.share:g}: set `cap: {math.ceil(most)}`, or a smaller share"
        )
    return None


def _check_discriminators(recipe: "Recipe") -> None:
    """What a discriminator tells from a teacher's text is what the policy samples."""
    names = [name for name, scorer in recipe.score.scorers.items() if scorer.kind == "discriminator"]
    if names and recipe.rollout.mix is not None:
        raise ValueError(
            f"score.scorers.{names[0]}: learns to know the policy's own text, and with rollout.mix some of it is a "
            "teacher's: remove one of them"
        )
    if names and recipe.rollout.engine.kind == "stored":
        raise ValueError(
            f"score.scorers.{names[0]}: learns to know the policy's own text, and stored completions are none of it: "
            "set another rollout.engine, or take the scorer out"
        )


def _check_axes(recipe: "Recipe") -> None:
    """What a recipe says of its feedback is what its training reads."""
    axes, train = recipe.axes, recipe.train
    if axes is None:
        return
    reads_teacher = bool(train.reads_teacher()) or train.teacher is not None
    if reads_teacher != (axes.feedback == "logit"):
        found = "a teacher's log-probs: say logit" if reads_teacher else "no teacher: say outcome or self_play"
        raise ValueError(f"axes.feedback: {axes.feedback}, and training reads {found}")
    if axes.feedback == "logit" and axes.access == "black_box":
        raise ValueError("axes.access: a black box shows no log-probs, which feedback logit is made of: say white_box")


def _standardises(recipe: "Recipe") -> bool:
    """Whether the reward reaches nothing but an advantage that is free of its scale."""
    curate, advantage = recipe.curate, recipe.train.advantage
    steps = [name for name in ("reward", "filter", "weight", "pair", "select") if getattr(curate, name) is not None]
    if steps:
        return False
    if advantage is not None and advantage.kind == "returns":
        return advantage.whiten and advantage.kl == 0.0
    if curate.advantage is None:
        return False
    whitened = advantage is not None and advantage.kind == "whiten" and curate.advantage.sql in _PROPORTIONAL
    params = curate.advantage.params
    standardised = curate.advantage.sql == "grpo" or (curate.advantage.sql == "gdpo" and params.get("whiten", True))
    return whitened or (bool(standardised) and _small(params))


_PROPORTIONAL = ("reinforce", "group_mean", "dr_grpo", "rloo", "grpo", "gdpo")
"""Advantages that grow with the reward, or do not depend on its scale."""


def _small(params: dict[str, object]) -> bool:
    """Whether `eps`, which is added to the standard deviation, leaves it the divisor."""
    eps = params.get("eps", 0.0)
    return isinstance(eps, float | int) and eps < 1e-3
