"""Rollouts that a round trains on and did not sample itself (a fork's first ones, replayed and stored ones)."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq

from rollway.config.checks import mixture_refused
from rollway.config.objectives import IMITATING, Objective, SequenceRatio, SequenceTokenRatio, TokenRatio
from rollway.config.scorers import same_scorer
from rollway.errors import RollwayError
from rollway.runtime.plan import Plan


def check_reused(plan: Plan, run: str) -> None:
    """Raises RollwayError naming the run, the round, what does not fit the rollouts it trains on, and the mend."""
    _check_sampling(plan, run)
    _check_experts(plan, run)
    _check_scorers(plan, run)
    _check_stale(plan, run)
    _check_behaviour(plan, run)


def _trained(plan: Plan, run: str) -> Iterator[tuple[int, range]]:
    """Rounds that the run trains itself, each with the rounds whose rollouts its batch may hold, oldest first."""
    for r in range(plan.config_of(run).rounds):
        if plan.home(run, r, "train") == run:
            yield r, plan.batch_rounds(run, r)


def _check_sampling(plan: Plan, run: str) -> None:
    """Reused rollouts may have been sampled under other settings than the round's."""
    name = plan.runs[run][0]
    for r, rounds in _trained(plan, run):
        sampled = {k: plan.sampled_as(run, k) for k in rounds}
        objective = plan.recipe(run, r).train.objective
        for k, rollout in sampled.items():
            if (whose := rollout.whose()) is None:
                continue
            begin = f"runs.{name}: round {r} trains on rollouts of {whose} in round {k}:"
            if rollout.mix is not None:
                if (why := mixture_refused(rollout.mix, objective)) is not None:
                    raise RollwayError(f"{begin} {why}")
            elif not objective.takes_foreign_samples():
                raise RollwayError(f"{begin} set train.objective.correction")
        scorers = plan.recipe(run, r).score.scorers.items()
        taught = [key for key, scorer in scorers if scorer.kind == "discriminator"]
        if taught and plan.sampled_as(run, r).mix is not None:
            raise RollwayError(
                f"runs.{name}.score.scorers.{taught[0]}: learns to know the policy's own text, and of the rollouts of "
                f"round {r}, which another run sampled, some of it is a teacher's (rollout.mix): fork without it"
            )
        if len({rollout.sampling.temperature for rollout in sampled.values()}) > 1:
            raise RollwayError(
                f"runs.{name}.curate.replay: round {r} would replay rollouts sampled at another temperature, and "
                "log-probs are recomputed at one; keep the temperature, or replay fewer rounds"
            )


def _check_experts(plan: Plan, run: str) -> None:
    """Reused rollouts may hold experts' solutions that the round's own would not."""
    name = plan.runs[run][0]
    for r, rounds in _trained(plan, run):
        with_experts = [k for k in rounds if plan.recipe(plan.home(run, k, "rollout"), k).rollout.experts]
        if with_experts and not plan.recipe(run, r).train.objective.places_experts():
            raise RollwayError(
                f"runs.{name}: round {r} would train on rollouts of round {with_experts[0]}, which hold experts' "
                "solutions, and its objective would take them for the policy's own: set train.objective.anchors: unit "
                "and curate.route: {sql: source}"
            )


def _check_scorers(plan: Plan, run: str) -> None:
    """One batch holds verdicts of one scorer of a name: each round's rollouts are judged as its own recipe says."""
    name = plan.runs[run][0]
    for r in range(plan.config_of(run).rounds):
        if plan.home(run, r, "curate") != run:
            continue
        score = plan.recipe(run, r).score
        for k in plan.batch_rounds(run, r)[:-1]:
            earlier = plan.recipe(run, k).score
            for scorer in plan.curated_score(run, r).scorers:
                if not same_scorer(earlier, score, scorer):
                    differs = "is another one" if scorer in earlier.scorers else "does not exist"
                    raise RollwayError(
                        f"runs.{name}.curate.replay: round {r} would replay round {k}, where scorer {scorer} "
                        f"{differs}; declare it alike for all rounds (score.scorers of the run; `schedule` may still "
                        "change score.reward), or replay fewer rounds"
                    )


def _check_stale(plan: Plan, run: str) -> None:
    """Where nothing weighs rows against who sampled them, replayed ones would pass for the current policy's."""
    name = plan.runs[run][0]
    for r, rounds in _trained(plan, run):
        objective = plan.recipe(run, r).train.objective
        # SPIN's own side is what the policy of this round wrote.
        imitates = objective.preference.kind not in ("none", "spin")
        imitates = imitates or (objective.gate is not None and objective.gate.kind in IMITATING)
        # A divergence over the vocabulary is defined on any text, whoever wrote it (DistiLLM's buffer).
        imitates = imitates or objective.takes_any_prefix()
        if len(rounds) > 1 and not imitates and not _reads_behaviour(objective):
            raise RollwayError(
                f"runs.{name}.curate.replay: round {r} would train on rollouts of earlier rounds, and its objective "
                "would take them for the current policy's, since nothing in it weighs them against who sampled them: "
                "set train.objective.ratio: {kind: token, denominator: behavior}, or train.objective.correction, or "
                "`replay: 0`"
            )


def _check_behaviour(plan: Plan, run: str) -> None:
    """Files of stored completions that are there already, and hold no log-probs where the objective reads them."""
    name = plan.runs[run][0]
    seen: set[str] = set()
    for r, rounds in _trained(plan, run):
        if not _reads_behaviour(plan.recipe(run, r).train.objective):
            continue
        for k in rounds:
            files = [file for file in plan.stored_files(plan.home(run, k, "rollout"), k) if file not in seen]
            seen.update(files)
            for file in files:
                if file not in plan.made_rollouts and _without_logprobs(Path(file)):
                    raise RollwayError(
                        f"runs.{name}.rollout.engine.files: {file}: holds no behaviour log-prob, which the objective "
                        f"of round {r} needs of the rollouts of round {k}; import them with log-probs, or use an "
                        "objective without correction (ratio with `denominator: old`)"
                    )


def _reads_behaviour(objective: Objective) -> bool:
    """Whether the log-probs of whoever sampled a row enter: in the ratio's denominator, or in a correction."""
    match objective.ratio:
        case TokenRatio(denominator=d) | SequenceRatio(denominator=d) | SequenceTokenRatio(denominator=d):
            return d == "behavior" or objective.corrects_behaviour()
    return objective.corrects_behaviour()


def _without_logprobs(file: Path) -> bool:
    """Whether the file's footer says that no log-prob in it is a number; what is wrong with a file is the stage's."""
    try:
        footer = pq.read_metadata(file)
    except (OSError, ValueError):
        return False
    found = False
    for group in range(footer.num_row_groups):
        columns = [footer.row_group(group).column(n) for n in range(footer.num_columns)]
        for column in columns:
            if column.path_in_schema.startswith("logprobs."):
                found = True
                if column.statistics is None or column.statistics.has_min_max:
                    return False
    return found
