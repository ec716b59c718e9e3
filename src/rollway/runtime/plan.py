"""The plan: which file each stage reads and writes, and its spec. The Snakefile only asks."""

import os
import re
from functools import cached_property, lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rollway.config.assets import find, relative
from rollway.config.base import ConfigError
from rollway.config.curation import CURATE_STEPS, STEP_FOLDERS, CurateConfig
from rollway.config.experiment import STAGES, Experiment, RunConfig
from rollway.config.recipes import Recipe
from rollway.config.rollouts import RolloutConfig, Sampling, StoredEngine, TransformersEngine
from rollway.config.scorers import MODEL_SCORERS, PythonScorer, ScoreConfig, Scorer, same_scorer, unchecked
from rollway.runtime import specs
from rollway.runtime.plan_derived import DerivedPasses
from rollway.runtime.plan_describe import run_info
from rollway.runtime.plan_discriminators import Discriminators
from rollway.runtime.plan_lm_eval import LmEvals
from rollway.runtime.plan_reward_models import RewardModels, model_files
from rollway.runtime.plan_teachers import Teachers
from rollway.runtime.specs import STAGE_VERSION


class Plan:
    """Paths, inputs and specs of every job of an experiment. `w` in the methods below are Snakemake's wildcards."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.results = experiment.results
        self.settings = lru_cache(maxsize=None)(self._settings)
        self._curated_score = lru_cache(maxsize=None)(self._used_scorers)
        self._refill = lru_cache(maxsize=None)(self._until_filter)
        self.reward_models = RewardModels(self)
        self.teachers = Teachers(self)
        self.derived = DerivedPasses(self)
        self.discriminators = Discriminators(self)
        self.lm_evals = LmEvals(self)

    # ---- runs

    @cached_property
    def runs(self) -> dict[str, tuple[str, int]]:
        """Run id (`grpo-s0`) -> (key in `runs:`, seed)."""
        return {f"{name}-s{seed}": (name, seed) for name, run in self.experiment.resolved.items() for seed in run.seeds}

    def config_of(self, run: str) -> RunConfig:
        return self.experiment.resolved[self._key(run)[0]]

    def _key(self, run: str) -> tuple[str, int]:
        if run not in self.runs:
            raise ConfigError(f"{run}: is not a run of this config; it has {', '.join(self.runs)}")
        return self.runs[run]

    def _settings(self, name: str, segment: int) -> Recipe:
        return self.experiment.settings(name, segment)

    def _starts(self, run: str) -> list[int]:
        """Rounds from which settings hold."""
        return [0, *(step.from_round for step in self.config_of(run).schedule)]

    def recipe(self, run: str, round: int) -> Recipe:
        """The run's recipe as it stands in `round`."""
        return self.settings(*self.segment(run, round))

    def segment(self, run: str, round: int) -> tuple[str, int]:
        """Key in `runs:`, and the round from which the settings of `round` hold."""
        name, _ = self._key(run)
        starts = [s.from_round for s in self.experiment.resolved[name].schedule if s.from_round <= round]
        return name, max(starts, default=0)

    def run_pattern(self) -> str:
        """Regular expression of the run folders that rules may write.

        Another config's run whose files are only read as stored completions is none of them, whatever its name.
        """
        files = {Path(file) for run in self.runs for r in self._starts(run) for file in self.stored_files(run, r)}
        inside = {file.relative_to(self.results).parts[0] for file in files if file.is_relative_to(self.results)}
        others = "|".join(re.escape(f"{name}/") for name in sorted(inside - set(self.runs)))
        return (rf"(?!{others})" if others else "") + r"[A-Za-z0-9][A-Za-z0-9_.]*(-[A-Za-z0-9_.]+)*-s\d+"

    def home(self, run: str, round: int, stage: str) -> str:
        """The run whose folder holds this stage of this round: a fork reuses its parent's files."""
        name, seed = self._key(run)
        fork = self.experiment.resolved[name].fork
        if fork and (round, STAGES.index(stage)) <= (fork.round, STAGES.index(fork.stage)):
            return self.home(f"{fork.run}-s{seed}", round, stage)
        return run

    # ---- paths

    def folder(self, run: str, round: int) -> str:
        return f"{self.results}/{run}/r{round:04d}"

    def prompts_path(self, run: str, split: str) -> str:
        return f"{self.results}/tasks/{self.config_of(run).task}/{split}.parquet"

    def warmup_path(self, run: str) -> str:
        return self.warmup_file(self.config_of(run).warmup, self._key(run)[1])

    def warmup_file(self, warmup: str, seed: int) -> str:
        return f"{self.results}/warmups/{warmup}-s{seed}/policy.json"

    def policy_path(self, run: str, round: int) -> str:
        """policy.json of the policy that has seen `round` rounds of training."""
        if round == 0:
            return self.warmup_path(run)
        return f"{self.folder(self.home(run, round - 1, 'train'), round)}/policy.json"

    def rollout_paths(self, run: str, round: int, pass_number: int) -> list[str]:
        home = self.home(run, round, "rollout")
        shards = self.recipe(home, round).rollout.shards
        folder = self.folder(home, round)
        return [f"{folder}/p{pass_number}/rollouts-{shard:03d}.parquet" for shard in range(shards)]

    def score_home(self, run: str, round: int, scorer: str) -> str:
        """The run whose folder holds a scorer's scores of a round: another than the run itself only for a fork."""
        home = self.home(run, round, "score")
        same = same_scorer(self.recipe(home, round).score, self.recipe(run, round).score, scorer)
        return home if same else run

    def score_paths(self, run: str, round: int, pass_number: int, scorer: str) -> list[str]:
        """A fork takes its parent's scores where both declare the same scorer, and makes its own where not."""
        shards = len(self.rollout_paths(run, round, pass_number))
        folder = self.folder(self.score_home(run, round, scorer), round)
        return [f"{folder}/p{pass_number}/scores/{scorer}-{shard:03d}.parquet" for shard in range(shards)]

    def sampled_as(self, run: str, round: int) -> RolloutConfig:
        """How the rollouts that `run` trains on in `round` were sampled: a fork's first ones as its parent says."""
        return self.recipe(self.home(run, round, "rollout"), round).rollout

    def passes(self, run: str, round: int) -> range:
        return range(self.recipe(self.home(run, round, "rollout"), round).rollout.all_passes)

    def eval_path(self, run: str, round: int) -> str:
        """A fork that evaluates as its parent does reuses the parent's evaluations of the policies they share."""
        owner = run
        while (round > 0 and self.home(owner, round - 1, "train") != owner) or round == 0:
            fork = self.config_of(owner).fork
            if fork is None:
                break
            parent = f"{fork.run}-s{self._key(owner)[1]}"
            if not self._evaluates_alike(owner, parent, round):
                break
            owner = parent
        return f"{self.folder(owner, round)}/evals.parquet"

    def _evaluates_alike(self, run: str, parent: str, round: int) -> bool:
        if round not in self.evaluated_rounds(parent) or self.policy_path(run, round) != self.policy_path(
            parent, round
        ):
            return False
        return self._evaluate_spec(run, round) == self._evaluate_spec(parent, round)

    def evaluated_rounds(self, run: str) -> list[int]:
        config = self.config_of(run)
        return config.evaluate.rounds(config.rounds)

    # ---- targets

    def policies(self, w: Any = None) -> list[str]:
        return [self.policy_path(run, self.config_of(run).rounds) for run in self.runs]

    def all_rollouts(self, w: Any = None) -> list[str]:
        return sorted({path for run, r, p in self._passes_of_all() for path in self.rollout_paths(run, r, p)})

    def all_scores(self, w: Any = None) -> list[str]:
        return sorted(
            {
                path
                for run, r, p in self._passes_of_all()
                for scorer in self.recipe(run, r).score.scorers
                for path in self.score_paths(run, r, p, scorer)
            }
        )

    def all_evals(self, w: Any = None) -> list[str]:
        return sorted({self.eval_path(run, r) for run in self.runs for r in self.evaluated_rounds(run)})

    def all_metrics(self, w: Any = None) -> list[str]:
        return sorted({path for run in self.runs for path in self.metrics_of(run)})

    def metrics_of(self, run: str) -> list[str]:
        """Every metrics file that a run's curves are made of."""
        rounds = range(self.config_of(run).rounds)
        curated = [f"{self.folder(self.home(run, r, 'curate'), r)}/curate.json" for r in rounds]
        trained = [f"{self.folder(self.home(run, r, 'train'), r + 1)}/metrics.json" for r in rounds]
        evaluated = [self.eval_path(run, r).removesuffix(".parquet") + ".json" for r in self.evaluated_rounds(run)]
        others = self.lm_evals.paths(run) + self.teachers.checks(run) + self.discriminators.metrics(run)
        return curated + trained + evaluated + others

    def descriptions(self, w: Any = None) -> list[str]:
        return [f"{self.results}/{run}/run.json" for run in self.runs]

    def tracked(self, w: Any = None) -> list[str]:
        return [f"{self.results}/{run}/tracked.json" for run in self.runs] if self.experiment.mlflow.enabled else []

    @cached_property
    def made_rollouts(self) -> set[str]:
        """Every rollout file that some job of this config writes."""
        return set(self.all_rollouts())

    @cached_property
    def made_by_place(self) -> dict[str, str]:
        return {os.path.abspath(file): file for file in self.made_rollouts}

    def _passes_of_all(self) -> list[tuple[str, int, int]]:
        return [
            (run, r, p) for run in self.runs for r in range(self.config_of(run).rounds) for p in self.passes(run, r)
        ]

    # ---- inputs of the rules

    def task_files(self, w: Any) -> list[str]:
        """Local files that a task is read from, so that editing them prepares it anew; missing ones are the stage's."""
        task = _known(self.experiment.tasks, w.task, "tasks")
        sources = [source for source in (task.source, task.heldout_source) if source is not None]
        paths = [source.path for source in sources if source.kind in ("jsonl", "parquet")]
        return [path for path in paths if Path(path).exists()]

    def warmup_prompts(self, w: Any) -> list[str]:
        task = self.experiment.warmups[w.warmup].task
        return [f"{self.results}/tasks/{task}/train.parquet"] if task else []

    def train_prompts(self, w: Any) -> str:
        return self.prompts_path(w.run, "train")

    def heldout_prompts(self, w: Any) -> str:
        return self.prompts_path(w.run, "heldout")

    def rollout_policy(self, w: Any) -> str:
        return self.policy_path(w.run, self.policy_round(w.run, int(w.round)))

    def stored_rollouts(self, w: Any) -> list[str]:
        return self.stored_files(w.run, int(w.round))

    def earlier_rollouts(self, w: Any) -> list[str]:
        earlier = range(int(w.p))
        return [path for p in earlier for path in self.rollout_paths(w.run, int(w.round), p)]

    def earlier_scores(self, w: Any) -> list[str]:
        if not int(w.p):
            return []
        derived = self.derived.scorers(w)
        scorers = self.refill(w.run, int(w.round))[0].scorers if derived is None else derived.scorers
        return [
            path for p in range(int(w.p)) for name in scorers for path in self.score_paths(w.run, int(w.round), p, name)
        ]

    def refill_sql(self, w: Any) -> list[str]:
        if (derived := self.derived.sql(w)) is not None:
            return [*self._sql_files(w.run, int(w.round), ("reward",)), derived]
        return self._sql_files(w.run, int(w.round), ("reward", "filter")) if int(w.p) else []

    def scored_rollouts(self, w: Any) -> str:
        return self.rollout_paths(w.run, int(w.round), int(w.p))[int(w.shard)]

    def needed_scores(self, w: Any) -> list[str]:
        needs = self.recipe(w.run, int(w.round)).score.scorers[w.scorer].needs
        return [self.score_paths(w.run, int(w.round), int(w.p), need)[int(w.shard)] for need in needs]

    def scorer_files(self, w: Any) -> list[str]:
        """The user's own scorer file, or the local folder of a reward model: editing them reruns the scores."""
        scorer = self.recipe(w.run, int(w.round)).score.scorers[w.scorer]
        if isinstance(scorer, PythonScorer) and ".py:" in scorer.function:
            return [scorer.function.rsplit(":", 1)[0]]
        if scorer.kind == "reward_model" and scorer.name is not None:
            return model_files(scorer.name)
        return self.teachers.files(scorer)

    def scoring_reward_model(self, w: Any) -> list[str]:
        scorer = self.recipe(w.run, int(w.round)).score.scorers[w.scorer]
        return self.reward_models.applied_by(scorer) + self.discriminators.applied_by(w.run, int(w.round), w.scorer)

    def scores_with_a_model(self, w: Any) -> bool:
        """Whether the scorer runs a model, which takes a GPU where there is one."""
        return self.recipe(w.run, int(w.round)).score.scorers[w.scorer].kind in MODEL_SCORERS

    def batch_rollouts(self, w: Any) -> list[str]:
        """This round's rollouts and those of the rounds that are replayed, oldest first."""
        return [path for r, p in self._batch_passes(w) for path in self.rollout_paths(w.run, r, p)]

    def batch_scores(self, w: Any) -> list[str]:
        return [
            path
            for r, p in self._batch_passes(w)
            for name in self.curated_score(w.run, int(w.round)).scorers
            for path in self.score_paths(w.run, r, p, name)
        ]

    def _batch_passes(self, w: Any) -> list[tuple[int, int]]:
        return [(r, p) for r in self.batch_rounds(w.run, int(w.round)) for p in self.passes(w.run, r)]

    def batch_rounds(self, run: str, round: int) -> range:
        """Rounds whose rollouts the batch of `round` may hold, oldest first: those replayed, and the round itself."""
        replay = self.recipe(self.home(run, round, "curate"), round).curate.replay
        return range(max(0, round - replay), round + 1)

    def curate_sql(self, w: Any) -> list[str]:
        return self._sql_files(w.run, int(w.round), CURATE_STEPS)

    def batch(self, w: Any) -> str:
        r = int(w.next) - 1
        return f"{self.folder(self.home(w.run, r, 'curate'), r)}/batch.parquet"

    def trained_rollouts(self, w: Any) -> list[str]:
        r = int(w.next) - 1
        return self.batch_rollouts(SimpleNamespace(run=self.home(w.run, r, "curate"), round=r))

    def train_policy(self, w: Any) -> str:
        return self.policy_path(w.run, int(w.next) - 1)

    def reference_policy(self, w: Any) -> list[str]:
        synced = self.teachers.synced(w.run, int(w.next) - 1)
        needed = self.recipe(w.run, int(w.next) - 1).train.needs_reference()
        return synced or ([self.warmup_path(w.run)] if needed else [])

    def evaluated_policy(self, w: Any) -> str:
        return self.policy_path(w.run, int(w.round))

    def evaluating_reward_model(self, w: Any) -> list[str]:
        return self.reward_models.applied_by(self.correctness(w.run, int(w.round))[1])

    def run_metrics(self, w: Any) -> list[str]:
        return self.metrics_of(w.run)

    def policy_round(self, run: str, round: int) -> int:
        """Round of the policy that the rollouts of `round` need; stored ones need the first one's tokenizer only."""
        if isinstance(self.recipe(run, round).rollout.engine, StoredEngine):
            return 0
        return max(0, round - self.config_of(run).lag)

    def stored_files(self, run: str, round: int) -> list[str]:
        """Files whose completions a round takes instead of sampling."""
        engine = self.recipe(run, round).rollout.engine
        files = engine.files if isinstance(engine, StoredEngine) else []
        named = [file.replace("{seed}", str(self._key(run)[1])) for file in files]
        # However a file that some job writes is spelled, it is that job's output.
        return [self.made_by_place.get(os.path.abspath(file), file) for file in named]

    def curated_score(self, run: str, round: int) -> ScoreConfig:
        """The scorers that curation reads: those of the reward, of correctness, and those that the method's SQL names.

        Others are recorded only, and adding them replans nothing but their own scores.
        """
        return self._curated_score(*self.segment(run, round))

    def refill(self, run: str, round: int) -> tuple[ScoreConfig, CurateConfig]:
        """What decides how many groups a later pass samples: the steps up to the filter, and the scorers they read."""
        return self._refill(*self.segment(run, round))

    def _used_scorers(self, name: str, segment: int) -> ScoreConfig:
        from rollway import curation

        recipe = self.settings(name, segment)
        given = curation.given_values(recipe.curate, round=segment, seed=0)
        return curation.scorers_read(recipe.score, recipe.curate, given)

    def _until_filter(self, name: str, segment: int) -> tuple[ScoreConfig, CurateConfig]:
        from rollway import curation

        recipe = self.settings(name, segment)
        steps = CurateConfig(reward=recipe.curate.reward, filter=recipe.curate.filter)
        if curation.takes_progress(steps):
            steps = steps.model_copy(update={"horizon": recipe.curate.horizon})
        given = curation.given_values(steps, round=segment, seed=0)
        return curation.scorers_read(recipe.score, steps, given), steps

    def _sql_files(self, run: str, round: int, steps: tuple[str, ...]) -> list[str]:
        curate = self.recipe(run, round).curate
        parts = [(step, getattr(curate, step)) for step in steps]
        return [relative(find("sql", part.sql, ".sql", STEP_FOLDERS[step])) for step, part in parts if part]

    # ---- specs

    def prepare_spec(self, w: Any) -> str:
        task = _known(self.experiment.tasks, w.task, "tasks")
        return specs.dump(specs.PrepareSpec(version=STAGE_VERSION["prepare"], name=w.task, task=task))

    def warmup_spec(self, w: Any) -> str:
        warmup = _known(self.experiment.warmups, w.warmup, "warmups")
        return specs.dump(specs.WarmupSpec(version=STAGE_VERSION["warmup"], warmup=warmup, seed=int(w.seed)))

    def rollout_spec(self, w: Any) -> str:
        round, pass_number = int(w.round), int(w.p)
        recipe = self.recipe(w.run, round)
        if (derived := self.derived.spec(w)) is not None:
            return specs.dump(derived)
        refills: dict[str, Any] = {}
        # The most passes there may be decides nothing that a pass writes, nor does what is derived of it.
        only: dict[str, Any] = {"passes": 2} if pass_number else {"passes": 1, "refill": None}
        only["derive"] = []
        if isinstance(recipe.rollout.engine, StoredEngine):
            # How evaluation samples, and at which temperature the trainer reads, is no part of stored completions.
            only["sampling"] = Sampling()
        if pass_number:
            score, steps = self.refill(w.run, round)
            refills = {"score": score, "reward": steps.reward, "filter": steps.filter, "horizon": steps.horizon}
        spec = specs.RolloutSpec(
            version=STAGE_VERSION["rollout"],
            seed=self._key(w.run)[1],
            round=round,
            pass_number=pass_number,
            policy_round=self.policy_round(w.run, round),
            shard=int(w.shard),
            rollout=recipe.rollout.model_copy(update=only),
            teacher=self.teachers.mixed_stored(w),
            **refills,
        )
        return specs.dump(spec)

    def score_spec(self, w: Any) -> str:
        known = self.recipe(w.run, int(w.round)).score.scorers
        config = unchecked(_known(known, w.scorer, f"score.scorers of {w.run}"))
        read = {"trained": next(iter(self.scoring_reward_model(w)), None), **self.teachers.read(w)}
        return specs.dump(specs.ScoreSpec(version=STAGE_VERSION["score"], scorer=w.scorer, config=config, **read))

    def curate_spec(self, w: Any) -> str:
        recipe = self.recipe(w.run, int(w.round))
        spec = specs.CurateSpec(
            version=STAGE_VERSION["curate"],
            seed=self._key(w.run)[1],
            round=int(w.round),
            score=self.curated_score(w.run, int(w.round)),
            curate=recipe.curate,
            teacher_columns=sorted(recipe.train.reads_teacher()),
        )
        return specs.dump(spec)

    def train_spec(self, w: Any) -> str:
        round = int(w.next) - 1
        recipe, fork = self.recipe(w.run, round), self.config_of(w.run).fork
        spec = specs.TrainSpec(
            version=STAGE_VERSION["train"],
            seed=self._key(w.run)[1],
            round=round,
            temperature=self.sampled_as(w.run, round).sampling.temperature,
            train=recipe.train.unchecked(),
            fresh=fork is not None and fork.begins_anew(round),
            **self.teachers.named(w),
        )
        return specs.dump(spec)

    def evaluate_spec(self, w: Any) -> str:
        return self._evaluate_spec(w.run, int(w.round))

    def _evaluate_spec(self, run: str, round: int) -> str:
        config = self.config_of(run)
        recipe = self.recipe(run, min(round, config.rounds - 1))
        engine = recipe.rollout.engine
        name, scorer = self.correctness(run, round)
        spec = specs.EvaluateSpec(
            version=STAGE_VERSION["evaluate"],
            seed=self._key(run)[1],
            round=round,
            evaluate=config.evaluate.model_copy(update={"every": 1}),
            max_tokens=recipe.rollout.sampling.max_tokens,
            stop=recipe.rollout.sampling.stop,
            engine=TransformersEngine() if isinstance(engine, StoredEngine) else engine,
            scorer_name=name,
            scorer=scorer,
            threshold=recipe.score.threshold,
            trained=next(iter(self.reward_models.applied_by(scorer)), None),
        )
        return specs.dump(spec)

    def correctness(self, run: str, round: int) -> tuple[str, Scorer]:
        """The scorer that says what is right when the policy of `round` is evaluated."""
        score = self.recipe(run, min(round, self.config_of(run).rounds - 1)).score
        if score.correct is None:
            raise ConfigError(f"runs of {run}: evaluation needs score.correct, the scorer that says what is right")
        return score.correct, score.scorers[score.correct]

    def describe_spec(self, w: Any) -> str:
        config = self.config_of(w.run)
        settings = config.model_dump_json(by_alias=True)
        info = run_info(*self._key(w.run), config, self.experiment.warmups.get(config.warmup))
        spec = specs.DescribeSpec(version=STAGE_VERSION["describe"], info=info, settings=settings)
        return specs.dump(spec)

    def catalog_spec(self, w: Any) -> str:
        return specs.dump(specs.CatalogSpec(version=STAGE_VERSION["catalog"]))

    def track_spec(self, w: Any) -> str:
        place, project = self.experiment.mlflow.model_dump(exclude={"enabled"}), self.experiment.project
        return specs.dump(specs.TrackSpec(version=STAGE_VERSION["track"], run=w.run, project=project, **place))

    def report_spec(self, w: Any) -> str:
        return specs.dump(specs.ReportSpec(version=STAGE_VERSION["report"], project=self.experiment.project))


def _known(mapping: dict[str, Any], name: str, place: str) -> Any:
    if name not in mapping:
        raise ConfigError(f"{name!r} is not in {place}; it has {', '.join(mapping)}")
    return mapping[name]
