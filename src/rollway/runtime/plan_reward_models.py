"""The part of the plan that reward models have: what training one reads, its spec, and who applies it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollway.config.assets import relative
from rollway.config.base import ConfigError
from rollway.config.curation import CurateConfig
from rollway.config.reward_models import FilePairs, RewardModelConfig, RunPairs, WarmupBase
from rollway.config.scorers import ScoreConfig, Scorer
from rollway.errors import RollwayError
from rollway.runtime import specs
from rollway.runtime.specs import STAGE_VERSION, PairRound, RewardModelSpec

if TYPE_CHECKING:
    from rollway.runtime.plan import Plan


class RewardModels:
    """Paths, inputs and specs of the jobs that train reward models. `w.reward_model` is a key in `reward_models`."""

    def __init__(self, plan: "Plan") -> None:
        self.plan = plan
        self.configs = plan.experiment.reward_models

    def config(self, name: str) -> RewardModelConfig:
        if name not in self.configs:
            raise ConfigError(f"{name!r} is not in reward_models; it has {', '.join(self.configs) or 'no entry'}")
        return self.configs[name]

    def path(self, name: str) -> str:
        return f"{self.plan.results}/reward_models/{name}/reward_model.json"

    def applied_by(self, scorer: Scorer) -> list[str]:
        """The file of the reward model that a scorer applies, where it names one that is trained here."""
        return [self.path(scorer.trained)] if scorer.kind == "reward_model" and scorer.trained is not None else []

    # ---- inputs of the rule

    def policy(self, w: Any) -> list[str]:
        base = self.config(w.reward_model).base
        return [self.plan.warmup_file(base.name, base.seed)] if isinstance(base, WarmupBase) else []

    def prompts(self, w: Any) -> list[str]:
        pairs = self.config(w.reward_model).pairs
        return [self.plan.prompts_path(_run(pairs), "train")] if isinstance(pairs, RunPairs) else []

    def rollouts(self, w: Any) -> list[str]:
        pairs = self.config(w.reward_model).pairs
        if not isinstance(pairs, RunPairs):
            return []
        return [path for r, p in self._passes(pairs) for path in self.plan.rollout_paths(_run(pairs), r, p)]

    def scores(self, w: Any) -> list[str]:
        pairs = self.config(w.reward_model).pairs
        if not isinstance(pairs, RunPairs):
            return []
        ranked = {part.round: part.score.scorers for part in self._rounds(pairs)}
        return [
            path
            for r, p in self._passes(pairs)
            for name in ranked[r]
            for path in self.plan.score_paths(_run(pairs), r, p, name)
        ]

    def files(self, w: Any) -> list[str]:
        """SQL files, or the local file that pairs are read from (where it is missing, the stage says so)."""
        from rollway import curation

        pairs = self.config(w.reward_model).pairs
        if isinstance(pairs, FilePairs):
            paths = [pairs.source.path] if pairs.source.kind in ("jsonl", "parquet") else []
            return [path for path in paths if Path(path).exists()]
        return sorted({relative(path) for part in self._rounds(pairs) for path in curation.sql_paths(part.curate)})

    def spec(self, w: Any) -> str:
        config = self.config(w.reward_model)
        rounds = self._rounds(config.pairs) if isinstance(config.pairs, RunPairs) else []
        return specs.dump(RewardModelSpec(version=STAGE_VERSION["reward_model"], config=config, rounds=rounds))

    def _passes(self, pairs: RunPairs) -> list[tuple[int, int]]:
        return [(r, p) for r in sorted(pairs.rounds) for p in self.plan.passes(_run(pairs), r)]

    def _rounds(self, pairs: RunPairs) -> list[PairRound]:
        """By round: the scorers that rank its rollouts, and the SQL that shapes their reward and pairs them."""
        from rollway import curation

        rounds = []
        for r in sorted(pairs.rounds):
            recipe = self.plan.recipe(_run(pairs), r)
            curate, score = CurateConfig(pair=pairs.pair), recipe.score
            if pairs.reward is not None:
                score = score.model_copy(update={"reward": pairs.reward})
            elif recipe.curate.reward is not None:
                curate = curate.model_copy(update={"reward": recipe.curate.reward})
            elif not curation.reads_reward(pairs.pair):
                score = score.model_copy(update={"reward": {}})  # what ranks nothing is not waited for
            if curation.takes_progress(curate):
                curate = curate.model_copy(update={"horizon": recipe.curate.horizon})
            given = curation.given_values(curate, round=r, seed=pairs.seed)
            rounds.append(PairRound(round=r, score=curation.scorers_read(score, curate, given), curate=curate))
        return rounds

    # ---- checks

    def check(self) -> None:
        """SQL files and their parameters, and circles. Raises RollwayError naming the reward model and the mend."""
        for name, config in self.configs.items():
            if isinstance(config.pairs, RunPairs):
                try:
                    self._rounds(config.pairs)
                    self._check_reward(config.pairs)
                except RollwayError as error:
                    raise RollwayError(f"reward_models.{name}.pairs: {error}") from None
        for name in self.configs:
            self._check_circle([name])

    def _check_reward(self, pairs: RunPairs) -> None:
        from rollway import curation

        if pairs.reward is not None and not curation.reads_reward(pairs.pair):
            raise RollwayError(
                f"`reward` has no effect, {pairs.pair.sql} does not read the reward; remove it, or pair by another file"
            )

    def _check_circle(self, chain: list[str]) -> None:
        for needed in self._needed(chain[-1]):
            if needed in chain:
                circle = " -> ".join([*chain[chain.index(needed) :], needed])
                raise RollwayError(
                    f"reward_models.{chain[-1]}.pairs: its pairs wait for scores of {needed}, which waits for them "
                    f"({circle}): pair rollouts of rounds before that model is used, and rank them by other scorers "
                    "(`pairs.reward`, `score.correct`)"
                )
            self._check_circle([*chain, needed])

    def _needed(self, name: str) -> list[str]:
        """Reward models whose scores lie upstream of this one's pairs."""
        pairs = self.configs[name].pairs
        if not isinstance(pairs, RunPairs):
            return []
        run, plan = _run(pairs), self.plan
        read = [(plan.recipe(run, part.round).score, part.score) for part in self._rounds(pairs)]
        for r in pairs.rounds:
            batches = [(plan.home(run, q, "curate"), q) for q in range(max(0, r - plan.config_of(run).lag))]
            if len(plan.passes(run, r)) > 1:  # later passes of a round read the scores of its earlier ones
                batches.append((plan.home(run, r, "rollout"), r))
            read += [(plan.recipe(home, q).score, plan.curated_score(home, q)) for home, q in batches]
        return sorted({model for declared, used in read for model in _trained(declared, used)})


def _run(pairs: RunPairs) -> str:
    return f"{pairs.run}-s{pairs.seed}"


def _trained(score: ScoreConfig, read: ScoreConfig) -> list[str]:
    """Reward models that the scorers in `read` apply, those that they need included (`score` declares all)."""
    todo, seen = list(read.scorers), set[str]()
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += score.scorers[name].needs
    used = [score.scorers[name] for name in seen]
    return [scorer.trained for scorer in used if scorer.kind == "reward_model" and scorer.trained is not None]
