"""The part of the plan that reward models have: what training one reads, its spec, and who applies it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollway.config.assets import relative
from rollway.config.base import ConfigError
from rollway.config.curation import CurateConfig
from rollway.config.reward_models import FilePairs, HuggingFaceBase, RewardModelConfig, RunPairs, WarmupBase
from rollway.config.scorers import Scorer
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
        """SQL files, or the local file that pairs are read from (where it is missing, the stage says so); and those of
        a base that is a local folder."""
        from rollway import curation

        config = self.config(w.reward_model)
        base = model_files(config.base.name) if isinstance(config.base, HuggingFaceBase) else []
        if isinstance(config.pairs, FilePairs):
            source = config.pairs.source
            paths = [source.path] if source.kind in ("jsonl", "parquet") else []
            return [path for path in paths if Path(path).exists()] + base
        sql = {relative(path) for part in self._rounds(config.pairs) for path in curation.sql_paths(part.curate)}
        return sorted(sql) + base

    def spec(self, w: Any) -> str:
        config = self.config(w.reward_model)
        rounds = self._rounds(config.pairs) if isinstance(config.pairs, RunPairs) else []
        return specs.dump(RewardModelSpec(version=STAGE_VERSION["reward_model"], config=config, rounds=rounds))

    def _passes(self, pairs: RunPairs) -> list[tuple[int, int]]:
        return [(r, p) for r in sorted(pairs.rounds) for p in self.plan.derived.others(_run(pairs), r)]

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
        """SQL files and their parameters. Raises RollwayError naming the reward model and the mend."""
        for name, config in self.configs.items():
            if isinstance(config.pairs, RunPairs):
                try:
                    self._rounds(config.pairs)
                    self._check_reward(config.pairs)
                except RollwayError as error:
                    raise RollwayError(f"reward_models.{name}.pairs: {error}") from None

    def _check_reward(self, pairs: RunPairs) -> None:
        from rollway import curation

        if pairs.reward is not None and not curation.reads_reward(pairs.pair):
            raise RollwayError(
                f"`reward` has no effect, {pairs.pair.sql} does not read the reward; remove it, or pair by another file"
            )


def model_files(name: str) -> list[str]:
    """Weights, configuration and tokenizer of a Hugging Face model in a local folder; nothing of one on the hub."""
    return sorted(str(path) for suffix in ("json", "safetensors") for path in Path(name).glob(f"*.{suffix}"))


def _run(pairs: RunPairs) -> str:
    return f"{pairs.run}-s{pairs.seed}"
